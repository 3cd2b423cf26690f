"""The one train state, and the optimisers by name."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from memdiff.config import above, at_least, between, one_of


@flax.struct.dataclass
class TrainState:
  """Everything a step needs and changes; a leading axis of seeds is added by the loop."""

  step: jax.Array  # int32 []
  key: jax.Array  # base PRNG key of this stage and seed
  params: Any
  opt_state: Any
  model_state: Any = None  # batch-norm statistics
  ema_params: Any = None  # exponential average of params, where a stage asks for one
  bank: Any = None  # the memory bank, class axis split over the mesh


OPTIMIZERS = ("sgd", "adamw")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Optimiser with linear warm-up and cosine decay to zero."""

  name: str = one_of(OPTIMIZERS)
  learning_rate: float = above(0)
  momentum: float = between(0, 0.9999)
  weight_decay: float = at_least(0)
  warmup: float = between(0, 0.9)
  clip_norm: float = at_least(0)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
  """Builds the optimiser.

  Args:
    config: `momentum` is Nesterov's momentum of sgd and b1 of adamw; `weight_decay` is added to
      the gradient in sgd (L2, as the LDAM recipe has it) and decoupled in adamw; `warmup` is the
      share of the steps with a rising learning rate; `clip_norm` caps the global gradient norm,
      0 leaves it alone.
    num_steps: steps until the learning rate reaches zero.
  """
  warmup = min(round(config.warmup * num_steps), num_steps - 1)
  schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, num_steps)
  if config.name == "sgd":
    rule = [
      optax.add_decayed_weights(config.weight_decay),
      optax.sgd(schedule, momentum=config.momentum, nesterov=True),
    ]
  else:
    rule = [optax.adamw(schedule, b1=config.momentum, weight_decay=config.weight_decay)]
  clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm > 0 else []
  return optax.chain(*clip, *rule)


def create(key: jax.Array, params: Any, optimizer: optax.GradientTransformation, **extra) -> Any:
  """A state at step zero; `extra` fills model_state, ema_params and bank."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    key=key,
    params=params,
    opt_state=optimizer.init(params),
    **extra,
  )


def apply_gradients(
  state: TrainState, gradients: Any, optimizer: optax.GradientTransformation, **changes
) -> TrainState:
  """One optimiser step; `changes` replace further fields."""
  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state, **changes)


def update_ema(average: Any, params: Any, step: jax.Array, decay: float) -> Any:
  """Exponential moving average, with the warm-up min(decay, (1 + step) / (10 + step))."""
  rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return optax.incremental_update(params, average, 1.0 - rate)
