"""New heads on frozen encoders, trained on the batches of a classifier's stage."""

import dataclasses

import jax
import numpy as np
import pytest

from memdiff.classifier import encoder, encoder_training, new_head
from memdiff.classifier.added_images import AddedImagesConfig
from memdiff.classifier.encoder_training import Recipe
from memdiff.runtime import mesh as mesh_lib
from tests.classifier import test_added_images as images
from tests.classifier import test_encoder_training as training


@pytest.fixture(scope="module")
def mesh():
  return mesh_lib.make_mesh()


def make(mesh, config, counts="real", loss="balanced_softmax"):
  """(the whole classifier's stage, the head's, the encoder)."""
  stage = images.stage_of(mesh, config, loss=loss, counts=counts)
  recipe = Recipe(images.CONFIG, training.ENCODER, loss, images=config, counts=counts)
  frozen = jax.tree.map(lambda x: x[None], jax.jit(stage.init)(jax.random.key(3), ()))
  made = new_head.make_stage(stage, recipe, frozen, 3, images.REAL)
  return stage, made, frozen


def first_step(stage):
  fold = jax.tree.map(lambda x: x[0], stage.per_seed)
  state = jax.jit(stage.init)(training.KEY, fold)
  return state, fold, *jax.jit(stage.step)(state, stage.shared, fold)


@pytest.mark.parametrize("counts", ["real", "effective"])
def test_the_loss_is_that_of_the_batch_through_the_encoder_in_evaluation_mode(mesh, counts):
  config = AddedImagesConfig(weight=0.5)
  stage, made, frozen = make(mesh, config, counts)
  state, fold, _, metrics = first_step(made)
  batch = stage.batch(state, stage.shared, fold)
  views, rows = batch.images, batch.rows
  model = encoder.make_model(training.ENCODER, "balanced_softmax", 3)
  variables = {"params": frozen.params, "batch_stats": frozen.model_state}
  variables = jax.tree.map(lambda x: x[0], variables)
  features = jax.jit(lambda views: model.apply(variables, views, train=False)[1])(views)
  number = np.bincount(images.data_of().train_labels).astype(float)
  if counts == "effective":
    often = images.REAL / images.GENERATED  # as many generated as real images in a batch
    number += often * 0.5 * np.array([1, 2, 3])
  logits = np.asarray(features @ state.params["kernel"]) + np.log(number / number.sum())
  labels = np.asarray(rows.labels)
  losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
  expected = (losses * rows.weight).sum() / np.sum(rows.weight)
  assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-4)


def test_the_head_learns_and_the_encoder_stays(mesh):
  _, made, frozen = make(mesh, AddedImagesConfig())
  state, _, after, _ = first_step(made)
  assert set(after.params) == {"kernel", "bias"}
  assert not np.array_equal(state.params["kernel"], after.params["kernel"])
  heads = jax.tree.map(lambda x: x[None], after)
  whole = new_head.whole(frozen, heads)
  assert jax.tree.structure(whole.params) == jax.tree.structure(frozen.params)
  np.testing.assert_array_equal(whole.params["head"]["kernel"][0], after.params["kernel"])
  others = [name for name in frozen.params if name != "head"]
  for name in others:
    jax.tree.map(np.testing.assert_array_equal, whole.params[name], frozen.params[name])


def test_stages_of_one_recipe_share_their_program(mesh):
  _, first, _ = make(mesh, AddedImagesConfig())
  _, second, _ = make(mesh, AddedImagesConfig())
  assert first.step is second.step and first.init is second.init


def test_real_images_alone_will_do(mesh):
  data = images.data_of()
  shared = encoder.device_data(training.ENCODER.input, data, mesh)
  recipe = Recipe(images.CONFIG, training.ENCODER, "cross_entropy")
  stage = encoder_training.make_stage(recipe, data, shared, mesh, images.ROWS)
  frozen = jax.tree.map(lambda x: x[None], jax.jit(stage.init)(jax.random.key(3), ()))
  made = new_head.make_stage(stage, recipe, frozen, 3, images.REAL)
  _, _, _, metrics = first_step(dataclasses.replace(made))
  assert np.isfinite(metrics["loss"])
