"""The one training loop: classifier, feature diffusion and (later) pixel diffusion run on it.

A stage gives an initial state, a pure step and optionally an evaluation, all written for one seed.
The loop runs every seed at once, under `vmap` or, on one CPU, each in a thread. It takes several
steps per dispatch in a compiled loop, over data that already lies on the devices or over batches
that a host iterator gives, and fetches the metrics and the next batches while a dispatch works.
The order is fixed, so that state, history and checkpoint agree: restore, evaluate, save, step,
write. What was evaluated at a checkpoint is not evaluated again after a resume.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from memdiff.runtime import checkpoint as checkpoint_lib
from memdiff.runtime import guard, programs, results
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.meter import Meter
from memdiff.runtime.stage import ExecutionConfig, LoopConfig, Run, Stage
from memdiff.runtime.workdir import writing
from memdiff.runtime.writers import History

__all__ = ["ExecutionConfig", "LoopConfig", "Run", "Stage", "train"]


class _Feed:
  """The batches of the next dispatches, on the devices: every seed's, several steps stacked."""

  def __init__(self, stage: Stage, run: Run, first_step: int, at_most: int):
    """Every dispatch has room for `at_most` steps."""
    self._mesh, self._at_most = run.mesh, at_most
    self._iterators = stage.batches and [stage.batches(seed, first_step) for seed in run.seeds]

  def take(self, num_steps: int) -> Any:
    """Arrays [S, at_most, B, ...], B split over the devices; None if the stage has none.

    The first `num_steps` batches are new; a copy of the last one fills the room behind them.
    """
    if self._iterators is None:
      return None
    seeds = [[next(iterator) for _ in range(num_steps)] for iterator in self._iterators]
    seeds = [batches + batches[-1:] * (self._at_most - num_steps) for batches in seeds]
    stacked = jax.tree.map(
      lambda *leaves: np.stack(leaves).reshape(len(seeds), self._at_most, *leaves[0].shape),
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

  def begin(self, checkpointer: checkpoint_lib.Checkpointer) -> tuple[int, Any, int]:
    """The newest checkpoint, or the initial state; drops the records of later steps.

    Returns:
      (step, state, the step at which all is evaluated and saved, or -1).
    """
    stage, run = self.stage, self.run
    newest = self.history.complete_until(checkpointer.records())
    restored = checkpointer.restore(programs.abstract_state(stage, run), newest)
    if restored is None:
      step, written = 0, -1
      with self.meter.apart("compile"):
        state = jax.block_until_ready(programs.make_init(stage, run)())
    else:
      (step, state), written = restored, restored[0]
      run.progress.say(f"{stage.name} resumes at step {step}/{stage.num_steps}")
    kept = self.history.rewind(written)
    run.tensorboard.rewind(stage.name, written)
    self._skipped = sum(int(max(r["metrics"].get("skipped", [0]))) for r in kept)
    return step, state, written

  def compile(self, dispatch: programs.Dispatch, arguments: tuple, at_most: int) -> Callable:
    words = f"{self.stage.name} ({at_most} steps per dispatch)"
    with self.meter.apart("compile"):
      executable = dispatch.compile(arguments, at_most, self.run.progress.compiling(words))
    self.meter.compiled(executable)
    return executable

  def write(self, step: int, kind: str, metrics: dict[str, np.ndarray]) -> None:
    self.history.write(step, kind, metrics)
    values = {f"{kind}/{n}": float(np.mean(v)) for n, v in metrics.items()}
    self.run.tensorboard.scalars(step, values, self.stage.name)

  def collect(self, pending: _Pending, state: Any) -> None:
    """Fetches the metrics of finished steps; stops the run if they are not finite."""
    stage, run = self.stage, self.run
    number = pending.last - pending.first
    fetched = {name: x[:, :number] for name, x in jax.device_get(pending.metrics).items()}
    finite = fetched.pop(guard.FINITE)
    self.meter.trained(number)
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

      def draw(state, shared, per_seed, batches):
        state, per_seed, batches = jax.tree.map(lambda x: x[seed], (state, per_seed, batches))

        def of_step(number):
          return (
            per_seed if batches is None else (per_seed, jax.tree.map(lambda x: x[number], batches))
          )

        def advance(number, state):
          return stage.step(state, shared, of_step(number))[0]

        state = jax.lax.fori_loop(0, offset, advance, state)
        return stage.batch(state, shared, of_step(offset))

      batch = mesh_lib.fetch(jax.jit(draw)(state, stage.shared, stage.per_seed, pending.batches))
      kept = guard.dump(batch, self.directory, stage.name, step, run.seeds[seed])
    guard.stop(stage.name, words, step, run.seeds[seed], kept)


def train(stage: Stage, run: Run, directory: pathlib.Path) -> Any:
  """Trains the stage to its end, from its newest checkpoint if there is one.

  Args:
    stage: what to train.
    run: seeds, mesh, cadence, and where to report.
    directory: of the stage; gets `checkpoints/`, `metrics.jsonl`, `speed.json` and, at the end,
      `result.npz`.

  Returns:
    The final state, with a leading axis of seeds.

  Raises:
    NonFiniteError: naming the stage, the metric, the step and the seed.
    Preempted: after saving, if the run was asked to stop.
  """
  config, progress = run.config, run.progress
  with writing(directory):
    (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
  training = _Training(stage, run, directory)
  meter = training.meter
  dispatch = programs.make_dispatch(stage, run)
  evaluate = stage.evaluate and programs.make_evaluate(stage, run)
  checkpointer = checkpoint_lib.Checkpointer(
    directory / "checkpoints", config.keep_checkpoints, config.keep_every
  )
  step, state, written = training.begin(checkpointer)
  at_most = min(config.steps_per_dispatch, stage.num_steps)
  feed = _Feed(stage, run, step, at_most)
  profile = _Profile(stage, run, directory / "profile")
  alive = mesh_lib.replicate(run.mesh, np.ones(len(run.seeds), bool))
  pending, executable = None, None
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
          scores = jax.device_get(evaluate(state, stage.shared, stage.per_seed))
        training.write(step, "eval", scores)
      if saves and (done or step > 0):
        with meter.apart("checkpoint"):
          checkpointer.save(step, state, training.history.number)
      if done:
        if stage.result:
          results.save(directory, state, stage.result)
        return state
      if stops:
        checkpointer.wait()
        run.preemption.stop(f"after step {step}/{stage.num_steps} of {stage.name} was saved")
      count = min(at_most, stage.num_steps - step)
      start = time.perf_counter()
      batches = feed.take(count)
      if pending and pending.is_ready():
        meter.waited(time.perf_counter() - start)
      number = mesh_lib.replicate(run.mesh, np.int32(count))
      arguments = (state, alive, stage.shared, stage.per_seed, batches, number)
      if executable is None:
        executable = training.compile(dispatch, arguments, at_most)
        progress.start_stage(step)
      meter.start()
      profile.at(step, state)
      with jax.transfer_guard("disallow"):
        state, alive, metrics = executable(*arguments)
      if pending:
        training.collect(pending, state)
      pending = _Pending(step, step + count, metrics, batches)
      step += count
  finally:
    profile.close()
    feed.close()
    checkpointer.close()
    meter.save()
