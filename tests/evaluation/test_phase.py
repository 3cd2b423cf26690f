"""The evaluation of an experiment on features: what is compared, and with what outcome."""

from types import SimpleNamespace

import numpy as np
import pytest

from memdiff.evaluation import phase
from memdiff.evaluation.phase import Scored

LOSSES = ("cross_entropy", "csl")
TOP1 = {
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


def experiment(names=("duplicate", "memdiff"), joint_loss="csl"):
  return SimpleNamespace(
    config=SimpleNamespace(
      generators=SimpleNamespace(names=names),
      head=SimpleNamespace(losses=LOSSES),
      joint=SimpleNamespace(loss=joint_loss),
    )
  )


def scored(**changes):
  top1 = {method: np.array(values) for method, values in (TOP1 | changes).items()}
  return Scored([{"method": method} for method in top1], top1, {})


def recommended(**scores):
  """A recommendation whose scores are those of test, but for `scores`."""
  known = {m: np.mean(v) for m, v in TOP1.items() if m.split("+")[0] not in phase.REFERENCES}
  known |= scores
  return {
    "method": "real+csl", "best": "memdiff+csl", "control": "real+csl",
    "scores": {method: {"score": score} for method, score in known.items()},
  }  # fmt: skip


# --- what is compared ------------------------------------------------------------------------


def test_memdiff_is_held_against_the_control_seed_by_seed():
  found = phase.compare(experiment(), scored(), recommended())
  assert [found[key] for key in ("method", "control", "reference")] == [
    "memdiff+csl", "real+csl", "oracle+csl"
  ]  # fmt: skip
  gain, headroom = np.array([0.05, 0.02]), np.array([0.20, 0.10])
  for key, values in (
    ("gain", gain), ("headroom", headroom), ("gap_closed", gain / headroom)
  ):  # fmt: skip
    assert found[key]["mean"] == pytest.approx(values.mean())
    assert found[key]["std"] == pytest.approx(values.std(ddof=1))


def test_cross_validation_and_not_the_test_set_chooses_the_losses():
  advice = recommended(**{
    "memdiff+cross_entropy": 0.99, "real+cross_entropy": 0.98, "duplicate+csl": 1.0
  })  # fmt: skip
  found = phase.compare(experiment(), scored(), advice)
  assert found["method"] == "memdiff+cross_entropy"
  assert found["control"] == "real+cross_entropy"
  assert found["reference"] == "oracle+cross_entropy"
  assert found["gain"]["mean"] == pytest.approx(np.mean([0.06, -0.02]))


def test_the_encoders_own_head_is_a_control_where_it_was_judged():
  found = phase.compare(experiment(), scored(), recommended(own_head=0.97))
  assert found["control"] == "own_head"
  assert found["gain"]["mean"] == pytest.approx(np.mean([0.25, 0.22]))
  adjusted = {"own_head+logit_adjustment": 0.97}
  made = scored(**{"own_head+logit_adjustment": [0.7, 0.7]})
  found = phase.compare(experiment(), made, recommended(**adjusted))
  assert found["control"] == "own_head+logit_adjustment"


def test_without_cross_validation_the_first_loss_stands_for_all():
  found = phase.compare(experiment(), scored(), None)
  assert (found["method"], found["control"]) == ("memdiff+cross_entropy", "real+cross_entropy")


def test_another_generator_stands_in_where_memdiff_was_not_run():
  found = phase.compare(experiment(("duplicate",)), scored(), recommended())
  assert found["method"] == "duplicate+cross_entropy"


def test_every_row_gets_its_share_of_the_gap():
  made = scored()
  phase.compare(experiment(), made, recommended())
  shares = {row["method"]: row["gap_closed"]["mean"] for row in made.rows}
  assert set(shares) == set(TOP1)
  assert shares["real+csl"] == pytest.approx(0) and shares["oracle+csl"] == pytest.approx(1)
  for method, values in TOP1.items():
    expected = np.mean((np.array(values) - TOP1["real+csl"]) / np.array([0.20, 0.10]))
    assert shares[method] == pytest.approx(expected)


@pytest.mark.parametrize("oracle", [[0.90, 0.74], [0.9, 0.5], [0.1, 0.1]])
def test_where_the_oracle_is_no_better_there_is_no_gap(oracle):
  made = scored(**{"oracle+csl": oracle})
  found = phase.compare(experiment(), made, recommended())
  assert found["gap_closed"] is None
  assert found["headroom"]["mean"] == pytest.approx(np.mean(oracle) - 0.72)
  assert not any("gap_closed" in row for row in made.rows)


def test_without_an_oracle_only_the_gain_is_known():
  made = scored()
  for method in ("oracle+csl", "oracle+cross_entropy"):
    del made.top1[method]
  found = phase.compare(experiment(), made, recommended())
  assert found["reference"] is found["headroom"] is found["gap_closed"] is None
  assert found["gain"]["mean"] == pytest.approx(0.035)


# --- how well it was foreseen ----------------------------------------------------------------


def test_agreement_is_perfect_where_scores_are_those_of_the_test_set():
  found = phase.agreement(scored(), recommended())
  assert found["kendall_tau"] == pytest.approx(1) and found["pairs"] == 1
  assert found["regret"] == 0
  assert found["methods"] == 7  # references are none
  assert found["test_gain"]["mean"] == pytest.approx(0.035)  # memdiff+csl over real+csl
  assert found["regret_of_recommended"] == pytest.approx(0.81 - 0.72)


def test_agreement_tells_what_a_wrong_first_place_costs():
  found = phase.agreement(scored(), recommended(own_head=0.99))
  assert found["regret"] == pytest.approx(0.81 - 0.52)
  # One method in seven moved from the last place to the first: 6 of 21 pairs are turned.
  assert found["pairs"] == pytest.approx(15 / 21)
  assert found["kendall_tau"] == pytest.approx((15 - 6) / 21)


def test_a_method_that_was_not_tested_takes_no_part_in_the_agreement():
  found = phase.agreement(scored(), recommended(**{"gan+csl": 1.0}))
  assert found["methods"] == 7 and found["kendall_tau"] == pytest.approx(1)


# --- joint training --------------------------------------------------------------------------


def test_joint_training_is_compared_with_its_own_control():
  made = scored(**{"joint:real+csl": [0.5, 0.7], "joint:memdiff+csl": [0.6, 0.6]})
  (found,) = phase.compare_joint(experiment(), made)
  assert found["method"] == "joint:memdiff+csl"
  assert found["gain"]["mean"] == pytest.approx(0)
  assert found["gain"]["std"] == pytest.approx(np.std([0.1, -0.1], ddof=1))


def test_joint_training_without_its_control_is_compared_with_nothing():
  assert phase.compare_joint(experiment(), scored()) == []
  assert phase.compare_joint(experiment(), scored(**{"joint:memdiff+csl": [0.6, 0.6]})) == []


# --- features at one strength ----------------------------------------------------------------


def test_features_of_one_strength_are_picked_by_its_value():
  rng = np.random.default_rng(0)
  arrays = {
    "labels": np.array([0, 1, 1]), "number": np.array([0, 0, 1]),
    "strengths": np.array([0.25, 1.0]), "features": rng.normal(size=(2, 2, 3, 5)),
  }  # fmt: skip
  for name in ("confidence", "nearest_index", "nearest_distance"):
    arrays[name] = rng.normal(size=(2, 2, 3))
  for k, strength in enumerate((0.25, 1.0)):
    found = phase.of_strength(arrays, SimpleNamespace(strength=strength))
    assert set(found) == set(arrays) - {"strengths"}
    for name in ("features", "confidence", "nearest_index", "nearest_distance"):
      np.testing.assert_array_equal(found[name], arrays[name][:, k])
    np.testing.assert_array_equal(found["number"], arrays["number"])
