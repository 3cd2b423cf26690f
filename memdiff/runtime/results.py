"""What a finished stage leaves for later phases: the parts of its final state that they read.

A plain .npz file, which NumPy reads as well; its names are paths such as `params/head/kernel`.
Reading it needs neither the stage nor its data, and any devices will do.
"""

import pathlib
from collections.abc import Sequence

from flax import traverse_util
from jax.sharding import Mesh

from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.train_state import TrainState
from memdiff.runtime.workdir import read_arrays, write_arrays

_FILE, _SEPARATOR = "result.npz", "/"


def save(folder: pathlib.Path, state: TrainState, fields: Sequence[str]) -> None:
  """Writes some fields of a final state; of several processes all must call it."""
  tree = {name: getattr(state, name) for name in fields if getattr(state, name) is not None}
  write_arrays(folder / _FILE, mesh_lib.fetch(traverse_util.flatten_dict(tree, sep=_SEPARATOR)))


def load(folder: pathlib.Path, mesh: Mesh) -> TrainState:
  """What `save` wrote, whole on every device; the fields that were not saved are None.

  Raises:
    WorkdirError: if the file is missing or damaged.
  """
  tree = traverse_util.unflatten_dict(read_arrays(folder / _FILE), sep=_SEPARATOR)
  nothing = {"step": None, "key": None, "params": None, "opt_state": None}
  return TrainState(**nothing | mesh_lib.replicate(mesh, tree))
