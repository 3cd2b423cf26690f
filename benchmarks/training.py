"""A training stage as the training loop runs it, for timing."""

import contextlib
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from memdiff.runtime import loop, programs
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.loop import Stage
from memdiff.runtime.preemption import Preemption
from memdiff.runtime.progress import Progress
from memdiff.runtime.writers import TensorBoard


def make_run(
  seeds: tuple[int, ...], mesh: Mesh, steps: int, parameters: str = "replicated"
) -> loop.Run:
  """What the loop's programs ask of a run; nothing is reported or written."""
  return loop.Run(
    seeds=seeds,
    mesh=mesh,
    config=loop.LoopConfig(steps, steps, steps, 1, 0, "stop", 0),
    progress=Progress(1),
    tensorboard=TensorBoard(pathlib.Path("unused"), enabled=False),
    preemption=Preemption(mesh),
    execution=loop.ExecutionConfig(parameters, False, "", ()),
  )


class Training:
  """A stage under the loop's own dispatch: every call does `steps` steps of every seed."""

  def __init__(self, stage: Stage, seeds: tuple[int, ...], mesh: Mesh, steps: int):
    self.stage, self.steps, self.work = stage, steps, steps * len(seeds)
    self.done = 0
    run = make_run(seeds, mesh, steps)
    self.state = programs.make_init(stage, run)()
    self._alive = mesh_lib.replicate(mesh, np.ones(len(seeds), bool))
    self._count = mesh_lib.replicate(mesh, np.int32(steps))
    arguments = (self.state, self._alive, stage.shared, stage.per_seed, None, self._count)
    dispatch = programs.make_dispatch(stage, run)
    self._compiled = dispatch.compile(arguments, steps, contextlib.nullcontext())

  def __call__(self) -> Any:
    self.state, self._alive, metrics = self._compiled(
      self.state, self._alive, self.stage.shared, self.stage.per_seed, None, self._count
    )
    self.done += self.steps
    return self.state, metrics

  def train_until(self, step: int) -> None:
    while self.done < step:
      jax.block_until_ready(self())


def step_flops(stage: Stage) -> float:
  """Operations of one optimiser step of one seed, as XLA counts them in a program without loop."""
  per_seed = jax.tree.map(lambda x: x[0], stage.per_seed)
  state = jax.eval_shape(stage.init, jax.random.key(0), per_seed)
  return float(jax.jit(stage.step).lower(state, stage.shared, per_seed).cost_analysis()["flops"])
