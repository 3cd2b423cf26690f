"""The evaluation of an experiment on features: what is compared, and with what outcome."""

from types import SimpleNamespace

import numpy as np
import pytest

from memdiff.evaluation import criteria, scores
from memdiff.experiments import comparison as comparison_lib
from memdiff.experiments import feature_evaluation, feature_scores, methods, summaries
from memdiff.experiments.comparison import Scored, agreement, mark_shown
from memdiff.experiments.fitted import Fitted
from memdiff.memory.feature_space import Standardizer

LOSSES = ("cross_entropy", "csl")
# Test accuracy of each seed, the same in every class.
RATES = {
  "own_head": [0.50, 0.54],
  "real+cross_entropy": [0.60, 0.62],
  "real+csl": [0.70, 0.74],
  "memdiff+cross_entropy": [0.66, 0.60],
  "memdiff+csl": [0.75, 0.76],
  "duplicate+cross_entropy": [0.80, 0.82],
  "duplicate+csl": [0.61, 0.63],
  "oracle+cross_entropy": [0.90, 0.92],
  "oracle+csl": [0.90, 0.84],
  "unseen_exemplars+csl": [0.85, 0.85],
}
BALANCED = (100, 100, 100)
COMMON, RARE = 900, 100  # examples of a test set as imbalanced as the training set


def experiment(names=("duplicate", "memdiff"), joint_loss="csl", loss="csl"):
  return SimpleNamespace(
    config=SimpleNamespace(
      generators=SimpleNamespace(names=names),
      head=SimpleNamespace(losses=LOSSES),
      joint=SimpleNamespace(loss=joint_loss),
      classifier=SimpleNamespace(loss=loss),
    )
  )


def predict(rates, counts):
  """Predictions [S, T] that are right on the first `rates` [S, C] of each class."""
  labels = np.repeat(np.arange(len(counts)), counts)
  place = np.concatenate([np.arange(n) / n for n in counts])
  rates = np.broadcast_to(np.array(rates).reshape(len(rates), -1), (len(rates), len(counts)))
  return np.where(place < rates[:, labels] - 1e-9, labels, (labels + 1) % len(counts))


def scored(counts=BALANCED, criterion="balanced_accuracy", train_counts=(200, 50, 5), **changes):
  rates = {m: r for m, r in (RATES | changes).items() if r is not None}
  return Scored(
    rows=[{"method": method} for method in rates],
    predictions={method: predict(r, counts) for method, r in rates.items()},
    heads={},
    labels=np.repeat(np.arange(len(counts)), counts),
    criterion=criterion,
    groups=scores.make_groups(np.array(train_counts[: len(counts)])),
  )


def recommended(method="real+csl", control="real+csl", **scores):
  """A recommendation whose scores are those of test, but for `scores`."""
  known = {m: np.mean(r) for m, r in RATES.items() if m.split("+")[0] not in methods.REFERENCES}
  known |= scores
  return {
    "method": method, "best": "memdiff+csl", "control": control,
    "scores": {
      method: {"score": score, "gain": score - 0.72, "interval": [score - 0.8, score - 0.7]}
      for method, score in known.items()
    },
  }  # fmt: skip


# --- what is compared ------------------------------------------------------------------------


def headline(made, *arguments):
  generators = [m for m in methods.methods(experiment()) if m.generator != methods.REAL]
  return comparison_lib.headline(made, generators, *arguments)


def compare(e, made, recommendation):
  return comparison_lib.compare(made, *feature_scores.compared_methods(e, recommendation))


def test_memdiff_is_held_against_the_control_seed_by_seed():
  found = compare(experiment(), scored(), recommended())
  assert [found[key] for key in ("method", "control", "reference")] == [
    "memdiff+csl", "real+csl", "oracle+csl"
  ]  # fmt: skip
  for key, values in (("gain", [0.05, 0.02]), ("headroom", [0.20, 0.10])):
    assert found[key]["mean"] == pytest.approx(np.mean(values))
    assert found[key]["std"] == pytest.approx(np.std(values, ddof=1))
    low, high = found[key]["interval"]
    assert (low + high) / 2 == pytest.approx(np.mean(values)) and low < high
    assert found[key]["ours"] - found[key]["theirs"] == pytest.approx(found[key]["mean"])


def test_cross_validation_and_not_the_test_set_chooses_the_losses():
  advice = recommended(control="real+cross_entropy", **{
    "memdiff+cross_entropy": 0.99, "real+cross_entropy": 0.98, "duplicate+csl": 1.0
  })  # fmt: skip
  found = compare(experiment(), scored(), advice)
  assert found["method"] == "memdiff+cross_entropy"
  assert found["control"] == "real+cross_entropy"
  assert found["reference"] == "oracle+cross_entropy"
  assert found["gain"]["mean"] == pytest.approx(np.mean([0.06, -0.02]))


def test_the_encoders_own_head_is_a_control_if_it_was_judged():
  found = compare(experiment(), scored(), recommended(control="own_head", own_head=0.97))
  assert found["control"] == "own_head"
  assert found["gain"]["mean"] == pytest.approx(np.mean([0.25, 0.22]))
  adjusted = {"control": "own_head+logit_adjustment", "own_head+logit_adjustment": 0.97}
  made = scored(**{"own_head+logit_adjustment": [0.7, 0.7]})
  found = compare(experiment(), made, recommended(**adjusted))
  assert found["control"] == "own_head+logit_adjustment"


def test_without_cross_validation_the_first_loss_stands_for_all():
  found = compare(experiment(), scored(), None)
  assert (found["method"], found["control"]) == ("memdiff+cross_entropy", "real+cross_entropy")


def test_another_generator_stands_in_if_memdiff_was_not_run():
  found = compare(experiment(("duplicate",)), scored(), recommended())
  assert found["method"] == "duplicate+cross_entropy"


STEADY = {"real+csl": [0.70, 0.72], "memdiff+csl": [0.75, 0.78], "oracle+csl": [0.90, 0.91]}


def test_every_row_gets_its_share_of_the_gap_if_there_is_one_for_certain():
  made = scored(**STEADY)
  found = compare(experiment(), made, recommended())
  assert found["headroom"]["interval"][0] > 0
  shares = {row["method"]: row["gap_closed"] for row in made.rows}
  assert set(shares) == set(RATES)
  assert found["gap_closed"] == shares["memdiff+csl"]
  for method, rates in (RATES | STEADY).items():
    expected = (np.mean(rates) - 0.71) / (0.905 - 0.71)  # a ratio of means
    assert shares[method]["mean"] == pytest.approx(expected)
    low, high = shares[method]["interval"]
    assert low - 1e-9 <= expected <= high + 1e-9


@pytest.mark.parametrize(
  ("oracle", "counts"),
  [
    ([0.90, 0.74], BALANCED),  # every seed has some, but seeds differ
    ([0.9, 0.5], BALANCED),
    ([0.1, 0.1], BALANCED),  # for certain, but downwards
    ([[0.70, 0.70, 0.75], [0.74, 0.74, 0.79]], (20, 20, 20)),  # one test example makes it
    ([0.70, 0.74], BALANCED),
  ],
)
def test_if_the_room_may_be_chance_no_gap_is_closed(oracle, counts):
  made = scored(counts, **{"oracle+csl": oracle})
  found = compare(experiment(), made, recommended())
  assert found["gap_closed"] is None
  assert found["headroom"]["mean"] == pytest.approx(np.mean(oracle) - 0.72, abs=0.03)
  assert not any("gap_closed" in row for row in made.rows)


def test_without_an_oracle_only_the_gain_is_known():
  made = scored(**{"oracle+csl": None, "oracle+cross_entropy": None})
  found = compare(experiment(), made, recommended())
  assert found["reference"] is found["headroom"] is found["gap_closed"] is None
  assert found["gain"]["mean"] == pytest.approx(0.035)
  first = headline(made, "own_head", found, recommended())
  assert first["room"] is None


# --- by the criterion ------------------------------------------------------------------------

# Accuracy on the common and on the rare class. Synthetic data help the rare class at the expense
# of the common one, so that accuracy falls and balanced accuracy rises.
IMBALANCED = {
  "own_head": [[0.95, 0.20], [0.96, 0.22]],
  "real+cross_entropy": [[0.94, 0.30], [0.95, 0.31]],
  "real+csl": [[0.90, 0.40], [0.91, 0.41]],
  "memdiff+cross_entropy": [[0.84, 0.80], [0.85, 0.80]],
  "memdiff+csl": [[0.84, 0.70], [0.85, 0.71]],
  "duplicate+cross_entropy": [[0.86, 0.60], [0.87, 0.60]],
  "duplicate+csl": [[0.88, 0.50], [0.89, 0.50]],
  "oracle+cross_entropy": [[0.98, 0.95], [0.98, 0.96]],
  "oracle+csl": [[0.98, 0.90], [0.98, 0.91]],
  "unseen_exemplars+csl": [[0.95, 0.85], [0.95, 0.85]],
}


def by_hand(criterion, method):
  """Mean over seeds of the criterion of `IMBALANCED`."""
  common, rare = np.mean(IMBALANCED[method], axis=0)
  share = COMMON / (COMMON + RARE) if criterion == "accuracy" else 0.5
  return share * common + (1 - share) * rare


@pytest.mark.parametrize("criterion", ["accuracy", "balanced_accuracy"])
def test_on_an_imbalanced_test_set_every_number_is_one_of_the_criterion(criterion):
  made = scored((COMMON, RARE), criterion, (200, 5), **IMBALANCED)
  method, control, plain = "memdiff+cross_entropy", "real+csl", "own_head"
  gain = by_hand(criterion, method) - by_hand(criterion, control)
  assert (gain > 0) == (criterion == "balanced_accuracy")  # that is what the data are made for
  advice = recommended(method, **{method: 0.99}) | {"best": method, "control": control}

  found = compare(experiment(), made, advice)
  assert (found["method"], found["control"]) == (method, control)
  assert found["gain"]["mean"] == pytest.approx(gain)
  room = by_hand(criterion, "oracle+cross_entropy") - by_hand(criterion, control)
  assert found["headroom"]["mean"] == pytest.approx(room)
  assert found["gap_closed"]["mean"] == pytest.approx(gain / room)
  for row in made.rows:
    share = (by_hand(criterion, row["method"]) - by_hand(criterion, control)) / room
    assert row["gap_closed"]["mean"] == pytest.approx(share)

  first = headline(made, plain, found, advice)
  over_plain = by_hand(criterion, method) - by_hand(criterion, plain)
  assert first["over_plain"]["overall"]["mean"] == pytest.approx(over_plain)
  assert first["synthetic"]["overall"]["mean"] == pytest.approx(gain)
  assert first["room"]["overall"]["mean"] == pytest.approx(room)

  seen = agreement(made, advice)
  judged = [m for m in IMBALANCED if m.split("+")[0] not in methods.REFERENCES]
  scores = [by_hand(criterion, m) for m in judged]
  assert seen["test_gain"]["mean"] == pytest.approx(gain)
  assert seen["regret"] == pytest.approx(max(scores) - by_hand(criterion, method))
  assert seen["regret_of_recommended"] == pytest.approx(seen["regret"])
  assert (seen["regret"] == 0) == (criterion == "balanced_accuracy")
  known = [advice["scores"][m]["score"] for m in judged]
  order = [
    np.sign((known[i] - known[j]) * (scores[i] - scores[j])) for i in range(7) for j in range(i)
  ]
  assert seen["pairs"] == pytest.approx(np.mean(np.array(order) > 0))
  assert seen["kendall_tau"] == pytest.approx(np.mean(order))


def test_macro_f1_decides_if_it_is_asked_for():
  made = scored((COMMON, RARE), "macro_f1", (200, 5), **IMBALANCED)
  found = compare(experiment(), made, recommended())
  ours, theirs = (
    criteria.score(made.predictions[m], made.labels, "macro_f1", 2).mean()
    for m in ("memdiff+csl", "real+csl")
  )
  assert found["gain"]["mean"] == pytest.approx(ours - theirs)
  assert made.score("memdiff+csl") == pytest.approx(ours)


# --- the first words -------------------------------------------------------------------------


def first_words(made=None, advice=None, plain="own_head", **changes):
  made = made or scored(**changes)
  comparison = compare(experiment(), made, advice)
  return headline(made, plain, comparison, advice)


def test_the_recommended_method_is_held_against_plain_training_in_every_group():
  rates = {"real+csl": [[0.9, 0.6, 0.3]] * 2, "own_head": [[0.95, 0.5, 0.1]] * 2}
  first = first_words(scored(**rates), recommended())
  assert (first["recommended"], first["by"], first["plain"]) == (
    "real+csl", "cross-validation", "own_head"
  )  # fmt: skip
  gains = {name: gain["mean"] for name, gain in first["over_plain"].items()}
  assert gains == pytest.approx(
    {"overall": 0.25 / 3, "many": -0.05, "medium": 0.1, "few": 0.2}, abs=2e-3
  )
  assert first["over_plain"]["few"]["ours"] == pytest.approx(0.3, abs=2e-3)


def test_a_group_without_test_examples_has_no_gain():
  made = scored(counts=(40, 0, 40))
  first = first_words(made, recommended())
  assert first["over_plain"]["medium"] is None
  assert first["over_plain"]["few"] and first["over_plain"]["many"]
  made = scored(counts=(40, 40, 0))
  assert first_words(made, recommended())["synthetic"]["few"] is None


def test_of_two_classes_none_is_medium():
  first = first_words(scored((COMMON, RARE), train_counts=(200, 5), **IMBALANCED), recommended())
  assert first["over_plain"]["medium"] is None
  assert first["over_plain"]["few"]["ours"] == pytest.approx(0.405)


def test_the_best_synthetic_method_by_cross_validation_speaks_for_synthetic_data():
  advice = recommended(**{"duplicate+csl": 0.99})
  synthetic = first_words(advice=advice)["synthetic"]
  assert (synthetic["method"], synthetic["control"]) == ("duplicate+csl", "real+csl")
  assert synthetic["overall"]["mean"] == pytest.approx(0.62 - 0.72)
  assert synthetic["expected"] == {
    "mean": pytest.approx(0.27), "interval": pytest.approx([0.19, 0.29])
  }  # fmt: skip
  assert not synthetic["recommended"]
  advice = recommended("duplicate+csl", **{"duplicate+csl": 0.99})
  assert first_words(advice=advice)["synthetic"]["recommended"]


def test_without_cross_validation_nothing_is_expected_or_recommended():
  first = first_words(advice=None)
  assert (first["recommended"], first["by"]) == ("memdiff+cross_entropy", "default")
  assert first["synthetic"]["method"] == "memdiff+cross_entropy"
  assert first["synthetic"]["expected"] is None and not first["synthetic"]["recommended"]


def test_rows_that_are_spoken_of_are_shown():
  made, advice = scored(), recommended(**{"duplicate+csl": 0.99})
  comparison = compare(experiment(), made, advice)
  mark_shown(
    made,
    headline(made, "own_head", comparison, advice),
    comparison,
  )
  assert {row["method"] for row in made.rows if row["shown"]} == {
    "real+csl", "own_head", "duplicate+csl", "memdiff+csl", "oracle+csl"
  }  # fmt: skip
  assert all(row["shown"] in (True, False) for row in made.rows)


@pytest.mark.parametrize(
  ("own", "losses", "loss", "expected"),
  [
    (("csl", "cross_entropy"), LOSSES, "csl", "own_head:cross_entropy"),
    (("cross_entropy",), LOSSES, "cross_entropy", "own_head"),
    (("csl",), LOSSES, "csl", "own_head"),  # no encoder was trained by cross-entropy
    ((), LOSSES, "csl", "real+cross_entropy"),  # features from a file
    ((), ("csl", "focal"), "csl", "real+csl"),
  ],
)
def test_plain_training_is_cross_entropy_on_the_data_as_they_are(own, losses, loss, expected):
  e = experiment(loss=loss)
  e.config.head.losses = losses
  space = SimpleNamespace(own_logits=dict.fromkeys(own))
  assert feature_scores.plain_training(e, space) == expected


# --- how well it was foreseen ----------------------------------------------------------------


def test_agreement_is_perfect_if_scores_are_those_of_the_test_set():
  found = agreement(scored(), recommended())
  assert found["kendall_tau"] == pytest.approx(1) and found["pairs"] == 1
  assert found["regret"] == 0
  assert found["methods"] == 7  # references are none
  assert found["test_gain"]["mean"] == pytest.approx(0.035)  # memdiff+csl over real+csl
  assert found["regret_of_recommended"] == pytest.approx(0.81 - 0.72)


def test_agreement_tells_what_a_wrong_first_place_costs():
  found = agreement(scored(), recommended(own_head=0.99))
  assert found["regret"] == pytest.approx(0.81 - 0.52)
  # One method in seven moved from the last place to the first: 6 of 21 pairs are turned.
  assert found["pairs"] == pytest.approx(15 / 21)
  assert found["kendall_tau"] == pytest.approx((15 - 6) / 21)


def test_a_method_that_was_not_tested_takes_no_part_in_the_agreement():
  found = agreement(scored(), recommended(**{"gan+csl": 1.0}))
  assert found["methods"] == 7 and found["kendall_tau"] == pytest.approx(1)


# --- joint training --------------------------------------------------------------------------


def test_joint_training_is_compared_with_its_own_control():
  made = scored(**{"joint:real+csl": [0.5, 0.7], "joint:memdiff+csl": [0.6, 0.6]})
  (found,) = feature_scores.compare_joint(experiment(), made)
  assert found["method"] == "joint:memdiff+csl"
  assert found["gain"]["mean"] == pytest.approx(0)
  assert found["gain"]["std"] == pytest.approx(np.std([0.1, -0.1], ddof=1))
  assert found["gain"]["interval"][0] < 0 < found["gain"]["interval"][1]


def test_joint_training_without_its_control_is_compared_with_nothing():
  assert feature_scores.compare_joint(experiment(), scored()) == []
  assert (
    feature_scores.compare_joint(experiment(), scored(**{"joint:memdiff+csl": [0.6, 0.6]})) == []
  )


# --- features --------------------------------------------------------------------------------


def test_features_of_one_strength_are_picked_by_its_value():
  rng = np.random.default_rng(0)
  arrays = {
    "labels": np.array([0, 1, 1]), "number": np.array([0, 0, 1]),
    "strengths": np.array([0.25, 1.0]), "features": rng.normal(size=(2, 2, 3, 5)),
  }  # fmt: skip
  for name in ("confidence", "nearest_index", "nearest_distance"):
    arrays[name] = rng.normal(size=(2, 2, 3))
  for k, strength in enumerate((0.25, 1.0)):
    found = feature_evaluation.of_strength(arrays, SimpleNamespace(strength=strength))
    assert set(found) == set(arrays) - {"strengths"}
    for name in ("features", "confidence", "nearest_index", "nearest_distance"):
      np.testing.assert_array_equal(found[name], arrays[name][:, k])
    np.testing.assert_array_equal(found["number"], arrays["number"])


def test_the_first_seeds_features_stand_in_one_space_with_their_labels():
  rng = np.random.default_rng(0)
  scale = np.array([[2.0, 4.0], [9.0, 9.0]])
  standardizer = Standardizer(mean=np.ones((2, 2)), scale=scale, lowest=np.zeros((2, 2)))
  real, left_out, made = (rng.normal(size=(2, n, 2)).astype(np.float32) for n in (3, 4, 5))
  runs = SimpleNamespace(standardizer=standardizer, exemplars=SimpleNamespace(features=real))
  e = SimpleNamespace(
    dataset=SimpleNamespace(train_labels=np.arange(3), left_out_labels=np.arange(4))
  )
  found = feature_evaluation.features_of_first_seed(
    e, SimpleNamespace(runs=runs, left_out=left_out), {"features": made, "labels": np.arange(5)}
  )
  assert list(found) == ["real", "left out", "synthetic"]
  np.testing.assert_array_equal(found["real"][0], real[0])
  np.testing.assert_array_equal(found["left out"][0], left_out[0])
  np.testing.assert_allclose(found["synthetic"][0], (made[0] - 1) / scale[0], rtol=1e-6)
  assert [len(labels) for _, labels in found.values()] == [3, 4, 5]


def test_the_map_and_the_projector_show_the_first_seeds_features(monkeypatch):
  told, e, made = {}, experiment(("memdiff",)), scored()
  choices = {f"memdiff+{loss}": methods.Choice(strength=1.0) for loss in LOSSES}
  e.dataset, e.run = SimpleNamespace(num_classes=2), SimpleNamespace(
    progress=SimpleNamespace(say=lambda text: None)
  )  # fmt: skip
  space, arrays = SimpleNamespace(own_logits={}), {"labels": np.array([0, 1]), "features": 7}
  replaced = {
    feature_evaluation: {
      "load_space": lambda e: space,
      "load_selection": lambda e: (choices, None),
      "load_synthetic": lambda e, name, parts: {"of": name},
      "classify": lambda *_: made,
      "of_strength": lambda synthetic, choice: arrays | synthetic,
      "judge": lambda *_: {"memdiff": {}},
      "save_recommended_head": lambda *_: None,
      "fitted": SimpleNamespace(load=lambda e: Fitted({}, {})),
      "seconds": lambda e: {},
      "features_of_first_seed": lambda e, space, shown: {"synthetic": dict(shown)},
      "place_on_map": lambda e, features: features,
      "draw": lambda *arguments: {"drawn": arguments[-2], "mapped": arguments[-1].result()},
    },
    feature_evaluation.record: {
      "record": lambda e, rows: {},
      "save": lambda e, outcome, figures: figures,
    },
    summaries: {"project": lambda e, features: told.update(features)},
  }
  for module, functions in replaced.items():
    for name, function in functions.items():
      monkeypatch.setattr(module, name, function)
  figures = feature_evaluation.evaluate(e)
  expected = {"synthetic": arrays | {"of": "memdiff"}}
  assert figures["drawn"] == figures["mapped"] == told == expected
