"""Tuning of a trained U-Net: what moves, what stays, and what comes of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from memdiff.runtime import loop, results
from memdiff.synthesis import image_methods, pixel_data, pixel_diffusion, pixel_tuning
from memdiff.synthesis.pixel_memory import PixelMemoryConfig
from memdiff.synthesis.pixel_settings import PixelDiffusionConfig
from memdiff.synthesis.pixel_text import PixelTextConfig
from memdiff.synthesis.pixel_tuning import CONDITIONS, LORA, SENTENCES, PixelTuningConfig
from tests.support import SLOW, TINY_UNET, make_run

COUNTS, SIDE, WIDTH = np.array([40, 15, 5]), 8, 6
LABELS = np.repeat(np.arange(3), COUNTS)
SEEDS = (0, 1)
CONFIG = PixelDiffusionConfig(
  unet=dataclasses.replace(TINY_UNET, dropout=0.0),
  batch_size=24,
  num_steps=40,
  label_dropout=0.2,
  mirror=False,
  text=PixelTextConfig(is_read=True),
  memory=PixelMemoryConfig(is_shown=True, num_exemplars=2),
  tuning=PixelTuningConfig(num_steps=60, learning_rate=3e-2, rank=2),
)


@pytest.fixture(scope="module")
def data(mesh):
  rng = np.random.default_rng(0)
  base = np.array([40, 120, 220])[LABELS][:, None, None, None]
  images = np.clip(base + rng.integers(-20, 20, (60, SIDE, SIDE, 1)), 0, 255).astype(np.uint8)
  captions = rng.normal(size=(60, WIDTH)).astype(np.float32)
  captions /= np.linalg.norm(captions, axis=1, keepdims=True)
  return pixel_data.make_data(images, LABELS, 3, mesh, captions)


@pytest.fixture(scope="module", params=SLOW)
def base(mesh, data, tmp_path_factory):
  """Parameters of U-Nets after a short training, seeds first."""
  folder = tmp_path_factory.mktemp("base")
  stage = pixel_diffusion.make_stage(CONFIG, data, COUNTS, mesh)
  loop.train(stage, make_run(mesh, SEEDS, 20), folder)
  return results.load(folder, mesh).ema_params


def beginning(base, kind):
  """What is tuned of a kind; sentences begin as nothing."""
  return base | ({SENTENCES: jnp.zeros((len(SEEDS), 3, WIDTH))} if kind == SENTENCES else {})


@pytest.fixture(scope="module")
def tune(mesh, data, base, tmp_path_factory):
  """kind -> (what is added at the beginning, at the end), seeds first."""

  @functools.cache
  def tuned(kind):
    stage = pixel_diffusion.make_tuning_stage(
      CONFIG, kind, beginning(base, kind), data, COUNTS, mesh
    )
    keys = make_run(mesh, SEEDS, 20).keys("tuning")
    first = jax.jit(jax.vmap(stage.init))(keys, stage.per_seed).params
    folder = tmp_path_factory.mktemp(kind)
    loop.train(stage, make_run(mesh, SEEDS, 20), folder)
    return first, results.load(folder, mesh).ema_params

  return tuned


def names(tree):
  return set(traverse_util.flatten_dict(tree, sep="/"))


def merged(kind, base, added):
  return pixel_tuning.KINDS[kind](CONFIG.tuning).merged(beginning(base, kind), added)


def equal(first, second):
  return all(jax.tree.leaves(jax.tree.map(np.array_equal, first, second)))


def test_each_kind_trains_what_its_paper_trains(tune):
  kernels = {name.rsplit("/", 1)[0] for name in names(tune(LORA)[1])}
  assert {name.rsplit("/", 2)[1] for name in kernels} == {"query", "key", "value", "out"}
  assert any(name.startswith("attend_") for name in kernels)
  conditions = names(tune(CONDITIONS)[1])
  assert {name.split("/")[0].split("_")[0] for name in conditions} == {"label", "sentence", "look"}
  assert {n.split("/")[1] for n in conditions if n.startswith("look")} == {"key", "value"}
  assert names(tune(SENTENCES)[1]) == {SENTENCES}


@pytest.mark.parametrize("kind", pixel_tuning.KINDS)
def test_tuning_begins_from_the_trained_u_net(base, tune, kind):
  first, _ = tune(kind)
  for seed in range(len(SEEDS)):
    one = jax.tree.map(lambda x, seed=seed: x[seed], (beginning(base, kind), first))
    assert equal(pixel_tuning.KINDS[kind](CONFIG.tuning).merged(*one), one[0])


@pytest.mark.parametrize("kind", pixel_tuning.KINDS)
def test_what_is_not_tuned_stays_bit_for_bit(base, tune, kind):
  first, last = tune(kind)
  assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, last)
  before = traverse_util.flatten_dict(beginning(base, kind), sep="/")
  for seed in range(len(SEEDS)):
    start, added = jax.tree.map(lambda x, seed=seed: x[seed], (before, last))
    whole = merged(kind, traverse_util.unflatten_dict(start, sep="/"), added)
    after = traverse_util.flatten_dict(whole, sep="/")
    moved = {name for name in after if not np.array_equal(after[name], start[name])}
    expected = names(last)
    if kind == LORA:
      expected = {name.rsplit("/", 1)[0] for name in expected}
    assert moved and moved <= expected
    assert len(moved) > 0.9 * len(expected)  # a bias of keys has no gradient


def test_the_matrix_that_is_added_has_the_rank(base, tune):
  params, added = jax.tree.map(lambda x: x[0], (base, tune(LORA)[1]))
  kernel = ("attend_middle", "value", "kernel")
  after, before = (
    traverse_util.flatten_dict(tree)[kernel] for tree in (merged(LORA, params, added), params)
  )
  values = np.linalg.svd(np.asarray(after - before), compute_uv=False)
  assert (values[:2] > 1e-4).all() and (values[2:] < 1e-5).all()


@pytest.mark.parametrize("kind", pixel_tuning.KINDS)
def test_the_loss_falls_on_the_same_batches(mesh, data, base, tune, kind):
  stage = pixel_diffusion.make_tuning_stage(CONFIG, kind, beginning(base, kind), data, COUNTS, mesh)

  @jax.jit
  @jax.vmap
  def losses(added, per_seed, key):
    state = stage.init(key, per_seed).replace(params=added)
    return jax.vmap(
      lambda step: stage.step(state.replace(step=step), data, per_seed)[1]["loss"]
    )(jnp.arange(40)).mean()  # fmt: skip

  keys = jax.random.split(jax.random.key(7), len(SEEDS))
  before, after = (losses(added, stage.per_seed, keys) for added in tune(kind))
  assert (np.asarray(after) < np.asarray(before) - 1e-4).all()


def test_a_sentence_moves_for_images_of_its_class_alone(mesh, data, base):
  """The gradient of a batch without a class leaves its sentence alone."""
  stage = pixel_diffusion.make_tuning_stage(
    dataclasses.replace(CONFIG, batch_size=2), SENTENCES, beginning(base, SENTENCES), data, COUNTS,
    mesh,
  )  # fmt: skip

  @jax.jit
  def train_twice(of_seed):
    """Two steps on the same batch; what was drawn, and the sentences."""
    state = stage.init(jax.random.key(0), of_seed).replace(step=jnp.int32(1))
    again = stage.step(state, data, of_seed)[0].replace(step=state.step)
    batch, after = stage.batch(state, data, of_seed)[0], stage.step(again, data, of_seed)[0]
    return batch.label, after.params[SENTENCES]

  label, sentences = train_twice(jax.tree.map(lambda x: x[0], stage.per_seed))
  drawn = set(np.asarray(label).tolist())
  assert 3 not in drawn and len(drawn) < 3
  moved = np.asarray(sentences != 0).any(axis=1)
  assert set(np.flatnonzero(moved).tolist()) == drawn


def test_batches_of_tuning_draw_classes_alike(mesh, data, base):
  config = dataclasses.replace(CONFIG, batch_size=600)
  stage = pixel_diffusion.make_tuning_stage(config, SENTENCES, beginning(base, SENTENCES), data,
                                            COUNTS, mesh)  # fmt: skip

  @jax.jit
  def draw(of_seed):
    return stage.batch(stage.init(jax.random.key(0), of_seed), data, of_seed)[0].label

  shares = np.bincount(draw(jax.tree.map(lambda x: x[0], stage.per_seed)), minlength=4) / 600
  np.testing.assert_allclose(shares, [1 / 3, 1 / 3, 1 / 3, 0], atol=0.06)


def test_a_method_is_tuned_after_its_base():
  names = ("balanced+prompted+lora", "balanced+prompted", "prompted+inverted+contrastive")
  assert image_methods.trainings(names) == [
    "balanced+prompted", "balanced+prompted+lora", "prompted", "prompted+inverted",
  ]  # fmt: skip
  assert image_methods.bases(names) == ["balanced+prompted", "prompted"]
  assert image_methods.base("lora") == "ddpm" and image_methods.trained("lora") == "lora"
  assert not image_methods.is_known("prompted+inverted+by_name")  # which no prompt would read
  assert not image_methods.is_known("lora+custom") and not image_methods.is_known("inverted")
