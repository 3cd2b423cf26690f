"""Metrics of two sets against closed forms, loops over all pairs, and cases of known answer."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdiff.errors import DataError
from memdiff.evaluation import set_metrics


def normal(seed, number, dim=4, shift=0.0, scale=1.0):
  return shift + scale * np.random.default_rng(seed).normal(size=(number, dim))


# --- Frechet ---------------------------------------------------------------------------------


@given(st.integers(2, 40), st.integers(1, 60), st.floats(-1e4, 1e4))
def test_a_gaussian_in_blocks_is_that_of_all_rows(number, block, shift):
  rows = normal(number, number, 3, shift)
  found = set_metrics.gaussian(rows[i : i + block] for i in range(0, number, block))
  np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(found.covariance, np.cov(rows, rowvar=False), rtol=1e-6, atol=1e-9)


def exact(mean, covariance):
  """Rows whose sample mean and covariance are exactly these."""
  rows = normal(0, 50, len(mean))
  rows = rows - rows.mean(axis=0)
  rows = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
  return rows @ np.linalg.cholesky(covariance).T + mean


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_distance_of_shifted_and_scaled_gaussians_is_the_closed_form(shift):
  """With S_g = s^2 S_r: |shift|^2 + (1 - s)^2 tr S_r."""
  covariance = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 0.7]])
  real = exact(np.zeros(3), covariance)
  generated = exact(np.full(3, shift), 2.25 * covariance)
  expected = 3 * shift**2 + 0.25 * np.trace(covariance)
  assert set_metrics.frechet_distance(real, generated) == pytest.approx(expected, rel=1e-9)
  assert set_metrics.frechet_distance(real, real) == pytest.approx(0, abs=1e-9)


def test_statistics_that_are_there_need_no_features():
  real, generated = normal(0, 90), normal(1, 70, shift=1.0)
  stored = set_metrics.gaussian([real])
  assert set_metrics.frechet_distance(stored, generated) == pytest.approx(
    set_metrics.frechet_distance(real, generated)
  )


def test_a_distance_is_that_of_torchmetrics():
  fid = pytest.importorskip("torchmetrics.image.fid")
  torch = pytest.importorskip("torch")
  real, generated = normal(0, 300, 16), normal(1, 200, 16, 0.3, 1.4)
  theirs = [(torch.tensor(x.mean(0)), torch.tensor(np.cov(x.T))) for x in (real, generated)]
  expected = float(fid._compute_fid(*theirs[0], *theirs[1]))
  assert set_metrics.frechet_distance(real, generated) == pytest.approx(expected, rel=1e-5)


# --- kernel ----------------------------------------------------------------------------------


def looped_mmd(x, y):
  def kernel(a, b):
    return (a @ b / len(a) + 1) ** 3

  n = len(x)
  pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
  within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs) / (n * (n - 1))
  return within - 2 * sum(kernel(a, b) for a in x for b in y) / n**2


def test_the_kernel_distance_of_whole_sets_is_the_sum_over_pairs():
  x, y = normal(0, 12), normal(1, 12, shift=0.5)
  mean, std = set_metrics.kernel_distance(x, y, subsets=3, size=12)
  assert mean == pytest.approx(looped_mmd(x, y), rel=1e-9)
  assert std == pytest.approx(0, abs=1e-9)  # a subset of all rows is all rows


def test_the_kernel_distance_is_unbiased_and_grows_with_the_shift():
  values = [
    set_metrics.kernel_distance(normal(0, 400), normal(1, 400, shift=s), subsets=50, size=100)[0]
    for s in (0.0, 0.3, 1.0)
  ]
  assert abs(values[0]) < 0.05 < values[1] < values[2]


# --- inception score -------------------------------------------------------------------------


def test_the_score_is_the_number_of_classes_if_each_is_certain_and_one_if_none_is():
  certain = np.eye(5)[np.arange(100) % 5]
  assert set_metrics.inception_score(certain, 4) == pytest.approx((5.0, 0.0))
  assert set_metrics.inception_score(np.full((100, 5), 0.2), 4) == pytest.approx((1.0, 0.0))


def test_the_score_is_its_formula():
  probabilities = np.random.default_rng(0).dirichlet(np.ones(4), 60)
  parts = []
  for part in np.split(probabilities, 3):
    marginal = part.mean(axis=0)
    kl = [sum(p * math.log(p / q) for p, q in zip(row, marginal, strict=True)) for row in part]
    parts.append(math.exp(np.mean(kl)))
  expected = np.mean(parts), np.std(parts)
  assert set_metrics.inception_score(probabilities, 3) == pytest.approx(expected)


# --- neighbourhoods --------------------------------------------------------------------------


def looped_neighbourhoods(real, generated, k):
  def distances(a, b):
    return np.linalg.norm(a[:, None] - b[None], axis=2)

  def radii(rows):
    return np.sort(distances(rows, rows), axis=1)[:, k]

  between, real_radii, generated_radii = (
    distances(generated, real), radii(real), radii(generated),
  )  # fmt: skip
  inside = between <= real_radii[None]
  return {
    "precision": inside.any(axis=1).mean(),
    "recall": (between <= generated_radii[:, None]).any(axis=0).mean(),
    "density": inside.sum() / (k * len(generated)),
    "coverage": (between.min(axis=0) <= real_radii).mean(),
  }


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_neighbourhoods_are_those_of_a_loop_over_all_pairs(k, shift, monkeypatch):
  monkeypatch.setattr(set_metrics, "_DISTANCES", 0.005)  # a few rows at a time
  real, generated = normal(0, 60), normal(1, 45, shift=shift)
  near, wide = (looped_neighbourhoods(real, generated, number) for number in (k, 4))
  expected = {name: (near if name in ("precision", "recall") else wide)[name] for name in near}
  assert set_metrics.neighbourhood_metrics(real, generated, k, 4) == pytest.approx(expected)


def test_what_is_missing_costs_recall_and_what_is_far_off_costs_precision():
  both = np.concatenate([normal(0, 150), normal(1, 150, shift=20.0)])
  half, wide = normal(2, 150), np.concatenate([both, normal(3, 300, shift=-30.0)])
  of_half = set_metrics.neighbourhood_metrics(both, half)
  assert of_half["recall"] < 0.55 < 0.8 < of_half["precision"]
  assert of_half["coverage"] < 0.55
  of_wide = set_metrics.neighbourhood_metrics(both, wide)
  assert of_wide["precision"] < 0.55 < 0.8 < of_wide["recall"]


# --- precision and recall of distributions ---------------------------------------------------


def test_equal_sets_have_all_and_disjoint_ones_nothing():
  rows = normal(0, 200)
  assert min(set_metrics.precision_recall_f(rows, rows, runs=2)) > 0.999
  apart = set_metrics.precision_recall_f(rows, normal(1, 200, shift=100.0), runs=2)
  assert max(apart) < 1e-3


def test_half_of_the_classes_missing_halves_the_recall():
  """The curve of p over all and q over half of the clusters: F_8 is near 1/2, F_1/8 near 1."""
  centres = 50.0 * np.arange(4)[:, None] * np.ones(3)
  real = np.concatenate([normal(i, 100, 3) + c for i, c in enumerate(centres)])
  generated = np.concatenate([normal(i + 4, 200, 3) + c for i, c in enumerate(centres[:2])])
  f8, f1_8 = set_metrics.precision_recall_f(real, generated, clusters=4, runs=2)
  assert 0.45 < f8 < 0.55 and f1_8 > 0.95
  f8, f1_8 = set_metrics.precision_recall_f(generated, real, clusters=4, runs=2)
  assert f8 > 0.95 and 0.45 < f1_8 < 0.55


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda m, x: m.kernel_distance(x, x), "subsets of 1000 rows, but a set has only 20"),
    (lambda m, x: m.neighbourhood_metrics(x, x[:3]), "more than 5 rows, but a set has 3"),
    (lambda m, x: m.precision_recall_f(x, x[:9]), "sets of one size, not 20 and 9"),
    (lambda m, x: m.precision_recall_f(x[:9], x[:9]), "9 rows on a side, too few for 20"),
    (lambda m, x: m.inception_score(x[:5]), "5 images, too few for 10 parts"),
    (lambda m, x: m.frechet_distance(x, x[:1]), "needs two rows of features or more"),
    (lambda m, x: m.frechet_distance(x, x[:, :2]), "4 numbers and generated ones 2"),
    (lambda m, x: m.kernel_distance(x, x[:, :2], size=5), "4 numbers and generated ones 2"),
    (lambda m, x: m.neighbourhood_metrics(x[0], x), "real features have the shape"),
    (lambda m, x: m.neighbourhood_metrics(x, x / 0), "generated features hold a NaN or an inf"),
    (lambda m, x: m.frechet_distance(x * np.nan, x), "hold a NaN or an infinity"),
  ],
)
def test_what_cannot_be_compared_is_one_sentence(call, words):
  with np.errstate(all="ignore"), pytest.raises(DataError, match=words) as caught:
    call(set_metrics, normal(0, 20))
  assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
