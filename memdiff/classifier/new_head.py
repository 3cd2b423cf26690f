"""A new head on a frozen encoder, trained on the batches and with the loss of a classifier.

What generated images do for the head alone, beside what they do for encoder and head.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memdiff.classifier import added_images, encoder, image_batches, losses
from memdiff.classifier.encoder_training import Recipe
from memdiff.memory.feature_space import linear_logits
from memdiff.runtime import train_state
from memdiff.runtime.loop import Stage
from memdiff.runtime.random import stream
from memdiff.runtime.train_state import TrainState


def make_stage(
  stage: Stage, recipe: Recipe, frozen: TrainState, num_classes: int, num_examples: int
) -> Stage:
  """Trains `params`: {"kernel": [D, C], "bias": [C]}.

  Args:
    stage: the training of whole classifiers by `recipe`, of runs with `rows`; its batches are used.
    recipe: its loss has no state and one view.
    frozen: trained classifiers, runs leading.
    num_classes: C.
    num_examples: training images that an epoch of the recipe has.
  """
  init, step = _functions(recipe, stage.batch, stage.num_steps, num_classes, num_examples)
  variables = {"params": frozen.params, "batch_stats": frozen.model_state}
  return dataclasses.replace(
    stage,
    init=init,
    step=step,
    evaluate=None,
    per_seed=stage.per_seed | {"encoder": variables},
    result=("params",),
  )


def whole(frozen: TrainState, head: TrainState) -> TrainState:
  """Classifiers with the encoders of `frozen` and the heads that a stage has trained."""
  return frozen.replace(params=frozen.params | {"head": head.params})


@functools.lru_cache(maxsize=8)
def _functions(
  recipe: Recipe, batch: Callable, num_steps: int, num_classes: int, num_examples: int
) -> tuple[Callable, Callable]:
  """(init, step); the same ones for seeds and folds, so that they compile once."""
  model = encoder.make_model(recipe.encoder, recipe.loss, num_classes)
  optimizer = train_state.make_optimizer(recipe.classifier.optimizer, num_steps)

  def init(key, _):
    shape = recipe.encoder.feature_dim, num_classes
    kernel = jax.nn.initializers.lecun_normal()(stream(key, "params"), shape)
    return train_state.create(key, {"kernel": kernel, "bias": jnp.zeros(num_classes)}, optimizer)

  def objective_of(state: TrainState, per_seed: Any) -> losses.Objective:
    counts = jnp.asarray(per_seed["counts"], jnp.float32)
    if recipe.images and recipe.counts == "effective":
      weight = recipe.images.weight_at(state.step, num_steps)
      counts = added_images.effective_counts(
        recipe.images, counts, per_seed["images"], weight, recipe.classifier.batch_size
      )
    return losses.make(
      recipe.loss,
      recipe.classifier.loss_parameters,
      counts,
      scale=recipe.encoder.backbone.scale,
      num_steps=num_steps,
      steps_per_epoch=max(num_examples // recipe.classifier.batch_size, 1),
    )

  def step(state, shared, per_seed):
    prepared = batch(state, shared, per_seed)
    _, features = model.apply(per_seed["encoder"], prepared.images, train=False)
    objective = objective_of(state, per_seed)

    def loss_of(params):
      logits = linear_logits(params, features)
      return objective(image_batches.seen(logits, features, prepared), {}, state.step)[0]

    value, gradients = jax.value_and_grad(loss_of)(state.params)
    return train_state.apply_gradients(state, gradients, optimizer), {"loss": value}

  return init, step
