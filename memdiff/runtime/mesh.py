"""The device mesh and every sharding memdiff uses.

One mesh axis, `data`, over all devices of all processes. Batches and samples are split over it, the
memory bank is split by class, and parameters with their optimiser are replicated or, on request,
split as well (FSDP). Arrays of a training stage lead with seeds, an axis that is never split.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from memdiff.errors import ConfigError

DATA_AXIS = "data"
PARAMETERS = ("replicated", "fsdp")
_SPLIT_FROM = 2**14  # numbers; smaller parameters cost more to gather than to keep


def make_mesh(devices=None) -> Mesh:
  """A one-axis mesh over `devices`, by default all of all processes.

  The axis is `Auto`: JAX makes axes `Explicit` by default, under which `nn.Dropout` fails.
  """
  number = jax.device_count() if devices is None else len(devices)
  return jax.make_mesh((number,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def one_by_one(mesh: Mesh) -> bool:
  """Whether seeds train one by one, each in a thread, rather than as one batch.

  XLA's CPU backend keeps one core busy with a network that is small enough to train there.
  """
  return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


# --- rules -----------------------------------------------------------------------------------


def split_over_data(size: int, mesh: Mesh) -> str | None:
  """The mesh axis for a dimension of `size`: `data`, or None if it does not divide evenly."""
  return DATA_AXIS if size % mesh.shape[DATA_AXIS] == 0 else None


def class_spec(rows: int, mesh: Mesh) -> PartitionSpec:
  """How the class axis of a bank is split: over all devices, or replicated if it cannot be."""
  return PartitionSpec(split_over_data(rows, mesh))


def parameter_spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """FSDP: the largest axis that divides evenly is split; small parameters are replicated."""
  fitting = [size for size in shape if split_over_data(size, mesh)]
  if not fitting or np.prod(shape) < _SPLIT_FROM:
    return PartitionSpec()
  return PartitionSpec(*(None,) * shape.index(max(fitting)), DATA_AXIS)


def with_seed_axis(spec: PartitionSpec) -> PartitionSpec:
  """The spec of an array that carries a leading, unsplit axis of seeds."""
  return PartitionSpec(None, *spec)


def state_specs(state: Any, mesh: Mesh, parameters: str) -> Any:
  """The spec of every leaf of one seed's TrainState (or of its shapes).

  Args:
    state: of one seed. Its bank is split by class; what else it holds follows `parameters`.
    mesh: the device mesh.
    parameters: out of PARAMETERS.
  """

  def of_leaf(leaf):
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    split = parameters == "fsdp" and not is_key
    return parameter_spec(leaf.shape, mesh) if split else PartitionSpec()

  specs = jax.tree.map(of_leaf, state)
  bank = jax.tree.map(lambda leaf: class_spec(leaf.shape[0], mesh), state.bank)
  return specs.replace(bank=bank)


def gather(tree: Any, mesh: Mesh) -> Any:
  """Inside jit: the whole of every array on every device; nothing if it is there already."""
  sharding = replicated(mesh)
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), tree)


def constrain(tree: Any, specs: Any, mesh: Mesh) -> Any:
  """Inside jit: every array split as its spec says."""
  return jax.tree.map(
    lambda x, spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)), tree, specs
  )


def shard_batch(tree: Any, mesh: Mesh) -> Any:
  """Inside jit: constrains the leading axis of every array to be split over the devices."""
  specs = jax.tree.map(lambda x: PartitionSpec(split_over_data(x.shape[0], mesh)), tree)
  return constrain(tree, specs, mesh)


# --- from hosts to devices and back ----------------------------------------------------------


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def is_described(mesh: Mesh) -> bool:
  """Whether the mesh is of devices that are not here, for which programs can only be compiled."""
  return getattr(mesh.devices.flat[0].client, "runtime_type", "") == "compile_only_runtime"


def _place(sharding: NamedSharding, array: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
  """This process's part of a global array on its devices; on a described mesh the shape alone."""
  if is_described(sharding.mesh):
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  return jax.make_array_from_process_local_data(sharding, array, shape)


def replicate(mesh: Mesh, tree: Any) -> Any:
  """Places host arrays, which every process holds alike, on every device of the mesh.

  Arrays that are there already stay, under the one sharding that programs are compiled for.
  """

  def place(x):
    if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(replicated(mesh), x.ndim):
      return jax.device_put(x, replicated(mesh))
    x = np.asarray(x)
    return _place(replicated(mesh), x, x.shape)

  return jax.tree.map(place, tree)


def place_batches(mesh: Mesh, array: np.ndarray) -> jax.Array:
  """This process's part of batches [S, k, B, ...] as one global array, B split over the devices.

  Raises:
    ConfigError: if there are several processes and the whole B does not divide by the devices.
  """
  whole = array.shape[2] * jax.process_count()
  axis = split_over_data(whole, mesh)
  if axis is None and jax.process_count() > 1:
    raise ConfigError(
      f"config.classifier.batch_size is {whole}, but must be a multiple of the {mesh.size} devices."
    )
  sharding = NamedSharding(mesh, PartitionSpec(None, None, axis))
  return _place(sharding, array, (*array.shape[:2], whole, *array.shape[3:]))


def place_rows(mesh: Mesh, rows: Any, start: int, size: int) -> jax.Array:
  """Rows [start, start + size) as one global array, split over the devices.

  Args:
    mesh: the device mesh.
    rows: [N, ...] that gives arrays when sliced; a process slices what its own devices hold.
    start: the first row.
    size: of the result; rows beyond N are zeros.
  """
  shape = (size, *rows.shape[1:])
  sharding = NamedSharding(mesh, PartitionSpec(split_over_data(size, mesh)))

  def part(index):
    first, last, _ = index[0].indices(size)
    local = np.asarray(rows[start + first : start + last])
    missing = last - first - len(local)
    return np.pad(local, [(0, missing)] + [(0, 0)] * (local.ndim - 1)) if missing else local

  return jax.make_array_from_callback(shape, sharding, part)


def fetch(tree: Any) -> Any:
  """NumPy arrays of device arrays, whichever process holds their parts; all processes must call."""

  def of_leaf(x):
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
      return multihost_utils.process_allgather(x, tiled=True)
    return x

  return jax.device_get(jax.tree.map(of_leaf, tree))
