"""Every loss of the table against a formula written out in NumPy, one row at a time."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdiff.classifier import losses
from memdiff.classifier.losses import LOSSES, LossConfig
from memdiff.errors import ConfigError

COUNTS = np.array([90, 40, 12, 5])
CONFIG = LossConfig(
  beta=0.99, power=0.7, focusing=1.5, margin=0.4, tau=1.3, defer=0.6, tail_share=0.5,
  contrastive_weight=0.3, embedding_dim=8, temperature=0.2,
)  # fmt: skip
SCALE, STEPS, PER_EPOCH = 20.0, 10, 3
STATELESS = [name for name, row in LOSSES.items() if not row.stateful]

rng = np.random.default_rng(0)
LOGITS = rng.normal(size=(16, 4)) * 3
LABELS = np.array([0, 1, 2, 3] * 4)
FEATURES = rng.normal(size=(16, 6))


def softmax(z):
  e = np.exp(z - z.max())
  return e / e.sum()


def row_loss(objective, z, y):
  """One example's loss, as the paper writes it."""
  prior = COUNTS / COUNTS.sum()
  if objective == "focal":
    p = softmax(z)[y]
    return -((1 - p) ** CONFIG.focusing) * math.log(p)
  if objective == "ldam":
    margin = CONFIG.margin * COUNTS[y] ** -0.25 / max(n**-0.25 for n in COUNTS)
    at_label = math.exp(z[y] - SCALE * margin)
    return -math.log(at_label / (at_label + sum(math.exp(z[j]) for j in range(4) if j != y)))
  if objective == "balanced_softmax":
    e = [COUNTS[j] * math.exp(z[j]) for j in range(4)]
    return -math.log(e[y] / sum(e))
  if objective == "logit_adjustment":
    return -math.log(softmax(z + CONFIG.tau * np.log(prior))[y])
  return -math.log(softmax(z)[y])


def class_weights(rule):
  mean_one = {
    "effective_number": [(1 - CONFIG.beta) / (1 - CONFIG.beta**n) for n in COUNTS],
    "inverse": [1 / n for n in COUNTS],
    "inverse_sqrt": [1 / math.sqrt(n) for n in COUNTS],
  }
  if rule in mean_one:
    return np.array(mean_one[rule]) / np.mean(mean_one[rule])
  if rule == "power":
    return np.array([(min(COUNTS) / n) ** CONFIG.power for n in COUNTS])
  return np.ones(4)


def expected(name, step, labels=LABELS):
  row = LOSSES[name]
  weights = class_weights(row.weights)
  if row.deferred and step < 0.6 * STEPS:
    weights = np.ones(4)
  rows = np.array([row_loss(row.objective, z, y) for z, y in zip(LOGITS, labels, strict=True)])
  total = (weights[labels] * rows).sum()
  return total / (weights[labels].sum() if row.normalized else len(rows))


def make(name, config=CONFIG, counts=COUNTS):
  return losses.make(name, config, counts, scale=SCALE, num_steps=STEPS, steps_per_epoch=PER_EPOCH)


def value_of(name, step, config=CONFIG, logits=LOGITS, **more):
  loss = make(name, config)
  inputs = [jnp.asarray(x, jnp.float32) for x in (logits, FEATURES)]
  batch = losses.Batch(*inputs, jnp.asarray(LABELS), **more)
  return float(loss(batch, loss.init(), jnp.int32(step))[0])


@pytest.mark.parametrize("step", [0, 5, 6, 9])
@pytest.mark.parametrize("name", STATELESS)
def test_the_loss_is_its_formula(name, step):
  assert value_of(name, step) == pytest.approx(expected(name, step), rel=1e-5)


@pytest.mark.parametrize("step", [0, 9])
@pytest.mark.parametrize("name", [n for n in STATELESS if not LOSSES[n].normalized])
def test_weighted_rows_are_the_summands_of_the_loss(name, step):
  rows = make(name).weighted_rows(jnp.asarray(LOGITS), jnp.asarray(LABELS), jnp.int32(step))
  assert rows.shape == (16,)
  assert float(rows.mean()) == pytest.approx(expected(name, step), rel=1e-5)


def test_the_names_of_the_field_are_all_there():
  assert set(LOSSES) >= {
    "cross_entropy", "cs_inverse", "cs_inverse_sqrt", "cs_power", "cs_power_drw", "class_balanced",
    "class_balanced_drw", "semantic_scale", "focal", "class_balanced_focal", "ldam", "ldam_drw",
    "balanced_softmax", "balanced_softmax_drw", "logit_adjustment", "csl", "csl_paper", "csl_code",
    "focal_tail", "bcl",
  }  # fmt: skip
  assert all(row.description for row in LOSSES.values())


@pytest.mark.parametrize("name", [n for n in STATELESS if not LOSSES[n].contrastive])
def test_mixup_is_a_mixture_of_the_losses_of_both_labels(name):
  partner = np.roll(LABELS, 1)
  mixed = value_of(name, 8, partner_labels=jnp.asarray(partner), share=jnp.float32(0.3))
  both = 0.3 * expected(name, 8) + 0.7 * expected(name, 8, partner)
  assert mixed == pytest.approx(both, rel=1e-5)


@pytest.mark.parametrize(
  "name", [n for n, row in LOSSES.items() if row.stateful or row.contrastive]
)
def test_losses_that_need_one_label_refuse_mixup(name):
  losses.check(name, mixup=False)
  with pytest.raises(ConfigError, match=f"The loss {name} needs one label per image"):
    losses.check(name, mixup=True)


@pytest.mark.parametrize("normalized", [True, False])
def test_weighted_means_are_those_of_pytorch(normalized):
  torch = pytest.importorskip("torch")
  weights = class_weights("inverse")
  ours = losses.average(
    losses.cross_entropy(jnp.asarray(LOGITS, jnp.float32), LABELS),
    jnp.asarray(weights, jnp.float32)[LABELS],
    jnp.ones(len(LABELS)),
    normalized,
  )
  arguments = torch.tensor(LOGITS), torch.tensor(LABELS)
  reduction = {True: "mean", False: "none"}[normalized]
  theirs = torch.nn.functional.cross_entropy(
    *arguments, weight=torch.tensor(weights), reduction=reduction
  )
  assert float(ours) == pytest.approx(float(theirs.mean()), rel=1e-5)


# --- properties ------------------------------------------------------------------------------

finite = st.floats(-30, 30)
logits_of_four = st.lists(st.lists(finite, min_size=4, max_size=4), min_size=1, max_size=5)


@given(logits_of_four, st.integers(0, 3))
def test_without_what_makes_them_special_losses_are_cross_entropy(rows, label):
  z, y = jnp.asarray(rows, jnp.float32), jnp.full(len(rows), label)
  counts, equal = jnp.asarray(COUNTS, jnp.float32), jnp.full(4, 7.0)
  plain = losses.cross_entropy(z, y)
  for special in (
    losses.focal(z, y, 0.0),
    losses.ldam(z, y, counts, 0.0, SCALE),
    losses.logit_adjusted(z, y, counts, 0.0),
    losses.logit_adjusted(z, y, equal, 1.0),
  ):
    np.testing.assert_allclose(special, plain, rtol=1e-4, atol=1e-4)


@given(logits_of_four, st.integers(0, 3), finite)
def test_adding_a_number_to_all_logits_changes_nothing(rows, label, shift):
  z, y = jnp.asarray(rows, jnp.float32), jnp.full(len(rows), label)
  counts = jnp.asarray(COUNTS, jnp.float32)
  for f in losses.OBJECTIVES.values():
    np.testing.assert_allclose(
      f(z + shift, y, counts, SCALE, CONFIG), f(z, y, counts, SCALE, CONFIG), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [0.0, 50.0, 3e4])
def test_gradients_are_finite_for_extreme_logits(name, size):
  loss = make(name)
  features = jnp.asarray(FEATURES, jnp.float32)
  for sign in (1, -1):
    logits = sign * size * jax.nn.one_hot(LABELS, 4)

    def value(z):
      batch = losses.Batch(z, features, jnp.asarray(LABELS))
      return loss(batch, loss.init(), jnp.int32(8), EMPTY)[0]

    gradient = jax.grad(value)(logits)
    assert np.isfinite(gradient).all()


@dataclasses.dataclass
class Bank:
  slots: jax.Array
  seen: jax.Array


EMPTY = Bank(jnp.zeros((8, 2, 6)), jnp.zeros((8,)))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_run_under_jit_vmap_and_scan_with_state_of_fixed_shape(name):
  loss = make(name)
  inputs = [jnp.asarray(x, jnp.float32) for x in (LOGITS, FEATURES)]

  def seed(scale):
    def body(state, step):
      batch = losses.Batch(scale * inputs[0], inputs[1], jnp.asarray(LABELS))
      value, state = loss(batch, state, step, EMPTY)
      return state, value

    return jax.lax.scan(body, loss.init(), jnp.arange(7))[1]

  together = jax.jit(jax.vmap(seed))(jnp.array([1.0, 0.5]))
  alone = [seed(scale) for scale in (1.0, 0.5)]
  np.testing.assert_allclose(together, np.stack(alone), rtol=2e-4)
