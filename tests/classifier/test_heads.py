"""Linear heads: what their minibatches are made of, and how far each row of them counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from memdiff.classifier import heads
from memdiff.classifier.heads import ALL, Added, HeadConfig, HeadData, Setting
from memdiff.evaluation import cross_validation
from memdiff.memory import exemplars as exemplars_lib
from memdiff.runtime import loop
from memdiff.runtime.train_state import OptimizerConfig
from tests import support

# Two runs: one with a class that has no real features, one with rows of padding.
LABELS = np.array([[0] * 9 + [1] * 4 + [3], [0] * 5 + [1] * 3 + [2] * 2 + [3] + [4] * 3], np.int32)
COUNTS = np.array([[9, 4, 0, 1], [5, 3, 2, 1]])
NUMBERS = np.array([0, 5, 3, 8])
CLASSES = DIM = 4  # so that the identity is a kernel
ADDED_LABELS = np.repeat(np.arange(CLASSES), NUMBERS)
RUNS, STRENGTHS, TESTS, BETA = 2, 3, 7, 0.9
CONFIG = HeadConfig(
  start="encoder", beta=BETA, gamma_counts="real", defer=0.0, batch_size=64, num_steps=10,
  optimizer=OptimizerConfig("sgd", 0.1, "constant", (), (), 0.0, False, 0.0, 0.0, 0.0, 1),
)  # fmt: skip


@functools.cache
def make_data(seed=0):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  runs = [exemplars_lib.make(normal(len(row), DIM), row, CLASSES) for row in LABELS]
  data = HeadData(
    exemplars=jax.tree.map(lambda *leaves: np.stack(leaves), *runs),
    added=Added(
      features=normal(RUNS, STRENGTHS, len(ADDED_LABELS), DIM),
      confidence=rng.uniform(0.1, 1.5, (RUNS, STRENGTHS, len(ADDED_LABELS))).astype(np.float32),
      numbers=NUMBERS,
    ),
    start={"kernel": normal(RUNS, DIM, CLASSES), "bias": normal(RUNS, CLASSES)},
    test_features=normal(RUNS, TESTS, DIM),
    test_labels=rng.integers(0, CLASSES, (RUNS, TESTS)).astype(np.int32),
  )
  return jax.tree.map(jnp.asarray, data)


def change(config=CONFIG, **fields):
  return dataclasses.replace(config, **fields)


def make_setting(run=0, strength=0, fill=ALL, exponent=1.0, loss="csl", **more):
  return Setting(
    **{"seed": 3, "stream": "test"} | more,
    run=run, strength=strength, fill=fill, exponent=exponent, loss=loss,
  )  # fmt: skip


def one_head(stage, number=0):
  return jax.tree.map(lambda x: x[number], stage.per_seed)


def train_heads(mesh, config, data, settings, steps):
  """(states, metrics [H, steps]) of all heads at once."""
  stage = heads.make_stage("test", config, data, settings, mesh)
  return training_program(stage.init, stage.step, steps)(data, stage.per_seed)


@functools.cache
def training_program(init, step, steps):
  """(data, own) -> (states, metrics [H, steps]), compiled once for all stages that share a step."""

  def of_head(data, per_seed):
    return jax.lax.scan(
      lambda state, _: step(state, data, per_seed), init(None, per_seed), length=steps
    )

  return jax.jit(jax.vmap(of_head, in_axes=(None, 0)))


# --- the mixture -----------------------------------------------------------------------------


def mixture_by_loop(counts, numbers, confidence, fill, exponent, part=1.0):
  """Class by class: (draw, share, used, prior), and what real rows weigh of all."""
  draw, share, used, weight = [], [], [], []
  first, part = 0, np.float32(part)
  for n, number in zip(counts, numbers, strict=True):
    u = min(max(int(np.round(np.float32(fill) * part)) - n, 0), number)
    if fill == ALL:
      u = int(np.round(np.float32(number) * part))
    u = u if n > 0 else 0
    draw.append((n + u) ** exponent if n + u > 0 else 0.0)
    share.append(u / (n + u) if n + u > 0 else 0.0)
    used.append(u)
    rows = [1.0] * n + list(confidence[first : first + u])
    weight.append(draw[-1] * np.mean(rows) if rows else 0.0)
    first += number
  draw, share, weight = np.array(draw), np.array(share), np.array(weight)
  real = (draw * (1 - share)).sum() / weight.sum()
  return draw / draw.sum(), share, np.array(used), weight / weight.sum(), real


def added_of(confidence, numbers):
  confidence = jnp.asarray(confidence, jnp.float32)[None, None]
  return Added(jnp.zeros((*confidence.shape, 1)), confidence, np.asarray(numbers, np.int32))


mixture = jax.jit(heads.mixture)


def mixture_for(counts, added, setting):
  per_seed = {
    name: jnp.asarray(value[0]) for name, value in heads.setting_arrays([setting]).items()
  }
  return mixture(jnp.asarray(counts), added, per_seed)


@given(
  counts=st.lists(st.integers(0, 12), min_size=5, max_size=5).filter(any),
  cuts=st.lists(st.integers(0, 14), min_size=4, max_size=4),
  fill=st.one_of(st.integers(0, 20), st.just(ALL)),
  exponent=st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1)),
  part=st.sampled_from([1.0, 0.9, 0.8, 2 / 3, 0.5, 0.1]),
  seed=st.integers(0, 2**20),
)
def test_the_mixture_is_that_of_a_loop(counts, cuts, fill, exponent, part, seed):
  numbers = np.diff([0, *sorted(cuts), 14])
  confidence = np.random.default_rng(seed).uniform(0, 2, 14)
  draw, share, used, prior, real = mixture_by_loop(
    counts, numbers, confidence, fill, exponent, part
  )
  setting = make_setting(fill=fill, exponent=exponent, share=part)
  mixed = mixture_for(counts, added_of(confidence, numbers), setting)
  np.testing.assert_array_equal(mixed.used, used)
  np.testing.assert_allclose(mixed.draw, draw, rtol=1e-5)
  np.testing.assert_allclose(mixed.share, share, rtol=1e-6)
  np.testing.assert_allclose(mixed.prior, prior, rtol=1e-4, atol=1e-7)
  np.testing.assert_allclose(mixed.real, real, rtol=1e-4)


@given(
  st.lists(st.integers(0, 12), min_size=5, max_size=5).filter(any),
  st.integers(0, 20),
  st.sampled_from([1.0, 0.5]),
  st.integers(0, 2**20),
)
def test_a_class_of_no_real_features_gets_nothing(counts, fill, part, seed):
  confidence = np.random.default_rng(seed).uniform(0, 2, 15)
  for setting in (make_setting(fill=n, exponent=0.5, share=part) for n in (fill, ALL)):
    mixed = mixture_for(counts, added_of(confidence, [3] * 5), setting)
    empty = np.array(counts) == 0
    for array in (mixed.draw, mixed.share, mixed.used, mixed.prior):
      assert not np.asarray(array)[empty].any()
    assert (np.asarray(mixed.draw)[~empty] > 0).all()


def test_the_mixture_reads_its_own_run_and_strength():
  confidence = jnp.arange(1.0, 13.0).reshape(2, 3, 2)
  added = Added(jnp.zeros((2, 3, 2, 1)), confidence, np.array([0, 2], np.int32))
  for run in range(2):
    for strength in range(3):
      mixed = mixture_for([6, 4], added, make_setting(run, strength))
      trusted = 4 + float(confidence[run, strength].sum())
      np.testing.assert_allclose(mixed.prior, [6 / (6 + trusted), trusted / (6 + trusted)])


def test_exponent_zero_draws_classes_alike_and_one_as_they_come():
  added, counts = added_of(np.ones(4), [0, 1, 0, 3]), [20, 5, 0, 1]
  alike = mixture_for(counts, added, make_setting(exponent=0.0)).draw
  np.testing.assert_allclose(alike, [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6)
  as_they_come = mixture_for(counts, added, make_setting(exponent=1.0)).draw
  np.testing.assert_allclose(as_they_come, np.array([20, 6, 0, 4]) / 30, rtol=1e-6)


@given(
  counts=st.lists(st.integers(2, 90), min_size=4, max_size=4),
  folds=st.sampled_from([2, 3, 5]),
  fill=st.floats(0, 1),
  everything=st.booleans(),
)
def test_the_mixture_of_a_fold_is_that_of_the_whole_set(counts, folds, fill, everything):
  """Within rounding, for every class; the largest one stays the one that is drawn most."""
  counts = np.array([max(counts) + 10, *counts])
  target = round(2 + fill * (counts[0] - 8))  # rounding cannot lift it above the largest class
  numbers = np.maximum(target - counts, 0)
  if numbers.sum() == 0:
    return
  labels, fill = np.repeat(np.arange(len(counts)), counts), ALL if everything else target
  added = heads.padded(added_of(np.ones(numbers.sum()), numbers), 500)  # one size, one program
  whole = mixture_for(counts, added, make_setting(fill=fill))
  config = cross_validation.SelectionConfig(
    folds=folds, repeats=1, encoder="frozen", criterion="top1"
  )
  for rows in cross_validation.fold_rows(labels, config)[0]:
    per_seed = np.bincount(labels[rows[rows >= 0]], minlength=len(counts))
    part = per_seed.sum() / counts.sum()
    mixed = mixture_for(per_seed, added, make_setting(fill=fill, share=part))
    np.testing.assert_allclose(per_seed + mixed.used, part * (counts + whole.used), atol=2)
    assert np.argmax(mixed.draw) == np.argmax(whole.draw) == 0


def test_mixtures_are_those_of_every_setting(mesh):
  data = make_data()
  settings = [
    make_setting(0, 2, ALL, 1.0, "csl", share=0.5), make_setting(1, 0, 4, 0.5, "cross_entropy"),
    make_setting(0, 0, 0, 0.0, "balanced_softmax"), make_setting(1, 1, 6, 1.0, share=0.8),
  ]  # fmt: skip
  result = heads.mixtures(data, settings)
  assert result.prior.shape == (4, CLASSES)
  stage = heads.make_stage("test", CONFIG, data, settings, mesh)
  jax.tree.map(np.testing.assert_array_equal, stage.per_seed["mixture"], result)
  for i, setting in enumerate(settings):
    draw, share, used, prior, _ = mixture_of(setting)
    np.testing.assert_array_equal(result.used[i], used)
    np.testing.assert_allclose(result.draw[i], draw, rtol=1e-4)
    np.testing.assert_allclose(result.share[i], share, rtol=1e-4)
    np.testing.assert_allclose(result.prior[i], prior, rtol=1e-4)


# --- what is drawn ---------------------------------------------------------------------------


@functools.cache
def gradients_of(config, mesh):
  """Of a step's loss, compiled once per config."""

  stage = heads.make_stage("test", config, make_data(), [make_setting()], mesh)

  def of(data, per_seed, step):
    state = stage.init(None, per_seed).replace(step=step)

    def loss(real, added):
      moved = data.replace(
        exemplars=data.exemplars.replace(features=real), added=data.added.replace(features=added)
      )
      return stage.step(state, moved, per_seed)[1]["loss"]

    return jax.grad(loss, argnums=(0, 1))(data.exemplars.features, data.added.features)

  return jax.jit(of)


def gradients(mesh, config, data, setting, step=0):
  """Gradients of a step's loss wrt real [R, N, D] and synthetic features [R, K, M, D]."""
  per_seed = one_head(heads.make_stage("test", config, data, [setting], mesh))
  found = gradients_of(config, mesh)(data, per_seed, jnp.asarray(step, jnp.int32))
  return jax.tree.map(np.asarray, found)


def drawn(mesh, config, data, setting, step=0):
  """How often each row [R, N] and [R, K, M] is in the minibatch.

  Where all features are zero and the kernel is the identity, a row of class y that is drawn n times
  has the gradient n / B (1 / C - [y = c]).
  """
  neutral = data.replace(
    exemplars=data.exemplars.replace(features=jnp.zeros_like(data.exemplars.features)),
    added=data.added.replace(
      features=jnp.zeros_like(data.added.features),
      confidence=jnp.ones_like(data.added.confidence),
    ),
    start={"kernel": jnp.stack([jnp.eye(DIM)] * RUNS), "bias": jnp.zeros((RUNS, CLASSES))},
  )
  plain = dataclasses.replace(setting, loss="cross_entropy")
  real, added = gradients(mesh, change(config, start="encoder"), neutral, plain, step)

  def times(gradient, labels):
    labels = np.broadcast_to(labels, gradient.shape[:-1])[..., None]
    at_label = np.take_along_axis(gradient, np.minimum(labels, CLASSES - 1), axis=-1)[..., 0]
    number = -at_label * config.batch_size / (1 - 1 / CLASSES)
    np.testing.assert_allclose(number, np.round(number), rtol=1e-4, atol=1e-2)
    return np.round(number).astype(int)

  return times(real, LABELS), times(added, ADDED_LABELS)


@pytest.mark.parametrize(
  ("run", "fill", "exponent", "part"),
  [(0, ALL, 1.0, 1.0), (1, 6, 0.5, 1.0), (0, 7, 0.0, 0.8), (1, ALL, 1.0, 0.5), (1, 0, 1.0, 1.0)],
)
def test_rows_are_drawn_as_often_as_the_mixture_says(mesh, run, fill, exponent, part):
  setting = make_setting(run, 2, fill, exponent, "cross_entropy", share=part)
  config = change(batch_size=8192)
  real, added = drawn(mesh, config, make_data(), setting)
  draw, share, used, *_ = mixture_by_loop(
    COUNTS[run], NUMBERS, np.ones(len(ADDED_LABELS)), fill, exponent, part
  )
  expected_real, expected_added = np.zeros(real.shape), np.zeros(added.shape)
  for c, n in enumerate(COUNTS[run]):
    expected_real[run][LABELS[run] == c] = draw[c] * (1 - share[c]) / max(n, 1)
    rows = np.flatnonzero(c == ADDED_LABELS)[: used[c]]  # the first of its class
    expected_added[run, 2, rows] = draw[c] * share[c] / max(used[c], 1)
  observed = np.concatenate([real.ravel(), added.ravel()])
  expected = np.concatenate([expected_real.ravel(), expected_added.ravel()]) * config.batch_size
  assert observed.sum() == config.batch_size
  assert not observed[expected == 0].any()  # neither padding nor other runs nor other strengths
  inside = expected > 0
  assert stats.chisquare(observed[inside], expected[inside]).pvalue > 1e-3


def test_minibatches_of_steps_seeds_and_streams_differ(mesh):
  data, setting = make_data(), make_setting()
  first, again = (drawn(mesh, CONFIG, data, setting)[0] for _ in range(2))
  np.testing.assert_array_equal(first, again)
  for other, step in (
    (setting, 1),
    (dataclasses.replace(setting, seed=4), 0),
    (dataclasses.replace(setting, stream="other"), 0),
  ):
    assert (first != drawn(mesh, CONFIG, data, other, step)[0]).any()


@pytest.mark.parametrize("number", [1, 3, 7, 1000])
def test_members_are_drawn_evenly_and_none_lies_outside(number):
  """Up to the largest number below one, which is what rounding could lift to `number`."""
  values = np.append((np.arange(8 * number) + 0.5) / (8 * number), np.nextafter(1, 0, dtype="f"))
  members = np.asarray(heads._below(jnp.asarray(values, jnp.float32), jnp.int32(number)))
  np.testing.assert_array_equal(np.bincount(members[:-1]), [8] * number)
  assert members[-1] == number - 1
  assert not heads._below(jnp.asarray(values, jnp.float32), jnp.int32(0)).any()


def test_without_synthetic_features_only_real_ones_are_drawn(mesh):
  nothing = jax.tree.map(jnp.asarray, heads.nothing_added(RUNS, DIM, CLASSES))
  data = make_data().replace(added=nothing)
  real, added = gradients(mesh, CONFIG, data, make_setting(1, 0, ALL, 0.5, "csl"))
  assert not added.any()
  of_class = [np.abs(real[1][LABELS[1] == c]).max() for c in range(CLASSES + 1)]
  assert min(of_class[:CLASSES]) > 0 and of_class[CLASSES] == 0


# --- what a row counts -----------------------------------------------------------------------


def effective_number(counts, beta=BETA):
  """Cui et al. 2019: (1 - beta) / (1 - beta^n), mean 1."""
  weights = (1 - beta) / (1 - beta ** np.asarray(counts, float))
  return weights / weights.mean()


def softmax(logits):
  p = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return p / p.sum(axis=-1, keepdims=True)


def feature_gradients(data, run, features, labels, offset):
  """d CE / d feature of logits + offset, each row by itself."""
  kernel, bias = (np.asarray(data.start[name][run], float) for name in ("kernel", "bias"))
  p = softmax(np.asarray(features, float) @ kernel + bias + offset)
  return (p - np.eye(CLASSES)[labels]) @ kernel.T


def check_gradients(mesh, config, setting, gamma, offset=0.0, step=0):
  """Every row's gradient is times drawn x gamma x confidence x d CE / d feature / B."""
  data, (run, strength) = make_data(), (setting.run, setting.strength)
  times_real, times_added = drawn(mesh, config, data, setting, step)
  real, added = gradients(mesh, config, data, setting, step)
  inside = LABELS[run] < CLASSES
  labels = LABELS[run][inside]
  weight = times_real[run][inside] * gamma[labels] / config.batch_size
  rows = feature_gradients(data, run, data.exemplars.features[run][inside], labels, offset)
  np.testing.assert_allclose(real[run][inside], weight[:, None] * rows, rtol=1e-3, atol=1e-6)
  confidence = np.asarray(data.added.confidence[run, strength])
  weight = times_added[run, strength] * gamma[ADDED_LABELS] * confidence / config.batch_size
  rows = feature_gradients(data, run, data.added.features[run, strength], ADDED_LABELS, offset)
  np.testing.assert_allclose(added[run, strength], weight[:, None] * rows, rtol=1e-3, atol=1e-6)
  assert (times_added[run, strength] > 0).sum() > 5  # something was compared
  return added[run, strength]


def mixture_of(setting):
  confidence = make_data().added.confidence[setting.run, setting.strength]
  counts = COUNTS[setting.run]
  return mixture_by_loop(counts, NUMBERS, confidence, setting.fill, setting.exponent, setting.share)


def test_the_gradient_of_a_synthetic_row_is_gamma_times_confidence(mesh):
  check_gradients(
    mesh, CONFIG, make_setting(1, 2, ALL, 1.0, "csl"), gamma=effective_number(COUNTS[1])
  )  # fmt: skip


def test_cross_entropy_knows_no_gamma_but_the_confidence(mesh):
  check_gradients(
    mesh, CONFIG, make_setting(0, 1, ALL, 0.5, "cross_entropy"), gamma=np.ones(CLASSES)
  )


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_balanced_softmax_adds_the_log_prior_to_the_logits(mesh, exponent):
  setting = make_setting(1, 1, 7, exponent, "balanced_softmax")
  *_, prior, _ = mixture_of(setting)
  check_gradients(mesh, CONFIG, setting, gamma=np.ones(CLASSES), offset=np.log(prior))


def test_gamma_may_come_from_the_effective_counts(mesh):
  """Where classes are drawn as they come: real features, and synthetic ones as far as trusted."""
  setting = make_setting(1, 0, 6, 1.0, "csl")
  confidence, seen = np.asarray(make_data().added.confidence[1, 0]), COUNTS[1].astype(float)
  for c, (n, number) in enumerate(zip(COUNTS[1], NUMBERS, strict=True)):
    seen[c] += confidence[c == ADDED_LABELS][: min(6 - n, number)].sum()
  config = change(gamma_counts="effective")
  check_gradients(mesh, config, setting, gamma=effective_number(seen))


def test_effective_counts_of_redrawn_classes_keep_the_unit_of_a_real_row(mesh):
  """A class that is drawn twice as often counts for twice as much; N real rows are worth N."""
  setting = make_setting(1, 0, ALL, 0.0, "csl")
  draw, share, *_ = mixture_of(setting)
  confidence = np.asarray(make_data().added.confidence[1, 0])
  trust = [confidence[c == ADDED_LABELS].mean() if n else 0 for c, n in enumerate(NUMBERS)]
  weight = draw * (1 - share + share * np.array(trust))
  seen = COUNTS[1].sum() * weight / (draw * (1 - share)).sum()
  config = change(gamma_counts="effective")
  check_gradients(mesh, config, setting, gamma=effective_number(seen))


@pytest.mark.parametrize(("step", "weighted"), [(0, False), (4, False), (5, True), (9, True)])
def test_deferring_keeps_the_confidence_and_drops_gamma(mesh, step, weighted):
  gamma = effective_number(COUNTS[1]) if weighted else np.ones(CLASSES)
  config = change(defer=0.5)
  check_gradients(mesh, config, make_setting(1, 2, ALL, 1.0, "csl"), gamma, step=step)


def test_half_the_confidence_is_half_the_gradient_and_none_is_none(mesh):
  data, setting = make_data(), make_setting(1, 0, ALL, 1.0, "csl")
  _, full = gradients(mesh, CONFIG, data, setting)
  factor = np.resize([0.5, 0.0, 2.0], len(ADDED_LABELS)).astype(np.float32)
  confidence = np.asarray(data.added.confidence) * factor
  mixed = data.replace(added=data.added.replace(confidence=jnp.asarray(confidence)))
  _, changed = gradients(mesh, CONFIG, mixed, setting)
  np.testing.assert_allclose(changed[1, 0], full[1, 0] * factor[:, None], rtol=1e-4)
  assert (np.abs(full[1, 0]).max(axis=1) > 1e-4).sum() > 8


def test_the_step_descends_along_the_gradient_of_its_loss(mesh):
  setting, data = make_setting(1, 2, ALL, 0.5, "csl"), make_data()
  times_real, times_added = drawn(mesh, CONFIG, data, setting)
  features = np.concatenate([data.exemplars.features[1], data.added.features[1, 2]]).astype(float)
  inside = np.concatenate([LABELS[1], ADDED_LABELS]) < CLASSES
  features, labels = features[inside], np.concatenate([LABELS[1], ADDED_LABELS])[inside]
  trust = np.concatenate([np.ones(len(LABELS[1])), data.added.confidence[1, 2]])
  times = np.concatenate([times_real[1], times_added[1, 2]])
  weight = (times * trust)[inside] * effective_number(COUNTS[1])[labels] / CONFIG.batch_size
  kernel, bias = (np.asarray(data.start[name][1], float) for name in ("kernel", "bias"))
  p = softmax(features @ kernel + bias)
  gradient = weight[:, None] * (p - np.eye(CLASSES)[labels])
  stage = heads.make_stage("test", CONFIG, data, [setting], mesh)
  per_seed = one_head(stage)
  state, metrics = jax.jit(stage.step)(stage.init(jax.random.key(3), per_seed), data, per_seed)
  loss = (weight * -np.log(p[np.arange(len(labels)), labels])).sum()
  assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-4)
  assert int(state.step) == 1
  np.testing.assert_allclose(
    state.params["kernel"], kernel - 0.1 * features.T @ gradient, atol=1e-5
  )
  np.testing.assert_allclose(state.params["bias"], bias - 0.1 * gradient.sum(axis=0), atol=1e-5)


@pytest.mark.parametrize("loss", heads.TRAINED)
@pytest.mark.parametrize("l2", [0.01, 2.0])
def test_l2_adds_half_the_squared_kernel_to_the_loss_and_leaves_the_bias(mesh, loss, l2):
  data, after = make_data(), []
  for strength in (0.0, l2):
    setting = make_setting(1, 1, 6, 0.5, loss, l2=strength)
    stage = heads.make_stage("test", CONFIG, data, [setting], mesh)
    per_seed = one_head(stage)
    after.append(jax.jit(stage.step)(stage.init(None, per_seed), data, per_seed))
  (plain, plain_metrics), (decayed, metrics) = after
  kernel = np.asarray(data.start["kernel"][1], float)
  expected = plain.params["kernel"] - 0.1 * l2 * kernel
  np.testing.assert_allclose(decayed.params["kernel"], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(decayed.params["bias"], plain.params["bias"])
  difference = float(metrics["loss"] - plain_metrics["loss"])
  assert difference == pytest.approx(l2 / 2 * (kernel**2).sum(), rel=1e-3, abs=1e-5)


def test_without_features_l2_lets_the_kernel_decay_by_its_rate(mesh):
  """Where all features are zero, nothing but the penalty moves the kernel: W (1 - rate l2)^t."""
  data = make_data()
  data = data.replace(
    exemplars=data.exemplars.replace(features=jnp.zeros_like(data.exemplars.features)),
    added=data.added.replace(features=jnp.zeros_like(data.added.features)),
  )
  settings = [make_setting(1, l2=l2) for l2 in (0.0, 0.5, 3.0)]
  states, _ = train_heads(mesh, CONFIG, data, settings, steps=6)
  for l2, kernel in zip((0.0, 0.5, 3.0), states.params["kernel"], strict=True):
    expected = np.asarray(data.start["kernel"][1]) * (1 - 0.1 * l2) ** 6
    np.testing.assert_allclose(kernel, expected, rtol=1e-4, atol=1e-6)


# --- the stage -------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["encoder", "zeros"])
def test_training_starts_where_the_config_says(mesh, start):
  data, settings = (
    make_data(),
    [make_setting(1, 0, 0, 1.0, "csl"), make_setting(0, 0, 0, 1.0, "csl")],
  )
  stage = heads.make_stage("t", change(start=start), data, settings, mesh)
  state = jax.vmap(stage.init)(jax.random.split(jax.random.key(0), 2), stage.per_seed)
  for name in ("kernel", "bias"):
    expected = data.start[name][::-1] if start == "encoder" else jnp.zeros_like(data.start[name])
    np.testing.assert_array_equal(state.params[name], expected)
  assert state.bank is None  # nothing that trains on synthetics carries a bank


def test_several_settings_at_once_are_each_alone(mesh):
  data = make_data()
  settings = [
    make_setting(0, 0, ALL, 1.0, "csl"), make_setting(1, 2, 6, 0.5, "balanced_softmax", l2=0.1),
    make_setting(1, 0, ALL, 0.0, "cross_entropy"), make_setting(0, 1, 0, 1.0, "balanced_softmax"),
    make_setting(1, 1, 3, 1.0, "csl", share=0.5), make_setting(0, 0, ALL, 1.0, "cross_entropy"),
    make_setting(1, seed=4), make_setting(1, stream="b"), make_setting(1, l2=0.1),
    make_setting(1, share=0.5),
  ]  # fmt: skip
  config = change(gamma_counts="effective")
  states, metrics = train_heads(mesh, config, data, settings, 5)
  assert metrics["loss"].shape == (len(settings), 5)
  for i, setting in enumerate(settings):
    state, own_metrics = train_heads(mesh, config, data, [setting], 5)
    np.testing.assert_allclose(metrics["loss"][i], own_metrics["loss"][0], rtol=1e-4)
    for name in ("kernel", "bias"):
      np.testing.assert_allclose(states.params[name][i], state.params[name][0], atol=1e-5)
  kernels = np.asarray(states.params["kernel"])
  apart = np.abs(kernels[:, None] - kernels[None]).max(axis=(2, 3)) > 1e-4
  assert apart.sum() == len(settings) * (len(settings) - 1)  # no two settings are the same


def test_a_head_follows_its_seed_and_stream_wherever_it_stands(mesh, tmp_path):
  """Neither the number nor the order of seeds and losses is in a head; the loop's seeds are not."""
  data = make_data()
  kept = [
    make_setting(1, 1, 6, seed=5, stream="a+csl"),
    make_setting(1, 1, 6, seed=7, stream="a+csl"),
    make_setting(1, 1, 6, seed=7, stream="a+ce", loss="cross_entropy"),
  ]
  others = [make_setting(0, seed=s, stream="b", loss="balanced_softmax") for s in (7, 0)]

  def train(settings, name):
    stage = heads.make_stage("heads", change(batch_size=16), data, settings, mesh)
    run = support.make_run(mesh, tuple(range(len(settings))), 5)
    return loop.train(stage, run, tmp_path / name).params

  first = train(kept, "first")
  second = train([others[0], kept[2], kept[1], others[1], kept[0]], "second")
  for here, there in enumerate((4, 2, 1)):
    for name in ("kernel", "bias"):
      np.testing.assert_allclose(first[name][here], second[name][there], rtol=1e-5, atol=1e-6)
  assert np.abs(first["kernel"][0] - first["kernel"][1]).max() > 1e-3  # another seed


def test_large_seeds_are_seeds_too(mesh):
  data, seeds = make_data(), (0, 1, 2**31, 2**32 - 1)
  states, _ = train_heads(mesh, CONFIG, data, [make_setting(seed=s) for s in seeds], 1)
  assert len({kernel.tobytes() for kernel in np.asarray(states.params["kernel"])}) == len(seeds)


def test_training_lowers_the_loss(mesh):
  data = make_data()
  config = change(num_steps=60, start="zeros")
  stage = heads.make_stage("t", config, data, [make_setting(0, 0, ALL, 1.0, "cross_entropy")], mesh)
  per_seed = one_head(stage)
  _, metrics = jax.jit(
    lambda state: jax.lax.scan(lambda s, _: stage.step(s, data, per_seed), state, None, length=60)
  )(stage.init(jax.random.key(0), per_seed))
  loss = np.asarray(metrics["loss"])
  assert loss[-10:].mean() < 0.9 * loss[:10].mean()


def test_accuracy_is_that_on_the_test_features_of_the_run(mesh):
  data = make_data()
  settings = [make_setting(1, 0, 0, 1.0, "csl"), make_setting(0, 0, 0, 1.0, "csl")]
  logits = np.einsum("rtd,rdc->rtc", data.test_features, data.start["kernel"])
  predicted = (logits + np.asarray(data.start["bias"])[:, None]).argmax(axis=-1)
  for run, wrong in enumerate((2, 5)):
    predicted[run, :wrong] = (predicted[run, :wrong] + 1) % CLASSES
  data = data.replace(test_labels=jnp.asarray(predicted, jnp.int32))
  stage = heads.make_stage("t", CONFIG, data, settings, mesh)
  state = jax.vmap(stage.init)(jax.random.split(jax.random.key(0), 2), stage.per_seed)
  metrics = jax.vmap(stage.evaluate, in_axes=(0, None, 0))(state, stage.shared, stage.per_seed)
  np.testing.assert_allclose(metrics["accuracy"], [2 / 7, 5 / 7], rtol=1e-6)


def test_without_test_examples_nothing_is_evaluated(mesh):
  data = make_data()
  data = data.replace(test_features=data.test_features[:, :0], test_labels=data.test_labels[:, :0])
  stage = heads.make_stage("t", CONFIG, data, [make_setting(0, 0, 0, 1.0, "csl")], mesh)
  assert stage.evaluate is None


# --- logit adjustment ------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_logit_adjustment_lowers_logits_by_tau_times_the_log_prior(tau):
  head = {"kernel": make_data().start["kernel"][0], "bias": make_data().start["bias"][0]}
  prior = np.array([0.6, 0.3, 0.08, 0.02], np.float32)
  features = make_data().test_features[0]
  before, after = heads.linear_logits(head, features), heads.linear_logits(
    heads.adjusted(head, jnp.asarray(prior), tau), features
  )  # fmt: skip
  np.testing.assert_allclose(before - after, np.tile(tau * np.log(prior), (TESTS, 1)), atol=1e-5)
  # p(y | x) / prior^tau, up to what all classes share
  balanced = softmax(np.asarray(before, float)) / prior**tau
  expected = balanced / balanced.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(softmax(np.asarray(after, float)), expected, rtol=1e-4)


def test_adjusting_by_equal_shares_predicts_the_same_and_by_none_stays_finite():
  head = {name: value[0] for name, value in make_data().start.items()}
  features = make_data().test_features[0]
  alike = heads.adjusted(head, jnp.full(CLASSES, 1 / CLASSES), 1.0)
  np.testing.assert_array_equal(
    heads.linear_logits(alike, features).argmax(-1), heads.linear_logits(head, features).argmax(-1)
  )
  without = heads.adjusted(head, jnp.array([0.5, 0.5, 0.0, 0.0]), 1.0)
  assert np.isfinite(heads.linear_logits(without, features)).all()


def test_heads_predict_on_the_features_of_their_run_adjusted_by_their_prior():
  rng = np.random.default_rng(2)
  run, taus = np.array([1, 0, 1, 1, 0]), np.array([0.0, 0.5, 1.0, 4.0], np.float32)
  params = {
    "kernel": rng.normal(size=(5, DIM, CLASSES)).astype(np.float32),
    "bias": rng.normal(size=(5, CLASSES)).astype(np.float32),
  }
  prior = rng.dirichlet(np.ones(CLASSES), 5).astype(np.float32)
  features = rng.normal(size=(RUNS, 60, DIM)).astype(np.float32)
  made = np.asarray(heads.predict(params, prior, taus, run, features))
  assert made.shape == (4, 5, 60)
  for t, tau in enumerate(taus):
    for h, per_seed in enumerate(run):
      logits = features[per_seed] @ params["kernel"][h] + params["bias"][h] - tau * np.log(prior[h])
      np.testing.assert_array_equal(made[t, h], logits.argmax(axis=-1))
  assert (made[0] != made[1]).any() and (made[1] != made[3]).any()
