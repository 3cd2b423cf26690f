"""Stable Diffusion 3 with random weights, on disk as KerasHub keeps it: loaded, asked, refused."""

import dataclasses
import functools
import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.errors import ConfigError, DataError
from memdiff.runtime import mesh as mesh_lib
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


# --- tuning ----------------------------------------------------------------------------------

WORDS = {"zwx": "red bird", "sks": "cat"}
LORA, INVERSION = "lora", "textual_inversion"
TUNED = (LORA, "dreambooth", "custom_diffusion", INVERSION)


def settings(method):
  rate = 0.3 if method == INVERSION else 1e-2
  optimizer = OptimizerConfig(
    name="adamw", learning_rate=rate, schedule="constant", milestones=(), factors=(), warmup=0.0,
    weight_decay=0.0,
  )  # fmt: skip
  return TuningConfig(method, rank=2, num_steps=40, batch_size=4, optimizer=optimizer)


@pytest.fixture(scope="module")
def examples():
  rng = np.random.default_rng(0)
  shape = (6, 8, 8, 3)  # enlarged to what the model draws
  images = rng.integers(0, 60, shape).astype(np.uint8)
  images[3:] += 180
  return Examples(images, np.repeat([4, 7], 3), ["a zwx red bird"] * 3 + ["a sks"] * 3, WORDS)


@pytest.fixture(scope="module")
def tune(config, examples, mesh, tmp_path_factory):
  """method -> (variables by path before it, the backend after it, its folder)."""

  @functools.cache
  def tuned(method):
    folder = tmp_path_factory.mktemp("tuning")
    backend = backends.load(config)
    before = values_of(backend)
    prior = Examples(examples.images[::-1].copy(), examples.labels, examples.prompts)
    backend.tune(settings(method), examples, prior, make_run(mesh, (0,), 10), folder)
    return before, backend, folder

  return tuned


def values_of(backend):
  return {v.path: np.array(v.value) for v in backend.task.backbone.variables}


def moved_by(before, backend):
  """{path: where a variable that was there before is another}."""
  after = values_of(backend)
  return {path: after[path] != old for path, old in before.items() if (after[path] != old).any()}


def test_lora_is_in_the_diffuser_and_nowhere_else(tune):
  before, backend, _ = tune(LORA)
  added = {v.path for v in backend.task.backbone.variables} - before.keys()
  inside = {v.path for v in backend.task.backbone.diffuser.variables}
  assert len(added) > 8 and all("lora" in path for path in added) and added <= inside
  assert not moved_by(before, backend)


def test_dreambooth_trains_the_diffuser_and_leaves_a_model_of_the_library(tune, config, mesh):
  before, backend, folder = tune("dreambooth")
  inside = {v.path for v in backend.task.backbone.diffuser.variables}
  moved = moved_by(before, backend).keys()
  assert moved <= inside and len(moved) > 0.8 * len(inside)
  saved = backends.load(dataclasses.replace(config, model=str(folder / "model")))
  drawn, again = (b.generate(PROMPTS, "", SEEDS, 4.0) for b in (backend, saved))
  np.testing.assert_array_equal(again, drawn)


def rows_of_words(backend):
  tokenizer = backend.task.preprocessor.clip_l_preprocessor.tokenizer
  return sorted(int(tokenizer(word)[0]) for word in WORDS)


def test_textual_inversion_moves_the_vectors_of_its_words_alone(tune):
  before, backend, _ = tune(INVERSION)
  moved = moved_by(before, backend)
  assert len(moved) == 2  # of both CLIPs
  for path, where in moved.items():
    assert "token_embedding" in path
    assert np.flatnonzero(where.any(axis=1)).tolist() == rows_of_words(backend)


def test_custom_diffusion_trains_words_and_what_the_text_is_attended_by(tune):
  before, backend, _ = tune("custom_diffusion")
  moved = moved_by(before, backend)
  tables = {path for path in moved if "token_embedding" in path}
  attended = moved.keys() - tables
  assert len(tables) == 2 and attended
  for path in attended:
    assert "context_block/attention_qkv" in path
    where = moved[path]
    third = where.shape[-1] // 3
    assert not where[..., :third].any()  # queries
    assert where[..., 2 * third :].any()


def test_words_of_an_inversion_begin_as_the_names_of_their_classes(config):
  backend = backends.load(config)
  before = values_of(backend)
  keras_hub_tuning.select(backend.task, settings(INVERSION), WORDS)
  tokenizer = backend.task.preprocessor.clip_l_preprocessor.tokenizer
  table = backend.task.backbone.clip_l.embedding.token_embedding.embeddings
  for word, name in WORDS.items():
    expected = before[table.path][np.asarray(tokenizer(name))].mean(axis=0)
    found = np.asarray(table.value)[int(tokenizer(word)[0])]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("method", TUNED)
def test_its_loss_falls(tune, method):
  folder = tune(method)[2]
  lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  name = "loss" if method == INVERSION else "real"
  losses = [np.mean(r["metrics"][name]) for r in map(json.loads, lines) if r["kind"] == "train"]
  assert losses[-1] < losses[0] * (0.99 if method == INVERSION else 0.9)
  assert method == INVERSION or "prior" in lines[0]


@pytest.mark.parametrize("method", TUNED)
def test_a_tuned_model_draws_other_images_and_its_file_the_same(tune, config, examples, images,
                                                                method):  # fmt: skip
  _, backend, folder = tune(method)
  said = ("a zwx", *PROMPTS[1:])
  drawn = backend.generate(said, "", SEEDS, 4.0)
  assert not np.array_equal(drawn[0], backends.load(config).generate(said, "", SEEDS, 4.0)[0])
  if method == INVERSION:
    np.testing.assert_array_equal(drawn[1:], images[1:])
  fresh = backends.load(config)
  run = make_run(mesh_lib.make_mesh(), (0,), 10)
  fresh.tune(settings(method), examples, None, run, folder)  # reads the result, trains nothing
  np.testing.assert_array_equal(fresh.generate(said, "", SEEDS, 4.0), drawn)


def test_rare_words_are_tokens_of_their_own_that_nothing_else_uses(backend):
  assert backend.words(2, ()) == ["zwx", "sks"]
  assert backend.words(3, ("a red sks",)) == ["zwx", "cat", "bird"]
  with pytest.raises(ConfigError, match=r"only 5 rare words, but there are 9 classes .* to lora"):
    backend.words(9, ())


def test_the_objective_is_that_of_a_flow(config, examples):
  """The error of one step against the formula by hand, with the library's own diffuser."""
  task = backends.load(config).task
  backbone = task.backbone
  trained = keras_hub_tuning.select(task, settings("custom_diffusion"), WORDS)
  kept = list(backbone.variables)
  told = keras_hub_tuning._told(task, examples)
  tokens = {name: ids[told.prompt[:2]] for name, ids in told.tokens.items()}
  error = keras_hub_tuning._flow_error(backbone, trained, kept)
  params = {name: part.begin() for name, part in trained.items()}
  key, latents = jax.random.key(3), told.latents[:2]
  found = error(params, [v.value for v in kept], latents, tokens, key)
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
