"""Is the denoiser in PyTorch the same function with the same updates as ours?"""

import dataclasses
from typing import Any

import jax
import numpy as np

from benchmarks.digits_workload import Workload
from memdiff.diffusion import objectives
from memdiff.runtime import train_state
from memdiff.synthesis import feature_diffusion


def make_trainer(work: Workload, params: Any):
  """A torch_denoiser.Trainer that starts from `params`."""
  from benchmarks import torch_denoiser

  config, per_seed = work.config.diffusion, work.one_run()
  dim = per_seed.exemplars.features.shape[-1]
  model = torch_denoiser.Denoiser(work.num_classes, dim, config.denoiser)
  torch_denoiser.load_parameters(model, params)
  return torch_denoiser.Trainer(model, config, per_seed, work.num_classes, seed=0)


def disagreement(work: Workload, updates: int = 3) -> dict[str, float]:
  """The largest differences between the two implementations, on the same inputs.

  Outputs are compared at parameters moved away from their zeros; weights and EMA after a few
  optimiser steps at a learning rate far along the schedule's warm-up.
  """
  from benchmarks import torch_denoiser

  config, denoiser, random = work.config.diffusion, work.denoiser(), np.random.RandomState(0)
  config = dataclasses.replace(
    config, num_steps=40, optimizer=dataclasses.replace(config.optimizer, warmup=0.05)
  )
  work = dataclasses.replace(work, config=dataclasses.replace(work.config, diffusion=config))
  batch = feature_diffusion.draw_batch(
    jax.random.key(1), work.one_run(), config, work.num_classes, work.mesh
  )
  x_t = random.standard_normal(batch.x0.shape).astype(np.float32)
  t = random.uniform(0, 1000, len(x_t)).astype(np.float32)
  wanted = random.standard_normal(x_t.shape).astype(np.float32)
  variables = denoiser.init(jax.random.key(0), x_t, t, batch.label, batch.memory)
  params = jax.tree.map(
    lambda p: p + 0.05 * random.standard_normal(p.shape).astype(np.float32), variables["params"]
  )
  torch_params = jax.device_get(params)

  @jax.jit
  def predict(params):
    return denoiser.apply({"params": params}, x_t, t, batch.label, batch.memory)[0]

  optimizer = train_state.make_optimizer(config.optimizer, config.num_steps)
  state = train_state.create(jax.random.key(0), params, optimizer, ema_params=params)

  @jax.jit
  def update(state):
    gradients = jax.grad(lambda p: objectives.mean_squared_error(predict(p), wanted).mean())(
      state.params
    )
    state = train_state.apply_gradients(state, gradients, optimizer)
    ema = train_state.update_ema(state.ema_params, state.params, state.step, config.ema_decay)
    return state.replace(ema_params=ema)

  for _ in range(updates):
    state = update(state)

  trainer = make_trainer(work, torch_params)
  as_tensor = torch_denoiser.as_tensor
  memory, label = torch_denoiser.as_memory(batch.memory), as_tensor(batch.label).long()
  inputs = as_tensor(x_t), as_tensor(t)
  output = trainer.model(*inputs, label, memory).detach().numpy()
  for _ in range(updates):
    trainer.update(*inputs, as_tensor(wanted), label, memory)
  names = [name for name, _ in trainer.model.named_parameters()]

  def largest(tensors, tree) -> float:
    ours = torch_denoiser.flat_parameters(jax.device_get(tree))
    pairs = zip(names, tensors, strict=True)
    return max(float(np.abs(x.detach().numpy() - ours[name]).max()) for name, x in pairs)

  return {
    "output": float(np.abs(output - predict(params)).max()),
    "weights": largest(trainer.parameters, state.params),
    "ema": largest(trainer.ema, state.ema_params),
    "weights_moved_by": largest(trainer.parameters, params),
  }
