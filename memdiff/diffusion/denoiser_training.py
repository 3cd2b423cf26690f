"""The training stage of the diffusion engine, for any shape of x and any source of batches."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from memdiff.config import at_least, between, one_of
from memdiff.contrastive import supervised_contrastive, unit_length
from memdiff.diffusion import objectives
from memdiff.diffusion.objectives import ObjectiveConfig
from memdiff.diffusion.sampler import model_time
from memdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime import train_state
from memdiff.runtime.loop import Stage
from memdiff.runtime.random import normal, stream
from memdiff.runtime.train_state import OptimizerConfig

# Parameters that only training needs lie beside the denoiser's own, which do not read them.
PROJECTION = "supcon_projection"


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """What the engine needs to know; what is drawn is the caller's business."""

  schedule: ScheduleConfig
  prediction: str = one_of(objectives.PREDICTIONS)
  objective: ObjectiveConfig
  ema_decay: float = between(0, 0.999999)
  num_steps: int = at_least(1)
  optimizer: OptimizerConfig


@flax.struct.dataclass
class Batch:
  """What a denoiser is trained on; the last three fields serve terms of the objective."""

  x0: Any  # [B, ...]
  label: Any  # [B] int32, as the denoiser sees it: num_classes where the class is not told
  memory: Any  # what the denoiser takes as memory; rows dropped together with the label
  true_label: Any = None  # [B] int32, of supcon: equal where rows are of one class, told or not
  other_label: Any = None  # [B] int32, of cbdm: y', dropped where the label is
  other_memory: Any = None  # of cbdm: the memory of y'


def _project(params: Any, bottleneck: jax.Array, dim: int) -> jax.Array:
  """One linear layer, then unit length. [B, W] -> [B, dim]."""
  return unit_length(nn.Dense(dim).apply({"params": params}, bottleneck), 1)


def loss_terms(
  config: TrainingConfig,
  denoiser: nn.Module,
  params: Any,
  batch: Batch,
  t: jax.Array,
  eps: jax.Array,
) -> dict[str, jax.Array]:
  """The terms whose sum is the loss, each a mean over the batch with its weight applied.

  Args:
    config: prediction and objective.
    denoiser: Flax module (x_t, t, label, memory) -> (prediction, bottleneck [B, W]).
    params: of the denoiser, and of the projection where `objective.supcon` has a weight.
    batch: B clean samples and their conditions.
    t: [B] step indices.
    eps: [B, ...] standard normal.
  """
  schedule, objective = NoiseSchedule(config.schedule), config.objective
  signal, noise = schedule.scales(t, batch.x0)
  x_t = schedule.noise(batch.x0, t, eps)
  time = t / schedule.num_steps

  def denoise(label, memory):
    return denoiser.apply({"params": params}, x_t, model_time(t, schedule), label, memory)

  def to_eps(output):
    a, b = objectives.eps_weights(config.prediction, signal, noise)
    return a * x_t + b * output

  output, bottleneck = denoise(batch.label, batch.memory)
  target = objectives.target(config.prediction, batch.x0, eps, signal, noise)
  squared = objectives.mean_squared_error(output, target)
  if objective.min_snr > 0:
    weights = objectives.min_snr_weights(config.prediction, signal, noise, objective.min_snr)
    squared = weights.reshape(-1) * squared
  terms = {"mse": squared.mean()}
  if objective.loss == "infonce":
    contrast = objectives.infonce(to_eps(output), eps, objective.infonce.temperature)
    terms = {"mse": objective.infonce.mse_weight * terms["mse"], "infonce": contrast.mean()}
  if objective.supcon.weight > 0:
    c = objective.supcon
    terms["supcon"] = supervised_contrastive(
      _project(params[PROJECTION], bottleneck, c.projection_dim),
      batch.true_label,
      c.temperature,
      objectives.supcon_weights(time, c.weight, c.decay),
    )
  if objective.cbdm.weight > 0:
    other, _ = denoise(batch.other_label, batch.other_memory)
    gap = objectives.class_balance(to_eps(output), to_eps(other), time, objective.cbdm.commitment)
    terms["cbdm"] = objective.cbdm.weight * gap.mean()
  return terms


def init_params(key: jax.Array, config: TrainingConfig, denoiser: nn.Module, batch: Batch) -> Any:
  """Parameters of the denoiser, with those of the projection beside them where one is trained."""
  inputs = batch.x0, jnp.zeros(batch.label.shape), batch.label, batch.memory
  params = denoiser.init(stream(key, "params"), *inputs)["params"]
  if config.objective.supcon.weight > 0:
    _, bottleneck = denoiser.apply({"params": params}, *inputs)
    layer = nn.Dense(config.objective.supcon.projection_dim)
    params = {**params, PROJECTION: layer.init(stream(key, "projection"), bottleneck)["params"]}
  return params


def make_stage(
  config: TrainingConfig,
  denoiser: nn.Module,
  draw_batch: Callable[[jax.Array, Any, Any], Batch],
  shared: Any,
  own: Any,
  mesh: Mesh,
) -> Stage:
  """Trains `denoiser` to predict the noise, or what the config names instead.

  Args:
    config: optimiser, schedule, objective, EMA.
    denoiser: Flax module (x_t, t, label, memory) -> (prediction, bottleneck).
    draw_batch: (key, shared, own) -> Batch, pure; called at every step. Stages of one and the same
      function share their compiled programs.
    shared: arrays on the devices that all runs use.
    own: arrays with a leading axis of runs.
    mesh: the device mesh.
  """
  example = jax.eval_shape(
    lambda shared, own: draw_batch(jax.random.key(0), shared, jax.tree.map(lambda x: x[0], own)),
    shared,
    own,
  )
  leaves, structure = jax.tree.flatten(example)
  program = _program(config, denoiser, draw_batch, structure, tuple(leaves), mesh)
  return Stage(
    name="diffusion",
    num_steps=config.num_steps,
    init=program.init,
    batch=program.draw,
    step=program.step,
    evaluate=None,
    shared=shared,
    own=own,
    batch_size=example.x0.shape[0],
    result=("ema_params",),
    one_by_one=mesh_lib.one_by_one(mesh),
  )


@dataclasses.dataclass(frozen=True)
class _Program:
  init: Callable
  draw: Callable
  step: Callable


@functools.lru_cache(maxsize=8)
def _program(
  config: TrainingConfig,
  denoiser: nn.Module,
  draw_batch: Callable,
  structure: Any,
  leaves: tuple[jax.ShapeDtypeStruct, ...],
  mesh: Mesh,
) -> _Program:
  """The functions of a stage; the same ones for seeds and folds, so that they compile once.

  `structure` and `leaves` are those of a batch, as shapes.
  """
  num_times = config.schedule.num_steps
  optimizer = train_state.make_optimizer(config.optimizer, config.num_steps)

  def init(key, _):
    zeros = [jnp.zeros(x.shape, x.dtype) for x in leaves]
    batch = jax.tree.unflatten(structure, zeros)
    params = init_params(key, config, denoiser, batch)
    # A copy: the two trees are donated together and must not share buffers.
    ema_params = jax.tree.map(jnp.copy, params)
    return train_state.create(key, params, optimizer, ema_params=ema_params)

  def noised_batch(state, shared, own):
    """(batch, t [B], eps)."""
    batch = draw_batch(stream(state.key, "batch", state.step), shared, own)
    batch = mesh_lib.shard_batch(batch, mesh)
    t = jax.random.randint(stream(state.key, "time", state.step), batch.label.shape, 0, num_times)
    eps = normal(stream(state.key, "noise", state.step), batch.x0.shape)
    return batch, t, eps

  def step(state, shared, own):
    batch, t, eps = noised_batch(state, shared, own)

    def loss_of(params):
      terms = loss_terms(config, denoiser, params, batch, t, eps)
      return sum(terms.values()), terms

    (loss, terms), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    state = train_state.apply_gradients(state, gradients, optimizer)
    ema_params = train_state.update_ema(
      state.ema_params, state.params, state.step, config.ema_decay
    )
    metrics = {"loss": loss} | (terms if len(terms) > 1 else {})
    return state.replace(ema_params=ema_params), metrics

  return _Program(init, noised_batch, step)
