"""Stable Diffusion with random weights, on disk as diffusers keeps it: loaded, asked, refused."""

import dataclasses
import importlib.util
import shutil

import numpy as np
import pytest

from memdiff.errors import ConfigError, DataError
from memdiff.synthesis.text_to_image import backends
from memdiff.synthesis.text_to_image.backends import TextToImageConfig
from memdiff.synthesis.text_to_image.tuning import TuningConfig
from tests.synthesis.text_to_image import tiny_diffusers

needs_diffusers = pytest.mark.skipif(
  importlib.util.find_spec("diffusers") is None or importlib.util.find_spec("torch") is None,
  reason="diffusers is not installed (requirements-text-to-image-torch.txt)",
)
pytestmark = pytest.mark.filterwarnings("ignore")  # of PyTorch and transformers
PROMPTS, SEEDS = ("a red bird", "a cat", "a red cat"), (3, 4, 5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  return tiny_diffusers.write(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.fixture(scope="module")
def config(saved):
  return TextToImageConfig(model=saved, num_steps=3, batch_size=2, dtype="float32")


@pytest.fixture(scope="module")
def backend(config):
  return backends.load(config)


@pytest.fixture(scope="module")
def images(backend):
  return backend.generate(PROMPTS, "", SEEDS, 4.0)


def differ(first, second):
  return np.abs(first.astype(int) - second).max()


@needs_diffusers
def test_the_same_seed_gives_the_same_image_whatever_is_beside_it(backend, images):
  assert images.shape == (3, tiny_diffusers.SIDE, tiny_diffusers.SIDE, 3)
  assert images.dtype == np.uint8 and images.std() > 5
  alone = backend.generate(PROMPTS[1:2], "", SEEDS[1:2], 4.0)
  assert differ(alone[0], images[1]) <= 1  # sums in another order
  assert differ(backend.generate(PROMPTS[1:2], "", (9,), 4.0)[0], images[1]) > 10


@needs_diffusers
def test_it_draws_what_the_library_itself_draws(backend, images):
  import torch

  noise = [torch.Generator().manual_seed(seed) for seed in SEEDS[:2]]
  theirs = backend.pipeline(
    list(PROMPTS[:2]), negative_prompt=["", ""], generator=noise, guidance_scale=4.0,
    num_inference_steps=3,
  ).images  # fmt: skip
  assert differ(np.stack([np.asarray(image) for image in theirs]), images[:2]) <= 1


@needs_diffusers
def test_prompt_guidance_side_and_what_is_not_to_be_shown_change_the_image(backend, images, config):
  for changed in (
    backend.generate(("a cat",), "", SEEDS[:1], 4.0),
    backend.generate(PROMPTS[:1], "a cat", SEEDS[:1], 4.0),
    backend.generate(PROMPTS[:1], "", SEEDS[:1], 1.0),
  ):
    assert differ(changed[0], images[0]) > 1
  smaller = backends.load(dataclasses.replace(config, side=16))
  assert smaller.generate(PROMPTS[:1], "", SEEDS[:1], 4.0).shape == (1, 16, 16, 3)


@needs_diffusers
def test_a_model_that_is_read_again_draws_the_same(config, images):
  again = backends.load(config).generate(PROMPTS, "", SEEDS, 4.0)
  np.testing.assert_array_equal(again, images)


@needs_diffusers
def test_long_prompts_are_named(backend):
  long = " ".join(["bird"] * tiny_diffusers.LENGTH)
  assert backend.too_long([*PROMPTS, long]) == [long]


@needs_diffusers
def test_too_little_memory_is_one_sentence(backend, monkeypatch):
  import torch

  def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")

  broken = dataclasses.replace(backend, pipeline=full)
  with pytest.raises(ConfigError, match="memory than there is for 2 images at a time; lower"):
    broken.generate(PROMPTS, "", SEEDS, 4.0)


@needs_diffusers
def test_a_torn_model_is_one_sentence(saved, config, tmp_path):
  place = tmp_path / "model"
  shutil.copytree(saved, place)
  next((place / "unet").glob("*.safetensors")).write_bytes(b"torn")
  with pytest.raises(DataError, match="Cannot read the text-to-image model in") as caught:
    backends.load(dataclasses.replace(config, model=str(place)))
  assert "\n" not in str(caught.value)


@needs_diffusers
def test_a_model_that_takes_no_prompts_is_refused(config, tmp_path):
  import diffusers

  unet = diffusers.UNet2DModel(
    sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), norm_num_groups=4,
    up_block_types=("UpBlock2D",), layers_per_block=1,
  )  # fmt: skip
  diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(str(tmp_path / "ddpm"))
  with pytest.raises(DataError, match=r"a DDPMPipeline, which takes no prompt and no negative"):
    backends.load(dataclasses.replace(config, model=str(tmp_path / "ddpm")))


@needs_diffusers
def test_models_of_diffusers_are_not_tuned(tmp_path):
  (tmp_path / "model_index.json").write_text("{}")
  config = TextToImageConfig(model=str(tmp_path), tuning=TuningConfig("lora"))
  with pytest.raises(ConfigError, match="models of diffusers are not tuned here"):
    backends.load(config)


def test_a_folder_of_neither_library_is_refused(tmp_path):
  with pytest.raises(DataError, match=r"holds no task\.json .* no model_index\.json .* licence"):
    backends.load(TextToImageConfig(model=str(tmp_path)))
