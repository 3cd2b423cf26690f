"""Feature metrics against closed forms, naive loops and brute force."""

import itertools
import json

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf

from memdiff.evaluation import feature_metrics as metrics
from memdiff.evaluation import quality


def normal(seed, num, dim=3, shift=0.0, scale=1.0):
  return np.random.default_rng(seed).normal(size=(num, dim)) * scale + shift


SMALL = st.integers(0, 2**31).map(lambda seed: (normal(seed, 6), normal(seed + 1, 5, shift=0.7)))


# --- distances -------------------------------------------------------------------------------


def within(x):
  return metrics.squared_distances(x, x)


def mmd(x, y, bandwidth=2.0):
  return metrics.mmd(within(x), within(y), metrics.squared_distances(x, y), bandwidth)


@given(SMALL, st.floats(-1e4, 1e4))
def test_squared_distances_are_those_of_loops_wherever_the_origin_is(pair, offset):
  x, y = pair
  expected = [[float(((a - b) ** 2).sum()) for b in y] for a in x]
  np.testing.assert_allclose(metrics.squared_distances(x + offset, y + offset), expected, atol=1e-9)
  assert not metrics.squared_distances(np.full((3, 2), 0.1), np.full((4, 2), 0.1)).any()
  assert metrics.squared_distances(x[:0], y).shape == (0, 5)
  assert metrics.squared_distances(x, y[:0]).shape == (6, 0)


@pytest.mark.parametrize("pairs", [1, 17, 2**22])
def test_the_nearest_is_found_in_parts_and_a_copy_is_at_no_distance(pairs, monkeypatch):
  monkeypatch.setattr(metrics, "_PAIRS", pairs)
  x, y = normal(0, 9, 4), normal(1, 7, 4)
  apart = np.linalg.norm(x[:, None] - y[None], axis=2)
  np.testing.assert_allclose(metrics.nearest_distances(x, y), apart.min(axis=1))
  np.testing.assert_array_equal(metrics.nearest_distances(x[::2], x), 0)
  own = np.linalg.norm(x[:, None] - x[None], axis=2) + np.diag(np.full(9, np.inf))
  np.testing.assert_allclose(metrics.nearest_distances(x, x, itself=False), own.min(axis=1))


def test_diversity_is_the_mean_distance_of_all_pairs():
  x = normal(0, 7)
  pairs = [np.linalg.norm(a - b) for a, b in itertools.combinations(x, 2)]
  assert metrics.diversity(within(x)) == pytest.approx(np.mean(pairs))
  assert metrics.diversity(within(np.full((4, 2), 0.1))) == 0
  assert np.isnan(metrics.diversity(within(x[:1]))) and np.isnan(metrics.diversity(within(x[:0])))


def test_large_sets_are_thinned_out_always_alike_and_small_ones_are_not():
  x = normal(0, metrics.MOST_ROWS + 300)
  some = metrics.at_most(x)
  assert len(np.unique(some, axis=0)) == len(some) == metrics.MOST_ROWS
  assert (np.searchsorted(np.sort(x[:, 0]), some[:, 0]) < len(x)).all()
  assert set(some[:, 0]) < set(x[:, 0]) and some[-1, 0] not in x[: metrics.MOST_ROWS, 0]
  np.testing.assert_array_equal(some, metrics.at_most(x))
  np.testing.assert_array_equal(metrics.at_most(x[:50]), x[:50])


def naive_mmd(x, y, bandwidth):
  def kernel(a, b):
    return np.exp(-((a - b) ** 2).sum() / (2 * bandwidth))

  within_x = np.mean([kernel(a, b) for a, b in itertools.permutations(x, 2)])
  within_y = np.mean([kernel(a, b) for a, b in itertools.permutations(y, 2)])
  return within_x + within_y - 2 * np.mean([kernel(a, b) for a in x for b in y])


@given(SMALL, st.floats(0.1, 50))
def test_mmd_equals_naive_loops(pair, bandwidth):
  assert mmd(*pair, bandwidth) == pytest.approx(naive_mmd(*pair, bandwidth), abs=1e-12)
  assert mmd(*pair, bandwidth) == pytest.approx(mmd(*pair[::-1], bandwidth), abs=1e-12)


def test_the_bandwidth_is_the_median_squared_distance():
  x = normal(0, 9)
  squared = [float(((a - b) ** 2).sum()) for a, b in itertools.combinations(x, 2)]
  assert metrics.median_bandwidth(within(x)) == pytest.approx(np.median(squared))
  assert np.isnan(metrics.median_bandwidth(within(x[:1])))


def test_mmd_is_unbiased_and_sees_a_shift():
  same = [mmd(normal(2 * i, 20), normal(2 * i + 1, 30)) for i in range(200)]
  assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(200)
  assert min(same) < 0
  assert mmd(normal(0, 50), normal(1, 50, shift=2.0)) > 10 * np.std(same)
  assert mmd(np.ones((3, 2)), np.ones((4, 2))) == pytest.approx(0)
  assert np.isnan(mmd(normal(0, 1), normal(1, 5)))
  assert np.isnan(mmd(normal(0, 4), normal(1, 5), 0.0))
  assert np.isnan(mmd(normal(0, 4), normal(1, 5), float("nan")))


# --- Gaussians -------------------------------------------------------------------------------


def with_moments(mean, covariance, num=4000, seed=0):
  """A sample whose mean and (biased) covariance are exactly those given."""
  x = normal(seed, num, len(mean))
  x = x - x.mean(axis=0)
  x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T, bias=True))).T
  return x @ np.linalg.cholesky(covariance).T + mean


GAUSS_P = np.array([0.0, 1.0]), np.array([[1.0, 0.4], [0.4, 2.0]])
GAUSS_Q = np.array([0.7, -0.5]), np.array([[2.0, -0.3], [-0.3, 0.5]])


def kl_of_gaussians(p, q):
  (mean_p, cov_p), (mean_q, cov_q) = p, q
  inverse, gap = np.linalg.inv(cov_q), mean_q - mean_p
  return 0.5 * (
    np.trace(inverse @ cov_p) + gap @ inverse @ gap - len(gap)
    + np.log(np.linalg.det(cov_q) / np.linalg.det(cov_p))
  )  # fmt: skip


def gaussian_kl(real, synthetic):
  return metrics.gaussian_kl(*map(metrics.fit_gaussian, (real, synthetic)))


def frechet(x, y):
  return metrics.frechet(*map(metrics.fit_gaussian, (x, y)))


def test_gaussian_kl_equals_its_closed_form_in_the_stated_direction():
  real, synthetic = with_moments(*GAUSS_P), with_moments(*GAUSS_Q, seed=1)
  kl, shrinkage = gaussian_kl(real, synthetic)
  forward, reverse = kl_of_gaussians(GAUSS_P, GAUSS_Q), kl_of_gaussians(GAUSS_Q, GAUSS_P)
  assert abs(forward - reverse) > 0.5
  assert kl == pytest.approx(forward, rel=0.01)
  assert gaussian_kl(synthetic, real)[0] == pytest.approx(reverse, rel=0.01)
  assert 0 < shrinkage < 0.01


def test_gaussian_kl_shrinks_as_it_says():
  real, synthetic = normal(0, 8, 5), normal(1, 6, 5, shift=0.5)
  (cov_p, shrink_p), (cov_q, shrink_q) = ledoit_wolf(real), ledoit_wolf(synthetic)
  kl, shrinkage = gaussian_kl(real, synthetic)
  expected = kl_of_gaussians((real.mean(0), cov_p), (synthetic.mean(0), cov_q))
  assert kl == pytest.approx(expected, rel=1e-4)
  assert shrinkage == max(shrink_p, shrink_q) > 0.05


def test_gaussian_kl_of_a_set_with_itself_is_zero():
  x = normal(2, 10, 64)
  assert gaussian_kl(x, x)[0] == pytest.approx(0, abs=1e-6)
  assert all(np.isnan(gaussian_kl(x, x[:1])))
  assert np.isfinite(gaussian_kl(x, np.ones((3, 64)))[0])  # a collapsed class


@given(st.integers(0, 2**31))
def test_frechet_equals_the_matrix_square_root(seed):
  x, y = normal(seed, 60, 4, scale=2.0), normal(seed + 1, 50, 4, shift=1.0)
  cov_x, cov_y = ledoit_wolf(x)[0], ledoit_wolf(y)[0]
  gap = x.mean(axis=0) - y.mean(axis=0)
  root = scipy.linalg.sqrtm(cov_x @ cov_y)
  expected = gap @ gap + np.trace(cov_x + cov_y - 2 * np.real(root))
  assert frechet(x, y) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_known_gaussians():
  same_axes = np.diag([1.0, 4.0]), np.diag([9.0, 0.25])
  x = with_moments(np.zeros(2), same_axes[0])
  y = with_moments(np.array([3.0, 4.0]), same_axes[1], seed=1)
  assert frechet(x, y) == pytest.approx(25 + (1 - 3) ** 2 + (2 - 0.5) ** 2, rel=0.01)
  assert frechet(x, x) == pytest.approx(0, abs=1e-9)
  assert np.isnan(frechet(x, y[:1]))
  singular = frechet(normal(0, 3, 64), normal(1, 4, 64))
  assert np.isfinite(singular) and singular > 0


# --- precision, recall, memorisation, separation ---------------------------------------------


def precision_recall(real, made, k=3):
  between = metrics.squared_distances(real, made)
  return metrics.precision_recall(within(real), within(made), between, k)


def memorization_ratio(train, left_out, made):
  return metrics.memorization_ratio(
    metrics.nearest_distances(made, train), metrics.nearest_distances(left_out, train)
  )


def covered(points, centres, k):
  """Share of points within the distance of some centre to its k-th nearest other centre."""
  k = min(k, len(centres) - 1)
  inside = 0
  for point in points:
    for i, centre in enumerate(centres):
      others = sorted(np.linalg.norm(centre - c) for j, c in enumerate(centres) if j != i)
      if np.linalg.norm(point - centre) <= others[k - 1]:
        inside += 1
        break
  return inside / len(points)


@given(st.integers(0, 2**31), st.integers(2, 8), st.integers(2, 8), st.integers(1, 4))
def test_precision_and_recall_equal_brute_force(seed, num_real, num_made, k):
  real, made = normal(seed, num_real, 2), normal(seed + 1, num_made, 2, shift=0.8, scale=1.5)
  precision, recall = precision_recall(real, made, k)
  assert precision == pytest.approx(covered(made, real, k))
  assert recall == pytest.approx(covered(real, made, k))


def test_precision_and_recall_tell_collapse_from_noise():
  real = normal(0, 100)
  collapsed = real[:1] + normal(1, 100, scale=0.01)
  scattered = normal(2, 100, scale=6.0)
  assert precision_recall(real, collapsed) == (1.0, pytest.approx(0.01, abs=0.02))
  precision, recall = precision_recall(real, scattered)
  assert precision < 0.3 and recall > 0.9
  assert precision_recall(real, real) == (1.0, 1.0)
  assert all(np.isnan(precision_recall(real, real[:1])))


def test_memorisation_is_zero_for_copies_and_one_for_unseen_members():
  train, left_out = normal(0, 10), normal(1, 400)
  copies = train[np.random.default_rng(0).integers(0, 10, 50)]
  assert memorization_ratio(train, left_out, copies) == 0
  assert memorization_ratio(train, left_out, left_out) == 1
  assert memorization_ratio(train, left_out, normal(2, 400)) == pytest.approx(1, abs=0.1)
  near = copies + normal(3, 50, scale=0.05)
  assert 0 < memorization_ratio(train, left_out, near) < 0.2
  assert np.isnan(memorization_ratio(train, left_out[:0], copies))
  assert np.isnan(memorization_ratio(train, train, copies))


def test_memorisation_is_a_ratio_of_medians_by_brute_force():
  train, left_out, made = normal(0, 6), normal(1, 9), normal(2, 7, scale=2.0)

  def median(points):
    return np.median([min(np.linalg.norm(p - t) for t in train) for p in points])

  expected = median(made) / median(left_out)
  assert memorization_ratio(train, left_out, made) == pytest.approx(expected)


@given(st.integers(0, 2**31))
def test_separation_equals_brute_force(seed):
  x, centre = normal(seed, 14, 3), np.array([0.3, -0.2, 0.1])
  labels = np.random.default_rng(seed).permutation([0] * 6 + [1] * 4 + [2] * 3 + [3])
  c = x - centre
  cosine = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in c] for a in c])
  result = metrics.separation(x, labels, centre, 5)
  for label in range(3):
    own = np.flatnonzero(labels == label)
    rest = np.flatnonzero(labels != label)
    within = np.mean([cosine[i, j] for i, j in itertools.permutations(own, 2)])
    across = np.mean([cosine[i, j] for i in own for j in rest])
    assert result[label] == pytest.approx(within - across, abs=1e-12)
  assert np.isnan(result[3:]).all()  # one feature, and none


def test_separation_of_one_class_alone_is_unknown():
  assert np.isnan(metrics.separation(normal(0, 5), np.zeros(5, int), np.zeros(3), 2)).all()


# --- all of them over seeds and classes ------------------------------------------------------


def measure(train, train_labels, left_out, left_out_labels, made, made_labels):
  """Of the generator "g" alone; arrays lead with seeds."""
  seeds = [quality.Seed(t, o, {"g": m}) for t, o, m in zip(train, left_out, made, strict=True)]
  return quality.measure(seeds, train_labels, left_out_labels, {"g": made_labels}, 4)["g"]


def measured(made_of):
  """With two seeds; class 2 is made up, class 3 has a single exemplar."""
  train_labels = np.repeat(np.arange(4), [9, 6, 4, 1])
  left_out_labels = np.repeat([1, 2, 3], [20, 30, 30])
  made_labels = np.repeat([2, 3], [30, 30])
  train = np.stack([normal(s, 20) + train_labels[:, None] for s in (0, 1)])
  left_out = np.stack([normal(s, 80) + left_out_labels[:, None] for s in (2, 3)])
  made = made_of(train, train_labels, made_labels)
  arguments = train, train_labels, left_out, left_out_labels, made, made_labels
  return measure(*arguments), arguments


def test_quality_is_the_mean_over_classes_then_seeds():
  def fresh(train, train_labels, made_labels):
    return np.stack([normal(s, 60) + made_labels[:, None] for s in (4, 5)])

  report, (train, train_labels, left_out, left_out_labels, made, made_labels) = measured(fresh)

  def of(features, labels, s, c):
    return features[s][labels == c]

  def against(real, real_labels, s, c):
    unseen = of(left_out, left_out_labels, s, c)
    bandwidth = np.median(within(unseen)[np.triu_indices(len(unseen), 1)])
    return naive_mmd(of(real, real_labels, s, c), of(made, made_labels, s, c), bandwidth)

  values = np.array([[against(left_out, left_out_labels, s, c) for c in (2, 3)] for s in (0, 1)])
  entry = report["truth_test"]["mmd"]
  assert entry["mean"] == pytest.approx(values.mean())
  assert entry["std"] == pytest.approx(values.mean(axis=1).std(ddof=1))
  assert entry["per_class"][:2] == [None, None]
  np.testing.assert_allclose(entry["per_class"][2:], values.mean(axis=0))
  against_train = [against(train, train_labels, s, 2) for s in (0, 1)]
  assert report["mmd"]["mean"] == pytest.approx(np.mean(against_train))
  assert report["mmd"]["per_class"][3] is None  # one exemplar has no MMD
  assert report["memorization_ratio"]["mean"] == pytest.approx(1, abs=0.5)
  assert set(report["truth_test"]) == {"mmd", "frechet", "precision", "recall"}
  assert 0 <= report["kl_gaussian"]["shrinkage"] <= 1
  json.dumps(report, allow_nan=False)


def test_generators_do_not_change_each_others_numbers_nor_the_bandwidth():
  """Of generators of different classes, judged together and alone; features far out, too."""
  _, (train, train_labels, left_out, left_out_labels, made, made_labels) = measured(
    lambda *_: np.stack([normal(s, 60) for s in (4, 5)])
  )
  far, far_labels = 100 * made[:, :30], made_labels[:30]
  seeds = [
    quality.Seed(t, o, {"g": m, "far": f})
    for t, o, m, f in zip(train, left_out, made, far, strict=True)
  ]
  labels = {"g": made_labels, "far": far_labels}
  together = quality.measure(seeds, train_labels, left_out_labels, labels, 4)
  rest = train, train_labels, left_out, left_out_labels
  assert together == {
    "g": measure(*rest, made, made_labels),
    "far": measure(*rest, far, far_labels),
  }
  assert together["far"]["mmd"]["per_class"][3] is None
  # Far from everything, the kernel between is 0 and the one within the real features as it was.
  unseen = [left_out[s][left_out_labels == 2] for s in (0, 1)]
  widths = [metrics.median_bandwidth(within(x)) for x in unseen]
  inside = [
    (np.exp(-within(x) / (2 * w)).sum() - 30) / (30 * 29)
    for x, w in zip(unseen, widths, strict=True)
  ]
  assert together["far"]["truth_test"]["mmd"]["mean"] == pytest.approx(np.mean(inside), abs=0.02)


def test_without_unseen_features_training_ones_set_the_bandwidth():
  _, (train, train_labels, left_out, _, made, made_labels) = measured(
    lambda *_: np.stack([normal(s, 60) for s in (4, 5)])
  )
  report = measure(train, train_labels, left_out[:, :0], np.zeros(0, int), made, made_labels)
  expected = []
  for s in (0, 1):
    real, own = train[s][train_labels == 2], made[s][made_labels == 2]
    expected.append(naive_mmd(real, own, metrics.median_bandwidth(within(real))))
  assert report["mmd"]["mean"] == pytest.approx(np.mean(expected))
  assert report["truth_test"]["mmd"]["mean"] is None
  json.dumps(report, allow_nan=False)


def test_quality_of_copies_says_so():
  def copies(train, train_labels, made_labels):
    first = [np.flatnonzero(train_labels == c)[0] for c in made_labels]
    return train[:, first]

  report, _ = measured(copies)
  assert report["memorization_ratio"]["mean"] == 0
  assert report["diversity"]["mean"] == 0
  entries = [v for k, v in report.items() if k != "truth_test"] + [*report["truth_test"].values()]
  assert all(entry["meaning"] and entry["better"] for entry in entries)
  json.dumps(report, allow_nan=False)


# --- nearness to unseen features --------------------------------------------------------------


def test_nearness_is_the_distance_to_the_nearest_unseen_in_units_of_theirs():
  unseen, made = normal(0, 12), normal(1, 9, scale=2.0)
  unseen_labels = np.repeat([0, 1, 3], [5, 6, 1])
  labels = np.random.default_rng(2).permutation([0] * 3 + [1] * 3 + [2, 3, 3])
  result = quality.nearness(made, labels, unseen, unseen_labels)
  assert result.shape == (9,)
  for feature, label, value in zip(made, labels, result, strict=True):
    own = unseen[unseen_labels == label]
    if label > 1:  # none unseen, or one without a neighbour
      assert np.isnan(value)
      continue
    neighbour = [
      min(np.linalg.norm(a - b) for j, b in enumerate(own) if j != i) for i, a in enumerate(own)
    ]
    nearest = min(np.linalg.norm(feature - b) for b in own)
    assert value == pytest.approx(nearest / np.median(neighbour))


def test_nearness_is_about_one_for_real_features_and_does_not_depend_on_their_scale():
  unseen, made = normal(0, 300), normal(1, 300)
  labels = np.zeros(300, int)
  near = quality.nearness(made, labels, unseen, labels)
  assert np.median(near) == pytest.approx(1, abs=0.1)
  np.testing.assert_allclose(quality.nearness(7 * made, labels, 7 * unseen, labels), near)
  np.testing.assert_array_equal(quality.nearness(unseen, labels, unseen, labels), 0)
  far = quality.nearness(made + 100, labels, unseen, labels)
  assert far.min() > 100


def test_nearness_is_unknown_where_the_unseen_are_all_alike():
  same = np.ones((3, 2))
  assert np.isnan(quality.nearness(same, np.zeros(3), same, np.zeros(3))).all()
