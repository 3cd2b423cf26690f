"""The head stage: a linear classifier on frozen, standardised features, real and added ones.

Minibatches mix real features of all classes with features of a pool: hallucinated ones, or the
left-out real ones (the oracle), or none (the control).
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from input_pipeline import batches
from memdiff.classifier import losses
from memdiff.config import at_least, between, one_of
from memdiff.feature_space import Standardizer
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime import train_state
from memdiff.runtime.loop import Stage
from memdiff.runtime.random import stream
from memdiff.runtime.train_state import OptimizerConfig

STARTS = ("encoder", "zeros")
GAMMA_COUNTS = ("real", "effective")


@dataclasses.dataclass(frozen=True)
class HeadConfig:
  start: str = one_of(STARTS)
  beta: float = between(0, 0.999999)
  gamma_counts: str = one_of(GAMMA_COUNTS)
  defer: float = between(0, 1)
  batch_size: int = at_least(1)
  added_batch_size: int = at_least(1)
  num_steps: int = at_least(1)
  optimizer: OptimizerConfig


@flax.struct.dataclass
class HeadData:
  """One seed's features; arrays of a stage lead with seeds."""

  features: Any  # [N, D] standardised training features
  added: Any  # [M, D] standardised pool, M may be 0
  confidence: Any  # [M], 1 for real features
  test_features: Any  # [T, D]
  start: dict[str, Any]  # {"kernel" [D, C], "bias" [C]}


def standardized_head(head: dict[str, jax.Array], standardizer: Standardizer):
  """The same linear map for standardised features: kernel [D, C], bias [C]."""
  return {
    "kernel": head["kernel"] * standardizer.scale[:, None],
    "bias": head["bias"] + standardizer.mean @ head["kernel"],
  }


def logits_of(head: dict[str, jax.Array], features: jax.Array) -> jax.Array:
  """[N, D] -> [N, C]."""
  return features @ head["kernel"] + head["bias"][None]


def effective_counts(
  train_counts: jax.Array,
  added_labels: jax.Array,
  confidence: jax.Array,
  share: float,
) -> jax.Array:
  """How much weight each class has in mixed minibatches, in units of real examples.

  n_c + share (N / M) times the confidences of class c: the class prior that the loss really sees.

  Args:
    train_counts: [C] real examples n_c, N in all.
    added_labels: [M] of the pool.
    confidence: [M].
    share: rows of the pool per real row of a minibatch.

  Returns:
    [C] float32.
  """
  per_class = jax.ops.segment_sum(confidence, added_labels, train_counts.shape[0])
  return train_counts + share * train_counts.sum() / max(len(added_labels), 1) * per_class


def make_stage(
  name: str,
  config: HeadConfig,
  own: HeadData,
  labels: np.ndarray,
  added_labels: np.ndarray,
  test_labels: np.ndarray,
  num_classes: int,
  mesh: Mesh,
) -> Stage:
  """Trains a head with the confidence-adaptive cost-sensitive loss.

  A real row weighs gamma_y, a row of the pool gamma_y conf (the design's gamma_c^adaptive), with
  gamma from the effective number of the real or the effective counts, deferred.

  Args:
    name: of the method, for folder and curves.
    config: see HeadConfig.
    own: features with a leading axis of seeds.
    labels, added_labels, test_labels: of the rows of `own`.
    num_classes: C.
    mesh: the device mesh.
  """
  optimizer = train_state.make_optimizer(config.optimizer, config.num_steps)
  counts = np.bincount(labels, minlength=num_classes).astype(np.float32)
  batch_size = min(config.batch_size, len(labels))
  added_size = min(config.added_batch_size, len(added_labels))
  shared = {"labels": labels, "added_labels": added_labels, "test_labels": test_labels,
            "counts": counts}  # fmt: skip
  start_step = round(config.defer * config.num_steps)

  def init(key, own):
    # Copies: the state is donated, `own` is not.
    start = jnp.copy if config.start == "encoder" else jnp.zeros_like
    return train_state.create(key, jax.tree.map(start, own.start), optimizer)

  def weights_per_class(shared, own):
    seen = shared["counts"]
    if config.gamma_counts == "effective":
      share = added_size / batch_size
      seen = effective_counts(seen, shared["added_labels"], own.confidence, share)
    return losses.effective_number(seen, config.beta)

  def draw(state, shared, own):
    """Features, labels and confidences of a mixed minibatch."""
    index = batches.epoch_indices(stream(state.key, "order"), state.step, len(labels), batch_size)
    real = own.features[index], shared["labels"][index], jnp.ones((batch_size,))
    if added_size == 0:
      return real
    index = batches.epoch_indices(
      stream(state.key, "added"), state.step, len(added_labels), added_size
    )
    added = own.added[index], shared["added_labels"][index], own.confidence[index]
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), real, added)

  def step(state, shared, own):
    features, targets, trust = mesh_lib.shard_batch(draw(state, shared, own), mesh)
    gamma = losses.deferred(weights_per_class(shared, own), state.step, start_step)

    def loss_of(params):
      logits = logits_of(params, features)
      return losses.weighted_cross_entropy(logits, targets, gamma[targets] * trust)

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    return train_state.apply_gradients(state, gradients, optimizer), {"loss": loss}

  def evaluate(state, shared, own):
    logits = logits_of(state.params, own.test_features)
    return {"accuracy": jnp.mean(logits.argmax(axis=-1) == shared["test_labels"])}

  return Stage(
    name=f"heads/{name}",
    num_steps=config.num_steps,
    init=init,
    step=step,
    evaluate=evaluate,
    shared=mesh_lib.replicate(mesh, shared),
    own=own,
  )
