"""The training stage of the diffusion engine, for any shape of x and any source of batches.

A denoiser may have dropout, `nn.Dropout(rate, deterministic=not self.has_rng("dropout"))`: training
gives it a key, sampling does not.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from memdiff.config import at_least, between, one_of, setting
from memdiff.diffusion import objectives, terms
from memdiff.diffusion.sampler import model_time
from memdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from memdiff.diffusion.terms import ObjectiveConfig
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime import train_state
from memdiff.runtime.loop import Stage
from memdiff.runtime.random import normal, stream
from memdiff.runtime.train_state import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """What the engine needs to know; what is drawn is the caller's business."""

  schedule: ScheduleConfig = setting(ScheduleConfig(), "how noise grows over the steps")
  prediction: str = setting("v", "what the denoiser predicts", one_of(objectives.PREDICTIONS))
  objective: ObjectiveConfig = setting(ObjectiveConfig(), "what training minimises")
  ema_decay: float = setting(0.999, "of the averaged weights, which sample", between(0, 0.999999))
  num_steps: int = setting(2000, "training steps", at_least(1))
  optimizer: OptimizerConfig = setting(
    OptimizerConfig(
      name="adamw", learning_rate=1e-3, schedule="cosine", milestones=(), factors=(),
      weight_decay=0.01, warmup=0.05, clip_norm=1.0,
    ),
    "of the denoiser",
  )  # fmt: skip


@flax.struct.dataclass
class Batch:
  """What a denoiser is trained on; the last six fields are there if a config asks for them."""

  x0: Any  # [B, ...]
  label: Any  # [B] int32, as the denoiser sees it: num_classes if the class is not told
  memory: Any  # what the denoiser takes as memory; rows dropped together with the label
  true_label: Any = None  # [B] int32, equal if rows are of one class, told or not
  other_label: Any = None  # [B] int32, another class, dropped if the label is
  other_memory: Any = None  # of that class
  class_count: Any = None  # [B] training examples of the true class, 0 if it was made up
  class_share: Any = None  # [B] of `capacity_weights`, 0 if it was made up
  class_rarity: Any = None  # [B] of the same


class Tuning(abc.ABC):
  """A few parameters that are trained while those of a denoiser stay; must be hashable."""

  @abc.abstractmethod
  def init(self, key: jax.Array, params: Any) -> Any:
    """The few, at the beginning, given those that stay; must not be the same arrays."""

  @abc.abstractmethod
  def merged(self, params: Any, added: Any) -> Any:
    """All parameters of the tuned denoiser."""

  def told(self, params: Any, batch: Batch) -> Batch:
    """The batch as the tuned parameters condition it; by default as it is."""
    del params
    return batch


@flax.struct.dataclass
class Tuned:
  """What a run that is tuned has for itself."""

  params: Any  # of the trained denoiser
  per_seed: Any  # as of a run that is not tuned


@dataclasses.dataclass(frozen=True)
class LateBatches:
  """Batches that training draws from step `first` on, of the same shapes."""

  first: int
  draw: Callable[[jax.Array, Any, Any], Batch]


def loss_terms(
  config: TrainingConfig,
  denoiser: nn.Module,
  params: Any,
  batch: Batch,
  t: jax.Array,
  eps: jax.Array,
  rngs: Mapping[str, jax.Array] | None = None,
) -> dict[str, jax.Array]:
  """The terms whose sum is the loss, each a mean over the batch with its weight applied.

  Args:
    config: prediction and objective.
    denoiser: Flax module (x_t, t, label, memory) -> (prediction, bottleneck [B, W]); if it has a
      reserve also in two halves, `descend` and `ascend`, as the U-Net.
    params: of the denoiser and of the terms, as `init_params` makes them.
    batch: B clean samples and their conditions.
    t: [B] step indices.
    eps: [B, ...] standard normal.
    rngs: {"dropout": key, "transfer": key}; every call of the denoiser drops the same units. None:
      no dropout, and no transfer of targets.
  """
  schedule = NoiseSchedule(config.schedule)
  signal, noise = schedule.scales(t, batch.x0)
  x_t = schedule.noise(batch.x0, t, eps)

  dropout = {"dropout": rngs["dropout"]} if rngs else None

  def denoise(label, memory):
    time = model_time(t, schedule)
    return denoiser.apply({"params": params}, x_t, time, label, memory, rngs=dropout)

  x0, transfer = batch.x0, config.objective.transfer
  if rngs and transfer.rule != "none":
    source = objectives.transferred(
      rngs["transfer"], x_t, x0, signal, noise, batch.class_count, transfer.rule
    )
    early = t < transfer.before * schedule.num_steps
    x0 = x0[jnp.where(early, source, jnp.arange(len(source)))]
    eps = (x_t - signal * x0) / noise
  general = None
  if terms.uses_reserve(config.objective):  # one way down serves both
    time = model_time(t, schedule)
    apply = functools.partial(denoiser.apply, {"params": params}, rngs=dropout)
    descent, bottleneck = apply(x_t, time, batch.label, batch.memory, method="descend")
    output, general = (apply(descent, on, method="ascend") for on in (True, False))
  else:
    output, bottleneck = denoise(batch.label, batch.memory)
  prediction = terms.Prediction(
    kind=config.prediction,
    batch=batch,
    params=params,
    x_t=x_t,
    x0=x0,
    eps=eps,
    signal=signal,
    noise=noise,
    alpha=jnp.asarray(schedule.alphas, jnp.float32)[t],
    time=t / schedule.num_steps,
    output=output,
    bottleneck=bottleneck,
    denoise=lambda label, memory: denoise(label, memory)[0],
    general=general,
  )
  wanted = terms.terms_of(config.objective)
  return {name: term.value(config.objective, prediction) for name, term in wanted.items()}


def init_params(key: jax.Array, config: TrainingConfig, denoiser: nn.Module, batch: Batch) -> Any:
  """Parameters of the denoiser, with those of terms beside them, which the denoiser ignores."""
  inputs = batch.x0, jnp.zeros(batch.label.shape), batch.label, batch.memory
  params = denoiser.init(stream(key, "params"), *inputs)["params"]
  for term in terms.terms_of(config.objective).values():
    if term.init is not None:
      made = denoiser.apply({"params": params}, *inputs)
      params = {**params, term.parameters: term.init(key, config.objective, *made)}
  return params


def make_stage(
  config: TrainingConfig,
  denoiser: nn.Module,
  draw_batch: Callable[[jax.Array, Any, Any], Batch],
  shared: Any,
  per_seed: Any,
  mesh: Mesh,
  late: LateBatches | None = None,
  tuning: Tuning | None = None,
) -> Stage:
  """Trains `denoiser` to predict the noise, or what the config names instead.

  Args:
    config: optimiser, schedule, objective, EMA.
    denoiser: Flax module (x_t, t, label, memory) -> (prediction, bottleneck).
    draw_batch: (key, shared, per_seed) -> Batch, pure; called at every step. Stages of one and the
      same function share their compiled programs.
    shared: arrays on the devices that all runs use.
    per_seed: arrays with a leading axis of runs.
    mesh: the device mesh.
    late: batches of the end of the training, if they are others.
    tuning: what is trained of a denoiser that was trained before; `per_seed` is then a Tuned, and
      the result is what is added. None: all parameters, from the beginning.
  """
  example = jax.eval_shape(
    lambda shared, per_seed: draw_batch(
      jax.random.key(0), shared, jax.tree.map(lambda x: x[0], per_seed)
    ),
    shared,
    per_seed.per_seed if tuning else per_seed,
  )
  leaves, structure = jax.tree.flatten(example)
  example_batch = structure, tuple(leaves)
  program = _program(config, denoiser, draw_batch, example_batch, mesh, late, tuning)
  return Stage(
    name="diffusion",
    num_steps=config.num_steps,
    init=program.init,
    batch=program.draw,
    step=program.step,
    evaluate=None,
    shared=shared,
    per_seed=per_seed,
    batch_size=example.x0.shape[0],
    result=("ema_params",),
    one_by_one=mesh_lib.one_by_one(mesh),
  )


@dataclasses.dataclass(frozen=True)
class _Program:
  init: Callable
  draw: Callable
  step: Callable


@functools.lru_cache(maxsize=16)
def _program(
  config: TrainingConfig,
  denoiser: nn.Module,
  draw_batch: Callable,
  example: tuple[Any, tuple[jax.ShapeDtypeStruct, ...]],
  mesh: Mesh,
  late: LateBatches | None,
  tuning: Tuning | None,
) -> _Program:
  """The functions of a stage; the same ones for seeds and folds, so that they compile once.

  `example` is the structure and the leaves of a batch, as shapes.
  """
  num_times = config.schedule.num_steps
  optimizer = train_state.make_optimizer(config.optimizer, config.num_steps)

  def init(key, per_seed):
    if tuning:
      params = tuning.init(stream(key, "tuning"), per_seed.params)
    else:
      structure, leaves = example
      zeros = [jnp.zeros(x.shape, x.dtype) for x in leaves]
      params = init_params(key, config, denoiser, jax.tree.unflatten(structure, zeros))
    # A copy: the two trees are donated together and must not share buffers.
    ema_params = jax.tree.map(jnp.copy, params)
    return train_state.create(key, params, optimizer, ema_params=ema_params)

  def noised_batch(state, shared, per_seed):
    """(batch, t [B], eps)."""
    key = stream(state.key, "batch", state.step)
    per_seed = per_seed.per_seed if tuning else per_seed
    batch = draw_batch(key, shared, per_seed)
    if late is not None:
      is_late, others = state.step >= late.first, late.draw(key, shared, per_seed)
      batch = jax.tree.map(lambda now, then: jnp.where(is_late, then, now), batch, others)
    batch = mesh_lib.shard_batch(batch, mesh)
    t = jax.random.randint(stream(state.key, "time", state.step), batch.label.shape, 0, num_times)
    eps = normal(stream(state.key, "noise", state.step), batch.x0.shape)
    return batch, t, eps

  def step(state, shared, per_seed):
    batch, t, eps = noised_batch(state, shared, per_seed)
    rngs = {name: stream(state.key, name, state.step) for name in ("dropout", "transfer")}

    def loss_of(trained):
      params, told = trained, batch
      if tuning:
        params = tuning.merged(per_seed.params, trained)
        told = tuning.told(params, batch)
      summands = loss_terms(config, denoiser, params, told, t, eps, rngs)
      return sum(summands.values()), summands

    (loss, summands), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    state = train_state.apply_gradients(state, gradients, optimizer)
    ema_params = train_state.update_ema(
      state.ema_params, state.params, state.step, config.ema_decay
    )
    metrics = {"loss": loss} | (summands if len(summands) > 1 else {})
    return state.replace(ema_params=ema_params), metrics

  return _Program(init, noised_batch, step)
