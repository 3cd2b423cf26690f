"""Accuracy, F1, groups and their summary against brute force."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from memdiff.evaluation import classification
from memdiff.evaluation.classification import make_groups, mean_std, per_class_scores, score_method


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


def test_classes_without_test_images_have_no_accuracy():
  accuracy, f1 = per_class_scores(np.array([0, 2]), np.array([0, 0]), 4)
  np.testing.assert_array_equal(accuracy, [0.5, np.nan, np.nan, np.nan])
  np.testing.assert_allclose(f1, [2 / 3, 0, 0, 0])


def test_mean_and_sample_deviation_over_seeds():
  summary = mean_std(np.array([[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]]))
  assert summary == {"mean": [3.0, 2.0], "std": [2.0, 0.0]}
  assert mean_std(np.array([0.25])) == {"mean": 0.25, "std": 0.0}


def test_numbers_are_plain_enough_for_json():
  value = classification.plain(np.array([[1.0, np.nan], [np.inf, 2.0]]))
  assert value == [[1.0, None], [None, 2.0]]
  assert json.dumps(classification.plain([np.float32(0.5), (1, 2)]), allow_nan=False)


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


def test_two_classes_give_a_row_without_warnings():
  groups = make_groups(np.array([40, 4]))
  predictions = np.array([[0, 1, 1], [0, 0, 1]])
  row = score_method("m", "", predictions, np.array([0, 1, 1]), groups, (0, 1), 2)
  assert row["top1"]["mean"] == pytest.approx(5 / 6)
  json.dumps(row, allow_nan=False)
