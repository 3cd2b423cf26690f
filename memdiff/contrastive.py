"""Supervised contrastive losses on unit-length embeddings, and how far classes are apart."""

import jax
import jax.numpy as jnp


def unit_length(x: jax.Array, axis: int) -> jax.Array:
  """`x` divided by its Euclidean length along `axis`; zero stays zero, also for gradients."""
  squares = jnp.square(x).sum(axis=axis, keepdims=True)
  return x * jnp.where(squares > 1e-24, jax.lax.rsqrt(jnp.maximum(squares, 1e-24)), 0.0)


def supervised_contrastive(
  embeddings: jax.Array,
  labels: jax.Array,
  temperature: float,
  weights: jax.Array | None = None,
) -> jax.Array:
  """SupCon, mean over the anchors that have a positive.

  -1/|P(i)| sum_{p in P(i)} log [exp(z_i z_p / t) / sum_{a != i} exp(z_i z_a / t)].
  Khosla et al., "Supervised contrastive learning", 2020, eq. 2 (L_out).

  Args:
    embeddings: [N, P] of unit length.
    labels: [N] int.
    temperature: t.
    weights: [N] of the anchors' terms before the mean; None: 1.
  """
  size = embeddings.shape[0]
  others = ~jnp.eye(size, dtype=bool)
  positive = (labels[:, None] == labels[None]) & others
  similarity = embeddings @ embeddings.T / temperature
  log_all = jax.nn.logsumexp(similarity, axis=1, where=others)
  of_anchor = jnp.sum(jnp.where(positive, log_all[:, None] - similarity, 0.0), axis=1)
  number = positive.sum(axis=1)
  mean = of_anchor / jnp.maximum(number, 1)
  if weights is not None:
    mean = weights * mean
  return mean.sum() / jnp.maximum((number > 0).sum(), 1)


def balanced_contrastive(
  embeddings: jax.Array, labels: jax.Array, centres: jax.Array, temperature: float
) -> jax.Array:
  """Balanced contrastive learning, mean over the anchors.

  As SupCon, with every class's centre among the contrasts (class complement), and in the
  denominator the mean over each class's contrasts in place of their sum (class averaging):
  sum_j 1/|A_j(i)| sum_{k in A_j(i)} exp(z_i z_k / t), A_j(i) the contrasts of class j without i.
  Zhu et al., "Balanced contrastive learning for long-tailed visual recognition", 2022, eq. 6.

  Args:
    embeddings: [V, B, P] of unit length, V views of B images.
    labels: [B] int.
    centres: [C, P] of unit length.
    temperature: t.
  """
  views, batch, _ = embeddings.shape
  num_classes = centres.shape[0]
  anchors = embeddings.reshape(views * batch, -1)
  anchor_labels = jnp.tile(labels, views)
  contrasts = jnp.concatenate([anchors, centres])
  contrast_labels = jnp.concatenate([anchor_labels, jnp.arange(num_classes)])
  itself = jnp.eye(views * batch, len(contrast_labels), dtype=bool)
  same = anchor_labels[:, None] == contrast_labels[None]
  similarity = anchors @ contrasts.T / temperature
  # |A_j(i)|: the contrasts of class j, less one where i itself is of class j.
  sizes = jnp.bincount(contrast_labels, length=num_classes)[contrast_labels]
  weights = jnp.where(itself, 0.0, 1 / jnp.maximum(sizes[None] - same, 1))
  log_all = jax.nn.logsumexp(similarity, axis=1, b=weights)
  positive = same & ~itself
  of_anchor = jnp.sum(jnp.where(positive, log_all[:, None] - similarity, 0.0), axis=1)
  return jnp.mean(of_anchor / positive.sum(axis=1))


def class_cosines(rows: jax.Array, labels: jax.Array, num_classes: int) -> dict[str, jax.Array]:
  """Mean cosine of two rows of one class, and of different ones; every class weighs the same.

  Args:
    rows: [N, W], for example bottlenecks.
    labels: [N] int, of two classes or more.
    num_classes: C.

  Returns:
    {"intra_cosine", "inter_cosine"}; NaN if no class has two rows.
  """
  unit = unit_length(rows, 1)
  member = (labels[None] == jnp.arange(num_classes)[:, None]).astype(unit.dtype)
  counts, sums = member.sum(axis=1), member @ unit
  pairs = counts * (counts - 1)
  within = jnp.square(sums).sum(axis=1) - member @ jnp.square(unit).sum(axis=1)
  means = sums / jnp.maximum(counts, 1)[:, None]
  across = jnp.square(means.sum(axis=0)).sum() - jnp.square(means).sum()
  number = (counts > 0).sum()
  return {
    "intra_cosine": (within / jnp.maximum(pairs, 1)).sum() / (pairs > 0).sum(),
    "inter_cosine": across / (number * (number - 1)),
  }
