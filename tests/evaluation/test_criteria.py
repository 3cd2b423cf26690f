"""Criteria and paired differences against scikit-learn, brute force, bootstrap and simulation."""

import warnings

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from memdiff.evaluation import criteria
from memdiff.evaluation.criteria import CRITERIA, Estimate

seeds = st.integers(0, 2**31)


def sample(seed, num_classes=5, size=40, absent=(), leading=()):
  """(predictions [*leading, size], labels [size]); no example is of an `absent` class."""
  rng = np.random.default_rng(seed)
  present = np.setdiff1d(np.arange(num_classes), absent)
  labels = np.concatenate([present, rng.choice(present, size - len(present))])
  predictions = rng.integers(0, num_classes, (*leading, size))
  return np.where(rng.random(predictions.shape) < 0.4, labels, predictions), labels


def by_scikit_learn(criterion, predictions, labels):
  if criterion == "accuracy":
    return metrics.accuracy_score(labels, predictions)
  if criterion == "macro_f1":
    present = np.unique(labels)
    return metrics.f1_score(labels, predictions, labels=present, average="macro", zero_division=0)
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "y_pred contains classes not in y_true")
    return metrics.balanced_accuracy_score(labels, predictions)


# --- scores ----------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
@given(seeds, st.integers(2, 7), st.data())
def test_scores_are_those_of_scikit_learn(criterion, seed, num_classes, data):
  absent = data.draw(st.sets(st.integers(0, num_classes - 1), max_size=num_classes - 1))
  predictions, labels = sample(seed, num_classes, absent=sorted(absent))
  found = criteria.score(predictions, labels, criterion, num_classes)
  assert found == pytest.approx(by_scikit_learn(criterion, predictions, labels))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("labels", [[0, 0, 3, 3, 3], [2], [1, 4, 4]])
def test_perfect_predictions_score_one_however_many_classes_are_untested(criterion, labels):
  labels = np.array(labels)
  assert criteria.score(labels, labels, criterion, 6) == pytest.approx(1)
  assert criteria.score((labels + 1) % 6, labels, criterion, 6) == 0


@pytest.mark.parametrize("criterion", CRITERIA)
@given(seeds)
def test_every_row_of_predictions_is_scored_by_itself(criterion, seed):
  predictions, labels = sample(seed, leading=(2, 3))
  found = criteria.score(predictions, labels, criterion, 5)
  assert found.shape == (2, 3)
  for index in np.ndindex(2, 3):
    assert found[index] == pytest.approx(criteria.score(predictions[index], labels, criterion, 5))


@pytest.mark.parametrize("criterion", CRITERIA)
@given(seeds, st.permutations(range(5)))
def test_names_of_classes_and_order_of_examples_do_not_matter(criterion, seed, names):
  predictions, labels = sample(seed)
  order, names = np.random.default_rng(seed).permutation(len(labels)), np.array(names)
  found = criteria.score(names[predictions[order]], names[labels[order]], criterion, 5)
  assert found == pytest.approx(criteria.score(predictions, labels, criterion, 5))
  assert 0 <= found <= 1


def test_a_rare_class_counts_as_much_as_a_common_one_but_for_accuracy():
  labels = np.repeat([0, 1], [98, 2])
  common, rare = np.zeros(100, int), np.repeat([1, 0, 1], [30, 68, 2])
  better = {c: criteria.score(rare, labels, c, 2) > criteria.score(common, labels, c, 2)
            for c in CRITERIA}  # fmt: skip
  assert better == {"balanced_accuracy": True, "accuracy": False, "macro_f1": False}


def test_only_the_classes_asked_for_count():
  labels = np.array([0, 0, 0, 1, 1, 2])
  predictions = np.array([0, 2, 1, 1, 0, 2])

  def score(criterion, classes):
    return criteria.score(predictions, labels, criterion, 4, classes)

  assert score("balanced_accuracy", (0, 1)) == pytest.approx((1 / 3 + 1 / 2) / 2)
  assert score("accuracy", (0, 1)) == pytest.approx(2 / 5)
  # F1 of class 2 knows of the example of class 0 that was taken for it.
  assert score("macro_f1", (0, 2)) == pytest.approx((2 / 5 + 2 / 3) / 2)
  # Class 3 has no examples.
  assert score("balanced_accuracy", (2, 3)) == score("accuracy", (2, 3)) == 1
  assert score("macro_f1", (2, 3)) == pytest.approx(2 / 3)


@pytest.mark.parametrize("criterion", CRITERIA)
@given(seeds)
def test_all_classes_together_are_the_whole(criterion, seed):
  predictions, labels = sample(seed, absent=(1,))
  whole = criteria.score(predictions, labels, criterion, 5)
  assert criteria.score(predictions, labels, criterion, 5, range(5)) == pytest.approx(whole)


# --- contributions ---------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["accuracy", "balanced_accuracy"])
@pytest.mark.parametrize("classes", [None, (0, 3)])
@given(seeds)
def test_contributions_to_an_accuracy_add_up_to_it(criterion, classes, seed):
  predictions, labels = sample(seed, absent=(2,), leading=(3,))
  parts = criteria.contributions(predictions, labels, criterion, 5, classes)
  expected = criteria.score(predictions, labels, criterion, 5, classes)
  np.testing.assert_allclose(parts.sum(axis=-1), expected)


@pytest.mark.parametrize("classes", [None, (0, 3)])
@given(seeds)
def test_contributions_to_macro_f1_foresee_another_prediction_of_one_example(classes, seed):
  predictions, labels = sample(seed, size=2000, absent=(2,))
  rows = np.flatnonzero(labels == np.random.default_rng(seed).choice([0, 1, 3, 4]))
  before = criteria.score(predictions, labels, "macro_f1", 5, classes)
  parts = criteria.contributions(predictions, labels, "macro_f1", 5, classes)
  row = rows[0]
  for other in {predictions[r]: r for r in rows}.values():  # one for each prediction
    changed = predictions.copy()
    changed[row] = predictions[other]
    after = criteria.score(changed, labels, "macro_f1", 5, classes)
    assert after - before == pytest.approx(parts[other] - parts[row], abs=1e-5)
    if predictions[other] == labels[row] != predictions[row] and classes is None:
      assert after - before > 1e-4  # ten times the tolerance


# --- standard errors -------------------------------------------------------------------------


def two_classifiers(rng, labels, num_classes, num_seeds=1):
  """Predictions [S, T] twice, of one accuracy each per class, that often agree."""
  rates = rng.uniform(0.4, 0.9, (2, num_classes))
  luck = rng.random((num_seeds, len(labels)))
  wrong = (labels + rng.integers(1, num_classes, len(labels))) % num_classes
  return [np.where(luck < rate[labels], labels, wrong) for rate in rates]


def bootstrap_error(ours, theirs, labels, criterion, num_classes, classes=None, draws=2000):
  """Deviation of the gain over samples drawn anew within classes; whole scores, no expansion."""
  rng = np.random.default_rng(0)
  members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
  rows = np.concatenate([rng.choice(m, (draws, len(m))) for m in members], axis=1)
  own = labels[rows[0]]  # the classes keep their places
  scores = [criteria.score(p[rows], own, criterion, num_classes, classes) for p in (ours, theirs)]
  return (scores[0] - scores[1]).std()


def estimated_error(ours, theirs, labels, criterion, num_classes, classes=None):
  found = criteria.over_seeds_and_examples(
    ours[None], theirs[None], labels, criterion, num_classes, classes
  )
  low, high = found["interval"]
  return (high - low) / 2 / scipy.stats.norm.ppf(0.975)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("classes", [None, (0, 2)])
def test_the_error_is_that_of_a_bootstrap_if_classes_are_large(criterion, classes):
  labels = np.repeat(np.arange(3), [150, 900, 150])
  ours, theirs = (p[0] for p in two_classifiers(np.random.default_rng(5), labels, 3))
  expected = bootstrap_error(ours, theirs, labels, criterion, 3, classes)
  found = estimated_error(ours, theirs, labels, criterion, 3, classes)
  assert found == pytest.approx(expected, rel=0.06)


@given(seeds)
def test_the_error_is_that_of_a_stratified_mean_with_moderated_variances(seed):
  rng, counts = np.random.default_rng(seed), np.array([30, 9, 2, 1])
  labels = np.repeat(np.arange(4), counts)
  d = rng.normal(size=counts.sum()) * (1 + labels)
  weights = criteria.example_weights(labels, "balanced_accuracy")
  found, freedom = criteria.stratified_error(d * weights, weights, labels)
  own = np.array([d[labels == c].var(ddof=1) if counts[c] > 1 else 0 for c in range(4)])
  pooled = own[:3].mean()  # a single example has no variance of its own
  moderated = ((counts - 1) * own + 4 * pooled) / (counts - 1 + 4)
  parts = moderated / counts / 16
  assert found == pytest.approx(np.sqrt(parts.sum()))
  assert freedom == pytest.approx(parts.sum() ** 2 / (parts**2 / (counts - 1 + 4)).sum())


@pytest.mark.parametrize("size", [1, 2])
def test_a_tiny_class_without_differences_is_not_taken_to_be_certain(size):
  labels = np.repeat([0, 1], [200, size])
  d = np.where(labels == 0, np.random.default_rng(0).normal(size=200 + size), 0.0)
  weights = criteria.example_weights(labels, "balanced_accuracy")
  found, freedom = criteria.stratified_error(d * weights, weights, labels)
  alone = d[:200].std(ddof=1) / np.sqrt(200) / 2  # if the tiny class were certain
  assert found > 3 * alone
  assert freedom < 10  # it rests on a handful of examples, and says so


def test_classes_of_one_example_each_have_an_error_too():
  labels, d = np.arange(6), np.array([1, -1, 0, 1, 0, 0.0])
  weights = criteria.example_weights(labels, "balanced_accuracy")
  found, freedom = criteria.stratified_error(d * weights, weights, labels)
  assert found == pytest.approx(np.sqrt(0.5 / 6)) and freedom > 0


def test_no_differences_have_no_error():
  labels = np.array([0, 0, 1])
  found, freedom = criteria.stratified_error(np.zeros(3), np.full(3, 1 / 3), labels)
  assert found == 0 and freedom > 0


# --- intervals -------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1, 4.5, 30, 1e6])
@pytest.mark.parametrize("comparisons", [1, 8])
def test_the_interval_is_that_of_student_for_so_many_comparisons(freedom, comparisons):
  low, high = Estimate(0.3, 0.02, freedom).interval(comparisons)
  expected = scipy.stats.t(freedom, 0.3, 0.02).interval(1 - 0.05 / comparisons)
  np.testing.assert_allclose([low, high], expected)


def test_the_interval_widens_with_fewer_degrees_of_freedom_and_more_comparisons():
  def width(freedom, comparisons=1):
    low, high = Estimate(0, 1, freedom).interval(comparisons)
    return high - low

  assert width(2) > width(5) > width(100) > 2 * 1.95
  assert width(50, 9) > width(50, 2) > width(50)


def test_without_an_error_the_interval_is_a_point():
  assert Estimate(0.1, 0.0, 3.0).interval() == [0.1, 0.1]


# --- over seeds and examples -----------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("num_seeds", [1, 3])
def test_equal_predictions_differ_by_nothing_for_certain(criterion, num_seeds):
  predictions, labels = sample(0, leading=(num_seeds,))
  found = criteria.over_seeds_and_examples(predictions, predictions, labels, criterion, 5)
  assert found["mean"] == found["std"] == 0 and found["interval"] == [0, 0]
  assert found["ours"] == found["theirs"] > 0


@pytest.mark.parametrize("criterion", CRITERIA)
@given(seeds)
def test_the_gain_is_that_of_the_scores_and_paired_by_seed(criterion, seed):
  both, labels = sample(seed, leading=(2, 4), absent=(3,))
  found = criteria.over_seeds_and_examples(*both, labels, criterion, 5)
  ours, theirs = ([by_scikit_learn(criterion, p, labels) for p in ps] for ps in both)
  gains = np.subtract(ours, theirs)
  assert found["mean"] == pytest.approx(gains.mean())
  assert found["std"] == pytest.approx(gains.std(ddof=1))
  assert found["ours"] == pytest.approx(np.mean(ours))
  assert found["theirs"] == pytest.approx(np.mean(theirs))
  assert sum(found["interval"]) / 2 == pytest.approx(gains.mean())
  turned = criteria.over_seeds_and_examples(*both[::-1], labels, criterion, 5)
  np.testing.assert_allclose(turned["interval"], -np.array(found["interval"])[::-1], atol=1e-12)


def test_seeds_that_agree_do_not_make_a_small_test_set_certain():
  labels = np.repeat([0, 1], [12, 4])
  theirs = np.where(np.arange(16) % 4, labels, 1 - labels)
  ours = np.where(np.arange(16) == 0, labels, theirs)  # one more is right
  found = criteria.over_seeds_and_examples(
    np.tile(ours, (5, 1)), np.tile(theirs, (5, 1)), labels, "balanced_accuracy", 2
  )
  assert found["std"] == 0 < found["mean"]
  assert found["interval"][0] < 0 < found["interval"][1]


def test_seeds_that_disagree_do_not_become_certain_by_many_test_examples():
  rng, labels = np.random.default_rng(0), np.arange(20000) % 2
  theirs = np.where(rng.random((3, 20000)) < 0.7, labels, 1 - labels)
  ours = np.where(rng.random((3, 20000)) < np.array([[0.6], [0.7], [0.9]]), labels, 1 - labels)
  found = criteria.over_seeds_and_examples(ours, theirs, labels, "accuracy", 2)
  expected = scipy.stats.ttest_1samp((ours == labels).mean(1) - (theirs == labels).mean(1), 0)
  np.testing.assert_allclose(found["interval"], expected.confidence_interval(), atol=2e-3)
  assert found["interval"][0] < 0


@pytest.mark.parametrize("classes", [(0,), (1, 2)])
def test_a_group_is_compared_on_its_own_examples(classes):
  predictions, labels = sample(3, leading=(2, 3), size=80)
  inside = np.isin(labels, classes)
  group = criteria.over_seeds_and_examples(*predictions, labels, "balanced_accuracy", 5, classes)
  alone = criteria.over_seeds_and_examples(
    *predictions[..., inside], labels[inside], "balanced_accuracy", 5
  )
  np.testing.assert_allclose(group.pop("interval"), alone.pop("interval"))
  assert group == pytest.approx(alone)


@pytest.mark.parametrize("criterion", ["balanced_accuracy", "accuracy"])
@pytest.mark.parametrize("counts", [(60, 60, 60), (80, 25, 6)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(criterion, counts):
  """Seeds have accuracies of their own around the truth, and share the test examples."""
  rng, labels = np.random.default_rng(1), np.repeat(np.arange(3), counts)
  rates = np.array([[0.8, 0.65, 0.5], [0.7, 0.6, 0.45]])
  weights = np.array(counts) / sum(counts) if criterion == "accuracy" else np.full(3, 1 / 3)
  truth, inside = weights @ (rates[0] - rates[1]), 0
  for _ in range(300):
    hard = rng.normal(size=len(labels))
    hits = [
      scipy.stats.norm.ppf(rate)[labels] + rng.normal(0, 0.1, (5, 1))
      > 0.8 * hard + 0.6 * rng.normal(size=(5, len(labels)))
      for rate in rates
    ]
    both = [np.where(h, labels, (labels + 1) % 3) for h in hits]
    low, high = criteria.over_seeds_and_examples(*both, labels, criterion, 3)["interval"]
    inside += low <= truth <= high
  assert 0.92 < inside / 300 <= 0.995


# --- share of the room -----------------------------------------------------------------------


def with_hits(number, size=400, classes=4):
  """Predictions [S, T] that are right on the first `number` [S] examples of each class."""
  labels, place = np.arange(size) % classes, np.arange(size) // classes
  hits = place < np.array(number)[:, None]
  return np.where(hits, labels, (labels + 1) % classes), labels


def shared(ours, control, reference, labels, criterion="balanced_accuracy"):
  (found,) = criteria.shares_of_room([ours], control, reference, labels, criterion, 4)
  return found


def test_the_share_is_a_ratio_of_means_and_no_mean_of_ratios():
  """One seed has next to no room; a mean over the seeds' own ratios would be -167 %."""
  control, labels = with_hits([50, 50, 50])
  ours, _ = with_hits([60, 60, 44])
  reference, _ = with_hits([70, 70, 51])
  found = shared(ours, control, reference, labels)
  assert np.mean([10 / 20, 10 / 20, -6 / 1]) == pytest.approx(-5 / 3)
  assert found["mean"] == pytest.approx(14 / 41)
  assert abs(found["mean"]) < 1 and found["interval"][0] <= 14 / 41 <= found["interval"][1]


def test_every_classifier_has_the_share_that_it_has_alone():
  (control, labels), (reference, _) = with_hits([40, 45]), with_hits([80, 70])
  ours = [with_hits(hits)[0] for hits in ([50, 60], [30, 45])]
  found = criteria.shares_of_room(ours, control, reference, labels, "balanced_accuracy", 4)
  for share, predictions in zip(found, ours, strict=True):
    alone = shared(predictions, control, reference, labels)
    assert share["mean"] == pytest.approx(alone["mean"])
    assert share["interval"] == pytest.approx(alone["interval"])
  assert found[0]["mean"] > 0 > found[1]["mean"]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_control_fills_nothing_and_reference_everything(criterion):
  rng = np.random.default_rng(0)
  control, labels = with_hits([40, 45])
  reference, _ = with_hits([80, 70])
  control = np.where(rng.random(control.shape) < 0.1, rng.integers(0, 4, control.shape), control)
  none = shared(control, control, reference, labels, criterion)
  assert none["mean"] == 0 and none["interval"] == [0, 0]
  all_of_it = shared(reference, control, reference, labels, criterion)
  assert all_of_it["mean"] == pytest.approx(1)
  np.testing.assert_allclose(all_of_it["interval"], 1)


@pytest.mark.parametrize("criterion", CRITERIA)
@settings(max_examples=5)
@given(seeds)
def test_the_interval_surrounds_the_share(criterion, seed):
  rng = np.random.default_rng(seed)
  labels = np.repeat(np.arange(4), [100, 60, 30, 10])
  luck, wrong = rng.random((3, 200)), (labels + rng.integers(1, 4, 200)) % 4
  ours, control, reference = (np.where(luck < r, labels, wrong) for r in (0.6, 0.4, 0.9))
  found = shared(ours, control, reference, labels, criterion)
  scores = [criteria.score(p, labels, criterion, 4).mean() for p in (ours, control, reference)]
  assert found["mean"] == pytest.approx((scores[0] - scores[1]) / (scores[2] - scores[1]))
  assert found["interval"][0] < found["mean"] < found["interval"][1]


def test_the_share_is_the_same_every_time():
  control, labels = with_hits([40, 45])
  both = with_hits([60, 50])[0], control, with_hits([80, 70])[0]
  assert shared(*both, labels) == shared(*both, labels)


def test_the_share_is_paired():
  """A method that always takes half of the room does so whatever the examples and seeds."""
  control, labels = with_hits([20, 50, 60])
  reference, _ = with_hits([60, 90, 100])
  place = np.arange(400) // 4
  half = np.where(place % 2 == 0, reference, control)
  paired = shared(half, control, reference, labels)
  shuffled = np.concatenate([half[:, labels == c][:, ::-1] for c in range(4)], axis=1)
  elsewhere = np.empty_like(half)
  for c in range(4):
    elsewhere[:, labels == c] = shuffled[:, c * 100 : (c + 1) * 100]
  other = shared(elsewhere, control, reference, labels)
  widths = [found["interval"][1] - found["interval"][0] for found in (paired, other)]
  assert paired["mean"] == pytest.approx(other["mean"]) == pytest.approx(0.5)
  assert widths[0] < 0.6 * widths[1]


def test_the_interval_of_the_share_covers_about_as_often_as_it_says():
  rng, labels, inside = np.random.default_rng(2), np.repeat(np.arange(4), [60, 40, 30, 20]), 0
  for _ in range(100):
    luck = rng.random((4, len(labels)))
    ours, control, reference = (
      np.where(luck < rate + rng.normal(0, 0.01, (4, 1)), labels, (labels + 1) % 4)
      for rate in (0.65, 0.5, 0.9)
    )
    low, high = shared(ours, control, reference, labels)["interval"]
    inside += low <= 0.15 / 0.4 <= high
  assert 0.88 < inside / 100 <= 1
