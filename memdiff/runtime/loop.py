"""The one training loop: classifier, feature diffusion and (later) pixel diffusion run on it.

A stage gives an initial state, a pure step and optionally an evaluation, all written for one seed.
The loop runs every seed at once under `vmap`, several steps per dispatch by `lax.scan`, over data
that already lies on the devices or over batches that a host iterator gives, and fetches the metrics
and the next batches while a dispatch works.
The order is fixed, so that state, history and checkpoint agree: restore, evaluate, save, step,
write.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memdiff.config import at_least
from memdiff.errors import NonFiniteError, WorkdirError
from memdiff.runtime import checkpoint as checkpoint_lib
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.progress import Progress
from memdiff.runtime.random import base_keys
from memdiff.runtime.writers import History, TensorBoard


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  steps_per_dispatch: int = at_least(1)
  eval_every: int = at_least(1)
  checkpoint_every: int = at_least(1)
  keep_checkpoints: int = at_least(1)

  def __post_init__(self):
    for name in ("eval_every", "checkpoint_every"):
      if getattr(self, name) % self.steps_per_dispatch:
        raise ValueError(
          f"{name} is {getattr(self, name)}, but must be a multiple of steps_per_dispatch,"
          f" {self.steps_per_dispatch}."
        )


@dataclasses.dataclass(frozen=True)
class Stage:
  """One training, described for one seed.

  Attributes:
    name: unique in a run; names its folder, its random streams and its curves.
    num_steps: optimiser steps.
    init: (base key, own) -> TrainState.
    step: (state, shared, own) -> (state, {name: scalar}); must be pure.
    evaluate: (state, shared, own) -> {name: scalar}, or None.
    shared: arrays on the devices that all seeds use.
    own: arrays with a leading axis of seeds, each seed's own.
    batches: (seed, first step) -> an iterator over the host's part of each step's batch, for data
      too large for the devices; `step` then gets (own, batch) in place of `own`.
    partition: abstract TrainState of one seed -> the same tree of PartitionSpecs; None replicates.
  """

  name: str
  num_steps: int
  init: Callable[[jax.Array, Any], Any]
  step: Callable[[Any, Any, Any], tuple[Any, dict[str, jax.Array]]]
  evaluate: Callable[[Any, Any, Any], dict[str, jax.Array]] | None
  shared: Any
  own: Any
  partition: Callable[[Any], Any] | None = None
  batches: Callable[[int, int], Iterator[Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Run:
  """What all stages of a run share."""

  seeds: tuple[int, ...]
  mesh: Mesh
  config: LoopConfig
  progress: Progress
  tensorboard: TensorBoard


def with_seed_axis(spec: PartitionSpec) -> PartitionSpec:
  """The spec of an array that carries a leading, unsplit axis of seeds."""
  return PartitionSpec(None, *spec)


def state_shardings(stage: Stage, mesh: Mesh) -> Any:
  """Shardings of the stage's state, seeds included."""
  own = jax.eval_shape(lambda own: jax.tree.map(lambda x: x[0], own), stage.own)
  one_seed = jax.eval_shape(stage.init, jax.random.key(0), own)
  if stage.partition is None:
    specs = jax.tree.map(lambda _: PartitionSpec(), one_seed)
  else:
    specs = stage.partition(one_seed)
  return jax.tree.map(lambda s: NamedSharding(mesh, with_seed_axis(s)), specs)


def abstract_state(stage: Stage, run: Run) -> Any:
  """Shapes, dtypes and shardings of the stage's state over all seeds."""
  keys = jax.eval_shape(lambda: base_keys(run.seeds, stage.name))
  shapes = jax.eval_shape(jax.vmap(stage.init), keys, stage.own)
  return checkpoint_lib.abstract(shapes, state_shardings(stage, run.mesh))


def _dispatch(state, shared, own, batches, *, stage: Stage, num_steps: int):
  """`num_steps` steps of every seed. Returns the state and metrics [S, num_steps].

  `batches` is None or has arrays that lead with [S, num_steps].
  """

  def one_seed(state, own, batches):
    def body(state, batch):
      return stage.step(state, shared, own if batch is None else (own, batch))

    return jax.lax.scan(body, state, batches, length=num_steps)

  return jax.vmap(one_seed)(state, own, batches)


class _Feed:
  """The batches of the next dispatches, on the devices: every seed's, several steps stacked."""

  def __init__(self, stage: Stage, run: Run, first_step: int):
    self._mesh = run.mesh
    self._iterators = stage.batches and [stage.batches(seed, first_step) for seed in run.seeds]

  def take(self, num_steps: int) -> Any:
    """Arrays [S, num_steps, B, ...], B split over the devices; None where the stage has none."""
    if self._iterators is None:
      return None
    seeds = [[next(iterator) for _ in range(num_steps)] for iterator in self._iterators]
    stacked = jax.tree.map(
      lambda *leaves: np.stack(leaves).reshape(len(seeds), num_steps, *leaves[0].shape),
      *[batch for batches in seeds for batch in batches],
    )
    return jax.tree.map(lambda x: mesh_lib.place_batches(self._mesh, x), stacked)

  def close(self) -> None:
    for iterator in self._iterators or ():
      iterator.close()


def _check_finite(metrics: dict[str, np.ndarray], stage: Stage, first: int, seeds) -> None:
  for name, values in metrics.items():
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
      seed, offset = bad[bad[:, 1].argmin()]
      raise NonFiniteError(
        f"Stage {stage.name}: {name} became {values[seed, offset]} at step {first + offset} (seed"
        f" {seeds[seed]}); the last checkpoint is intact, try a lower learning rate or a"
        " clip_norm in a new --workdir."
      )


def train(stage: Stage, run: Run, directory) -> Any:
  """Trains the stage to its end, from its newest checkpoint if there is one.

  Args:
    stage: what to train.
    run: seeds, mesh, cadence, and where to report.
    directory: `pathlib.Path` of the stage; gets `checkpoints/` and `metrics.jsonl`.

  Returns:
    The final state, with a leading axis of seeds.

  Raises:
    NonFiniteError: naming the stage, the metric, the step and the seed.
  """
  config, progress = run.config, run.progress
  directory.mkdir(parents=True, exist_ok=True)
  history = History(directory / "metrics.jsonl")
  shardings = state_shardings(stage, run.mesh)
  dispatch = jax.jit(
    functools.partial(_dispatch, stage=stage),
    static_argnames="num_steps",
    donate_argnums=0,
    out_shardings=(shardings, mesh_lib.replicated(run.mesh)),
  )
  evaluate = stage.evaluate and jax.jit(jax.vmap(stage.evaluate, in_axes=(0, None, 0)))
  checkpointer = checkpoint_lib.Checkpointer(directory / "checkpoints", config.keep_checkpoints)

  def write(step: int, kind: str, metrics: dict[str, np.ndarray]) -> None:
    history.write(step, kind, metrics)
    run.tensorboard.scalars(
      step, {f"{stage.name}/{kind}/{n}": float(v.mean()) for n, v in metrics.items()}
    )

  def collect(first: int, last: int, metrics: dict[str, jax.Array]) -> None:
    """Fetches the metrics of the steps [first, last); they have finished, or are waited for."""
    fetched = jax.device_get(metrics)
    _check_finite(fetched, stage, first, run.seeds)
    means = {name: values.mean(axis=1) for name, values in fetched.items()}
    write(last, "train", means)
    shown = {name: float(value.mean()) for name, value in means.items()}
    progress.step(stage.name, last, stage.num_steps, shown)

  restored = checkpointer.restore(abstract_state(stage, run))
  if restored is None:
    step = 0
    with progress.compiling(f"{stage.name} initial state"):
      init = jax.jit(jax.vmap(stage.init), out_shardings=shardings)
      state = jax.block_until_ready(init(base_keys(run.seeds, stage.name), stage.own))
  else:
    step, state = restored
    progress.say(f"{stage.name} resumes at step {step}/{stage.num_steps}")
  history.rewind(step)

  feed = _Feed(stage, run, step)
  pending = None
  compiled = {}
  progress.start_stage(step)
  try:
    while True:
      done = step == stage.num_steps
      saves = done or step % config.checkpoint_every == 0
      evaluates = evaluate and (done or step % config.eval_every == 0)
      if pending and (saves or evaluates):
        collect(*pending)
        pending = None
      if evaluates:
        write(step, "eval", jax.device_get(evaluate(state, stage.shared, stage.own)))
      if done or (saves and step > 0):
        checkpointer.save(step, state)
      if done:
        return state
      count = min(config.steps_per_dispatch, stage.num_steps - step)
      batches = feed.take(count)
      if count not in compiled:
        with progress.compiling(f"{stage.name} step ({count} steps per dispatch)"):
          lowered = dispatch.lower(state, stage.shared, stage.own, batches, num_steps=count)
          compiled[count] = lowered.compile()
        progress.start_stage(step)
      with jax.transfer_guard("disallow"):
        state, metrics = compiled[count](state, stage.shared, stage.own, batches)
      if pending:
        collect(*pending)
      pending = (step, step + count, metrics)
      step += count
  finally:
    feed.close()
    checkpointer.close()


def load_final(stage: Stage, run: Run, directory) -> Any:
  """The state at the end of a finished stage, on the present devices."""
  checkpointer = checkpoint_lib.Checkpointer(directory / "checkpoints", run.config.keep_checkpoints)
  try:
    restored = checkpointer.restore(abstract_state(stage, run))
  finally:
    checkpointer.close()
  if restored is None or restored[0] != stage.num_steps:
    raise WorkdirError(
      f"{directory} holds no checkpoint of step {stage.num_steps}, the end of {stage.name}; remove"
      f" the folder {directory} and the manifest.json beside or in it to train the stage anew."
    )
  return restored[1]
