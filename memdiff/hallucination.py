"""Hallucination: bank and denoiser make synthetic features for tail classes, with confidences."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from memdiff import memory_bank
from memdiff.config import above, at_least, one_of
from memdiff.diffusion import sampler
from memdiff.diffusion.denoisers import MLPDenoiser
from memdiff.diffusion.sampler import SAMPLERS
from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.errors import ConfigError
from memdiff.feature_space import Standardizer
from memdiff.memory_bank import MemoryBank
from memdiff.runtime import mesh as mesh_lib

_EPSILON = 1e-8


def cosine_confidence(features, labels, bank: MemoryBank, logits):
  """max(0, cos(f - g, mu_y - g)) with g the mean of the filled prototypes.

  Centred, because all features of a ReLU encoder point the same way. [M] in [0, 1].
  """
  del logits
  filled = (bank.seen > 0)[:, None]
  centre = jnp.sum(bank.prototype * filled, axis=0) / jnp.maximum(filled.sum(), 1)
  a, b = features - centre[None], bank.prototype[labels] - centre[None]
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return jnp.maximum(jnp.sum(a * b, axis=-1) / jnp.maximum(norms, _EPSILON), 0.0)


def _entropy(logits):
  log_p = jax.nn.log_softmax(logits)
  return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def certainty_confidence(features, labels, bank, logits):
  """1 - H(softmax(logits)) / log C: 1 where the classifier is sure (of any class). [M]."""
  del features, labels, bank
  return jnp.maximum(1.0 - _entropy(logits) / np.log(logits.shape[-1]), 0.0)


def entropy_confidence(features, labels, bank, logits):
  """H(softmax(logits)) in nats, [M] in [0, log C], to the letter of the original design.

  It rewards *uncertain* features; `certainty` is what was probably meant.
  """
  del features, labels, bank
  return _entropy(logits)


def probability_confidence(features, labels, bank, logits):
  """softmax(logits) of the feature's own class. [M] in [0, 1]."""
  del features, bank
  return jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], axis=-1)[:, 0]


CONFIDENCES = {
  "cosine": cosine_confidence,
  "certainty": certainty_confidence,
  "entropy_literal": entropy_confidence,
  "probability": probability_confidence,
}


CONDITIONS = ("class_and_memory", "memory", "class")


@dataclasses.dataclass(frozen=True)
class HallucinationConfig:
  tail_below: int = at_least(1)
  fill_to: int = at_least(1)
  sampler: str = one_of(SAMPLERS)
  num_steps: int = at_least(2)
  condition: str = one_of(CONDITIONS)
  guidance: float = at_least(0)
  x0_limit: float | None = above(0)
  chunk_size: int = at_least(1)
  confidence: str = one_of(CONFIDENCES)
  confidence_power: float = above(0)
  normalize_confidence: bool


@flax.struct.dataclass
class SyntheticFeatures:
  """Hallucinated features and where each comes from. M rows; arrays may lead with seeds."""

  features: Any  # [M, D] in the encoder's units
  labels: Any  # [M] int32
  confidence: Any  # [M] as defined by HallucinationConfig
  number: Any  # [M] int32, the n-th hallucination of its class
  num_exemplars: Any  # [M] int32, exemplars in the memory it was conditioned on
  nearest_index: Any  # [M] int32, nearest training feature of its class (index into the train set)
  nearest_distance: Any  # [M] Euclidean, standardised units


def plan(train_counts: np.ndarray, config: HallucinationConfig) -> np.ndarray:
  """How many features to hallucinate per class: tail classes are filled up to `fill_to`. [C]."""
  tail = train_counts < config.tail_below
  numbers = np.where(tail, np.maximum(config.fill_to - train_counts, 0), 0)
  if numbers.sum() == 0:
    raise ConfigError(
      f"config.hallucination: no class with fewer than tail_below={config.tail_below} training"
      f" images needs filling to fill_to={config.fill_to}; the counts are {train_counts.tolist()}."
    )
  return numbers


def guided_denoiser(denoiser: MLPDenoiser, params, label, memory, scale: float):
  """(x, t) -> the denoiser's output, with the conditioning of these labels encoded once.

  At scale 1 the denoiser runs once per call; otherwise conditional and unconditional rows run as
  one batch of 2B.
  """
  variables = {"params": params}

  def condition(label, memory):
    return denoiser.apply(variables, label, memory, method="condition")

  def denoise(x, t, context):
    return denoiser.apply(variables, x, t, context, method="denoise")[0]

  if scale == 1.0:
    context = condition(label, memory)
    return lambda x, t: denoise(x, t, context)

  nothing = memory_bank.forget(memory, jnp.ones(label.shape, bool))
  no_class = jnp.full_like(label, denoiser.num_classes)
  pair = jax.tree.map(
    lambda a, b: jnp.concatenate([a, b]), condition(label, memory), condition(no_class, nothing)
  )

  def predict(x, t):
    both = denoise(jnp.concatenate([x, x]), jnp.concatenate([t, t]), pair)
    return sampler.guide(*jnp.split(both, 2), scale)

  return predict


def sample_features(
  denoiser: MLPDenoiser,
  params: Any,
  schedule: NoiseSchedule,
  bank: MemoryBank,
  labels: jax.Array,
  key: jax.Array,
  config: HallucinationConfig,
  prediction: str,
  mesh: Mesh,
) -> jax.Array:
  """Samples one standardised feature per label, chunk by chunk in one compiled program.

  Args:
    denoiser, params, schedule: of the training; `params` are usually the EMA weights.
    bank: in standardised units.
    labels: [M] int32.
    key: randomness.
    config: sampler, steps, condition, guidance and chunk size.
    prediction: what the denoiser was trained to predict.
    mesh: samples are split over it.

  Returns:
    [M, D] float32.
  """
  num_samples = labels.shape[0]
  chunk = min(config.chunk_size, num_samples)
  num_chunks = -(-num_samples // chunk)
  padded = jnp.pad(labels, (0, num_chunks * chunk - num_samples)).reshape(num_chunks, chunk)

  def sample_chunk(arguments):
    number, labels = arguments
    labels = mesh_lib.shard_batch(labels, mesh)
    memory = memory_bank.read(bank, labels, mesh=mesh)
    if config.condition == "class":
      memory = memory_bank.forget(memory, jnp.ones(labels.shape, bool))
    if config.condition == "memory":
      labels = jnp.full_like(labels, denoiser.num_classes)
    predict = guided_denoiser(denoiser, params, labels, memory, config.guidance)
    return sampler.sample(
      predict,
      schedule,
      (chunk, denoiser.feature_dim),
      jax.random.fold_in(key, number),
      method=config.sampler,
      num_steps=config.num_steps,
      prediction=prediction,
      x0_limit=config.x0_limit,
    )

  samples = jax.lax.map(sample_chunk, (jnp.arange(num_chunks), padded))
  return samples.reshape(num_chunks * chunk, -1)[:num_samples]


def confidence(features, labels, bank: MemoryBank, logits, config: HallucinationConfig):
  """Confidence of synthetic features [M]; a constant for the gradient.

  `confidence_power` sharpens it; `normalize_confidence` divides by the mean of the class, so that
  confidence tells a class's features apart without lowering the weight of the class.
  """
  values = CONFIDENCES[config.confidence](features, labels, bank, logits)
  values = jax.lax.stop_gradient(values) ** config.confidence_power
  if config.normalize_confidence:
    rows = bank.seen.shape[0]
    total = jax.ops.segment_sum(values, labels, rows)
    number = jax.ops.segment_sum(jnp.ones_like(values), labels, rows)
    values = values / jnp.maximum(total / jnp.maximum(number, 1), _EPSILON)[labels]
  return values


def nearest_of_class(features, labels, references, reference_labels):
  """For each row, the nearest reference of its own class: (index [M], Euclidean distance [M])."""

  def one(feature, label):
    squared = jnp.sum(jnp.square(references - feature[None]), axis=-1)
    squared = jnp.where(reference_labels == label, squared, jnp.inf)
    return jnp.argmin(squared).astype(jnp.int32), jnp.sqrt(jnp.min(squared))

  return jax.lax.map(lambda row: one(*row), (features, labels), batch_size=256)


def hallucinate(
  denoiser: MLPDenoiser,
  params: Any,
  schedule: NoiseSchedule,
  bank: MemoryBank,
  standardizer: Standardizer,
  head: dict[str, jax.Array],
  train_features: jax.Array,
  train_labels: jax.Array,
  numbers: np.ndarray,
  key: jax.Array,
  config: HallucinationConfig,
  prediction: str,
  mesh: Mesh,
) -> SyntheticFeatures:
  """Makes the synthetic set of one seed; pure, to be jitted and vmapped over seeds.

  Args:
    bank: in standardised units, like `train_features` [N, D].
    head: {"kernel" [D, C], "bias" [C]} on standardised features, for the confidences.
    numbers: [C] features to make per class (host array: fixes the shapes).
    key: base key of the seed.
  """
  labels = jnp.asarray(np.repeat(np.arange(len(numbers)), numbers), jnp.int32)
  samples = sample_features(denoiser, params, schedule, bank, labels, key, config, prediction, mesh)
  # Through the encoder's units and back: what is judged and exported is what the head trains on.
  raw = standardizer.backward(samples)
  samples = standardizer.forward(raw)
  logits = samples @ head["kernel"] + head["bias"][None]
  index, distance = nearest_of_class(samples, labels, train_features, train_labels)
  return SyntheticFeatures(
    features=raw,
    labels=labels,
    confidence=confidence(samples, labels, bank, logits, config),
    number=jnp.asarray(np.concatenate([np.arange(n) for n in numbers]), jnp.int32),
    num_exemplars=jnp.minimum(bank.seen, bank.slots.shape[1])[labels],
    nearest_index=index,
    nearest_distance=distance,
  )
