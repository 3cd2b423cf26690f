"""The memory bank: what the classifier has seen of every class, in bounded memory.

Per class it keeps a running-mean prototype and a reservoir of `K` features. The update is pure,
vectorised over the batch, and equal to offering the features one after the other:

- reservoir: Algorithm R (Vitter, "Random sampling with a reservoir", 1985), so that every feature
  ever offered to a class is equally likely to sit in its slots;
- prototype: mu <- mu + a_m (f - mu) with a_m = max(1/m, 1/horizon) for the m-th feature, the exact
  mean until `horizon` features were seen and an exponential average after.

The class axis is split over the mesh. Each device sees the whole batch (B x D) and writes the rows
of its own classes; the bank itself never travels. Results do not depend on the number of devices.
"""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from memdiff.config import at_least, setting
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.random import uniform


@dataclasses.dataclass(frozen=True)
class BankConfig:
  num_slots: int = setting(32, "stored features per class", at_least(1))
  horizon: int = setting(
    1000, "features until the mean becomes an exponential average", at_least(1)
  )


@flax.struct.dataclass
class MemoryBank:
  """Statistics and exemplars per class; C is `num_rows(num_classes)`, so that it splits evenly."""

  prototype: jax.Array  # [C, D] running mean
  slots: jax.Array  # [C, K, D] reservoir; the first min(seen, K) slots of a class are filled
  seen: jax.Array  # [C] int32, features offered so far
  class_embeddings: Any = None  # [C, E] of the classes; None: there are none


@flax.struct.dataclass
class Memory:
  """The bank's rows for a batch of labels."""

  prototype: jax.Array  # [B, D] mean of `count` features
  slots: jax.Array  # [B, K, D]
  mask: jax.Array  # [B, K] bool, which slots may be looked at
  count: jax.Array  # [B] float32, how many features the prototype averages
  class_embeddings: Any = None  # [B, E]


def num_rows(num_classes: int) -> int:
  """Rows of a bank for `num_classes`: rounded up to a multiple of min(256, next power of two).

  The number depends on the classes alone, so a checkpoint fits any number of devices; meshes of
  2, 4, 8 ... devices up to that multiple split it evenly. Rows beyond `num_classes` stay empty.
  """
  multiple = min(256, 1 << (num_classes - 1).bit_length())
  return -(-num_classes // multiple) * multiple


def create(num_classes: int, num_slots: int, feature_dim: int) -> MemoryBank:
  """An empty bank for `num_classes` classes with `num_slots` features each."""
  rows = num_rows(num_classes)
  return MemoryBank(
    prototype=jnp.zeros((rows, feature_dim)),
    slots=jnp.zeros((rows, num_slots, feature_dim)),
    seen=jnp.zeros((rows,), jnp.int32),
  )


def _rank_in_class(labels: jax.Array) -> jax.Array:
  """For each row, how many earlier rows carry the same label. [B] int32 -> [B] int32."""
  order = jnp.argsort(labels, stable=True)
  ordered = labels[order]
  first = jnp.searchsorted(ordered, ordered, side="left")
  rank = jnp.arange(labels.shape[0]) - first
  return jnp.zeros_like(labels).at[order].set(rank.astype(labels.dtype))


def _update_rows(bank, features, labels, draws, *, horizon):
  """Offers a batch to the rows of one device; labels outside [0, rows) belong elsewhere.

  Only the batch is looked at, pair by pair: the cost does not depend on the number of rows.
  """
  rows, num_slots, _ = bank.slots.shape
  batch = jnp.arange(labels.shape[0])
  mine = (labels >= 0) & (labels < rows)
  labels = jnp.where(mine, labels, rows)
  same_class = (labels[:, None] == labels[None]) & mine[None]
  offered = same_class.sum(axis=1, dtype=jnp.int32)
  before = bank.seen.at[labels].get(mode="fill", fill_value=0)
  total = before + offered
  # The m-th feature of its class, m = 1, 2, ...
  position = before + _rank_in_class(labels) + 1

  # Reservoir: feature m takes slot m - 1 while there is room, then a uniform draw out of m
  # places, of which the first K are slots. Where several rows of a batch hit a slot, the last one
  # stays, as it would have one by one.
  slot = jnp.where(position <= num_slots, position - 1, draws(position))
  target = jnp.where(mine & (slot < num_slots), labels * num_slots + slot, rows * num_slots)
  later = (target[:, None] == target[None]) & (batch[None] > batch[:, None])
  target = jnp.where(later.any(axis=1), rows * num_slots, target)
  flat = bank.slots.reshape(rows * num_slots, -1)
  flat = flat.at[target].set(features, mode="drop")

  # Prototype: the closed form of the one-by-one recursion, across the horizon H. With n = total,
  # feature m <= H weighs 1/min(n, H) (1 - 1/H)^max(0, n - H), feature m > H (1 - 1/H)^(n - m) / H.
  fresh = jnp.maximum(jnp.minimum(total, horizon), 1).astype(jnp.float32)  # min(n, H)
  decay = (1 - 1 / horizon) ** jnp.maximum(total - horizon, 0).astype(jnp.float32)
  weight = jnp.where(
    position <= horizon,
    decay / fresh,
    (1 - 1 / horizon) ** (total - position).astype(jnp.float32) / horizon,
  )
  added = jnp.matmul(same_class * weight[None], features, precision=jax.lax.Precision.HIGHEST)
  kept = jnp.where(
    before >= horizon, (1 - 1 / horizon) ** offered.astype(jnp.float32), decay * before / fresh
  )
  moved = kept[:, None] * bank.prototype.at[labels].get(mode="fill", fill_value=0.0) + added
  last = position == total  # of its class in the batch
  return bank.replace(
    prototype=bank.prototype.at[jnp.where(last, labels, rows)].set(moved, mode="drop"),
    slots=flat.reshape(bank.slots.shape),
    seen=bank.seen.at[labels].add(1, mode="drop"),
  )


def update(
  bank: MemoryBank,
  features: jax.Array,
  labels: jax.Array,
  valid: jax.Array,
  key: jax.Array,
  *,
  horizon: int,
  mesh: Mesh,
) -> MemoryBank:
  """Offers a batch of features to the bank.

  Args:
    bank: the bank, class axis split over `mesh`.
    features: [B, D].
    labels: [B] int.
    valid: [B] bool; rows that are False, hold a non-finite number, or carry a label outside the
      bank never enter.
    key: randomness of the reservoir.
    horizon: features until the prototype turns from the exact mean to an exponential average.
    mesh: the device mesh.

  Returns:
    The bank after the batch.
  """
  features = jax.lax.stop_gradient(features).astype(bank.slots.dtype)
  valid = valid & jnp.isfinite(features).all(axis=-1)
  features = jnp.where(valid[:, None], features, 0.0)
  labels = jnp.where(valid, labels, -1).astype(jnp.int32)
  spec = mesh_lib.class_spec(bank.seen.shape[0], mesh)

  def on_device(bank, features, labels, key_data):
    key = jax.random.wrap_key_data(key_data)
    rows = bank.seen.shape[0]
    first = jax.lax.axis_index(mesh_lib.DATA_AXIS) * rows if spec[0] else 0
    draws = functools.partial(_uniform_below, key)
    local = jnp.where(labels < 0, -1, labels - first)
    return _update_rows(bank, features, local, draws, horizon=horizon)

  everywhere = PartitionSpec()
  return jax.shard_map(
    on_device,
    mesh=mesh,
    in_specs=(spec, everywhere, everywhere, everywhere),
    out_specs=spec,
    check_vma=bool(spec[0]),
  )(bank, features, labels, jax.random.key_data(key))


def _uniform_below(key: jax.Array, bound: jax.Array) -> jax.Array:
  """Independent draws from {0, ..., bound - 1}. [B] int32 -> [B] int32."""
  return jax.random.randint(key, bound.shape, 0, bound)


def read(bank: MemoryBank, labels: jax.Array, *, mesh: Mesh) -> Memory:
  """The bank's rows of `labels` [B], which must be rows of it; one collective on a split bank.

  From a split bank each device gets the rows of its part of the batch, if B divides by the
  devices, and so computes on that part alone; otherwise every device gets all of them.
  """
  rows, num_slots, _ = bank.slots.shape
  spec = mesh_lib.class_spec(rows, mesh)
  batch_axis = spec[0] and mesh_lib.split_over_data(labels.shape[0], mesh)

  def on_device(prototype, slots, seen, labels):
    def pick(row):
      # One array, so that one collective carries all of a class's rows; packed after they are
      # picked, since the bank may be large.
      mean = prototype[row][:, None]
      counts = jnp.broadcast_to(seen[row][:, None, None].astype(slots.dtype), mean.shape)
      return jnp.concatenate([slots[row], mean, counts], axis=1)

    if not spec[0]:
      return pick(labels)
    local = labels - jax.lax.axis_index(mesh_lib.DATA_AXIS) * seen.shape[0]
    mine = (local >= 0) & (local < seen.shape[0])
    picked = jnp.where(mine[:, None, None], pick(jnp.where(mine, local, 0)), 0.0)
    if batch_axis:
      return jax.lax.psum_scatter(picked, batch_axis, scatter_dimension=0, tiled=True)
    return jax.lax.psum(picked, mesh_lib.DATA_AXIS)

  packed = jax.shard_map(
    on_device,
    mesh=mesh,
    in_specs=(spec, spec, spec, PartitionSpec()),
    out_specs=PartitionSpec(batch_axis),
  )(bank.prototype, bank.slots, bank.seen, labels)
  count = packed[:, num_slots + 1, 0]
  mask = jnp.arange(num_slots)[None] < count[:, None]
  told = None if bank.class_embeddings is None else bank.class_embeddings[labels]
  return Memory(packed[:, num_slots], packed[:, :num_slots], mask, count, told)


# How near a stored feature must be to count as the noised one itself: root mean square distance
# per dimension, in units of the (standardised) feature space.
_SAME_FEATURE = 1e-3


def leave_one_out(memory: Memory, features: jax.Array) -> Memory:
  """Takes each feature [B, D] out of its own memory, as a member of its class.

  A denoiser that finds the feature it must recover in its context learns to copy. Slots that hold
  the feature (or a duplicate of it) are masked, and the prototype is the mean of the others. A
  class without others has an empty memory. The prototype is exact while the class is within the
  bank's horizon and, if there are duplicates, all its members have slots.
  """
  distance = jnp.mean(jnp.square(memory.slots - features[:, None]), axis=-1)
  mask = memory.mask & (distance > _SAME_FEATURE**2)
  copies = jnp.maximum((memory.mask & ~mask).sum(axis=1), 1).astype(jnp.float32)
  others = jnp.maximum(memory.count - copies, 0)
  rest = memory.count[:, None] * memory.prototype - copies[:, None] * features
  prototype = rest / jnp.maximum(others, 1)[:, None]
  prototype = jnp.where(others[:, None] > 0, prototype, 0.0)
  slots = jnp.where(mask[:, :, None], memory.slots, 0.0)
  return memory.replace(prototype=prototype, slots=slots, mask=mask, count=others)


def thin_out(memory: Memory, key: jax.Array) -> Memory:
  """Keeps a random number of exemplars per row, as if the class were rarer than it is.

  The number k is log-uniform between 1 and the class's count, so that contexts of a few exemplars
  are as familiar to the denoiser as full ones. Where k reaches the number of stored exemplars the
  memory stays whole; otherwise k stored exemplars stay and the prototype is their mean.
  """
  size_key, choice_key = jax.random.split(key)
  available = memory.mask.sum(axis=1)
  u = jax.random.uniform(size_key, memory.count.shape)
  wanted = jnp.floor(jnp.exp(u * jnp.log(jnp.maximum(memory.count, 1) + 1)))
  lottery = jnp.where(memory.mask, uniform(choice_key, memory.mask.shape), 2.0)
  # Ranks by comparison: on CPU two argsorts cost a tenth of the denoiser's whole step.
  rank = jnp.sum(lottery[:, None, :] < lottery[:, :, None], axis=2)
  kept = memory.mask & (rank < wanted[:, None])
  number = kept.sum(axis=1).astype(jnp.float32)
  slots = jnp.where(kept[:, :, None], memory.slots, 0.0)
  mean = slots.sum(axis=1) / jnp.maximum(number, 1)[:, None]
  whole = wanted >= available
  return memory.replace(
    prototype=jnp.where(whole[:, None], memory.prototype, mean),
    slots=jnp.where(whole[:, None, None], memory.slots, slots),
    mask=jnp.where(whole[:, None], memory.mask, kept),
    count=jnp.where(whole, memory.count, number),
  )


def forget(memory: Memory, dropped: jax.Array) -> Memory:
  """Empties the memory of the rows where `dropped` [B] is True: nothing is known of the class."""
  return Memory(
    prototype=jnp.where(dropped[:, None], 0.0, memory.prototype),
    slots=jnp.where(dropped[:, None, None], 0.0, memory.slots),
    mask=memory.mask & ~dropped[:, None],
    count=jnp.where(dropped, 0.0, memory.count),
    class_embeddings=without_class_embeddings(memory, dropped).class_embeddings,
  )


def without_class_embeddings(memory: Memory, dropped: jax.Array) -> Memory:
  """Takes the class embeddings away from the rows where `dropped` [B] is True."""
  if memory.class_embeddings is None:
    return memory
  kept = jnp.where(dropped[:, None], 0.0, memory.class_embeddings)
  return memory.replace(class_embeddings=kept)


def standardize(bank: MemoryBank, mean: jax.Array, scale: jax.Array) -> MemoryBank:
  """The same bank in the standardised space (f - mean) / scale; `mean` and `scale` are [D]."""
  prototype = (bank.prototype - mean[None]) / scale[None]
  prototype = jnp.where((bank.seen > 0)[:, None], prototype, 0.0)
  slots = (bank.slots - mean[None, None]) / scale[None, None]
  return bank.replace(prototype=prototype, slots=slots)
