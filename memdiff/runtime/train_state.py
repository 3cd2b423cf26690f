"""The one train state, and the optimisers by name."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from memdiff.config import above, at_least, between, each_if_any, one_of, setting


@flax.struct.dataclass
class TrainState:
  """Everything a step needs and changes; a leading axis of seeds is added by the loop."""

  step: jax.Array  # int32 []
  key: jax.Array  # base PRNG key of this stage and seed
  params: Any
  opt_state: Any
  model_state: Any = None  # batch-norm statistics
  ema_params: Any = None  # exponential average of params, if a stage asks for one
  bank: Any = None  # the memory bank, class axis split over the mesh
  loss_state: Any = None  # what a loss carries from step to step


OPTIMIZERS = ("sgd", "adamw")


SCHEDULES = ("cosine", "step", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Optimiser with linear warm-up and a schedule; all times are shares of the steps."""

  name: str = setting("sgd", "the update rule", one_of(OPTIMIZERS))
  learning_rate: float = setting(0.1, "peak, after the warm-up", above(0))
  schedule: str = setting("step", "of the learning rate; cosine falls to 0", one_of(SCHEDULES))
  milestones: tuple[float, ...] = setting(
    (0.8, 0.9),
    "step: shares of the steps at which the rate changes",
    each_if_any(lambda m: 0 < m < 1, "shares between 0 and 1"),
  )
  factors: tuple[float, ...] = setting(
    (0.01, 0.0001),
    "step: the rate from each milestone on, as a factor of the peak",
    each_if_any(lambda f: f > 0, "numbers above 0"),
  )
  momentum: float = setting(0.9, "of sgd; b1 of adamw", between(0, 0.9999))
  nesterov: bool = setting(False, "whether sgd uses Nesterov momentum")
  weight_decay: float = setting(2e-4, "L2 penalty in sgd, decoupled in adamw", at_least(0))
  warmup: float = setting(0.025, "share of the steps over which the rate rises", between(0, 0.9))
  clip_norm: float = setting(0.0, "limit of the gradient norm; 0: none", at_least(0))
  accumulate: int = setting(1, "batches whose mean gradient makes one update", at_least(1))

  def __post_init__(self):
    if len(self.milestones) != len(self.factors):
      raise ValueError(
        f"there are {len(self.milestones)} milestones and {len(self.factors)} factors; each"
        " milestone needs the factor of the learning rate that holds after it."
      )
    if (self.schedule == "step") != bool(self.milestones):
      raise ValueError(
        f"schedule is {self.schedule!r} with {len(self.milestones)} milestones; milestones and"
        " factors go with the schedule step, and with it alone."
      )
    if list(self.milestones) != sorted(set(self.milestones)):
      raise ValueError(f"milestones are {self.milestones}, but must rise.")
    if any(milestone < self.warmup for milestone in self.milestones):
      raise ValueError(
        f"milestones are {self.milestones}, but the warm-up lasts until {self.warmup}."
      )


def nesterov_cosine(
  learning_rate: float, weight_decay: float, warmup: float = 0.05
) -> OptimizerConfig:
  """SGD with Nesterov momentum and cosine decay."""
  return OptimizerConfig(
    learning_rate=learning_rate,
    schedule="cosine",
    milestones=(),
    factors=(),
    nesterov=True,
    weight_decay=weight_decay,
    warmup=warmup,
  )


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """The learning rate at each step.

  Linear from 0 over `warmup`; then `constant`; or `cosine` down to 0 at `num_steps`; or `step`,
  where the peak is multiplied by `factors[i]` from the share `milestones[i]` on (not cumulative, as
  the LDAM recipe states it: x 0.01 after epoch 160 of 200, x 0.0001 after 180).
  """
  peak, warmup = config.learning_rate, min(round(config.warmup * num_steps), num_steps - 1)
  if config.schedule == "cosine":
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, num_steps)
  starts = [warmup, *(round(share * num_steps) for share in config.milestones)]
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, peak, max(warmup, 1)),
      *(optax.constant_schedule(peak * factor) for factor in (1.0, *config.factors)),
    ],
    starts,
  )


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
  """Builds the optimiser.

  Args:
    config: `momentum` is that of sgd (Nesterov's if `nesterov`) and b1 of adamw; `weight_decay` is
      added to the gradient in sgd (L2 of every parameter, as the LDAM recipe has it) and decoupled
      in adamw; `warmup` and `schedule` as in `learning_rate`; `clip_norm` caps the global gradient
      norm, 0 leaves it alone; `accumulate` steps average their gradients and make one update, which
      is what warm-up and schedule then count.
    num_steps: of the whole training.
  """
  schedule = learning_rate(config, max(num_steps // config.accumulate, 1))
  if config.name == "sgd":
    rule = [
      optax.add_decayed_weights(config.weight_decay),
      optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov),
    ]
  else:
    rule = [
      optax.adamw(
        schedule, b1=config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov
      )
    ]
  clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm > 0 else []
  optimizer = optax.chain(*clip, *rule)
  if config.accumulate > 1:
    optimizer = optax.MultiSteps(optimizer, config.accumulate).gradient_transformation()
  return optimizer


def create(key: jax.Array, params: Any, optimizer: optax.GradientTransformation, **extra) -> Any:
  """A state at step zero; `extra` fills the further fields of TrainState."""
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
