"""The one training loop: classifier, feature diffusion and (later) pixel diffusion run on it.

A stage gives an initial state, a pure step and optionally an evaluation, all written for one seed.
The loop runs every seed at once under `vmap`, several steps per dispatch by `lax.scan`, over data
that already lies on the devices or over batches that a host iterator gives, and fetches the metrics
and the next batches while a dispatch works.
The order is fixed, so that state, history and checkpoint agree: restore, evaluate, save, step,
write. What was evaluated at a checkpoint is not evaluated again after a resume.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from memdiff.config import at_least, one_of
from memdiff.errors import WorkdirError
from memdiff.runtime import checkpoint as checkpoint_lib
from memdiff.runtime import guard
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.meter import Meter
from memdiff.runtime.preemption import Preemption
from memdiff.runtime.progress import Progress
from memdiff.runtime.random import base_keys
from memdiff.runtime.workdir import writing
from memdiff.runtime.writers import History, TensorBoard


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """What decides the records and checkpoints of a run."""

  steps_per_dispatch: int = at_least(1)
  eval_every: int = at_least(1)
  checkpoint_every: int = at_least(1)
  keep_checkpoints: int = at_least(1)
  keep_every: int = at_least(0)
  on_non_finite: str = one_of(guard.ON_NON_FINITE)
  max_skipped: int = at_least(0)

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

  parameters: str = one_of(mesh_lib.PARAMETERS)
  profile_stage: str
  profile_steps: tuple[int, ...]

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
    name: unique in a run; names its folder, its random streams and its curves.
    num_steps: optimiser steps.
    init: (base key, own) -> TrainState.
    batch: (state, shared, own) -> the batch that the next step sees; must be pure.
    step: (state, shared, own) -> (state, {name: scalar}); must be pure.
    evaluate: (state, shared, own) -> {name: scalar}, or None.
    shared: arrays on the devices that all seeds use.
    own: arrays with a leading axis of seeds, each seed's own.
    batch_size: examples per step.
    batches: (seed, first step) -> an iterator over the host's part of each step's batch, for data
      too large for the devices; `batch` and `step` then get (own, host batch) in place of `own`.
  """

  name: str
  num_steps: int
  init: Callable[[jax.Array, Any], Any]
  batch: Callable[[Any, Any, Any], Any]
  step: Callable[[Any, Any, Any], tuple[Any, dict[str, jax.Array]]]
  evaluate: Callable[[Any, Any, Any], dict[str, jax.Array]] | None
  shared: Any
  own: Any
  batch_size: int
  batches: Callable[[int, int], Iterator[Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Run:
  """What all stages of a run share."""

  seeds: tuple[int, ...]
  mesh: Mesh
  config: LoopConfig
  progress: Progress
  tensorboard: TensorBoard
  preemption: Preemption
  execution: ExecutionConfig = ExecutionConfig("replicated", "", ())


def state_specs(stage: Stage, run: Run) -> Any:
  """Specs of one seed's state."""
  own = jax.eval_shape(lambda own: jax.tree.map(lambda x: x[0], own), stage.own)
  one_seed = jax.eval_shape(stage.init, jax.random.key(0), own)
  return mesh_lib.state_specs(one_seed, run.mesh, run.execution.parameters)


def state_shardings(stage: Stage, run: Run) -> Any:
  """Shardings of the stage's state, seeds included."""
  return jax.tree.map(
    lambda spec: NamedSharding(run.mesh, mesh_lib.with_seed_axis(spec)), state_specs(stage, run)
  )


def abstract_state(stage: Stage, run: Run) -> Any:
  """Shapes, dtypes and shardings of the stage's state over all seeds."""
  keys = jax.eval_shape(lambda: base_keys(run.seeds, stage.name))
  shapes = jax.eval_shape(jax.vmap(stage.init), keys, stage.own)
  return checkpoint_lib.abstract(shapes, state_shardings(stage, run))


def make_init(stage: Stage, run: Run) -> Callable:
  """The jitted () -> state of all seeds, born where it belongs."""
  keys = base_keys(run.seeds, stage.name)
  init = jax.jit(jax.vmap(stage.init), out_shardings=state_shardings(stage, run))
  return functools.partial(init, keys, stage.own)


def make_dispatch(stage: Stage, run: Run) -> Callable:
  """The jitted program that trains several steps of every seed.

  Returns:
    (state, alive [S], shared, own, batches, num_steps) -> (state, alive, metrics [S, num_steps]).
    State and `alive` are donated; `batches` is None or has arrays that lead with [S, num_steps].
  """
  specs, mesh = state_specs(stage, run), run.mesh
  step = guard.guarded(stage.step, run.config.on_non_finite)
  if run.execution.parameters == "fsdp":
    step = _with_split_parameters(step, specs, mesh)

  def dispatch(state, alive, shared, own, batches, *, num_steps):
    def one_seed(state, alive, own, batches):
      def body(carry, batch):
        *carry, metrics = step(*carry, shared, own if batch is None else (own, batch))
        return tuple(carry), metrics

      (new, alive), metrics = jax.lax.scan(body, (state, alive), batches, length=num_steps)
      if run.config.on_non_finite == "stop":
        new = guard.choose(alive, new, state)
      return new, alive, metrics

    return jax.vmap(one_seed)(state, alive, own, batches)

  everywhere = mesh_lib.replicated(mesh)
  return jax.jit(
    dispatch,
    static_argnames="num_steps",
    donate_argnums=(0, 1),
    out_shardings=(state_shardings(stage, run), everywhere, everywhere),
  )


def _with_split_parameters(step: Callable, specs: Any, mesh: Mesh) -> Callable:
  """FSDP: parameters lie split, are gathered for the step, and are split again after it."""

  def fsdp_step(state, alive, *rest):
    whole = state.replace(
      params=mesh_lib.gather(state.params, mesh),
      model_state=mesh_lib.gather(state.model_state, mesh),
    )
    state, alive, metrics = step(whole, alive, *rest)
    state = state.replace(
      **{
        name: mesh_lib.constrain(getattr(state, name), getattr(specs, name), mesh)
        for name in ("params", "opt_state", "ema_params", "model_state")
      }
    )
    return state, alive, metrics

  return fsdp_step


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


class _Profile:
  """A trace of the steps that the config names, for TensorBoard's and Perfetto's profilers."""

  def __init__(self, stage: Stage, run: Run, folder: pathlib.Path):
    chosen = run.execution.profile_stage == stage.name
    self._steps = run.execution.profile_steps if chosen else ()
    self._folder, self._progress, self._running = folder, run.progress, False

  def at(self, step: int, wait_for: Any) -> None:
    """Called before every dispatch; the first whose step has come starts or stops the trace."""
    if not self._running and self._steps and self._steps[0] <= step < self._steps[1]:
      jax.block_until_ready(wait_for)
      jax.profiler.start_trace(str(self._folder))
      self._running = True
    elif self._running and step >= self._steps[1]:
      self.close(wait_for)

  def close(self, wait_for: Any = None) -> None:
    if self._running:
      jax.block_until_ready(wait_for)
      jax.profiler.stop_trace()
      self._progress.say(f"profile written to {self._folder}")
      self._running, self._steps = False, ()


@dataclasses.dataclass(frozen=True)
class _Pending:
  """Steps [first, last) that were dispatched and whose metrics are not yet fetched."""

  first: int
  last: int
  metrics: dict[str, jax.Array]
  batches: Any

  def is_ready(self) -> bool:
    return all(x.is_ready() for x in jax.tree.leaves(self.metrics))


class _Training:
  """One call of `train`: the state's companions on the host."""

  def __init__(self, stage: Stage, run: Run, directory: pathlib.Path):
    self.stage, self.run, self.directory = stage, run, directory
    self.meter = Meter(directory, stage.batch_size, len(run.seeds))
    self.history = History(directory / "metrics.jsonl")

  def resume(self, step: int, *, restored: bool) -> None:
    """Drops the records beyond `step`, which a killed process had written."""
    kept = self.history.rewind(step if restored else -1)
    self.run.tensorboard.rewind(self.stage.name, step if restored else -1)
    self._skipped = sum(int(max(r["metrics"].get("skipped", [0]))) for r in kept)

  def write(self, step: int, kind: str, metrics: dict[str, np.ndarray]) -> None:
    self.history.write(step, kind, metrics)
    values = {f"{kind}/{n}": float(np.mean(v)) for n, v in metrics.items()}
    self.run.tensorboard.scalars(step, values, self.stage.name)

  def collect(self, pending: _Pending, state: Any) -> None:
    """Fetches the metrics of finished steps; stops the run where they are not finite."""
    stage, run = self.stage, self.run
    fetched = jax.device_get(pending.metrics)
    finite = fetched.pop(guard.FINITE)
    self.meter.trained(pending.last - pending.first)
    bad = guard.first_bad(finite)
    if bad is not None:
      self._skipped += int((~finite).sum(axis=1).max())
      if run.config.on_non_finite == "stop" or self._skipped > run.config.max_skipped:
        self._stop(pending, state, fetched, *bad)
    if bad is None:
      means = {name: values.mean(axis=1) for name, values in fetched.items()}
    else:
      means = {name: guard.mean_where(finite, values) for name, values in fetched.items()}
      means["skipped"] = (~finite).sum(axis=1)
    self.write(pending.last, "train", means)
    speed = {f"speed/{n}": float(v) for n, v in self.meter.summary().items()}
    run.tensorboard.scalars(pending.last, speed, stage.name)
    shown = {name: float(value.mean()) for name, value in means.items()}
    run.progress.step(stage.name, pending.last, stage.num_steps, shown)

  def _stop(self, pending: _Pending, state: Any, metrics, seed: int, offset: int) -> None:
    """Keeps the batch that a bad step met, and raises NonFiniteError."""
    stage, run = self.stage, self.run
    step, kept = pending.first + offset, None
    words = guard.blame(metrics, seed, offset)
    if run.config.on_non_finite == "skip":
      words = f"{self._skipped} bad steps are more than {run.config.max_skipped}; {words}"
    else:  # the seed stands where the dispatch began

      def draw(state, shared, own, batches):
        state, own, batches = jax.tree.map(lambda x: x[seed], (state, own, batches))

        def of_step(number):
          return own if batches is None else (own, jax.tree.map(lambda x: x[number], batches))

        def advance(number, state):
          return stage.step(state, shared, of_step(number))[0]

        state = jax.lax.fori_loop(0, offset, advance, state)
        return stage.batch(state, shared, of_step(offset))

      batch = mesh_lib.fetch(jax.jit(draw)(state, stage.shared, stage.own, pending.batches))
      kept = guard.dump(batch, self.directory, stage.name, step, run.seeds[seed])
    guard.stop(stage.name, words, step, run.seeds[seed], kept)


def train(stage: Stage, run: Run, directory: pathlib.Path) -> Any:
  """Trains the stage to its end, from its newest checkpoint if there is one.

  Args:
    stage: what to train.
    run: seeds, mesh, cadence, and where to report.
    directory: of the stage; gets `checkpoints/`, `metrics.jsonl` and `speed.json`.

  Returns:
    The final state, with a leading axis of seeds.

  Raises:
    NonFiniteError: naming the stage, the metric, the step and the seed.
    Preempted: after saving, where the run was asked to stop.
  """
  config, progress = run.config, run.progress
  with writing(directory):
    (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
  training = _Training(stage, run, directory)
  meter = training.meter
  dispatch = make_dispatch(stage, run)
  evaluate = stage.evaluate and jax.jit(
    jax.vmap(stage.evaluate, in_axes=(0, None, 0)), out_shardings=mesh_lib.replicated(run.mesh)
  )
  checkpointer = checkpoint_lib.Checkpointer(
    directory / "checkpoints", config.keep_checkpoints, config.keep_every
  )
  newest = training.history.complete_until(checkpointer.records())
  restored = checkpointer.restore(abstract_state(stage, run), newest)
  if restored is None:
    step = 0
    with progress.compiling(f"{stage.name} initial state"), meter.apart("compile"):
      state = jax.block_until_ready(make_init(stage, run)())
  else:
    step, state = restored
    progress.say(f"{stage.name} resumes at step {step}/{stage.num_steps}")
  training.resume(step, restored=restored is not None)
  written = step if restored else -1  # at which all is evaluated and saved

  feed = _Feed(stage, run, step)
  profile = _Profile(stage, run, directory / "profile")
  alive = mesh_lib.replicate(run.mesh, np.ones(len(run.seeds), bool))
  pending, compiled = None, {}
  progress.start_stage(step)
  try:
    while True:
      done, stops = step == stage.num_steps, run.preemption.asked()
      saves = (done or stops or step % config.checkpoint_every == 0) and step != written
      evaluates = evaluate and (done or step % config.eval_every == 0) and step != written
      if pending and (saves or evaluates or stops):
        training.collect(pending, state)
        pending = None
      if evaluates:
        with meter.apart("evaluate"):
          scores = jax.device_get(evaluate(state, stage.shared, stage.own))
        training.write(step, "eval", scores)
      if saves and (done or step > 0):
        with meter.apart("checkpoint"):
          checkpointer.save(step, state, training.history.number)
      if done:
        return state
      if stops:
        checkpointer.wait()
        run.preemption.stop(f"after step {step}/{stage.num_steps} of {stage.name} was saved")
      count = min(config.steps_per_dispatch, stage.num_steps - step)
      start = time.perf_counter()
      batches = feed.take(count)
      if pending and pending.is_ready():
        meter.waited(time.perf_counter() - start)
      if count not in compiled:
        with (
          progress.compiling(f"{stage.name} step ({count} steps per dispatch)"),
          meter.apart("compile"),
        ):
          lowered = dispatch.lower(state, alive, stage.shared, stage.own, batches, num_steps=count)
          compiled[count] = lowered.compile()
        meter.compiled(compiled[count])
        progress.start_stage(step)
      meter.start()
      profile.at(step, state)
      with jax.transfer_guard("disallow"):
        state, alive, metrics = compiled[count](state, alive, stage.shared, stage.own, batches)
      if pending:
        training.collect(pending, state)
      pending = _Pending(step, step + count, metrics, batches)
      step += count
  finally:
    profile.close()
    feed.close()
    checkpointer.close()
    meter.save()


def load_final(stage: Stage, run: Run, directory) -> Any:
  """The state at the end of a finished stage, on the present devices."""
  config = run.config
  checkpointer = checkpoint_lib.Checkpointer(
    directory / "checkpoints", config.keep_checkpoints, config.keep_every
  )
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
