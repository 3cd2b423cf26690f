"""Stable Diffusion 3 with random weights, on disk as KerasHub keeps it: loaded, asked, refused."""

import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.errors import DataError
from memdiff.runtime.random import stream
from memdiff.runtime.train_state import OptimizerConfig
from memdiff.synthesis.text_to_image import backends, keras_hub_tuning
from memdiff.synthesis.text_to_image.backends import TextToImageConfig
from memdiff.synthesis.text_to_image.tuning import Examples, TuningConfig
from tests.support import make_run
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


# --- LoRA ------------------------------------------------------------------------------------

TUNING = TuningConfig(
  rank=2,
  num_steps=40,
  batch_size=4,
  optimizer=OptimizerConfig(
    name="adamw", learning_rate=1e-2, schedule="constant", milestones=(), factors=(), warmup=0.0
  ),
)


@pytest.fixture(scope="module")
def examples():
  rng = np.random.default_rng(0)
  shape = (6, 8, 8, 3)  # enlarged to what the model draws
  images = rng.integers(0, 60, shape).astype(np.uint8)
  images[3:] += 180
  return Examples(images, np.repeat([4, 7], 3), ["a red bird"] * 3 + ["a cat"] * 3)


@pytest.fixture(scope="module")
def tuned(config, examples, mesh, tmp_path_factory):
  folder = tmp_path_factory.mktemp("tuning")
  backend = backends.load(config)
  prior = Examples(examples.images[::-1].copy(), examples.labels, examples.prompts)
  backend.tune(TUNING, examples, prior, make_run(mesh, (0,), 10), folder)
  return backend, folder


def test_lora_is_in_the_diffuser_and_nowhere_else(tuned):
  backbone = tuned[0].task.backbone
  added = [v.path for v in backbone.variables if "lora" in v.path]
  assert len(keras_hub_tuning.adapted(backbone)) == len(added) > 8


def test_its_loss_falls(tuned):
  lines = (tuned[1] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  losses = [
    np.mean(record["metrics"]["real"])
    for record in map(json.loads, lines)
    if record["kind"] == "train"
  ]
  assert losses[-1] < 0.9 * losses[0]


def test_a_tuned_model_draws_other_images_and_its_file_the_same(tuned, config, examples, images):
  backend, folder = tuned
  drawn = backend.generate(PROMPTS, "", SEEDS, 4.0)
  assert not np.array_equal(drawn, images)
  fresh = backends.load(config)
  fresh.tune(TUNING, examples, None, None, folder)  # reads the file, trains nothing
  np.testing.assert_array_equal(fresh.generate(PROMPTS, "", SEEDS, 4.0), drawn)


def test_the_objective_is_that_of_a_flow(tuned, examples):
  """The error of one step against the formula by hand, with the library's own diffuser."""
  backbone = tuned[0].task.backbone
  trained = keras_hub_tuning.adapted(backbone)
  known = {id(v) for v in trained.values()}
  frozen = [v for v in backbone.variables if id(v) not in known]
  told = keras_hub_tuning._told(tuned[0].task, examples)
  tokens = {name: ids[told.prompt[:2]] for name, ids in told.tokens.items()}
  error = keras_hub_tuning._flow_error(backbone, trained, frozen)
  params = {name: np.asarray(v.value) for name, v in trained.items()}
  key, latents = jax.random.key(3), told.latents[:2]
  found = error(params, [v.value for v in frozen], latents, tokens, key)
  noise = np.asarray(jax.random.normal(stream(key, "noise"), latents.shape))
  sigma = 1 / (1 + np.exp(-np.asarray(jax.random.normal(stream(key, "time"), (2,)))))
  share = sigma[:, None, None, None]
  embeddings = backbone.encode_text_step(tokens, tokens)
  velocity = backbone.diffuser({
    "latent": jnp.asarray((1 - share) * latents + share * noise), "context": embeddings[0],
    "pooled_projection": embeddings[2], "timestep": jnp.asarray(1000 * sigma),
  })  # fmt: skip
  expected = np.mean((np.asarray(velocity) - (noise - latents)) ** 2)
  np.testing.assert_allclose(found, expected, rtol=1e-4)


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
