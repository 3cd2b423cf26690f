"""The one feature space: the frozen encoder's features, the bank refilled from them, their scale.

After the encoder is trained, all its features are computed again in evaluation mode, and the bank
is refilled from those of the training set. Diffusion and head work on features standardised with
training statistics; the bank, the saved features and the exported hallucinations stay in the
encoder's own units.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from memdiff import memory_bank
from memdiff.memory_bank import BankConfig, MemoryBank
from memdiff.runtime.loop import with_seed_axis
from memdiff.runtime.random import base_keys, stream

_CHUNK = 512  # rows per encoder call and per bank update


@flax.struct.dataclass
class Standardizer:
  """Maps features to mean 0 and deviation 1 per dimension, and back."""

  mean: jax.Array  # [D]
  scale: jax.Array  # [D], 1 where a dimension is constant

  def forward(self, features: jax.Array) -> jax.Array:
    """[N, D] -> [N, D]."""
    return (features - self.mean[None]) / self.scale[None]

  def backward(self, features: jax.Array) -> jax.Array:
    """Back to the encoder's units; encoders that end in a ReLU have no negative features."""
    return jnp.maximum(features * self.scale[None] + self.mean[None], 0.0)


def fit_standardizer(features: jax.Array) -> Standardizer:
  """Statistics of training features [N, D]."""
  scale = features.std(axis=0)
  constant = scale < 1e-6 * jnp.maximum(jnp.abs(features).max(), 1e-30)
  return Standardizer(mean=features.mean(axis=0), scale=jnp.where(constant, 1.0, scale))


def encode(encode_chunk, images):
  """What `encode_chunk` makes of `images` [N, ...], in chunks of one compiled size.

  Args:
    encode_chunk: jitted, uint8 [chunk, ...] -> arrays [S, chunk, ...], for example features.
    images: [N, H, W, ch] uint8, in memory or read when sliced.

  Returns:
    The same tree of NumPy arrays, [S, N, ...].
  """
  chunks = []
  for start in range(0, max(len(images), 1), _CHUNK):  # one even of no images, for the shapes
    chunk = images[start : start + _CHUNK]
    padded = np.concatenate([chunk, np.zeros((_CHUNK - len(chunk), *chunk.shape[1:]), chunk.dtype)])
    made, size = jax.device_get(encode_chunk(padded)), len(chunk)
    chunks.append(jax.tree.map(lambda x, n=size: x[:, :n], made))
  return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *chunks)


def fill_bank(
  features: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  seeds: tuple[int, ...],
  config: BankConfig,
  mesh: Mesh,
) -> MemoryBank:
  """A bank per seed, filled with features [S, N, D] in a random order; leading axis of seeds."""
  _, num_examples, dim = features.shape
  num_chunks = -(-num_examples // _CHUNK)
  padding = num_chunks * _CHUNK - num_examples

  def fill(key, features):
    order = jax.random.permutation(stream(key, "order"), num_examples)
    index = jnp.pad(order, (0, padding)).reshape(num_chunks, _CHUNK)
    valid = (jnp.arange(num_chunks * _CHUNK) < num_examples).reshape(num_chunks, _CHUNK)

    def step(bank, chunk):
      number, index, valid = chunk
      chunk_key = stream(key, "reservoir", number)
      return memory_bank.update(
        bank, features[index], jnp.asarray(labels)[index], valid, chunk_key,
        horizon=config.horizon, mesh=mesh,
      ), None  # fmt: skip

    empty = memory_bank.create(num_classes, config.num_slots, dim)
    bank, _ = jax.lax.scan(step, empty, (jnp.arange(num_chunks), index, valid))
    return bank

  return jax.jit(jax.vmap(fill), out_shardings=bank_sharding(num_classes, mesh))(
    base_keys(seeds, "memory_bank"), features
  )


def bank_sharding(num_classes: int, mesh: Mesh) -> NamedSharding:
  """Of a bank with a leading axis of seeds."""
  spec = memory_bank.class_spec(memory_bank.num_rows(num_classes), mesh)
  return NamedSharding(mesh, with_seed_axis(spec))
