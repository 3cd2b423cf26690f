"""The training stage of the diffusion engine, for any shape of x and any source of batches."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from memdiff.config import at_least, between, one_of
from memdiff.diffusion import objectives
from memdiff.diffusion.denoisers import DenoiserConfig
from memdiff.diffusion.sampler import model_time
from memdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime import train_state
from memdiff.runtime.loop import Stage
from memdiff.runtime.random import stream
from memdiff.runtime.train_state import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
  schedule: ScheduleConfig
  prediction: str = one_of(objectives.PREDICTIONS)
  denoiser: DenoiserConfig
  class_exponent: float = between(0, 1)
  label_dropout: float = between(0, 1)
  anonymous: float = between(0, 1)
  displacement: float = at_least(0)
  ema_decay: float = between(0, 0.999999)
  batch_size: int = at_least(1)
  num_steps: int = at_least(1)
  optimizer: OptimizerConfig


@flax.struct.dataclass
class Batch:
  """What a denoiser is trained on."""

  x0: jax.Array  # [B, ...]
  label: jax.Array  # [B] int32, num_classes where the condition is dropped
  memory: Any  # what the denoiser takes as memory; rows dropped together with the label


def make_stage(
  config: DiffusionConfig,
  denoiser: nn.Module,
  draw_batch: Callable[[jax.Array, Any, Any], Batch],
  shared: Any,
  own: Any,
  mesh: Mesh,
) -> Stage:
  """Trains `denoiser` to predict the noise, or what the config names instead.

  Args:
    config: optimiser, schedule, EMA.
    denoiser: Flax module (x_t, t, label, memory) -> (prediction, bottleneck).
    draw_batch: (key, shared, own) -> Batch, pure; called at every step.
    shared: arrays on the devices that all seeds use.
    own: arrays with a leading axis of seeds.
    mesh: the device mesh.
  """
  schedule = NoiseSchedule(config.schedule)
  optimizer = train_state.make_optimizer(config.optimizer, config.num_steps)
  example = jax.eval_shape(draw_batch, jax.random.key(0), shared, jax.tree.map(lambda x: x[0], own))

  def init(key, _):
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)
    t = jnp.zeros(batch.label.shape)
    params = denoiser.init(stream(key, "params"), batch.x0, t, batch.label, batch.memory)["params"]
    # A copy: the two trees are donated together and must not share buffers.
    ema_params = jax.tree.map(jnp.copy, params)
    return train_state.create(key, params, optimizer, ema_params=ema_params)

  def step(state, shared, own):
    batch = draw_batch(stream(state.key, "batch", state.step), shared, own)
    batch = mesh_lib.shard_batch(batch, mesh)
    t = jax.random.randint(
      stream(state.key, "time", state.step), batch.label.shape, 0, schedule.num_steps
    )
    eps = jax.random.normal(stream(state.key, "noise", state.step), batch.x0.shape)
    x_t = schedule.noise(batch.x0, t, eps)
    target = objectives.target(config.prediction, batch.x0, eps, *schedule.scales(t, batch.x0))

    def loss_of(params):
      output, _ = denoiser.apply(
        {"params": params}, x_t, model_time(t, schedule), batch.label, batch.memory
      )
      return objectives.mean_squared_error(output, target).mean()

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    state = train_state.apply_gradients(state, gradients, optimizer)
    ema_params = train_state.update_ema(
      state.ema_params, state.params, state.step, config.ema_decay
    )
    return state.replace(ema_params=ema_params), {"loss": loss}

  return Stage(
    name="diffusion",
    num_steps=config.num_steps,
    init=init,
    step=step,
    evaluate=None,
    shared=shared,
    own=own,
  )
