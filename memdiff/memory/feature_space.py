"""The one feature space: the frozen encoder's features, the bank refilled from them, their scale.

After the encoder is trained, all its features are computed again in evaluation mode, and the bank
is refilled from those of the training set. Diffusion and head work on features standardised with
training statistics; the bank, the saved features and the exported hallucinations stay in the
encoder's own units.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from input_pipeline.batches import group_by_class
from memdiff.memory import memory_bank
from memdiff.memory.exemplars import Exemplars
from memdiff.memory.memory_bank import BankConfig, MemoryBank
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.random import stream

_CHUNK = 512  # rows at a time: per encoder call, per bank update
_LEAST_DEVIATION = 1e-30  # a column that varies less is constant


@flax.struct.dataclass
class Standardizer:
  """Maps features to mean 0 and deviation 1 per dimension, and back."""

  mean: jax.Array  # [D]
  scale: jax.Array  # [D], 1 if a dimension is constant
  lowest: jax.Array  # [D], 0 if no training feature is negative, else -infinity

  def forward(self, features: jax.Array) -> jax.Array:
    """[N, D] -> [N, D]."""
    return (features - self.mean[None]) / self.scale[None]

  def backward(self, features: jax.Array) -> jax.Array:
    """Back to the encoder's units; dimensions that end in a ReLU have no negative features."""
    return jnp.maximum(features * self.scale[None] + self.mean[None], self.lowest[None])


def fit_standardizer(features: np.ndarray, valid: np.ndarray) -> Standardizer:
  """Statistics of training features [N, D], those rows where `valid` [N] is True; on the host.

  In float64, so that neither the squares of very large or small numbers nor a large offset harm
  them. Every column is judged by itself alone.
  """
  moments = _moments(np.asarray(features), np.asarray(valid))
  scale = np.where(moments.is_constant(), 1.0, moments.deviation)
  return Standardizer(
    mean=moments.mean.astype(np.float32),
    scale=scale.astype(np.float32),
    lowest=np.where(moments.smallest < 0, -np.inf, 0.0).astype(np.float32),
  )


def constant_columns(features: np.ndarray) -> np.ndarray:
  """Numbers of the columns of [N, D] that tell nothing apart, in ascending order."""
  return np.flatnonzero(_moments(features, np.ones(len(features), bool)).is_constant())


@dataclasses.dataclass(frozen=True)
class _Moments:
  """Of the columns, float64 [D]."""

  mean: np.ndarray
  deviation: np.ndarray
  smallest: np.ndarray
  largest: np.ndarray

  def is_constant(self) -> np.ndarray:
    """Columns whose deviation is rounding, or too small to divide a head's kernel by. [D] bool.

    Between two neighbouring float32 numbers a deviation is at most half of their distance.
    """
    magnitude = np.maximum(-self.smallest, self.largest).astype(np.float32)
    return self.deviation <= np.maximum(0.5 * np.spacing(magnitude), _LEAST_DEVIATION)


def _moments(features: np.ndarray, valid: np.ndarray) -> _Moments:
  """Of the valid rows, in two passes; a chunk at a time is float64."""
  dim = features.shape[1]
  total, squares = np.zeros(dim), np.zeros(dim)
  smallest, largest = np.full(dim, np.inf), np.full(dim, -np.inf)
  starts = range(0, len(features), _CHUNK)
  for start in starts:
    rows = features[start : start + _CHUNK][valid[start : start + _CHUNK]]
    total += rows.sum(axis=0, dtype=np.float64)
    smallest = np.minimum(smallest, rows.min(axis=0, initial=np.inf))
    largest = np.maximum(largest, rows.max(axis=0, initial=-np.inf))
  mean = total / valid.sum()
  for start in starts:
    rows = features[start : start + _CHUNK][valid[start : start + _CHUNK]]
    squares += np.square(rows - mean).sum(axis=0)
  return _Moments(mean, np.sqrt(squares / valid.sum()), smallest, largest)


@flax.struct.dataclass
class FeatureRuns:
  """What generators and heads learn from, of R runs: seeds, or folds of cross-validation."""

  exemplars: Exemplars  # standardised
  bank: MemoryBank  # in the same units
  standardizer: Standardizer
  head: Any  # {"kernel" [R, D, C], "bias" [R, C]} on standardised features: the encoder's own
  alike: bool = flax.struct.field(pytree_node=False, default=False)  # the exemplars of all runs


def make_runs(
  features: np.ndarray,
  labels: np.ndarray,
  bank: MemoryBank,
  head: dict[str, np.ndarray] | None,
  num_classes: int,
  mesh: Mesh,
  rows: np.ndarray | None = None,
) -> FeatureRuns:
  """Standardises the features of R runs and places them on the devices.

  Args:
    features: [R, N, D] in the encoder's units, or [1, N, D] that all runs share.
    labels: [R, N] int; C in rows that do not belong to a run. [R, n] if there are `rows`.
    bank: of the same features and units, leading with R.
    head: {"kernel" [R, D, C], "bias" [R, C]} on such features; None if there is none.
    num_classes: C.
    mesh: the device mesh.
    rows: [R, n] of the features that each run takes, as in `take`; None: all of them.
  """
  num_runs, dim = len(labels), features.shape[-1]
  by_class = [group_by_class(row, num_classes) for row in labels]
  by_class = jax.tree.map(lambda *leaves: np.stack(leaves), *by_class)
  if head is None:
    head = {
      "kernel": np.zeros((num_runs, dim, num_classes), np.float32),
      "bias": np.zeros((num_runs, num_classes), np.float32),
    }
  inside = labels < num_classes
  alike = len(features) == 1 and all(x is None or bool((x == x[:1]).all()) for x in (labels, rows))
  fitted = [
    fit_standardizer(take(features, rows, run), inside[run])
    for run in range(1 if alike else num_runs)
  ]
  fitted = jax.tree.map(lambda *leaves: np.stack(leaves), *fitted * (num_runs if alike else 1))
  labels, by_class, head, standardizer = mesh_lib.replicate(
    mesh, (np.asarray(labels, np.int32), by_class, head, fitted)
  )
  moved = standardize(standardizer, features, mesh, rows, inside)
  return FeatureRuns(
    exemplars=Exemplars(moved, labels, by_class),
    bank=jax.jit(jax.vmap(lambda b, s: memory_bank.standardize(b, s.mean, s.scale)))(
      bank, standardizer
    ),
    standardizer=standardizer,
    head=jax.jit(jax.vmap(standardized_head))(head, standardizer),
    alike=alike,
  )


def with_class_embeddings(runs: FeatureRuns, embeddings: np.ndarray, mesh: Mesh) -> FeatureRuns:
  """The same runs, with `embeddings` [C, E] of the classes in their banks."""
  num_runs, rows = runs.bank.seen.shape
  table = np.zeros((num_runs, rows, embeddings.shape[1]), np.float32)
  table[:, : len(embeddings)] = embeddings[None]
  placed = mesh_lib.replicate(mesh, table)
  return runs.replace(bank=runs.bank.replace(class_embeddings=placed))


def take(features: np.ndarray, rows: np.ndarray | None, run: int) -> np.ndarray:
  """What one run takes of `features` [R or 1, N, D]: all, or its `rows` [R, n]; zeros if -1."""
  of_run = features[run % len(features)]
  if rows is None:
    return of_run
  return np.where((rows[run] >= 0)[:, None], of_run[rows[run]], np.zeros((), of_run.dtype))


def standardize(
  standardizer: Standardizer,
  features: np.ndarray,
  mesh: Mesh,
  rows: np.ndarray | None = None,
  inside: np.ndarray | None = None,
) -> jax.Array:
  """Features of R runs on the devices, each by its own standardizer. [R, n, D].

  Args:
    standardizer: leads with R.
    features: [R, N, D], or [1, N, D] that all runs share, which are placed once.
    mesh: the device mesh.
    rows: [R, n] of the features that each run takes; None: all of them, n = N.
    inside: [R, n] bool; what is False becomes zeros. None: all that `rows` take, which are not -1.
  """
  shared = len(features) == 1
  if rows is not None and inside is None:
    inside = rows >= 0
  features, rows, inside = mesh_lib.replicate(mesh, (features, rows, inside))

  def of_run(standardizer, features, rows, inside):
    moved = standardizer.forward(features if rows is None else features[rows])
    return moved if inside is None else jnp.where(inside[:, None], moved, 0.0)

  program = jax.vmap(of_run, in_axes=(0, None if shared else 0, 0, 0))
  # The one array takes the place of the other.
  replaced = 1 if rows is None and not shared else ()
  program = jax.jit(program, donate_argnums=replaced)
  return program(standardizer, features[0] if shared else features, rows, inside)


def standardized_head(head: dict[str, jax.Array], standardizer: Standardizer):
  """The same linear map for standardised features: kernel [D, C], bias [C]."""
  return {
    "kernel": head["kernel"] * standardizer.scale[:, None],
    "bias": head["bias"] + _exact_product(standardizer.mean, head["kernel"]),
  }


def raw_head(head: dict[str, jax.Array], standardizer: Standardizer):
  """The same linear map for features in the encoder's units."""
  kernel = head["kernel"] / standardizer.scale[:, None]
  return {"kernel": kernel, "bias": head["bias"] - _exact_product(standardizer.mean, kernel)}


def _exact_product(mean: jax.Array, kernel: jax.Array) -> jax.Array:
  """In float32 on every device: means may be large."""
  return jnp.matmul(mean, kernel, precision=jax.lax.Precision.HIGHEST)


def linear_logits(head: Mapping[str, jax.Array], features: jax.Array) -> jax.Array:
  """Logits [N, C] of a head {"kernel" [D, C], "bias" [C]} on features [N, D]."""
  return features @ head["kernel"] + head["bias"][None]


def encode(encode_chunk, images, mesh: Mesh):
  """What `encode_chunk` makes of `images` [N, ...], in chunks of one compiled size.

  Args:
    encode_chunk: jitted, uint8 [chunk, ...] -> arrays [S, chunk, ...], for example features.
    images: [N, H, W, ch] uint8, in memory or read when sliced.
    mesh: chunks are split over it; a process reads what its own devices encode.

  Returns:
    The same tree of NumPy arrays, [S, N, ...].
  """
  chunks = []
  for start in range(0, max(len(images), 1), _CHUNK):  # one even of no images, for the shapes
    size = min(len(images) - start, _CHUNK)
    encoded = mesh_lib.fetch(encode_chunk(mesh_lib.place_rows(mesh, images, start, _CHUNK)))
    chunks.append(jax.tree.map(lambda x, n=size: x[:, :n], encoded))
  return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *chunks)


def fill_bank(
  features: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  keys: jax.Array,
  config: BankConfig,
  mesh: Mesh,
  rows: np.ndarray | None = None,
) -> MemoryBank:
  """A bank per run, filled with its features in a random order; leading axis of runs.

  Args:
    features: [R, N, D], or [1, N, D] that all runs share.
    labels: [R, N] int, [R, n] if there are `rows`; features with C or more never enter.
    num_classes: C.
    keys: [R], randomness.
    config: slots and horizon.
    mesh: the device mesh.
    rows: [R, n] of the features that each run takes, as in `take`; None: all of them.
  """
  labels = np.asarray(labels, np.int32)
  program = _fill_program((labels.shape[1], features.shape[2]), num_classes, config, mesh)
  # A run at a time, and waiting for it, since the program holds copies of its features.
  banks = [
    jax.block_until_ready(program(key, take(features, rows, run), labels[run]))
    for run, key in enumerate(keys)
  ]
  together = jax.jit(
    lambda *banks: jax.tree.map(lambda *leaves: jnp.stack(leaves), *banks),
    out_shardings=bank_sharding(num_classes, mesh),
  )
  return together(*banks)


@functools.lru_cache(maxsize=4)
def _fill_program(
  shape: tuple[int, int], num_classes: int, config: BankConfig, mesh: Mesh
) -> Callable:
  """The jitted (key, features [N, D], labels [N]) -> bank of a run; one for seeds and folds."""
  num_examples, dim = shape
  num_chunks = -(-num_examples // _CHUNK)
  padding = num_chunks * _CHUNK - num_examples

  def fill(key, features, labels):
    order = jax.random.permutation(stream(key, "order"), num_examples)
    index = jnp.pad(order, (0, padding)).reshape(num_chunks, _CHUNK)
    valid = (jnp.arange(num_chunks * _CHUNK) < num_examples).reshape(num_chunks, _CHUNK)
    valid = valid & (labels < num_classes)[index]

    def step(bank, chunk):
      number, index, valid = chunk
      chunk_key = stream(key, "reservoir", number)
      return memory_bank.update(
        bank, features[index], labels[index], valid, chunk_key,
        horizon=config.horizon, mesh=mesh,
      ), None  # fmt: skip

    empty = memory_bank.create(num_classes, config.num_slots, dim)
    bank, _ = jax.lax.scan(step, empty, (jnp.arange(num_chunks), index, valid))
    return bank

  return jax.jit(fill)


def bank_sharding(num_classes: int, mesh: Mesh) -> NamedSharding:
  """Of a bank with a leading axis of seeds."""
  spec = mesh_lib.class_spec(memory_bank.num_rows(num_classes), mesh)
  return NamedSharding(mesh, mesh_lib.with_seed_axis(spec))
