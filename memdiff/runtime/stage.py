"""What the training loop is given: a stage, and what all stages of a run share."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from memdiff.config import at_least, one_of, setting
from memdiff.runtime import guard
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.preemption import Preemption
from memdiff.runtime.progress import Progress
from memdiff.runtime.random import base_keys
from memdiff.runtime.writers import TensorBoard


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """What decides the records and checkpoints of a run."""

  steps_per_dispatch: int = setting(50, "steps per call of the compiled program", at_least(1))
  eval_every: int = setting(1000, "steps between evaluations", at_least(1))
  checkpoint_every: int = setting(
    1000, "steps between checkpoints; a killed run loses at most these", at_least(1)
  )
  keep_checkpoints: int = setting(2, "newest checkpoints that are kept", at_least(1))
  keep_every: int = setting(
    0, "keep one checkpoint every so many steps for good; 0: none", at_least(0)
  )
  on_non_finite: str = setting(
    "stop", "stop and keep the batch, or skip the step", one_of(guard.ON_NON_FINITE)
  )
  max_skipped: int = setting(0, "skip: steps that may be skipped before the run stops", at_least(0))

  def __post_init__(self):
    for name in ("eval_every", "checkpoint_every"):
      if getattr(self, name) % self.steps_per_dispatch:
        raise ValueError(
          f"{name} is {getattr(self, name)}, but must be a multiple of steps_per_dispatch,"
          f" {self.steps_per_dispatch}."
        )
    if self.keep_every % self.checkpoint_every:
      raise ValueError(
        f"keep_every is {self.keep_every}, but must be a multiple of checkpoint_every,"
        f" {self.checkpoint_every}."
      )


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
  """How a run is executed; may change from one call to the next."""

  parameters: str = setting(
    "replicated",
    "fsdp splits parameters and optimiser state over the devices",
    one_of(mesh_lib.PARAMETERS),
  )
  show_folds: bool = setting(False, "whether TensorBoard shows the trainings of cross-validation")
  profile_stage: str = setting("", 'stage to profile, such as "classifier/csl"; "": none')
  profile_steps: tuple[int, ...] = setting(
    (), "its steps (first, last); lands in the stage's folder"
  )

  def __post_init__(self):
    if self.profile_steps and (
      len(self.profile_steps) != 2 or not 0 <= self.profile_steps[0] < self.profile_steps[1]
    ):
      raise ValueError(
        f"profile_steps is {self.profile_steps}, but must be (first, last) with first below last,"
        " or ()."
      )
    if bool(self.profile_steps) != bool(self.profile_stage):
      raise ValueError("profile_stage and profile_steps go together: give both, or neither.")


@dataclasses.dataclass(frozen=True)
class Stage:
  """One training, described for one seed.

  Attributes:
    name: unique in a run; names its folder, its curves and, without `streams`, its random streams.
    num_steps: optimiser steps.
    init: (base key, per_seed) -> TrainState.
    batch: (state, shared, per_seed) -> the batch that the next step sees; must be pure.
    step: (state, shared, per_seed) -> (state, {name: scalar}); must be pure.
    evaluate: (state, shared, per_seed) -> {name: scalar}, or None.
    shared: arrays on the devices that all seeds use.
    per_seed: arrays with a leading axis of seeds.
    batch_size: examples per step.
    batches: (seed, first step) -> an iterator over the host's part of each step's batch, for data
      too large for the devices; `batch` and `step` then get (per_seed, host batch) as `per_seed`.
    result: the fields of the final state that later phases read, for `results.save`.
    one_by_one: whether every seed runs by itself, in a thread, rather than all as one batch; on one
      device. Convolutions on CPUs gain nothing from the batch, and the program is a third the size.
    streams: names its random streams; stages with the same ones draw alike, for paired comparisons.
  """

  name: str
  num_steps: int
  init: Callable[[jax.Array, Any], Any]
  batch: Callable[[Any, Any, Any], Any]
  step: Callable[[Any, Any, Any], tuple[Any, dict[str, jax.Array]]]
  evaluate: Callable[[Any, Any, Any], dict[str, jax.Array]] | None
  shared: Any
  per_seed: Any
  batch_size: int
  batches: Callable[[int, int], Iterator[Any]] | None = None
  result: tuple[str, ...] = ("params",)
  one_by_one: bool = False
  streams: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
  """What all stages of a run share; `streams` begins the names of its random streams.

  Seeds and folds, or one round and the next, are numbered alike; different `streams` keep their
  random numbers apart.
  """

  seeds: tuple[int, ...]
  mesh: Mesh
  config: LoopConfig
  progress: Progress
  tensorboard: TensorBoard
  preemption: Preemption
  execution: ExecutionConfig = ExecutionConfig()
  streams: str = ""

  def keys(self, name: str) -> jax.Array:
    """One key per seed for the random stream `name`. [S]."""
    return base_keys(self.seeds, self.streams + name)
