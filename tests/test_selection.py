"""Cross-validation and the recommendation: folds, scores, honest choices, intervals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdiff import selection
from memdiff.selection import Judged, SelectionConfig

LABELS = np.array([0] * 13 + [1] * 6 + [2] * 2 + [3])


@given(st.lists(st.integers(1, 12), min_size=2, max_size=8), st.integers(2, 6), st.integers(0, 99))
def test_every_class_is_spread_as_evenly_as_can_be(counts, num_folds, seed):
  labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
  fold = selection.deal(labels, num_folds, seed)
  for label, count in enumerate(counts):
    own = fold[labels == label]
    if count == 1:
      assert own.tolist() == [-1]  # the only member always trains
      continue
    held = np.bincount(own, minlength=num_folds)
    assert held.sum() == count and held.max() - held.min() <= 1
    assert held.max() < count  # some member is left to train on
  sizes = np.bincount(fold[fold >= 0], minlength=num_folds)
  assert sizes.max() - sizes.min() <= 1


def test_runs_are_the_folds_of_all_repeats():
  config = SelectionConfig(folds=3, repeats=2, encoder="frozen")
  train, held_out = selection.fold_rows(LABELS, config)
  assert len(train) == len(held_out) == config.num_runs == 6
  for repeat in range(2):
    runs = range(3 * repeat, 3 * repeat + 3)
    held = np.concatenate([row[row >= 0] for row in held_out[runs]])
    assert sorted(held) == list(range(len(LABELS) - 1))  # each once, but the only one of class 3
    for r in runs:
      own = train[r][train[r] >= 0]
      assert sorted([*own, *held_out[r][held_out[r] >= 0]]) == list(range(len(LABELS)))
  assert not np.array_equal(held_out[:3], held_out[3:])


def test_a_single_fold_is_refused():
  with pytest.raises(ValueError, match="folds is 1"):
    SelectionConfig(folds=1, repeats=1, encoder="frozen")


def judged(repeats=1):
  config = SelectionConfig(folds=3, repeats=repeats, encoder="frozen")
  _, held_out = selection.fold_rows(LABELS, config)
  return selection.judged_examples(held_out, LABELS, 3)


@given(st.integers(0, 2**20))
def test_the_score_is_a_mean_over_classes(seed):
  hits, label = np.random.default_rng(seed).random((4, 30)), np.arange(30) ** 2 % 7
  expected = [np.mean([row[label == c].mean() for c in np.unique(label)]) for row in hits]
  np.testing.assert_allclose(selection.score(hits, label), expected)


def test_the_first_of_equally_good_settings_is_chosen():
  hits = np.array([[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0.0]])
  assert selection.choose(hits, np.zeros(4, int)) == 0
  assert selection.choose(hits, np.array([0, 1, 1, 1])) == 1


def test_choosing_for_a_fold_does_not_look_at_it():
  folds = judged()
  rng = np.random.default_rng(0)
  hits = (rng.random((40, len(folds.label))) < 0.5).astype(float)  # settings that are all alike
  best = selection.score(hits, folds.label).max()
  fitted = selection.score(selection.cross_fitted(hits, folds), folds.label)
  assert fitted < best - 0.05  # the best of forty looks better than it is
  for fold in range(3):
    inside = folds.fold == fold
    chosen = selection.choose(hits[:, ~inside], folds.label[~inside])
    np.testing.assert_array_equal(selection.cross_fitted(hits, folds)[inside], hits[chosen, inside])


def test_a_setting_that_is_always_best_is_always_chosen():
  folds = judged(repeats=2)
  hits = np.stack([np.zeros(len(folds.label)), np.ones(len(folds.label))])
  assert selection.cross_fitted(hits, folds).all()


def test_the_standard_error_is_that_of_a_stratified_mean():
  rng = np.random.default_rng(1)
  label = np.repeat([0, 1, 2], [40, 10, 5])
  folds = Judged(label=label, example=np.arange(55), fold=np.arange(55) % 5)
  hits, control = rng.random(55), rng.random(55)
  gain = selection.paired_gain(hits, control, folds)
  d = hits - control
  variance = sum(d[label == c].var(ddof=1) / (label == c).sum() for c in range(3)) / 9
  assert gain["mean"] == pytest.approx(np.mean([d[label == c].mean() for c in range(3)]))
  assert gain["standard_error"] == pytest.approx(np.sqrt(variance))
  low, high = gain["interval"]
  assert high - low == pytest.approx(2 * 1.959964 * np.sqrt(variance))


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
  rng, label = np.random.default_rng(2), np.repeat(np.arange(8), [60, 40, 20, 10, 8, 6, 5, 4])
  folds = Judged(label=label, example=np.arange(len(label)), fold=np.zeros(len(label), int))
  rate, inside = np.linspace(0.1, 0.4, 8), 0
  for _ in range(400):
    hits = (rng.random(len(label)) < 0.3 + rate[label]).astype(float)
    control = (rng.random(len(label)) < 0.3).astype(float)
    low, high = selection.paired_gain(hits, control, folds)["interval"]
    inside += low <= rate.mean() <= high
  assert 0.9 < inside / 400 < 0.99


def test_repeats_of_an_example_count_as_one():
  rng = np.random.default_rng(3)
  label, d = np.repeat([0, 1], [9, 5]), rng.random(14)
  once = Judged(label=label, example=np.arange(14), fold=np.arange(14) % 3)
  twice = Judged(
    label=np.tile(label, 2), example=np.tile(np.arange(14), 2), fold=np.tile(once.fold, 2)
  )
  zeros = np.zeros(14)
  one = selection.paired_gain(d, zeros, once)
  two = selection.paired_gain(np.tile(d, 2), np.tile(zeros, 2), twice)
  assert two["mean"] == pytest.approx(one["mean"])
  assert two["standard_error"] == pytest.approx(one["standard_error"])


def hits_with(rate, label, seed):
  return (np.random.default_rng(seed).random(len(label)) < rate).astype(float)


def test_a_clear_gain_is_recommended_and_a_doubtful_one_is_not():
  label = np.repeat(np.arange(5), 80)
  folds = Judged(label=label, example=np.arange(400), fold=np.arange(400) % 5)
  hits = {
    "real": hits_with(0.5, label, 0),
    "real+adjusted": hits_with(0.55, label, 1),
    "memdiff": hits_with(0.8, label, 2),
  }
  found = selection.recommend(hits, folds, ["real", "real+adjusted"])
  assert found["method"] == found["best"] == "memdiff" and found["control"] == "real+adjusted"
  assert found["interval"][0] > 0 and found["expected_gain"] == pytest.approx(
    found["scores"]["memdiff"]["score"] - found["scores"]["real+adjusted"]["score"]
  )
  hits["memdiff"] = np.where(np.arange(400) < 3, 1.0, hits["real+adjusted"])
  found = selection.recommend(hits, folds, ["real", "real+adjusted"])
  assert found["method"] == "real+adjusted"


def test_agreement_of_two_rankings():
  same = selection.rank_agreement([1, 2, 3], [0.1, 0.2, 0.3])
  assert same == {"kendall_tau": 1.0, "pairs": 1.0, "regret": 0.0}
  turned = selection.rank_agreement([3, 2, 1], [0.1, 0.2, 0.3])
  assert turned["kendall_tau"] == -1.0 and turned["regret"] == pytest.approx(0.2)
  assert selection.rank_agreement([1, 1], [0.1, 0.2])["pairs"] == 0.5
