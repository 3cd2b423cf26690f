"""Stable Diffusion 3 with random weights, on disk as KerasHub keeps it: loaded, asked, refused."""

import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest

from memdiff.errors import DataError
from memdiff.synthesis.text_to_image import backends
from memdiff.synthesis.text_to_image.backends import TextToImageConfig
from tests.synthesis.text_to_image import tiny_sd3

pytestmark = [
  pytest.mark.skipif(
    importlib.util.find_spec("keras_hub") is None,
    reason="keras-hub is not installed (requirements-text-to-image.txt)",
  ),
  pytest.mark.filterwarnings("ignore"),  # of Keras and TensorFlow
]
PROMPTS, SEEDS = ("a red bird", "a cat", "a red cat"), (3, 4, 5)


@pytest.fixture(scope="module", autouse=True)
def as_keras_computes():
  with jax.numpy_rank_promotion("allow"):
    yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  return tiny_sd3.write(tmp_path_factory.mktemp("tiny") / "sd3")


@pytest.fixture(scope="module")
def config(saved):
  return TextToImageConfig(model=saved, num_steps=3, batch_size=2, dtype="float32")


@pytest.fixture(scope="module")
def backend(config):
  return backends.load(config)


@pytest.fixture(scope="module")
def images(backend):
  return backend.generate(PROMPTS, "", SEEDS, 4.0)


def test_the_same_seed_gives_the_same_image_whatever_is_beside_it(backend, images):
  assert images.shape == (3, tiny_sd3.SIDE, tiny_sd3.SIDE, 3) and images.dtype == np.uint8
  alone = backend.generate(PROMPTS[1:2], "", SEEDS[1:2], 4.0)
  assert np.abs(alone[0].astype(int) - images[1]).max() <= 1  # sums in another order
  other = backend.generate(PROMPTS[1:2], "", (9,), 4.0)
  assert np.abs(other[0].astype(int) - images[1]).max() > 10


def test_it_draws_what_the_library_itself_draws(backend, images):
  """The same noise through the library's own `generate`."""
  from keras import random

  latents = []
  draw = backend.task.make_generate_function()
  backend.task.generate_function = lambda noise, *rest: latents.append(noise) or draw(noise, *rest)
  try:
    theirs = backend.task.generate({"prompts": list(PROMPTS[:2])}, 3, 4.0, seed=0)
  finally:
    backend.task.generate_function = draw
  expected = random.normal((2, *backend.task.latent_shape[1:]), seed=0)
  np.testing.assert_array_equal(latents[0], expected)
  tokens = [
    backend.task.preprocessor.generate_preprocess(list(texts)) for texts in (PROMPTS[:2], ("", ""))
  ]
  ours = np.asarray(draw(expected, tuple(tokens), 3, np.float32(4.0)))
  np.testing.assert_allclose(np.clip((ours + 1) * 127.5, 0, 255), theirs, atol=0.51)


def test_prompt_guidance_and_what_is_not_to_be_shown_change_the_image(backend, images):
  for changed in (
    backend.generate(("a cat",), "", SEEDS[:1], 4.0),
    backend.generate(PROMPTS[:1], "a cat", SEEDS[:1], 4.0),
    backend.generate(PROMPTS[:1], "", SEEDS[:1], 1.0),
  ):
    assert not np.array_equal(changed[0], images[0])


def test_a_model_that_is_read_again_draws_the_same(config, images):
  again = backends.load(config).generate(PROMPTS, "", SEEDS, 4.0)
  np.testing.assert_array_equal(again, images)


def test_long_prompts_are_named(backend):
  long = " ".join(["bird"] * tiny_sd3.LENGTH)
  assert backend.too_long([*PROMPTS, long]) == [long]


@pytest.mark.parametrize(
  ("spoil", "words"),
  [
    (lambda p: shutil.rmtree(p), "holds no task.json"),
    (lambda p: (p / "task.json").write_text("{"), "Cannot read the text-to-image model"),
    (lambda p: (p / "model.weights.h5").write_bytes(b"torn"), "Cannot read the text-to-image"),
    (
      lambda p: (p / "task.json").write_text(
        json.dumps({"module": "keras", "class_name": "Dense", "config": {}})
      ),
      "Cannot read the text-to-image model",
    ),
  ],
)
def test_a_model_that_cannot_be_read_is_one_sentence(saved, tmp_path, spoil, words):
  place = tmp_path / "model"
  shutil.copytree(saved, place)
  spoil(place)
  with pytest.raises(DataError) as caught:
    backends.load(TextToImageConfig(model=str(place), dtype="float32"))
  assert words in str(caught.value) and "\n" not in str(caught.value)
