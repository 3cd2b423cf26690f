"""Runs an experiment of any kind, phase by phase, from where its workdir stands to the report."""

import contextlib
import functools
import itertools
import shlex
import time
from collections.abc import Iterator, Mapping
from typing import Any

from input_pipeline.long_tail import LongTailLabels
from memdiff import config as config_lib
from memdiff.errors import ConfigError
from memdiff.experiments import augmented, classification, features, images, record
from memdiff.experiments.base import Experiment, Kind, Phase
from memdiff.runtime import ahead, distributed, environment, loop
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.preemption import Preemption
from memdiff.runtime.progress import CompileClock, Progress
from memdiff.runtime.workdir import DATA, Workdir
from memdiff.runtime.writers import TensorBoard

KINDS = {
  "memdiff": features.IMAGES,
  "features": features.EMBEDDINGS,
  "classification": classification.KIND,
  "images": images.KIND,
  "augmented": augmented.KIND,
}


def kind_of(config: Mapping[str, Any]) -> Kind:
  """The kind that `config.experiment` names."""
  name = config.get("experiment")
  if not isinstance(name, str) or name not in KINDS:
    raise ConfigError(f"config.experiment is {name!r}, but must be one of {', '.join(KINDS)}.")
  return KINDS[name]


def settings_of(config: Mapping[str, Any]) -> Any:
  """The settings of a config of any kind; raises ConfigError if it is not valid."""
  return config_lib.build(kind_of(config).settings, config)


def prepare(config: Mapping[str, Any]) -> tuple[Kind, Any, LongTailLabels]:
  """(kind, settings, data) of an experiment, with all that can be checked before it starts.

  Raises:
    MemdiffError: with a sentence for the user.
  """
  environment.check_switches()
  kind = kind_of(config)
  settings = settings_of(config)
  data = kind.load(settings.dataset)
  kind.check(settings, data)
  return kind, settings, data


def phase_config(experiment: Experiment, phases: tuple[Phase, ...], phase: Phase) -> dict[str, Any]:
  """The flat config that the phase's manifest is held against, earlier phases' included.

  The data are part of it: all of them for every phase.
  """
  so_far = phases[: phases.index(phase) + 1]
  read = {name for p in so_far for name in p.fields_read(experiment.config)}
  flat = config_lib.flatten(config_lib.as_dict(experiment.config))
  flat = {path: value for path, value in flat.items() if read & set(_groups(path))}
  return flat | {f"{DATA}{name}": digest for name, digest in experiment.data_digests.items()}


def _groups(path: str) -> list[str]:
  """`a.b.c` -> [`a`, `a.b`, `a.b.c`]."""
  return list(itertools.accumulate(path.split("."), "{}.{}".format))


def open_experiment(
  config: Mapping[str, Any], workdir: str, *, tensorboard: bool, command: str
) -> tuple[Kind, Experiment]:
  """An experiment that is checked, with its data and devices; its workdir is locked until closed.

  Args and Raises: of `run`.
  """
  kind, settings, data = prepare(config)
  folder = Workdir(workdir)
  mesh = mesh_lib.make_mesh()
  return kind, Experiment(
    config=settings,
    dataset=data,
    workdir=folder,
    run=loop.Run(
      seeds=settings.seeds,
      mesh=mesh,
      config=settings.loop,
      progress=Progress(len(kind.phases_of(settings))),
      tensorboard=TensorBoard(folder.path / "tensorboard", tensorboard),
      preemption=Preemption(mesh),
      execution=settings.execution,
    ),
    command=command,
  )


def run(config: Mapping[str, Any], workdir: str, *, tensorboard: bool, command: str) -> dict:
  """Runs an experiment from where its workdir stands to the report.

  Args:
    config: the values of the settings of its kind, which `config["experiment"]` names.
    workdir: folder of the run; made if it does not exist.
    tensorboard: whether to write TensorBoard events (needs TensorFlow).
    command: what the user typed, for the report.

  Returns:
    The report, as written to report.json.

  Raises:
    MemdiffError: with a sentence for the user.
  """
  with distributed.noticing():
    kind, experiment = open_experiment(config, workdir, tensorboard=tensorboard, command=command)
    try:
      with experiment.run.preemption.listening():
        return _run_phases(experiment, kind)
    finally:
      try:
        experiment.run.tensorboard.close()  # raises what its thread has met
      finally:
        experiment.workdir.close()


def _run_phases(experiment: Experiment, kind: Kind) -> dict:
  phases, clock = kind.phases_of(experiment.config), CompileClock()
  for phase in phases:  # a changed config is refused before any work
    if experiment.workdir.manifest(phase.name) is not None:
      experiment.workdir.begin(phase.name, phase_config(experiment, phases, phase))
  unfinished = [
    p for p in phases if not (experiment.workdir.manifest(p.name) or {}).get("finished")
  ]
  begun: set[str] = set()

  def compile_ahead(phase: Phase) -> None:
    if phase.name not in begun:  # else it compiles its programs itself
      phase.compile_ahead(experiment)

  tasks = [functools.partial(compile_ahead, p) for p in unfinished if p.compile_ahead]
  with ahead.compiling_ahead(tasks, experiment.mesh):
    _work(experiment, phases, clock, begun)
  _say_if_nothing_was_profiled(experiment)
  manifests = {phase.name: experiment.workdir.manifest(phase.name) for phase in phases}
  written = record.write_report(experiment, manifests, kind.render)
  if distributed.is_main():
    print(kind.summarise(written))
    print(f"\nreport: {experiment.workdir.path / 'report.html'}")
    if kind.predicts:
      print(
        f"predict: python -m memdiff.predict --workdir={shlex.quote(str(experiment.workdir.path))}"
        " --input=NEW --output=predictions.csv"
      )
  distributed.barrier("the end")
  return written


def _say_if_nothing_was_profiled(experiment: Experiment) -> None:
  execution = experiment.run.execution
  if execution.profile_stage and not any(experiment.workdir.path.rglob("profile")):
    first, last = execution.profile_steps
    experiment.run.progress.say(
      f"note: nothing was profiled, since no stage {execution.profile_stage} trained steps {first}"
      f" to {last}; execution.profile_stage takes names as the log has them, such as classifier/csl"
    )


def _work(
  experiment: Experiment, phases: tuple[Phase, ...], clock: CompileClock, begun: set[str]
) -> None:
  """Goes through the phases, from the first that is not finished; adds their names to `begun`."""
  progress = experiment.run.progress
  for number, phase in enumerate(phases, 1):
    begun.add(phase.name)
    progress.phase(number, phase.name)
    experiment.run.preemption.check(f"before the phase {phase.name}")
    if experiment.workdir.begin(phase.name, phase_config(experiment, phases, phase)):
      progress.say("finished earlier")
      continue
    progress.say(phase.title)
    with _timed(experiment, phase, clock) as times:
      metrics = phase.work(experiment)
    experiment.workdir.finish(phase.name, {"versions": environment.versions(), "metrics": metrics})
    progress.say(
      f"finished in {times['seconds']:.1f} s, of which compiling"
      f" {times['compile_seconds']:.1f} s; {times['cpu_seconds']:.1f} CPU-seconds"
    )


@contextlib.contextmanager
def _timed(experiment: Experiment, phase: Phase, clock: CompileClock) -> Iterator[dict]:
  """Adds the time of this process to that of earlier ones; yields a dict that has it at the end.

  A process that is killed cannot. It leaves a count behind, so that the report can tell.
  """
  add = functools.partial(experiment.workdir.add, phase.name)
  add({"killed": 1})
  start, worked, compiled = time.perf_counter(), time.process_time(), clock.seconds
  times = {}
  try:
    yield times
  finally:
    times["seconds"] = time.perf_counter() - start
    times["compile_seconds"] = clock.seconds - compiled
    times["cpu_seconds"] = time.process_time() - worked
    add(times | {"killed": -1})
