"""A training stage as the training loop runs it, for timing."""

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from memdiff.runtime import loop
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.loop import Stage
from memdiff.runtime.random import base_keys


class Training:
  """A stage under the loop's own dispatch: every call does `steps` steps of every seed."""

  def __init__(self, stage: Stage, seeds: tuple[int, ...], mesh: Mesh, steps: int):
    self.stage, self.steps, self.work = stage, steps, steps * len(seeds)
    self.done = 0
    shardings = loop.state_shardings(stage, mesh)
    init = jax.jit(jax.vmap(stage.init), out_shardings=shardings)
    self.state = init(base_keys(seeds, stage.name), stage.own)
    dispatch = jax.jit(
      functools.partial(loop._dispatch, stage=stage),
      static_argnames="num_steps",
      donate_argnums=0,
      out_shardings=(shardings, mesh_lib.replicated(mesh)),
    )
    lowered = dispatch.lower(self.state, stage.shared, stage.own, None, num_steps=steps)
    self._compiled = lowered.compile()

  def __call__(self) -> Any:
    self.state, metrics = self._compiled(self.state, self.stage.shared, self.stage.own, None)
    self.done += self.steps
    return self.state, metrics

  def train_until(self, step: int) -> None:
    while self.done < step:
      jax.block_until_ready(self())
