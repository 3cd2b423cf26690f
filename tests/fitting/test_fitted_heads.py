"""Fitted heads against independent statements of their formulas, and against scikit-learn."""

import numpy as np
import pytest
from scipy import stats
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from memdiff.fitting import blend, heads
from memdiff.fitting.heads import FAMILIES, Training

COUNTS = np.array([60, 25, 8, 1])
CLASSES, DIM = len(COUNTS), 5
LABELS = np.repeat(np.arange(CLASSES), COUNTS)
ALIKE = np.full(CLASSES, 1 / CLASSES)


@pytest.fixture(scope="module")
def training():
  rng = np.random.default_rng(0)
  means, mixed = rng.normal(size=(CLASSES, DIM)) * 1.5, rng.normal(size=(DIM, DIM))
  features = means[LABELS] + rng.normal(size=(len(LABELS), DIM)) @ mixed
  return Training(features.astype(np.float32), LABELS, ALIKE)


@pytest.fixture(scope="module")
def weighted(training):
  """The same, and the features with each example as often as it weighs."""
  times = np.random.default_rng(2).integers(1, 5, len(LABELS))
  weights = (times / times.mean()).astype(np.float32)
  once = Training(training.features, LABELS, ALIKE, weights)
  repeated = Training(np.repeat(training.features, times, axis=0), np.repeat(LABELS, times), ALIKE)
  return once, repeated


@pytest.mark.parametrize("name", [*heads.REGRESSIONS, "centroid"])
def test_weights_are_repeats_to_heads_without_uncertainty(weighted, new, name):
  family = FAMILIES[name]
  found, expected = (family.fit(each, family.settings[:1])[0].logits(new) for each in weighted)
  np.testing.assert_allclose(logs(found), logs(expected), atol=2e-2)  # where L-BFGS ends


def test_weighted_means_are_those_of_repeats(weighted):
  once, repeated = weighted
  np.testing.assert_allclose(once.means, repeated.means, atol=1e-5)


def test_weighted_moments_are_as_sure_as_they_say():
  """Over many draws: the covariance is unbiased, means vary as those of `counts` examples."""
  rng, labels = np.random.default_rng(4), np.repeat([0, 1], [12, 4])
  weights = rng.exponential(size=16).astype(np.float32) ** 2
  weights /= weights.mean()
  draws = [
    Training(rng.normal(size=(16, 3)).astype(np.float32), labels, ALIKE[:2] * 2, weights)
    for _ in range(2000)
  ]
  assert np.mean([d.within[1].mean() for d in draws]) == pytest.approx(1, abs=0.05)
  variance = np.mean([np.square(d.means).mean(axis=1) for d in draws], axis=0)
  np.testing.assert_allclose(variance, 1 / draws[0].counts, rtol=0.1)


def test_equal_weights_change_nothing(training, new):
  alike = Training(training.features, LABELS, ALIKE, np.ones(len(LABELS), np.float32))
  for family in FAMILIES.values():
    (found,), (expected,) = (family.fit(t, family.settings[:1]) for t in (alike, training))
    np.testing.assert_allclose(logs(found.logits(new)), logs(expected.logits(new)), atol=2e-3)


@pytest.fixture(scope="module")
def new():
  return np.random.default_rng(1).normal(size=(50, DIM)).astype(np.float32) * 2


def logs(logits):
  return blend.log_probabilities(logits.astype(np.float64))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_discriminants_are_those_of_the_shrunk_covariance(training, new, share):
  """By densities, with the covariance that scikit-learn shrinks."""
  apart = training.features - training.means[LABELS]
  covariance = apart.T @ apart / (len(LABELS) - CLASSES)
  shrunk = (1 - share) * covariance + share * np.trace(covariance) / DIM * np.eye(DIM)
  expected = np.stack([stats.multivariate_normal(m, shrunk).logpdf(new) for m in training.means], 1)
  (head,) = heads.discriminants(training, (share,))
  np.testing.assert_allclose(logs(head.logits(new)), logs(expected), atol=2e-3)


@pytest.mark.filterwarnings("ignore:Only one sample")
def test_discriminants_agree_with_scikit_learn(training, new):
  theirs = LinearDiscriminantAnalysis("lsqr", priors=ALIKE, shrinkage=0.0)
  theirs.fit(training.features, LABELS)
  (head,) = heads.discriminants(training, (0.0,))
  agree = head.logits(new).argmax(axis=1) == theirs.predict(new)
  assert agree.mean() > 0.97  # its covariance is divided by N, which moves no boundary


def test_probabilistic_discriminants_are_predictive_densities(training, new):
  """p(x | features of the class), by the joint Gaussian of a class's features and x."""
  (head,) = heads.probabilistic_discriminants(training, (0.1,))
  apart = training.features.astype(float) - training.means[LABELS]
  within = apart.T @ apart / (len(LABELS) - CLASSES)
  within = 0.9 * within + 0.1 * np.trace(within) / DIM * np.eye(DIM)
  values, vectors = np.linalg.eigh(within)
  whiten = vectors / np.sqrt(values)
  means = training.means @ whiten
  centre = means.mean(axis=0)
  between = np.cov((means - centre).T, bias=False) - (1 / COUNTS).mean() * np.eye(DIM)
  spread, axes = np.linalg.eigh(between)
  between = (axes * np.maximum(spread, 0)) @ axes.T
  expected = []
  for mean, count in zip(means, COUNTS, strict=True):
    gain = between @ np.linalg.inv(between + np.eye(DIM) / count)
    density = stats.multivariate_normal(
      centre + gain @ (mean - centre), np.eye(DIM) + between - gain @ between
    )
    expected.append(density.logpdf(new @ whiten))
  np.testing.assert_allclose(logs(head.logits(new)), logs(np.stack(expected, 1)), atol=5e-3)


def test_a_class_of_few_is_drawn_to_the_middle_and_wider(training):
  (head,) = heads.probabilistic_discriminants(training, (0.1,))
  assert (np.diff(head.variances.mean(axis=1)) > 0).all()  # the fewer, the wider


def test_centroids_are_cosines(training, new):
  def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  (head,) = heads.centroids(training, (0.5,))
  rows = unit(np.sign(training.features) * np.sqrt(np.abs(training.features)))
  means = np.stack([rows[c == LABELS].mean(axis=0) for c in range(CLASSES)])
  expected = unit(np.sign(new) * np.sqrt(np.abs(new))) @ unit(means).T
  np.testing.assert_allclose(head.logits(new) / head.scale, expected + np.log(1 / CLASSES) /
                             head.scale, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize(("name", "weight"), [("plain_logistic", None),
                                              ("weighted_logistic", "balanced")])  # fmt: skip
def test_regressions_agree_with_scikit_learn(training, new, monkeypatch, name, weight):
  monkeypatch.setattr(heads, "_BETTER", 1e-10)
  monkeypatch.setattr(heads, "_FLATTER", 1e-6)
  l2 = 1e-2
  (head,) = FAMILIES[name].fit(training, (l2,))
  theirs = LogisticRegression(C=1 / (l2 * len(LABELS)), class_weight=weight, tol=1e-8)
  theirs.fit(training.features, LABELS)
  ours = np.exp(logs(head.logits(new)))
  np.testing.assert_allclose(ours, theirs.predict_proba(new), atol=2e-3)


def test_balanced_softmax_is_the_minimum_of_its_loss(training):
  """At the minimum the gradient vanishes, and the prior is in the loss alone."""
  l2 = 1e-2
  (head,) = FAMILIES["balanced_logistic"].fit(training, (l2,))
  offset = np.log(COUNTS / len(LABELS)) - np.log(ALIKE)
  share = np.exp(logs(training.features @ head.kernel + (head.bias + offset)[None]))
  share[np.arange(len(LABELS)), LABELS] -= 1
  gradient = training.features.T @ share / len(LABELS) + l2 * head.kernel
  assert np.abs(gradient).max() < 5e-3
  assert np.abs(share.mean(axis=0)).max() < 5e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_settings_are_fitted_alike_together_and_alone(training, new, name):
  family = FAMILIES[name]
  together = family.fit(training, family.settings)
  assert len(together) == len(family.settings)
  for setting, head in list(zip(family.settings, together, strict=True))[:3]:
    (alone,) = family.fit(training, (setting,))
    same = alone.logits(new).argmax(axis=1) == head.logits(new).argmax(axis=1)
    assert same.mean() >= 0.94  # regressions end within a tolerance, from another beginning


@pytest.mark.parametrize("name", FAMILIES)
def test_a_class_without_features_is_never_predicted(training, new, name):
  rows = LABELS != 1
  without = Training(training.features[rows], LABELS[rows], ALIKE)
  for head in FAMILIES[name].fit(without, FAMILIES[name].settings):
    logits = head.logits(new)
    assert not np.isnan(logits).any() and (logits.argmax(axis=1) != 1).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_more_columns_than_rows_and_constant_ones_do_no_harm(name):
  rng = np.random.default_rng(2)
  features = rng.normal(size=(9, 30)).astype(np.float32)
  features[:, 3] = 0
  labels = np.array([0] * 6 + [1] * 2 + [2])
  for head in FAMILIES[name].fit(
    Training(features, labels, np.full(3, 1 / 3)), FAMILIES[name].settings
  ):
    assert np.isfinite(head.logits(features)).all()


# --- blends ----------------------------------------------------------------------------------


def test_the_weight_of_one_classifier_is_its_temperature():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(4000, 3)) * 2
  labels = np.array([rng.choice(3, p=p) for p in np.exp(logs(logits))])
  (weight,) = blend.fit_weights([logs(4 * logits)], labels, np.ones(4000))
  assert weight == pytest.approx(0.25, abs=0.02)


def test_what_tells_nothing_gets_no_weight_and_what_tells_more_gets_more():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 4, 3000)
  good, better = (np.eye(4)[labels] * s + rng.normal(size=(3000, 4)) for s in (1.0, 2.0))
  nothing = rng.normal(size=(3000, 4))
  weights = blend.fit_weights([logs(x) for x in (good, better, nothing)], labels, np.ones(3000))
  assert weights[1] > weights[0] > 0.3 and weights[2] < 0.15
  both = blend.blended(weights, [logs(x) for x in (good, better, nothing)]).argmax(axis=1)
  assert (both == labels).mean() > (better.argmax(axis=1) == labels).mean() + 0.02


def test_no_classifier_alone_rules_a_class_out():
  assert blend.log_probabilities(np.array([[0.0, -1e4]])).min() == -30


def test_means_are_the_same_some_rows_at_a_time(monkeypatch):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 5, 300)
  features = rng.normal(size=(300, 4)).astype(np.float32)
  monkeypatch.setattr(heads, "_ROWS", 7)
  means = Training(features, labels, np.full(6, 1 / 6)).means_of(np.square)
  expected = [np.square(features[labels == c]).mean(axis=0) for c in range(5)]
  np.testing.assert_allclose(means[:5], expected, rtol=1e-5)
  assert not means[5].any()
