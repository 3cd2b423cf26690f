"""FASA: virtual features, and how often each class needs them (Zang, Huang, Loy, ICCV 2021).

"FASA: Feature augmentation and sampling adaptation for long-tailed instance segmentation",
arXiv 2102.12867, on the features of a frozen encoder. While a linear head trains, running means and
variances of each class follow the minibatches, and every step adds a virtual feature of class c
with probability p_c. After each epoch p_c falls if the loss of the class's group on held-out
data has risen, and rises if it has fallen.

Different from the published code, which segments images: a class that a minibatch holds once
says nothing about its variance, which stays as it is (there every object comes with many proposals,
and a single one counts as variance 0; here that would leave the tail no variance at all); classes
are grouped once, since features stand still, by affinity propagation on the *negative* squared
distances of their means (there distances are handed over as similarities).
"""

import dataclasses
import warnings
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from memdiff.config import at_least, setting
from memdiff.evaluation import cross_validation
from memdiff.memory import exemplars as exemplars_lib
from memdiff.memory.exemplars import Exemplars
from memdiff.memory.feature_space import FeatureRuns
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime import train_state
from memdiff.runtime.random import stream
from memdiff.runtime.train_state import OptimizerConfig, nesterov_cosine
from memdiff.synthesis.generator import Generator, Sampler

MOMENTUM = 0.1  # share of a minibatch in the running statistics
VIRTUAL_WEIGHT = 0.1  # of the loss on virtual features
FIRST_VIRTUAL_EPOCH = 1
DOWN, UP = 0.9, 1.1  # factors of p_c


@dataclasses.dataclass(frozen=True)
class FASAConfig:
  num_epochs: int = setting(20, "passes over the training features", at_least(1))
  batch_size: int = setting(128, "features", at_least(1))
  optimizer: OptimizerConfig = setting(nesterov_cosine(0.05, 5e-4), "of its head")


@flax.struct.dataclass
class Statistics:
  """Running mean and variance of every class."""

  mean: jax.Array  # [C, D]
  variance: jax.Array  # [C, D]
  has_mean: jax.Array  # [C] bool
  has_variance: jax.Array  # [C] bool; the variance is 0 until then


@flax.struct.dataclass
class Adapted:
  """What FASA has learned; arrays may lead with runs."""

  statistics: Statistics
  probability: jax.Array  # [C] of a virtual feature per step
  losses: jax.Array  # [E, C] on held-out data after each epoch: sum over a class / all examples


def group_classes(means: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Groups classes by affinity propagation (Frey and Dueck 2007) on their means; on the host.

  The similarity of two classes is the negative squared distance of their means, the preference its
  median. Where the messages do not converge, even damped, every class is a group of its own.

  Args:
    means: [C, D].
    counts: [C]; classes without examples are groups of their own.

  Returns:
    Group numbers below C, [C] int32.
  """
  from sklearn.cluster import AffinityPropagation  # takes seconds

  means, filled = np.asarray(means, np.float64), np.flatnonzero(np.asarray(counts) > 0)
  difference = means[filled, None] - means[None, filled]
  groups = np.arange(len(means), dtype=np.int32)
  for damping in (0.5, 0.7, 0.9):
    model = AffinityPropagation(affinity="precomputed", damping=damping, random_state=1)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of messages that do not converge, and of equal distances
      model.fit(-np.square(difference).sum(axis=-1))
    if model.n_iter_ < model.max_iter:
      groups[filled] = filled[model.cluster_centers_indices_[model.labels_]]
      break
  return groups


def initial_probability(counts: jax.Array) -> jax.Array:
  """p_c = (1 / n_c) / sum_j (1 / n_j); 0 for an empty class. [C]."""
  inverse = jnp.where(counts > 0, 1 / jnp.maximum(counts, 1), 0.0)
  return inverse / jnp.maximum(inverse.sum(), 1e-12)


def adapt_probability(probability, groups, before, now) -> jax.Array:
  """x 0.9 for groups whose loss has risen, x 1.1 if it has fallen, at most 1. [C].

  Args:
    probability: [C].
    groups: [C] int, group numbers below C.
    before, now: [C] losses of the classes on held-out data.
  """
  change = jax.ops.segment_sum(now - before, groups, groups.shape[0])[groups]
  factor = jnp.where(change > 0, DOWN, jnp.where(change < 0, UP, 1.0))
  return jnp.clip(probability * factor, 0.0, 1.0)


def update_statistics(old: Statistics, features, labels) -> Statistics:
  """Takes in a minibatch: features [B, D], labels [B], of which C and more belong to no class.

  s <- 0.9 s + 0.1 s_batch for mean and unbiased variance; the first batch of a class sets them.
  """
  num_classes = old.mean.shape[0]

  def sums(values):
    return jax.ops.segment_sum(values, labels, num_classes + 1)[:num_classes]

  number = sums(jnp.ones(labels.shape))
  mean = sums(features) / jnp.maximum(number, 1)[:, None]
  centre = mean[jnp.minimum(labels, num_classes - 1)]
  variance = sums(jnp.square(features - centre)) / jnp.maximum(number - 1, 1)[:, None]

  def blend(old, new, started, arrived):
    moved = jnp.where(started[:, None], (1 - MOMENTUM) * old + MOMENTUM * new, new)
    return jnp.where(arrived[:, None], moved, old)

  return Statistics(
    mean=blend(old.mean, mean, old.has_mean, number > 0),
    variance=blend(old.variance, variance, old.has_variance, number > 1),
    has_mean=old.has_mean | (number > 0),
    has_variance=old.has_variance | (number > 1),
  )


def _draw(key, statistics: Statistics, labels):
  deviation = jnp.sqrt(statistics.variance)[labels]
  return statistics.mean[labels] + deviation * jax.random.normal(key, deviation.shape)


def sample(key: jax.Array, adapted: Adapted, labels: jax.Array) -> jax.Array:
  """Virtual features mu_c + sigma_c z of labels [M], classes that have examples. [M, D]."""
  return _draw(key, adapted.statistics, labels)


def class_weights(adapted: Adapted) -> jax.Array:
  """How far to trust virtual features of each class: p_c, 1 for the largest. [C]."""
  return adapted.probability / jnp.maximum(adapted.probability.max(), 1e-12)


def _epoch_rows(key, labels, num_classes: int, batch_size: int) -> jax.Array:
  """All examples in a random order, then padding. Row numbers [steps, B], N if there is none."""
  rows = jnp.arange(labels.shape[0])
  # A number per row, so that padding does not change the order of the others.
  place = jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row)))(rows)
  order = jnp.argsort(jnp.where(labels < num_classes, place, jnp.inf))
  padding = -labels.shape[0] % batch_size
  return jnp.pad(order, (0, padding), constant_values=labels.shape[0]).reshape(-1, batch_size)


def _losses(head, features, labels):
  """Cross-entropy of each row, 0 for padding. [B]."""
  inside = labels < head["bias"].shape[0]
  targets = jnp.where(inside, labels, 0)
  logits = features @ head["kernel"] + head["bias"][None]
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return jnp.where(inside, losses, 0.0)


def adapt(
  key: jax.Array, train: Exemplars, held_out: Exemplars, groups: jax.Array, config: FASAConfig
) -> Adapted:
  """Trains a linear head with virtual features and adapts their probabilities; one run.

  Args:
    key: randomness.
    train: to learn from.
    held_out: other examples of the training set, never of the test set, in the same units. Classes
      without any leave the decision to their group.
    groups: [C] int32, of `group_classes`.
    config: of the head's training. An epoch passes over all examples of `train` once.

  Returns:
    Statistics, probabilities and losses at the end of the training.
  """
  num_classes, dim = train.by_class.counts.shape[0], train.features.shape[1]
  classes, num_rows = jnp.arange(num_classes), train.labels.shape[0]
  features = jnp.pad(train.features, ((0, 1), (0, 0)))  # with the row that _epoch_rows pads with
  labels = jnp.pad(train.labels, (0, 1), constant_values=num_classes)
  num_steps = config.num_epochs * -(-num_rows // config.batch_size)
  optimizer = train_state.make_optimizer(config.optimizer, num_steps)

  def train_epoch(key, model, statistics, probability):
    """One pass over the examples; virtual features by `probability` [C]."""

    def step(carry, inputs):
      (head, opt_state), statistics = carry
      number, rows = inputs
      batch, targets = features[rows], labels[rows]
      num_real = jnp.sum(targets < num_classes)
      statistics = update_statistics(statistics, batch, targets)
      virtual = _draw(stream(key, "virtual", number), statistics, classes)
      chosen = jax.random.bernoulli(stream(key, "chosen", number), probability)
      chosen = chosen & statistics.has_mean

      def loss_of(head):
        real = _losses(head, batch, targets).sum() / jnp.maximum(num_real, 1)
        added = jnp.sum(chosen * _losses(head, virtual, classes)) / jnp.maximum(chosen.sum(), 1)
        return real + VIRTUAL_WEIGHT * added

      updates, new_state = optimizer.update(jax.grad(loss_of)(head), opt_state, head)
      new = optax.apply_updates(head, updates), new_state
      # A minibatch of padding alone trains nothing.
      kept = jax.tree.map(lambda a, b: jnp.where(num_real > 0, a, b), new, (head, opt_state))
      return (kept, statistics), None

    rows = _epoch_rows(stream(key, "order"), train.labels, num_classes, config.batch_size)
    carry, _ = jax.lax.scan(step, (model, statistics), (jnp.arange(rows.shape[0]), rows))
    return carry

  def epoch(carry, number):
    model, statistics, probability, before = carry
    starts = number >= FIRST_VIRTUAL_EPOCH
    model, statistics = train_epoch(
      stream(key, "epoch", number), model, statistics, probability * starts
    )
    losses = _losses(model[0], held_out.features, held_out.labels)
    now = jax.ops.segment_sum(losses, held_out.labels, num_classes + 1)[:num_classes]
    now = now / jnp.maximum(held_out.by_class.counts.sum(), 1)
    before = jnp.where(number == 0, now, before)
    return (model, statistics, adapt_probability(probability, groups, before, now), now), now

  head = {"kernel": jnp.zeros((dim, num_classes)), "bias": jnp.zeros((num_classes,))}
  unknown = Statistics(
    mean=jnp.zeros((num_classes, dim)),
    variance=jnp.zeros((num_classes, dim)),
    has_mean=jnp.zeros((num_classes,), bool),
    has_variance=jnp.zeros((num_classes,), bool),
  )
  probability = initial_probability(train.by_class.counts)
  start = ((head, optimizer.init(head)), unknown, probability, jnp.zeros((num_classes,)))
  (_, statistics, probability, _), losses = jax.lax.scan(
    epoch, start, jnp.arange(config.num_epochs)
  )
  return Adapted(statistics=statistics, probability=probability, losses=losses)


@dataclasses.dataclass(frozen=True)
class FASA(Generator):
  """The method as a generator: its sampling probabilities become the trust in what it makes."""

  config: FASAConfig

  def prepare(self, runs: FeatureRuns, params: Any) -> Any:
    del params
    return _split(runs)

  def sampler(self, labels: np.ndarray, feature_dim: int, mesh: Mesh) -> Sampler:
    del feature_dim, mesh

    def of_runs(keys, strength, runs, parts):
      del strength, runs

      def of_run(run):
        key, (train, held_out, groups) = jax.tree.map(lambda x: x[run], (keys, parts))
        adapted = adapt(stream(key, "adapt"), train, held_out, groups, self.config)
        return sample(stream(key, "sample"), adapted, labels), class_weights(adapted)[labels]

      return of_run

    return of_runs


def _split(runs: FeatureRuns) -> tuple[Exemplars, Exemplars, np.ndarray]:
  """Four fifths of each run's exemplars, the fifth that is held out, and groups of the classes."""
  num_classes = runs.exemplars.by_class.counts.shape[-1]
  parts, groups = ([], []), []
  features, labels = mesh_lib.fetch((runs.exemplars.features, runs.exemplars.labels))
  for run_features, own_labels in zip(features, labels, strict=True):
    fold = cross_validation.deal(own_labels, 5, seed=0)
    for part, inside in zip(parts, (fold != 0, fold == 0), strict=True):
      masked = np.where(inside, own_labels, num_classes)
      part.append(exemplars_lib.make(run_features, masked, num_classes))
    train = parts[0][-1]
    means = np.asarray(exemplars_lib.class_means(jax.tree.map(jnp.asarray, train)))
    groups.append(group_classes(means, train.by_class.counts))
  train, held_out = (jax.tree.map(lambda *leaves: np.stack(leaves), *part) for part in parts)
  return train, held_out, np.stack(groups)
