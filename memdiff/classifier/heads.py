"""The head stage: linear classifiers on frozen, standardised features, many of them at once.

A head is trained on the real features of one run (a seed, or a fold of cross-validation) and on
one generator's synthetic features beside them, by one `Setting`. A stage trains the heads of all
its settings as if they were seeds; they share the features on the devices.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from memdiff.classifier import losses
from memdiff.classifier.priors import effective_number, log_shares
from memdiff.config import at_least, between, one_of, setting
from memdiff.memory.exemplars import Exemplars
from memdiff.memory.feature_space import linear_logits
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime import train_state
from memdiff.runtime.loop import Stage
from memdiff.runtime.random import stream, uniform
from memdiff.runtime.train_state import OptimizerConfig, nesterov_cosine

STARTS = ("encoder", "zeros")
GAMMA_COUNTS = ("real", "effective")

# Trained losses; `logit_adjustment` is the head of cross_entropy, adjusted afterwards.
TRAINED = ("cross_entropy", "balanced_softmax", "csl")
LOSSES = {
  "cross_entropy": "cross-entropy",
  "logit_adjustment": "cross-entropy, logits adjusted by the class prior afterwards",
  "balanced_softmax": "balanced softmax",
  "csl": "the confidence-adaptive cost-sensitive loss",
}


def trained_loss(loss: str) -> str:
  """The loss that the head of `loss` is trained with."""
  return "cross_entropy" if loss == "logit_adjustment" else loss


@dataclasses.dataclass(frozen=True)
class HeadConfig:
  start: str = setting("encoder", "start from the encoder's head or from zeros", one_of(STARTS))
  beta: float = setting(0.9999, "csl: effective number, as in the classifier", between(0, 0.999999))
  gamma_counts: str = setting(
    "effective",
    "csl: what gamma counts; effective: real and trusted synthetic features",
    one_of(GAMMA_COUNTS),
  )
  defer: float = setting(
    0.0, "csl: share of the steps before the class weights set in", between(0, 1)
  )
  batch_size: int = setting(256, "features, real and synthetic", at_least(1))
  num_steps: int = setting(1000, "training steps", at_least(1))
  optimizer: OptimizerConfig = setting(nesterov_cosine(0.05, 0.0), "of the heads")


ALL = 10**9  # a fill that no class reaches: as many synthetic features as there are


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """How one head is trained.

  Attributes:
    run: which of the runs.
    seed: of its minibatches; heads of one seed and stream draw the same ones.
    stream: names its random numbers, for example after its generator and loss.
    strength: which of the generator's strengths, by number.
    fill: classes with fewer real features are filled up to this number with synthetic ones; ALL
      takes all that were made.
    share: of the training set that the run has; what is filled shrinks alike, so that a fold's
      mixture is the whole set's.
    exponent: classes are drawn by (real + synthetic features)^exponent.
    l2: strength of the penalty l2 / 2 |W|^2 on the kernel.
    loss: one of TRAINED.
  """

  run: int
  seed: int
  stream: str
  strength: int = 0
  fill: int = ALL
  share: float = 1.0
  exponent: float = 1.0
  l2: float = 0.0
  loss: str


@flax.struct.dataclass
class Added:
  """A generator's features of R runs at K strengths, in order of class."""

  features: Any  # [R, K, M, D] standardised
  confidence: Any  # [R, K, M]
  numbers: Any  # [C] features per class, M in all


@flax.struct.dataclass
class HeadData:
  """What the heads of a stage share."""

  exemplars: Exemplars  # of R runs
  added: Added
  start: dict[str, Any]  # {"kernel" [R, D, C], "bias" [R, C]}
  test_features: Any  # [R, T, D], T may be 0
  test_labels: Any  # [R, T]


@flax.struct.dataclass
class Mixture:
  """What a head's minibatches are made of."""

  draw: Any  # [C] probability of a class
  share: Any  # [C] probability that a row of the class is synthetic
  used: Any  # [C] synthetic features of the class that are used
  prior: Any  # [C] weight of the class in the loss: its rows, synthetic ones as far as trusted
  real: Any  # [] weight of all real features in the loss


_PADDED_UP_TO = 2**26  # bytes of synthetic features up to which all pools get one size


def nothing_added(num_runs: int, dim: int, num_classes: int) -> Added:
  """No synthetic features; one row that is never drawn, since arrays cannot be empty."""
  return Added(
    features=jnp.zeros((num_runs, 1, 1, dim)),
    confidence=jnp.ones((num_runs, 1, 1)),
    numbers=np.zeros(num_classes, np.int32),
  )


def padded(added: Added, rows: int) -> Added:
  """The same with `rows` rows, of which the last are never drawn, if that takes little memory.

  Pools of one size share the programs of their heads.
  """
  missing = rows - added.features.shape[2]
  size = added.features.size // added.features.shape[2] * rows * 4
  if missing <= 0 or size > _PADDED_UP_TO:
    return added
  behind = ((0, 0), (0, 0), (0, missing))
  return added.replace(
    features=jnp.pad(added.features, (*behind, (0, 0))),
    confidence=jnp.pad(added.confidence, behind, constant_values=1.0),
  )


def mixture(counts: jax.Array, added: Added, per_seed: dict[str, jax.Array]) -> Mixture:
  """The mixture of one head.

  Args:
    counts: [C] real features.
    added: of all runs.
    per_seed: scalars of its setting, a row of `setting_arrays`.
  """
  run, strength, share_of_set = per_seed["run"], per_seed["strength"], per_seed["share"]
  numbers = jnp.asarray(added.numbers)
  filled = jnp.clip(
    jnp.round(per_seed["fill"] * share_of_set).astype(jnp.int32) - counts, 0, numbers
  )
  everything = jnp.round(numbers * share_of_set).astype(jnp.int32)
  used = jnp.where(counts > 0, jnp.where(per_seed["fill"] == ALL, everything, filled), 0)
  total = counts + used
  draw = jnp.where(
    total > 0, jnp.maximum(total, 1).astype(jnp.float32) ** per_seed["exponent"], 0.0
  )
  draw = draw / draw.sum()
  share = used / jnp.maximum(total, 1)
  first = jnp.cumsum(numbers) - numbers
  trusted = jnp.concatenate([jnp.zeros(1), jnp.cumsum(added.confidence[run, strength])])
  trust = (trusted[first + used] - trusted[first]) / jnp.maximum(used, 1)
  weight = draw * (1 - share + share * trust)
  total_weight = weight.sum()
  return Mixture(
    draw=draw,
    share=share,
    used=used,
    prior=weight / total_weight,
    real=jnp.sum(draw * (1 - share)) / total_weight,
  )


def setting_arrays(settings: Sequence[Setting]) -> dict[str, np.ndarray]:
  """The settings as arrays that lead with heads."""
  return {
    "run": np.array([s.run for s in settings], np.int32),
    "seed": np.array([s.seed for s in settings], np.uint32),
    "stream": np.array([zlib.crc32(s.stream.encode()) for s in settings], np.uint32),
    "strength": np.array([s.strength for s in settings], np.int32),
    "fill": np.array([s.fill for s in settings], np.int32),
    "share": np.array([s.share for s in settings], np.float32),
    "exponent": np.array([s.exponent for s in settings], np.float32),
    "l2": np.array([s.l2 for s in settings], np.float32),
    "loss": np.array([TRAINED.index(s.loss) for s in settings], np.int32),
  }


@jax.jit
def _mixtures(counts: jax.Array, added: Added, per_seed: dict[str, jax.Array]) -> Mixture:
  return jax.vmap(lambda per_seed: mixture(counts[per_seed["run"]], added, per_seed))(per_seed)


def mixtures(data: HeadData, settings: Sequence[Setting]) -> Mixture:
  """The mixture of every head; arrays lead with heads."""
  return _mixtures(data.exemplars.by_class.counts, data.added, setting_arrays(settings))


def adjusted(head: dict[str, jax.Array], prior: jax.Array, tau: float) -> dict[str, jax.Array]:
  """The head whose logits are lowered by tau log prior (Menon et al. 2021, eq. 9)."""
  return head | {"bias": head["bias"] - tau * log_shares(prior)}


@jax.jit
def predict(
  params: dict[str, jax.Array], prior: jax.Array, taus: jax.Array, run: jax.Array, features
) -> jax.Array:
  """Classes that heads predict, with logits lowered by each tau times their log prior.

  Args:
    params: {"kernel" [H, D, C], "bias" [H, C]}.
    prior: [H, C].
    taus: [T]; 0 leaves the logits as they are.
    run: [H] whose features a head sees.
    features: [R, B, D].

  Returns:
    [T, H, B] int.
  """

  def of_head(arguments):
    params, prior, run = arguments
    logits = linear_logits(params, features[run])
    lower = taus[:, None] * log_shares(prior)[None]
    return jax.vmap(lambda offset: (logits - offset[None]).argmax(axis=-1))(lower)

  return jax.lax.map(of_head, (params, prior, run)).swapaxes(0, 1)


def make_stage(
  name: str, config: HeadConfig, data: HeadData, settings: Sequence[Setting], mesh: Mesh
) -> Stage:
  """Trains one head per setting.

  A minibatch draws classes by `Mixture.draw`, then real or synthetic members of each. A real row
  weighs 1, a synthetic one its confidence. `balanced_softmax` adds log `Mixture.prior` to the
  logits (Ren et al. 2020, eq. 4, with the prior that the loss really sees); `csl` multiplies the
  weights with gamma_y, from the effective number of the real or the effective counts, deferred:
  gamma_c^adaptive = gamma_c conf.

  Args:
    name: of the stage: its folder and curves.
    config: see HeadConfig.
    data: on the devices.
    settings: H of them; they lead the stage's state as seeds do.
    mesh: the device mesh.
  """
  program = _program(config, mesh)
  per_seed = setting_arrays(settings)
  counts = jnp.asarray(data.exemplars.by_class.counts)[per_seed["run"]]
  mixed = mixtures(data, settings)
  change = jnp.asarray if config.start == "encoder" else jnp.zeros_like
  start = jax.tree.map(lambda x: change(jnp.asarray(x)[per_seed["run"]]), data.start)
  return Stage(
    name=name,
    num_steps=config.num_steps,
    init=program.init,
    batch=program.draw,
    step=program.step,
    evaluate=program.evaluate if data.test_labels.shape[1] else None,
    shared=data,
    per_seed=mesh_lib.replicate(
      mesh,
      per_seed | {"start": start, "mixture": mixed} | class_terms(config, per_seed, counts, mixed),
    ),
    batch_size=config.batch_size,
    result=(),  # `experiments.feature_heads` keeps its own
  )


def class_terms(
  config: HeadConfig, per_seed: dict[str, Any], counts: jax.Array, mixed: Mixture
) -> dict[str, jax.Array]:
  """What each head's loss knows of the classes.

  Args:
    config: see there.
    per_seed: of `setting_arrays`.
    counts: [H, C] real features.
    mixed: of every head.

  Returns:
    {"offset" [H, C], added to the logits, "gamma" [H, C], weights once they have set in}.
  """
  seen = counts.astype(jnp.float32)
  if config.gamma_counts == "effective":  # in units of real features
    seen = counts.sum(axis=1, keepdims=True) * mixed.prior / mixed.real[:, None]
  gamma = effective_number(jnp.maximum(seen, 1e-3), config.beta)
  balanced, csl = (
    (per_seed["loss"] == TRAINED.index(n))[:, None] for n in ("balanced_softmax", "csl")
  )
  return {
    "offset": jnp.where(balanced, log_shares(mixed.prior), 0.0),
    "gamma": jnp.where(csl, gamma, 1.0),
  }


@dataclasses.dataclass(frozen=True)
class _Program:
  init: Callable
  draw: Callable
  step: Callable
  evaluate: Callable


def _below(uniform: jax.Array, number: jax.Array) -> jax.Array:
  """Whole numbers from 0 to `number` - 1, of numbers in [0, 1); 0 if there is none."""
  return jnp.minimum(jnp.floor(uniform * number), jnp.maximum(number - 1, 0)).astype(jnp.int32)


@functools.lru_cache(maxsize=8)
def _program(config: HeadConfig, mesh: Mesh) -> _Program:
  """The functions of a stage; the same ones for every generator, so that they compile once."""
  optimizer = train_state.make_optimizer(config.optimizer, config.num_steps)
  start_step = round(config.defer * config.num_steps)

  def init(_, per_seed):
    key = jax.random.fold_in(jax.random.key(per_seed["seed"]), per_seed["stream"])
    start = jax.tree.map(jnp.copy, per_seed["start"])  # the state is donated, the data are not
    return train_state.create(key, start, optimizer)

  def draw(state, data, per_seed):
    """Features [B, D], labels [B] and trust [B] of a minibatch."""
    mixed, run, by_class = per_seed["mixture"], per_seed["run"], data.exemplars.by_class
    of_class, of_real, of_added, of_kind = uniform(
      stream(state.key, "batch", state.step), (4, config.batch_size)
    )
    cumulative = jnp.cumsum(mixed.draw)
    label = jnp.searchsorted(cumulative, of_class * cumulative[-1], side="right")
    label = jnp.minimum(label, len(cumulative) - 1)
    member = _below(of_real, by_class.counts[run, label])
    real = data.exemplars.features[run, by_class.order[run, by_class.starts[run, label] + member]]
    numbers = jnp.asarray(data.added.numbers)
    first = (jnp.cumsum(numbers) - numbers)[label]
    row = jnp.minimum(first + _below(of_added, mixed.used[label]), data.added.features.shape[2] - 1)
    added = data.added.features[run, per_seed["strength"], row]
    confidence = data.added.confidence[run, per_seed["strength"], row]
    synthetic = of_kind < mixed.share[label]
    features = jnp.where(synthetic[:, None], added, real)
    return mesh_lib.shard_batch((features, label, jnp.where(synthetic, confidence, 1.0)), mesh)

  def step(state, data, per_seed):
    features, label, trust = draw(state, data, per_seed)
    gamma = losses.deferred(per_seed["gamma"], state.step, start_step)

    def loss_of(params):
      logits = linear_logits(params, features) + per_seed["offset"][None]
      value = losses.weighted_cross_entropy(logits, label, gamma[label] * trust)
      return value + per_seed["l2"] / 2 * jnp.square(params["kernel"]).sum()

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    return train_state.apply_gradients(state, gradients, optimizer), {"loss": loss}

  def evaluate(state, data, per_seed):
    logits = linear_logits(state.params, data.test_features[per_seed["run"]])
    return {"accuracy": jnp.mean(logits.argmax(axis=-1) == data.test_labels[per_seed["run"]])}

  return _Program(init, draw, step, evaluate)
