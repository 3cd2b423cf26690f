"""What tests of several folders share: numbers, a small U-Net, runs, processes."""

import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest

from input_pipeline.new_inputs import ArrayInputs
from memdiff.diffusion.unet import UNetConfig
from memdiff.evaluation.lookup import row_of
from memdiff.prediction import finished, predict
from memdiff.prediction import methods as prediction_methods
from memdiff.runtime import loop
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.preemption import Preemption
from memdiff.runtime.progress import Progress
from memdiff.runtime.writers import TensorBoard

SLOW = [pytest.param("", marks=pytest.mark.slow)]  # `params` of a fixture whose tests are slow
ROOT = pathlib.Path(__file__).parent.parent
TINY_UNET = UNetConfig(channels=8, multipliers=(1,), num_blocks=1, attention=())  # compiles soonest
HANG = 1500  # seconds: only what hangs takes longer, on the busiest machine
FLAGS = os.environ.get("XLA_FLAGS", "")  # of conftest.py


def normal(seed: int, *shape: int) -> np.ndarray:
  """Drawn by NumPy: `jax.random` compiles a program for each shape."""
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def moved(params: Any, scale: float) -> Any:
  """Parameters that are random everywhere, so that every input matters."""
  leaves, structure = jax.tree.flatten(params)
  return jax.tree.unflatten(
    structure, [x + scale * normal(i, *x.shape) for i, x in enumerate(leaves)]
  )


def environment_of_children(devices: int = 1) -> dict[str, str]:
  """Of processes with so many CPU devices that compile nothing twice.

  Programs for several devices are not optimised: that takes longer than it saves.
  """
  changed = {
    "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={devices}",
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "MPLBACKEND": "Agg",
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  if devices > 1:
    changed["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
  return os.environ | changed


def on_fake_devices(script: str, *arguments: str, devices: int = 8) -> str:
  """What a script prints in a process of its own with so many CPU devices; it must succeed."""
  done = subprocess.run(
    [sys.executable, script, *arguments], env=environment_of_children(devices), cwd=ROOT,
    capture_output=True, text=True, timeout=HANG,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


# main.py as it is, but for classifiers of one block.
SMALL_MAIN = """
import runpy, sys
from memdiff.classifier import backbones
backbones.BACKBONES["resnet8"] = backbones.Architecture((1,), (16,), for_small_images=True)
sys.argv = ["main.py", *sys.argv[1:]]
runpy.run_path("main.py", run_name="__main__")
"""


@dataclasses.dataclass(frozen=True)
class SmallRuns:
  """Runs of one config in processes of their own.

  Attributes:
    config: file and variant.
    overrides: of its fields.
  """

  config: str
  overrides: dict

  def command(self, workdir: pathlib.Path, **changes) -> list[str]:
    overrides = [
      f"--config.{name}={value if isinstance(value, str) else repr(value)}"
      for name, value in (self.overrides | changes).items()
    ]
    options = [f"--config={self.config}", f"--workdir={workdir}", "--notensorboard", *overrides]
    return [sys.executable, "-c", SMALL_MAIN, *options]

  def start(self, workdir: pathlib.Path, devices: int = 1, **changes):
    """The finished process, whether it succeeded or not."""
    return subprocess.run(
      self.command(workdir, **changes), cwd=ROOT, env=environment_of_children(devices),
      capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip

  def __call__(self, workdir: pathlib.Path, devices: int = 1, **changes) -> tuple[dict, str]:
    """(report, what the terminal showed) of a run that must succeed."""
    done = self.start(workdir, devices, **changes)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((workdir / "report.json").read_text()), done.stdout + done.stderr


def wait_for(path: pathlib.Path, processes: list[subprocess.Popen]) -> None:
  """Returns as soon as a path is there. Fails, and ends all processes, if one ends before."""
  deadline = time.monotonic() + HANG
  try:
    while not path.exists():
      for process in processes:
        assert process.poll() is None, f"ended before {path} was there: {process.communicate()[1]}"
      assert time.monotonic() < deadline, f"{path} did not come"
      time.sleep(0.002)
  except BaseException:
    kill(processes)
    raise


def kill(processes: list[subprocess.Popen]) -> None:
  """Ends what still runs, so that no later test meets it."""
  for process in processes:
    process.kill()
    process.communicate()


def kill_in_phase(
  command: list[str],
  workdir: pathlib.Path,
  phase: str,
  moment: str,
  environment: dict[str, str] | None = None,
) -> None:
  """Starts a run and kills it as soon as `moment`, a path in its workdir, is there.

  The environment is that of `environment_of_children` if none is given. Fails if the run ends
  before, or if the phase is over by then.
  """
  process = subprocess.Popen(
    command, cwd=ROOT, env=environment or environment_of_children(), stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )  # fmt: skip
  wait_for(workdir / moment, [process])
  kill([process])
  manifest = json.loads((workdir / phase / "manifest.json").read_text())
  assert not manifest["finished"], f"{phase} was over before the kill"


def make_run(mesh, seeds, steps_per_dispatch, *, every=None, **changes) -> loop.Run:
  """What stages share, silent; checkpoints and scores `every` so many steps.

  Args:
    mesh: the device mesh.
    seeds: of the run.
    steps_per_dispatch: also `every`, where that is not given.
    every: steps.
    **changes: further fields of LoopConfig, or of Run.
  """
  every = every or steps_per_dispatch
  config = {
    "eval_every": every, "checkpoint_every": every, "keep_checkpoints": 1, "keep_every": 0,
    "on_non_finite": "stop", "max_skipped": 0,
  }  # fmt: skip
  config |= {name: changes.pop(name) for name in config if name in changes}
  shared = {
    "progress": Progress(1, stream=io.StringIO()),
    "tensorboard": TensorBoard(pathlib.Path("unused"), enabled=False),
    "preemption": Preemption(mesh),
  }
  return loop.Run(seeds, mesh, loop.LoopConfig(steps_per_dispatch, **config), **shared | changes)


def check_that_predictions_are_those_of_the_report(workdir, inputs, labels, methods) -> None:
  """Every method's classifier of every seed scores on the test set as the report says.

  Args:
    workdir: of a finished run.
    inputs: the test set, [T, ...].
    labels: [T].
    methods: those to look at.
  """
  run, mesh = finished.open_run(str(workdir)), mesh_lib.make_mesh()
  for method in methods:
    scores = []
    for seed in range(len(run.settings.seeds)):
      classifier = prediction_methods.load(run, method, [seed], mesh)
      found = predict.predict(classifier, ArrayInputs(inputs), mesh, top=1)
      scores.append((found.classes[:, 0] == labels).mean())
    expected = row_of(run.report, method)["top1"]["mean"]
    # A change of the last digit may turn a tie.
    assert abs(np.mean(scores) - expected) < 1.01 / len(labels), method
