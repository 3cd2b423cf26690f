"""Cross-validation and the recommendation: folds, scores, honest choices, intervals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from memdiff.evaluation import criteria, cross_validation
from memdiff.evaluation.cross_validation import Judged, SelectionConfig

LABELS = np.array([0] * 13 + [1] * 6 + [2] * 2 + [3])


@given(st.lists(st.integers(1, 12), min_size=2, max_size=8), st.integers(2, 6), st.integers(0, 99))
def test_every_class_is_spread_as_evenly_as_can_be(counts, num_folds, seed):
  labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
  fold = cross_validation.deal(labels, num_folds, seed)
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


def config(folds=3, repeats=1, criterion="balanced_accuracy"):
  return SelectionConfig(folds, repeats, encoder="frozen", criterion=criterion)


def test_runs_are_the_folds_of_all_repeats():
  train, held_out = cross_validation.fold_rows(LABELS, config(repeats=2))
  assert len(train) == len(held_out) == config(repeats=2).num_runs == 6
  for repeat in range(2):
    runs = range(3 * repeat, 3 * repeat + 3)
    held = np.concatenate([row[row >= 0] for row in held_out[runs]])
    assert sorted(held) == list(range(len(LABELS) - 1))  # each once, but the only one of class 3
    for r in runs:
      own = train[r][train[r] >= 0]
      assert sorted([*own, *held_out[r][held_out[r] >= 0]]) == list(range(len(LABELS)))
  assert not np.array_equal(held_out[:3], held_out[3:])


@given(st.lists(st.integers(1, 12), min_size=2, max_size=6), st.integers(2, 5))
def test_training_rows_have_the_shape_of_the_whole_set(counts, folds):
  labels = np.repeat(np.arange(len(counts)), [2, *counts[1:]])
  train, held_out = cross_validation.fold_rows(labels, config(folds))
  assert train.shape == (folds, len(labels))
  assert held_out.shape == (folds, (held_out >= 0).sum(axis=1).max())
  padding = np.arange(len(labels)) >= (train >= 0).sum(axis=1)[:, None]
  np.testing.assert_array_equal(train == -1, padding)  # behind the rows


def test_a_single_fold_is_refused():
  with pytest.raises(ValueError, match="folds is 1"):
    config(folds=1)


def judged(repeats=1, criterion="balanced_accuracy"):
  _, held_out = cross_validation.fold_rows(LABELS, config(repeats=repeats))
  return cross_validation.judged_examples(held_out, LABELS, criterion, 4)


def all_at_once(label, criterion="balanced_accuracy"):
  """Every example held out once."""
  example = np.arange(len(label))
  return Judged(label, example, example % 5, criterion, label.max() + 1)


def predict(hits, label, num_classes=None):
  """Predictions that are right on the hits, else of the next class."""
  return np.where(hits, label, (label + 1) % (num_classes or label.max() + 1))


def test_every_held_out_example_is_judged_with_its_run():
  folds = judged(repeats=2)
  assert len(folds.label) == 2 * (len(LABELS) - 1)
  np.testing.assert_array_equal(folds.label, LABELS[folds.example])
  assert sorted(np.unique(folds.run)) == list(range(6))
  for repeat in range(2):
    examples = folds.example[folds.run // 3 == repeat]
    assert sorted(examples) == list(range(len(LABELS) - 1))


# --- choosing a setting ----------------------------------------------------------------------


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
@given(st.integers(0, 2**20))
def test_scores_follow_the_criterion_on_the_rows_asked_for(criterion, seed):
  rng = np.random.default_rng(seed)
  folds = judged(criterion=criterion)
  predictions, some = rng.integers(0, 4, (3, len(folds.label))), rng.random(len(folds.label)) < 0.5
  for rows in (np.ones(len(some), bool), some):
    expected = [criteria.score(p[rows], folds.label[rows], criterion, 4) for p in predictions]
    np.testing.assert_allclose(folds.only(rows).score(predictions[:, rows]), expected)


@pytest.mark.parametrize("repeats", [1, 2])
@given(st.integers(0, 2**20))
def test_the_first_setting_within_one_standard_error_of_the_best_is_chosen(repeats, seed):
  """Of a lead that is the sum of one coin per example: heads for the one, tails for the other."""
  rng, folds = np.random.default_rng(seed), judged(repeats)
  hits = rng.random((5, len(folds.label))) < rng.random((5, 1))
  weights = criteria.example_weights(folds.label, "balanced_accuracy")
  best = int(np.argmax(np.round(hits @ weights, 9)))
  within = []
  for earlier in hits:
    parts = weights * (hits[best].astype(int) - earlier)
    variance = sum(parts[folds.example == x].sum() ** 2 for x in np.unique(folds.example))
    within.append(parts.sum() <= np.sqrt(variance) + 1e-9)
  chosen = cross_validation.choose(predict(hits, folds.label), folds)
  assert chosen == within.index(True) <= best


def test_the_first_of_equally_good_settings_is_chosen():
  folds = judged()
  half, all_right = predict(folds.example % 2 == 0, folds.label), folds.label
  assert cross_validation.choose(np.stack([half, all_right, all_right]), folds) == 1
  assert cross_validation.choose(np.stack([all_right, half, all_right]), folds) == 0


def test_one_rare_example_is_no_evidence():
  label = np.repeat([0, 1], [200, 2])
  folds, first = all_at_once(label), predict(np.arange(202) != 200, label)
  assert folds.score(label) - folds.score(first) == pytest.approx(0.25)
  assert cross_validation.choose(np.stack([first, label]), folds) == 0
  first = predict(label == 0, label)
  assert cross_validation.choose(np.stack([first, label]), folds) == 1  # two for it, none against


def test_choosing_for_a_run_does_not_look_at_it():
  folds = judged()
  rng = np.random.default_rng(0)
  predictions = predict(rng.random((40, len(folds.label))) < 0.5, folds.label)  # all alike
  fitted = cross_validation.cross_fitted(predictions, folds)
  for run in range(3):
    inside = folds.run == run
    chosen = cross_validation.choose(predictions[:, ~inside], folds.only(~inside))
    np.testing.assert_array_equal(fitted[inside], predictions[chosen, inside])


def of_six_examples():
  """Two repeats of two folds; an example is held out under another number the second time."""
  held_out = np.array([[0, 1, 2], [3, 4, 5], [0, 3, 4], [1, 2, 5]])
  return cross_validation.judged_examples(held_out, np.array([0, 0, 0, 0, 0, 1]), "accuracy", 2)


def test_an_example_has_no_part_in_the_choice_for_it_in_any_repeat():
  folds = of_six_examples()
  hits = np.stack([np.isin(folds.example, (0, 1, 2)), np.isin(folds.example, (3, 4, 5))])
  predictions = predict(hits, folds.label)
  fitted = cross_validation.cross_fitted(predictions, folds)
  # Run 0 holds out 0, 1 and 2; of the others, only the second setting has one right. The second
  # repeat holds 1 and 2 out elsewhere, and would vote for the first.
  np.testing.assert_array_equal(fitted[folds.run == 0], predictions[1, folds.run == 0])
  for leak in (folds.run % 2 == 1, folds.run != 0):
    assert cross_validation.choose(predictions[:, leak], folds.only(leak)) == 0
  np.testing.assert_array_equal(fitted[folds.run == 1], predictions[0, folds.run == 1])


@given(st.integers(0, 2**20), st.integers(0, 5))
def test_whatever_is_predicted_for_held_out_examples_the_choice_for_them_stays(seed, run):
  folds, rng = judged(repeats=2), np.random.default_rng(seed)
  predictions = rng.integers(0, 4, (3, len(folds.label)))
  inside = folds.run == run
  theirs = np.isin(folds.example, folds.example[inside])
  marked = []
  for favourite in range(3):
    given = predictions.copy()
    given[:, theirs] = 3  # of which no example is
    given[favourite, theirs] = folds.label[theirs]
    chosen_favourite = cross_validation.cross_fitted(given, folds)[inside] == folds.label[inside]
    assert chosen_favourite.all() or not chosen_favourite.any()
    marked.append(chosen_favourite.all())
  assert sum(marked) == 1  # the same setting all three times


def test_chance_is_not_taken_for_skill_however_many_repeats_there_are():
  """Settings that know nothing, but predict the same for an example in every repeat."""
  labels, rng, gains = np.arange(40) % 2, np.random.default_rng(0), []
  _, held_out = cross_validation.fold_rows(labels, config(4, repeats=5))
  folds = cross_validation.judged_examples(held_out, labels, "accuracy", 2)
  for _ in range(20):
    predictions = rng.integers(0, 2, (30, 40))[:, folds.example]
    gains.append(folds.score(cross_validation.cross_fitted(predictions, folds)) - 0.5)
  assert np.mean(gains) < 0.03  # a leak makes it 0.1


def test_a_setting_that_is_always_best_is_always_chosen():
  folds = judged(repeats=2)
  predictions = predict(np.array([[False], [True]]), folds.label)
  np.testing.assert_array_equal(cross_validation.cross_fitted(predictions, folds), folds.label)


def test_the_criterion_decides_between_settings():
  label = np.repeat([0, 1], [40, 10])
  common, rare = predict(label == 0, label), predict((label == 1) | (np.arange(50) < 25), label)
  for criterion, best in (("accuracy", common), ("balanced_accuracy", rare)):
    folds = all_at_once(label, criterion)
    fitted = cross_validation.cross_fitted(np.stack([common, rare]), folds)
    np.testing.assert_array_equal(fitted, best)


# --- gains -----------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_error_is_that_of_drawing_examples_anew_within_classes(criterion, repeats):
  """The repeats of an example are drawn together."""
  rng, labels = np.random.default_rng(1), np.repeat([0, 1, 2], [200, 120, 60])
  size = len(labels)
  label, example = np.tile(labels, repeats), np.tile(np.arange(size), repeats)
  folds = Judged(label, example, np.repeat(np.arange(repeats), size), criterion, 3)
  luck, shift = rng.random((2, size)), rng.integers(1, 3, size)
  hits = np.concatenate(
    [luck + rng.normal(0, 0.1, (2, size)) < [[0.7], [0.55]] for _ in range(repeats)], axis=1
  )
  both = np.where(hits, label, (label + np.tile(shift, repeats)) % 3)
  found = cross_validation.paired_gain(*both, folds)
  assert found.mean == pytest.approx(np.subtract(*folds.score(both)))
  members = [np.flatnonzero(labels == c) for c in range(3)]
  drawn = []
  for _ in range(1500):
    rows = np.concatenate([rng.choice(m, len(m)) for m in members])
    rows = (rows + size * np.arange(repeats)[:, None]).ravel()
    drawn.append(np.subtract(*criteria.score(both[:, rows], label, criterion, 3)))
  assert found.error == pytest.approx(np.std(drawn), rel=0.1)


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
def test_repeats_of_an_example_count_as_one(criterion):
  rng, label = np.random.default_rng(3), np.repeat([0, 1], [9, 5])
  once, both = all_at_once(label, criterion), rng.integers(0, 2, (2, 14))
  twice = Judged(
    np.tile(label, 2), np.tile(once.example, 2), np.tile(once.run, 2), criterion, 2
  )  # fmt: skip
  one = cross_validation.paired_gain(*both, once)
  two = cross_validation.paired_gain(*np.tile(both, 2), twice)
  assert two.mean == pytest.approx(one.mean) and two.error > 0
  assert two.error == pytest.approx(one.error) and two.freedom == pytest.approx(one.freedom)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
  rng, label = np.random.default_rng(2), np.repeat(np.arange(8), [60, 40, 20, 10, 8, 6, 5, 4])
  folds, rate, inside = all_at_once(label), np.linspace(0.1, 0.4, 8), 0
  for _ in range(400):
    hits, control = rng.random((2, len(label))) < [0.3 + rate[label], np.full(len(label), 0.3)]
    gain = cross_validation.paired_gain(predict(hits, label), predict(control, label), folds)
    low, high = gain.interval()
    inside += low <= rate.mean() <= high
  assert 0.92 < inside / 400 < 0.99


# --- the recommendation ----------------------------------------------------------------------

LONG_TAIL = (122, 79, 51, 33, 21, 14, 9, 6, 4, 2)
RATES = np.linspace(0.95, 0.6, 10)  # accuracy by class


def draw_methods(rng, label, gains):
  """Correlated predictions of methods, right as often as `RATES` plus `gains` [methods, classes].

  The first is the control. What makes an example hard is half of the luck of each method.
  """
  luck = rng.normal(size=len(label)) + rng.normal(size=(len(gains), len(label)))
  reach = np.sqrt(2) * norm.ppf(np.clip(RATES + gains, 0, 0.999))
  wrong = (label + rng.integers(1, 10, luck.shape)) % 10
  found = np.where(luck < reach[:, label], label, wrong)
  return {"real" if i == 0 else f"method {i}": p for i, p in enumerate(found)}


@pytest.mark.parametrize(
  ("counts", "criterion", "trials"),
  [
    (LONG_TAIL, "balanced_accuracy", 300),
    (LONG_TAIL, "accuracy", 300),
    (LONG_TAIL, "macro_f1", 100),
    ((34,) * 10, "balanced_accuracy", 300),
  ],
)
def test_methods_as_good_as_the_control_are_rarely_recommended(counts, criterion, trials):
  """Of eight at once; each interval by itself would let the best of them through too often."""
  rng, label = np.random.default_rng(4), np.repeat(np.arange(10), counts)
  folds, wrong, uncorrected = all_at_once(label, criterion), 0, 0
  for _ in range(trials):
    predictions = draw_methods(rng, label, np.zeros((9, 10)))
    found = cross_validation.recommend(predictions, folds, ["real"])
    wrong += found["method"] != "real"
    gain = cross_validation.paired_gain(predictions[found["best"]], predictions["real"], folds)
    uncorrected += gain.interval(comparisons=1)[0] > 0
  assert wrong / trials < 0.045  # nominally 0.025
  if criterion != "macro_f1":  # its intervals are wide as it is
    assert uncorrected / trials > 0.045


@pytest.mark.parametrize("counts", [LONG_TAIL, (34,) * 10])
def test_a_method_that_is_clearly_better_is_recommended(counts):
  rng, label = np.random.default_rng(5), np.repeat(np.arange(10), counts)
  folds, gains, found = all_at_once(label), np.zeros((9, 10)), []
  gains[3] = 0.99 - RATES
  for _ in range(50):
    predictions = draw_methods(rng, label, gains)
    found.append(cross_validation.recommend(predictions, folds, ["real"])["method"])
  assert found.count("method 3") > 35


def test_the_intervals_hold_for_all_methods_at_once():
  """They widen with the methods beside the controls; controls are not looked at for a gain."""
  rng, label = np.random.default_rng(6), np.repeat(np.arange(10), LONG_TAIL)
  gains = np.zeros((9, 10))
  gains[2] = -0.4
  folds, predictions = all_at_once(label), draw_methods(rng, label, gains)
  for names in (["real", "method 1"], list(predictions)):
    for controls in (["real"], ["real", "method 2"]):
      given = {name: predictions[name] for name in {*names, *controls}}
      found = cross_validation.recommend(given, folds, controls)
      gain = cross_validation.paired_gain(given["method 1"], given["real"], folds)
      expected = gain.interval(comparisons=len(given) - len(controls))
      assert found["control"] == "real"
      assert found["scores"]["method 1"]["interval"] == pytest.approx(expected)


def test_controls_alone_are_ranked():
  label = np.arange(20) % 2
  given = {"real": predict(label == 0, label), "own": predict(np.full(20, True), label)}
  found = cross_validation.recommend(given, all_at_once(label), ["real", "own"])
  assert found["method"] == found["best"] == found["control"] == "own"
  assert found["interval"] == [0, 0]


@pytest.mark.parametrize("criterion", ["accuracy", "balanced_accuracy"])
def test_a_gain_is_one_by_the_criterion(criterion):
  """The method wins on the common class what it loses on the rare one."""
  label = np.repeat([0, 1], [500, 100])
  place = np.concatenate([np.arange(500) / 500, np.arange(100) / 100])
  given = {
    "real": predict(place < np.where(label == 0, 0.8, 0.9), label),
    "memdiff": predict(place < np.where(label == 0, 1.0, 0.5), label),
  }
  found = cross_validation.recommend(given, all_at_once(label, criterion), ["real"])
  accuracy = criterion == "accuracy"
  assert found["method"] == found["best"] == ("memdiff" if accuracy else "real")
  assert found["criterion"] == criterion
  gain = found["scores"]["memdiff"]["gain"]
  assert gain == pytest.approx((550 - 490) / 600 if accuracy else 0.75 - 0.85)


def test_a_clear_gain_is_recommended_and_a_doubtful_one_is_not():
  label, rng = np.repeat(np.arange(5), 80), np.random.default_rng(0)
  folds = all_at_once(label)
  rates = {"real": 0.5, "real+adjusted": 0.55, "memdiff": 0.8}
  given = {name: predict(rng.random(400) < rate, label) for name, rate in rates.items()}
  found = cross_validation.recommend(given, folds, ["real", "real+adjusted"])
  assert found["method"] == found["best"] == "memdiff" and found["control"] == "real+adjusted"
  assert found["interval"][0] > 0 and found["expected_gain"] == pytest.approx(
    found["scores"]["memdiff"]["score"] - found["scores"]["real+adjusted"]["score"]
  )
  given["memdiff"] = np.where(np.arange(400) < 3, label, given["real+adjusted"])
  found = cross_validation.recommend(given, folds, ["real", "real+adjusted"])
  assert found["method"] == "real+adjusted"


def test_a_preferred_control_gives_way_only_to_one_that_is_clearly_better():
  label, place = np.repeat(np.arange(5), 80), np.arange(400) % 80
  folds = all_at_once(label)
  blend = predict(place < 48, label)
  slightly = predict((place >= 4) & (place < 54), label)  # right on six more, wrong on four
  clearly = predict(place < 60, label)
  for real, control in ((slightly, "real+blend"), (clearly, "real")):
    assert folds.score(real) > folds.score(blend)
    given = {"real": real, "real+blend": blend, "memdiff": real.copy()}
    found = cross_validation.recommend(given, folds, ["real", "real+blend"], "real+blend")
    assert found["control"] == control == found["method"]
  assert cross_validation.recommend(given, folds, ["real"], "real+blend")["control"] == "real"


# --- agreement -------------------------------------------------------------------------------


def test_agreement_of_two_rankings():
  same = cross_validation.rank_agreement([1, 2, 3], [0.1, 0.2, 0.3])
  assert same == {"kendall_tau": 1.0, "pairs": 1.0, "regret": 0.0}
  turned = cross_validation.rank_agreement([3, 2, 1], [0.1, 0.2, 0.3])
  assert turned["kendall_tau"] == -1.0 and turned["regret"] == pytest.approx(0.2)
  assert cross_validation.rank_agreement([1, 1], [0.1, 0.2])["pairs"] == 0.5
