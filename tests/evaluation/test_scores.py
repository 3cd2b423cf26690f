"""Accuracy, F1, groups and their summary against brute force."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from memdiff.evaluation import scores
from memdiff.evaluation.scores import make_groups, mean_std, per_class_scores, score_method


def names_and_classes(counts):
  return {group.name: group.classes for group in make_groups(np.array(counts))}


def test_groups_follow_the_thresholds_of_the_field():
  assert names_and_classes([500, 101, 100, 50, 20, 19, 1]) == {
    "many": (0, 1), "medium": (2, 3, 4), "few": (5, 6)
  }  # fmt: skip
  assert "more than 100" in make_groups(np.array([500, 50, 5]))[0].rule


@pytest.mark.parametrize(
  ("counts", "expected"),
  [
    ([90, 50, 10, 5, 2, 1], {"many": (0, 1), "medium": (2, 3), "few": (4, 5)}),  # nobody is many
    ([500, 400, 300], {"many": (0,), "medium": (1,), "few": (2,)}),
    ([500, 5, 4], {"many": (0,), "medium": (1,), "few": (2,)}),  # nobody is medium
    ([5, 500, 7, 300, 5, 5], {"many": (1, 3), "medium": (0, 2), "few": (4, 5)}),  # ties by index
    ([50] * 7, {"many": (0, 1, 2), "medium": (3, 4), "few": (5, 6)}),
  ],
)
def test_thirds_where_a_group_would_be_empty(counts, expected):
  assert names_and_classes(counts) == expected
  assert all("third" in group.rule for group in make_groups(np.array(counts)))


@pytest.mark.parametrize(
  ("counts", "many", "few"),
  [([40, 4], 0, 1), ([4, 40], 1, 0), ([500, 150], 0, 1), ([3, 2], 0, 1), ([7, 7], 0, 1)],
)
def test_of_two_classes_the_smaller_one_is_few(counts, many, few):
  assert names_and_classes(counts) == {"many": (many,), "medium": (), "few": (few,)}
  rules = [group.rule for group in make_groups(np.array(counts))]
  assert rules == ["the larger class", "no class", "the smaller class"]


@given(st.lists(st.integers(1, 300), min_size=3, max_size=30))
def test_every_class_is_in_one_group_and_groups_are_ordered(counts):
  groups = names_and_classes(counts)
  assert sorted(sum(groups.values(), ())) == list(range(len(counts)))
  assert list(groups) == ["many", "medium", "few"] and all(groups.values())
  by_size = [[counts[c] for c in classes] for classes in groups.values()]
  assert min(by_size[0]) >= max(by_size[1]) and min(by_size[1]) >= max(by_size[2])


@given(st.integers(0, 2**31), st.integers(2, 6))
def test_scores_per_class_equal_those_of_scikit_learn(seed, num_classes):
  rng = np.random.default_rng(seed)
  labels = np.concatenate([np.arange(num_classes), rng.integers(0, num_classes, 20)])
  predictions = rng.integers(0, num_classes, len(labels))
  accuracy, f1 = per_class_scores(predictions, labels, num_classes)
  every = list(range(num_classes))
  recall = metrics.recall_score(labels, predictions, labels=every, average=None)
  expected = metrics.f1_score(labels, predictions, labels=every, average=None, zero_division=0)
  np.testing.assert_allclose(accuracy, recall)
  np.testing.assert_allclose(f1, expected)


def test_classes_without_test_images_have_no_scores():
  accuracy, f1 = per_class_scores(np.array([0, 2]), np.array([0, 0]), 4)
  np.testing.assert_array_equal(accuracy, [0.5, np.nan, np.nan, np.nan])
  # Class 2 was predicted once, but nothing of it was there to be found.
  np.testing.assert_allclose(f1, [2 / 3, np.nan, np.nan, np.nan])


def test_mean_and_sample_deviation_over_seeds():
  summary = mean_std(np.array([[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]]))
  assert summary == {"mean": [3.0, 2.0], "std": [2.0, 0.0]}
  assert mean_std(np.array([0.25])) == {"mean": 0.25, "std": 0.0}


def test_numbers_are_plain_enough_for_json():
  value = scores.plain(np.array([[1.0, np.nan], [np.inf, 2.0]]))
  assert value == [[1.0, None], [None, 2.0]]
  assert json.dumps(scores.plain([np.float32(0.5), (1, 2)]), allow_nan=False)


def test_a_row_of_the_table_by_hand():
  labels = np.array([0, 0, 1, 1, 2, 3])
  predictions = np.array([[0, 0, 1, 0, 2, 0], [0, 1, 1, 1, 0, 3]])
  groups = make_groups(np.array([200, 50, 10, 5]))
  row = score_method("m", "words", predictions, labels, groups, (3, 7), 4)
  assert (row["method"], row["description"], row["seeds"]) == ("m", "words", [3, 7])
  assert row["top1"] == {"mean": pytest.approx(4 / 6), "std": pytest.approx(0, abs=1e-12)}
  assert row["many"]["mean"] == pytest.approx((1 + 0.5) / 2)
  assert row["medium"]["mean"] == pytest.approx((0.5 + 1) / 2)
  assert row["few"]["mean"] == pytest.approx((0.5 + 0.5) / 2)
  first = [2 * 2 / (2 + 4), 2 * 1 / (2 + 1), 1.0, 0.0]
  second = [2 * 1 / (2 + 2), 2 * 2 / (2 + 3), 0.0, 1.0]
  assert row["macro_f1"]["mean"] == pytest.approx(np.mean([first, second]))
  np.testing.assert_allclose(row["per_class_f1"]["mean"], np.mean([first, second], axis=0))
  np.testing.assert_allclose(row["per_class_top1"]["mean"], [0.75, 0.75, 0.5, 0.5])
  np.testing.assert_allclose(row["per_class_top1"]["std"][2], np.sqrt(0.5))


def row_of(predictions, labels, counts):
  num_classes, seeds = len(counts), range(len(predictions))
  groups = make_groups(np.array(counts))
  return score_method("m", "", np.array(predictions), np.array(labels), groups, seeds, num_classes)


def test_two_classes_give_a_row_without_warnings():
  row = row_of([[0, 1, 1], [0, 0, 1]], [0, 1, 1], [40, 4])
  assert row["top1"]["mean"] == pytest.approx(5 / 6)
  assert row["balanced_accuracy"]["mean"] == pytest.approx(7 / 8)
  assert row["many"]["mean"] == 1 and row["few"]["mean"] == pytest.approx(0.75)
  assert row["medium"] == {"mean": None, "std": None}
  json.dumps(row, allow_nan=False)


@given(st.integers(0, 2**31), st.sets(st.integers(0, 5), min_size=1, max_size=5))
def test_means_over_classes_leave_out_those_without_test_examples(seed, absent):
  rng, present = np.random.default_rng(seed), np.setdiff1d(np.arange(6), list(absent))
  labels = np.concatenate([present, rng.choice(present, 20)])
  predictions = rng.integers(0, 6, (2, len(labels)))
  row = row_of(predictions, labels, [200, 120, 50, 30, 10, 5])
  recall, f1 = (
    np.mean([f(labels, p, labels=present, average=None, zero_division=0) for p in predictions], 0)
    for f in (metrics.recall_score, metrics.f1_score)
  )
  assert row["balanced_accuracy"]["mean"] == pytest.approx(recall.mean())
  assert row["macro_f1"]["mean"] == pytest.approx(f1.mean())
  for key in ("per_class_top1", "per_class_f1"):
    assert {c for c in range(6) if row[key]["mean"][c] is None} == absent
    assert {c for c in range(6) if row[key]["std"][c] is None} == absent
  for name, classes in (("many", (0, 1)), ("medium", (2, 3)), ("few", (4, 5))):
    scored = np.isin(present, classes)
    expected = pytest.approx(recall[scored].mean()) if scored.any() else None
    assert row[name]["mean"] == expected
  json.dumps(row, allow_nan=False)


def test_perfect_predictions_score_one_if_classes_are_untested():
  row = row_of([[0, 0, 3]], [0, 0, 3], [200, 50, 30, 5])
  assert {row[key]["mean"] for key in ("top1", "balanced_accuracy", "macro_f1")} == {1}


def test_on_an_imbalanced_test_set_accuracies_may_order_methods_differently():
  labels = np.repeat([0, 1, 2], [90, 8, 2])
  common = np.zeros((1, 100), int)
  fair = np.where(np.arange(100) < 20, 1, labels)[None]
  rows = [row_of(p, labels, [900, 80, 20]) for p in (common, fair)]
  accuracy, balanced = ([row[key]["mean"] for row in rows] for key in ("top1", "balanced_accuracy"))
  assert accuracy == pytest.approx([0.9, 0.8])
  assert balanced == pytest.approx([1 / 3, (70 / 90 + 2) / 3])
