"""The device mesh and the few shardings memdiff uses.

One mesh axis, `data`: batches and samples are split over it, parameters are replicated, and the
memory bank is split by class. Arrays of a training stage carry a leading axis of seeds, which is
never split.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"


def make_mesh() -> Mesh:
  """A one-axis mesh over all devices of all processes.

  The axis is `Auto`: JAX makes axes `Explicit` by default, under which `nn.Dropout` fails.
  """
  return jax.make_mesh((jax.device_count(),), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def replicate(mesh: Mesh, tree):
  """Places host arrays on every device of the mesh."""
  return jax.tree.map(lambda x: jax.device_put(np.asarray(x), replicated(mesh)), tree)


def place_batches(mesh: Mesh, array: np.ndarray) -> jax.Array:
  """This process's part of batches [S, k, B, ...] as one global array, B split over the devices."""
  whole = array.shape[2] * jax.process_count()
  spec = PartitionSpec(None, None, split_over_data(whole, mesh))
  return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), array)


def split_over_data(size: int, mesh: Mesh) -> str | None:
  """The mesh axis for a dimension of `size`: `data`, or None where it does not divide evenly."""
  return DATA_AXIS if size % mesh.shape[DATA_AXIS] == 0 else None


def shard_batch(tree, mesh: Mesh):
  """Inside jit: constrains the leading axis of every array to be split over the devices."""

  def constrain(x):
    spec = PartitionSpec(split_over_data(x.shape[0], mesh))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

  return jax.tree.map(constrain, tree)
