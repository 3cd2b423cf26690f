"""What tests of training stages share."""

import io
import pathlib

from memdiff.runtime import loop
from memdiff.runtime.preemption import Preemption
from memdiff.runtime.progress import Progress
from memdiff.runtime.writers import TensorBoard


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
