"""The losses by name: a per-example objective, weights of the classes, and when they set in.

LOSSES is the table. A row is read from left to right: `ldam_drw` is the objective `ldam` on cosine
logits, weighted by the effective number, deferred. To add a loss, write one function of logits and
labels here, give it a name in OBJECTIVES and a row in LOSSES.

`normalized` says how a batch is averaged. PyTorch's weighted cross-entropy, which the published
repositories call, divides by the sum of the batch's weights; the rows that reproduce them do too.
memdiff's own cost-sensitive loss (CSL) is the plain mean of gamma_y CE, and of gamma_y conf CE
where a synthetic row is trusted as far as its confidence.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from memdiff import contrastive
from memdiff.classifier import stateful_losses
from memdiff.classifier.priors import effective_number, log_prior, with_mean_one
from memdiff.config import above, at_least, between, setting
from memdiff.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """What the losses are tuned by; a row reads what its formula has."""

  beta: float = setting(
    0.9999, "effective number: 0 weighs classes alike, 1 by 1 / count", between(0, 0.999999)
  )
  power: float = setting(1.0, "cs_power: (n_min / n)^power", between(0, 2))
  focusing: float = setting(1.0, "focal: (1 - p)^focusing", at_least(0))
  margin: float = setting(0.5, "ldam: of the smallest class, as a cosine", at_least(0))
  tau: float = setting(1.0, "logit_adjustment: times the log of the class prior", at_least(0))
  defer: float = setting(
    0.8, "*_drw, csl: share of the steps before the class weights set in", between(0, 1)
  )
  tail_share: float = setting(
    0.3, "csl_*, focal_tail: share of the classes that count as tail", between(0, 1)
  )
  contrastive_weight: float = setting(0.35, "bcl: of the contrastive part", at_least(0))
  embedding_dim: int = setting(128, "bcl: of the contrastive embeddings", at_least(1))
  temperature: float = setting(0.1, "bcl: of cosines", above(0))


# --- weights of the classes ------------------------------------------------------------------


# Rule -> (counts [C] float32, config) -> gamma [C].
CLASS_WEIGHTS: dict[str, Callable[[jax.Array, LossConfig], jax.Array]] = {
  "effective_number": lambda n, config: effective_number(n, config.beta),
  "inverse": lambda n, config: with_mean_one(1 / n),
  "inverse_sqrt": lambda n, config: with_mean_one(jax.lax.rsqrt(n)),
  # Weights of at most 1, as "Bag of tricks" (Zhang et al. 2021) has its cost-sensitive CE.
  "power": lambda n, config: (n.min() / n) ** config.power,
}


def deferred(weights: jax.Array, step: jax.Array, start: int) -> jax.Array:
  """Deferred re-weighting (DRW, Cao et al. 2019): ones before step `start`, `weights` after."""
  return jnp.where(step < start, jnp.ones_like(weights), weights)


# --- objectives: logits [B, C] and labels [B] int -> [B] --------------------------------------


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """-log softmax(logits)[label]. [B, C] and [B] int -> [B]."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def focal(logits: jax.Array, labels: jax.Array, focusing: float) -> jax.Array:
  """(1 - p_y)^focusing times -log p_y. Lin et al., "Focal loss", 2017, eq. 4, with softmax.

  p_y is the network's own probability; the LDAM repository computes it from the weighted loss.
  """
  loss = cross_entropy(logits, labels)
  # 1 - p = -expm1(-loss); its power has no gradient at 0, so stay a little above.
  return jnp.maximum(-jnp.expm1(-loss), 1e-12) ** focusing * loss


def ldam(
  logits: jax.Array, labels: jax.Array, counts: jax.Array, margin: float, scale: float
) -> jax.Array:
  """Cross-entropy of s (cos - Delta_y at the label), Delta_c = margin n_c^(-1/4) / max n^(-1/4).

  Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", 2019,
  eq. 13. `logits` are s cos already, `scale` is that s, `counts` is [C].
  """
  margins = margin * (counts.min() / counts) ** 0.25
  at_label = jax.nn.one_hot(labels, logits.shape[-1])
  return cross_entropy(logits - scale * at_label * margins[None], labels)


def logit_adjusted(
  logits: jax.Array, labels: jax.Array, counts: jax.Array, tau: float
) -> jax.Array:
  """Cross-entropy of logits + tau log prior, prior = counts / sum(counts), `counts` [C].

  Menon et al., "Long-tail learning via logit adjustment", 2021, eq. 10. tau = 1 is the balanced
  softmax of Ren et al., "Balanced meta-softmax for long-tailed visual recognition", 2020, eq. 4.
  """
  return cross_entropy(logits + tau * log_prior(counts)[None], labels)


# Name -> (logits, labels, counts, scale, config) -> [B].
OBJECTIVES = {
  "cross_entropy": lambda z, y, n, s, config: cross_entropy(z, y),
  "focal": lambda z, y, n, s, config: focal(z, y, config.focusing),
  "ldam": lambda z, y, n, s, config: ldam(z, y, n, config.margin, s),
  "balanced_softmax": lambda z, y, n, s, config: logit_adjusted(z, y, n, 1.0),
  "logit_adjustment": lambda z, y, n, s, config: logit_adjusted(z, y, n, config.tau),
}


# --- averages over a batch -------------------------------------------------------------------


def weighted_cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
  """Mean over the rows of weight times cross-entropy; `weights` is [B]. Returns a scalar."""
  return jnp.mean(weights * cross_entropy(logits, labels))


def average(
  losses: jax.Array, class_weights: jax.Array, row_weights: jax.Array, normalized: bool
) -> jax.Array:
  """Sum of [B], weighted by class and row, over the sum of all weights or of the rows' alone.

  Returns:
    A scalar; without normalisation and with rows of weight 1, the mean over the batch.
  """
  weights = class_weights * row_weights
  return jnp.sum(weights * losses) / (weights if normalized else row_weights).sum()


# --- the table -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Loss:
  """A row of the table.

  Attributes:
    description: for reports, after "trained with".
    objective: a name in OBJECTIVES.
    weights: a name in CLASS_WEIGHTS, or `semantic_scale`; None weighs all classes alike.
    deferred: whether the weights set in at the share `defer` of the steps, or from the start.
    normalized: whether the batch's mean divides by the sum of its class weights.
    cosine_head: whether the objective is made for a cosine head.
    term: what is added to the mean and remembers earlier steps: a name in stateful_losses.TERMS.
    contrastive: whether balanced contrastive learning of two further views is added.
  """

  description: str
  objective: str = "cross_entropy"
  weights: str | None = None
  deferred: bool = False
  normalized: bool = True
  cosine_head: bool = False
  term: str | None = None
  contrastive: bool = False

  @property
  def views(self) -> int:
    """Augmented views of each image."""
    return 3 if self.contrastive else 1

  @property
  def needs_bank(self) -> bool:
    return self.weights == "semantic_scale"

  @property
  def stateful(self) -> bool:
    return self.needs_bank or self.term is not None


_PUBLISHED = {
  "cross_entropy": Loss("plain cross-entropy"),
  "cs_inverse": Loss("cross-entropy weighted by 1/n", weights="inverse"),
  "cs_inverse_sqrt": Loss("cross-entropy weighted by 1/sqrt(n)", weights="inverse_sqrt"),
  "cs_power": Loss("cost-sensitive cross-entropy, (n_min/n)^power", weights="power"),
  "class_balanced": Loss(
    "cross-entropy weighted by the effective number", weights="effective_number"
  ),
  "semantic_scale": Loss("cross-entropy weighted by semantic scale", weights="semantic_scale"),
  "focal": Loss("the focal loss", "focal", normalized=False),
  "class_balanced_focal": Loss(
    "the focal loss weighted by the effective number", "focal", "effective_number", normalized=False
  ),
  "ldam": Loss("LDAM's margins on cosines", "ldam", cosine_head=True),
  "balanced_softmax": Loss("balanced softmax", "balanced_softmax"),
  "logit_adjustment": Loss("the logit-adjusted loss", "logit_adjustment"),
}

_DEFERRED = {
  f"{name}_drw": dataclasses.replace(
    row,
    description=f"{row.description}, re-weighting deferred",
    weights=row.weights or "effective_number",
    deferred=True,
  )
  for name, row in _PUBLISHED.items()
  if name not in ("cross_entropy", "logit_adjustment")
}

_OTHERS = {
  "csl": Loss(
    "the cost-sensitive loss, deferred",
    weights="effective_number",
    deferred=True,
    normalized=False,
  ),
  "csl_paper": Loss(
    "the additive CSL term as its paper's text has it (features, predictive entropy)",
    term="csl_paper",
  ),
  "csl_code": Loss(
    "the additive CSL term as its published code computes it (logits, cancelling entropy)",
    term="csl_code",
  ),
  "focal_tail": Loss(
    "inverse-frequency cross-entropy and the tail-boosting focal term of CSL's later rewrite",
    weights="inverse",
    term="focal_tail",
  ),
  "bcl": Loss(
    "balanced contrastive learning beside the logit-adjusted loss",
    "logit_adjustment",
    cosine_head=True,
    contrastive=True,
  ),
}

LOSSES: dict[str, Loss] = _PUBLISHED | _DEFERRED | _OTHERS


def check(name: str, *, mixup: bool) -> None:
  """Raises ConfigError if a loss cannot be trained as asked."""
  row = LOSSES[name]
  if mixup and (row.stateful or row.contrastive):
    raise ConfigError(
      f"The loss {name} needs one label per image, which mixup takes away; set"
      " config.classifier.augment.mixup to 0.0 or choose another loss."
    )


@flax.struct.dataclass
class Batch:
  """What a network says of a batch of images, and what the images show."""

  logits: jax.Array  # [B, C]
  features: jax.Array  # [B, D], before the head
  labels: jax.Array  # [B] int
  partner_labels: jax.Array | None = None  # [B] int, of mixup
  share: jax.Array | None = None  # [] in [0, 1], of the own label in mixup
  weight: jax.Array | None = None  # [B], of each image beside its class's; None: 1
  partner_weight: jax.Array | None = None  # [B], of mixup


@dataclasses.dataclass(frozen=True)
class Objective:
  """A row of the table, made ready for one training set; pure, for use inside jit."""

  row: Loss
  config: LossConfig
  counts: Any  # [C] training examples; may be traced
  scale: float  # of cosine logits
  num_steps: int
  steps_per_epoch: int

  def init(self) -> dict[str, Any]:
    """What the loss carries from step to step; arrays of fixed shapes, perhaps none."""
    state = {}
    if self.row.weights == "semantic_scale":
      state["weights"] = stateful_losses.init_semantic_scale(len(self.counts))
    if self.row.term is not None:
      state["term"] = stateful_losses.TERMS[self.row.term].init(len(self.counts))
    return state

  def __call__(
    self, batch: Batch, state: dict[str, Any], step: jax.Array, bank: Any = None
  ) -> tuple[jax.Array, dict[str, Any]]:
    """The loss of a batch and the next state.

    Args:
      batch: of B images.
      state: of `init` or the last call.
      step: int32 [].
      bank: the memory bank, for rows that need it.
    """
    state = dict(state)
    if self.row.weights == "semantic_scale":
      gamma, state["weights"] = stateful_losses.semantic_scale(
        state["weights"], batch.logits, batch.labels, step, bank, self.steps_per_epoch
      )
    else:
      gamma = self._class_weights()
    gamma = self._deferred(gamma, step)

    def of_labels(labels, weight):
      rows = self._rows(batch.logits, labels)
      of_rows = jnp.ones_like(rows) if weight is None else weight
      return average(rows, gamma[labels], of_rows, self.row.normalized)

    value = of_labels(batch.labels, batch.weight)
    if batch.partner_labels is not None:
      partner = of_labels(batch.partner_labels, batch.partner_weight)
      value = batch.share * value + (1 - batch.share) * partner
    if self.row.term is not None:
      tail = stateful_losses.tail_classes(self.counts, self.config.tail_share)
      added, state["term"] = stateful_losses.TERMS[self.row.term].value(
        state["term"], batch.logits, batch.features, batch.labels, step, tail, self.steps_per_epoch
      )
      value = value + added
    return value, state

  def weighted_rows(self, logits: jax.Array, labels: jax.Array, step: jax.Array) -> jax.Array:
    """Losses of single examples with their class weights, for rows without a state. [B]."""
    gamma = self._deferred(self._class_weights(), step)
    return gamma[labels] * self._rows(logits, labels)

  def _rows(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
    counts = jnp.asarray(self.counts, jnp.float32)
    return OBJECTIVES[self.row.objective](logits, labels, counts, self.scale, self.config)

  def _class_weights(self) -> jax.Array:
    counts = jnp.asarray(self.counts, jnp.float32)
    if self.row.weights is None:
      return jnp.ones_like(counts)
    return CLASS_WEIGHTS[self.row.weights](counts, self.config)

  def _deferred(self, gamma: jax.Array, step: jax.Array) -> jax.Array:
    start = round(self.config.defer * self.num_steps)
    return deferred(gamma, step, start) if self.row.deferred else gamma

  def contrastive_term(
    self, embeddings: jax.Array, centres: jax.Array, labels: jax.Array
  ) -> jax.Array:
    """What a contrastive row adds: embeddings [V * B, P], view by view; centres [C, P]."""
    views = embeddings.reshape(-1, labels.shape[0], embeddings.shape[-1])
    value = contrastive.balanced_contrastive(views, labels, centres, self.config.temperature)
    return self.config.contrastive_weight * value


def make(
  name: str,
  config: LossConfig,
  counts: Any,
  *,
  scale: float,
  num_steps: int,
  steps_per_epoch: int,
) -> Objective:
  """The loss `name` for a training set with `counts` [C] examples per class, maybe traced."""
  return Objective(LOSSES[name], config, counts, scale, num_steps, steps_per_epoch)
