"""The one feature space: the frozen encoder's features, the bank refilled from them, their scale.

After the encoder is trained, all its features are computed again in evaluation mode, and the bank
is refilled from those of the training set. Diffusion and head work on features standardised with
training statistics; the bank, the saved features and the exported hallucinations stay in the
encoder's own units.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from input_pipeline.batches import group_by_class
from memdiff import memory_bank
from memdiff.exemplars import Exemplars
from memdiff.memory_bank import BankConfig, MemoryBank
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.random import stream

_CHUNK = 512  # rows per encoder call and per bank update


@flax.struct.dataclass
class Standardizer:
  """Maps features to mean 0 and deviation 1 per dimension, and back."""

  mean: jax.Array  # [D]
  scale: jax.Array  # [D], 1 where a dimension is constant
  lowest: jax.Array  # [D], 0 where no training feature is negative, else -infinity

  def forward(self, features: jax.Array) -> jax.Array:
    """[N, D] -> [N, D]."""
    return (features - self.mean[None]) / self.scale[None]

  def backward(self, features: jax.Array) -> jax.Array:
    """Back to the encoder's units; dimensions that end in a ReLU have no negative features."""
    return jnp.maximum(features * self.scale[None] + self.mean[None], self.lowest[None])


def fit_standardizer(features: jax.Array, valid: jax.Array) -> Standardizer:
  """Statistics of training features [N, D], those rows where `valid` [N] is True."""
  inside, number = valid[:, None], valid.sum()
  mean = jnp.where(inside, features, 0.0).sum(axis=0) / number
  squares = jnp.where(inside, jnp.square(features - mean[None]), 0.0)
  scale = jnp.sqrt(squares.sum(axis=0) / number)
  largest = jnp.where(inside, jnp.abs(features), 0.0).max()
  negative = (inside & (features < 0)).any(axis=0)
  return Standardizer(
    mean=mean,
    scale=jnp.where(scale < 1e-6 * jnp.maximum(largest, 1e-30), 1.0, scale),
    lowest=jnp.where(negative, -jnp.inf, 0.0),
  )


@flax.struct.dataclass
class FeatureRuns:
  """What generators and heads learn from, of R runs: seeds, or folds of cross-validation."""

  exemplars: Exemplars  # standardised
  bank: MemoryBank  # in the same units
  standardizer: Standardizer
  head: Any  # {"kernel" [R, D, C], "bias" [R, C]} on standardised features: the encoder's own


def make_runs(
  features: np.ndarray,
  labels: np.ndarray,
  bank: MemoryBank,
  head: dict[str, np.ndarray] | None,
  num_classes: int,
  mesh: Mesh,
) -> FeatureRuns:
  """Standardises the features of R runs and places them on the devices.

  Args:
    features: [R, N, D] in the encoder's units.
    labels: [R, N] int; C in rows that pad a run.
    bank: of the same features and units, leading with R.
    head: {"kernel" [R, D, C], "bias" [R, C]} on such features; None where there is none.
    num_classes: C.
    mesh: the device mesh.
  """
  num_runs, _, dim = features.shape
  by_class = [group_by_class(row, num_classes) for row in labels]
  by_class = jax.tree.map(lambda *leaves: np.stack(leaves), *by_class)
  if head is None:
    head = {
      "kernel": np.zeros((num_runs, dim, num_classes), np.float32),
      "bias": np.zeros((num_runs, num_classes), np.float32),
    }
  features, labels, by_class, head = mesh_lib.replicate(
    mesh, (features, np.asarray(labels, np.int32), by_class, head)
  )
  inside = labels < num_classes
  standardizer = jax.jit(jax.vmap(fit_standardizer))(features, inside)
  moved = jax.jit(jax.vmap(lambda s, x, i: jnp.where(i[:, None], s.forward(x), 0.0)))
  return FeatureRuns(
    exemplars=Exemplars(moved(standardizer, features, inside), labels, by_class),
    bank=jax.jit(jax.vmap(lambda b, s: memory_bank.standardize(b, s.mean, s.scale)))(
      bank, standardizer
    ),
    standardizer=standardizer,
    head=jax.jit(jax.vmap(standardized_head))(head, standardizer),
  )


def standardized_head(head: dict[str, jax.Array], standardizer: Standardizer):
  """The same linear map for standardised features: kernel [D, C], bias [C]."""
  return {
    "kernel": head["kernel"] * standardizer.scale[:, None],
    "bias": head["bias"] + standardizer.mean @ head["kernel"],
  }


def raw_head(head: dict[str, jax.Array], standardizer: Standardizer):
  """The same linear map for features in the encoder's units."""
  kernel = head["kernel"] / standardizer.scale[:, None]
  return {"kernel": kernel, "bias": head["bias"] - standardizer.mean @ kernel}


def logits_of(head: dict[str, jax.Array], features: jax.Array) -> jax.Array:
  """[N, D] -> [N, C]."""
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
    made = mesh_lib.fetch(encode_chunk(mesh_lib.place_rows(mesh, images, start, _CHUNK)))
    chunks.append(jax.tree.map(lambda x, n=size: x[:, :n], made))
  return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *chunks)


def fill_bank(
  features: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  keys: jax.Array,
  config: BankConfig,
  mesh: Mesh,
) -> MemoryBank:
  """A bank per run, filled with its features in a random order; leading axis of runs.

  Args:
    features: [R, N, D].
    labels: [R, N] int; rows with C or more never enter.
    num_classes: C.
    keys: [R], randomness.
    config: slots and horizon.
    mesh: the device mesh.
  """
  _, num_examples, dim = features.shape
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

  return jax.jit(jax.vmap(fill), out_shardings=bank_sharding(num_classes, mesh))(
    keys, features, np.asarray(labels, np.int32)
  )


def bank_sharding(num_classes: int, mesh: Mesh) -> NamedSharding:
  """Of a bank with a leading axis of seeds."""
  spec = mesh_lib.class_spec(memory_bank.num_rows(num_classes), mesh)
  return NamedSharding(mesh, mesh_lib.with_seed_axis(spec))
