"""What tests of training stages and of several devices share."""

import io
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from memdiff.runtime import loop
from memdiff.runtime.preemption import Preemption
from memdiff.runtime.progress import Progress
from memdiff.runtime.writers import TensorBoard

SLOW = [pytest.param("", marks=pytest.mark.slow)]  # `params` of a fixture whose tests are slow
ROOT = pathlib.Path(__file__).parent.parent
FLAGS = os.environ.get("XLA_FLAGS", "")  # of conftest.py


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


def on_fake_devices(script: str, *arguments: str, devices: int = 8, timeout: int = 300) -> str:
  """What a script prints in a process of its own with so many CPU devices; it must succeed."""
  done = subprocess.run(
    [sys.executable, script, *arguments], env=environment_of_children(devices), cwd=ROOT,
    capture_output=True, text=True, timeout=timeout,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


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
