"""The further sentences of the page."""

import pytest

from memdiff.evaluation import wording
from tests.evaluation.sample_report import advise, make_report

pytestmark = pytest.mark.filterwarnings("error")


def compared(**changes) -> list[str]:
  report = make_report()
  report["comparison"] |= changes
  return wording.comparison(report)


def gain(mean, low, high):
  return {"mean": mean, "std": 0.01, "interval": [low, high]}


class TestComparison:
  @pytest.mark.parametrize(
    ("given", "words"),
    [
      (gain(0.012, 0.006, 0.018), "1.2 points above real+csl (description of real+csl):"
       " synthetic features help (95 % interval +0.6 to +1.8)."),
      (gain(-0.012, -0.018, -0.006), "1.2 points below real+csl (description of real+csl):"
       " clearly worse with synthetic features (95 % interval −1.8 to −0.6)."),
      (gain(0.012, -0.006, 0.03), "no clear difference (95 % interval −0.6 to +3.0)."),
      (gain(0.0, -0.01, 0.01), "level with real+csl"),
    ],
  )  # fmt: skip
  def test_the_gain_is_called_what_its_interval_says(self, given, words):
    assert words in compared(gain=given)[0]

  def test_the_reference_tells_the_room_and_the_share_that_is_filled(self):
    assert compared()[1] == (
      "oracle+csl is 7.0 points above real+csl (95 % interval +5.8 to +8.2): synthetic"
      " features could gain at most this much. memdiff+csl fills 29 % of it (95 % interval 19 to"
      " 38)."
    )

  @pytest.mark.parametrize("headroom", [gain(0.01, -0.01, 0.03), gain(-0.02, -0.03, -0.01)])
  def test_without_room_no_share_of_it_is_claimed(self, headroom):
    said = compared(headroom=headroom, gap_closed=None)[1]
    assert "synthetic ones have no room" in said and "fills" not in said

  def test_groups_are_compared(self):
    assert "82.0 % against 80.0 % on few" in compared()[2]


class TestDecision:
  def said(self, *arguments, **more):
    return wording.decision(make_report() | {"recommendation": advise(*arguments, **more)})

  def test_a_method_that_is_better_for_certain(self):
    (_, first, _) = self.said("memdiff+csl", "real+csl", "memdiff+csl", 0.031, (0.012, 0.05))
    assert first == (
      "memdiff+csl is better than the best without synthetic data: +3.1 points against real+csl,"
      " 95 % interval +1.2 to +5.0."
    )

  def test_a_gain_that_may_be_chance(self):
    (_, first, _) = self.said("real+csl", "real+csl", "memdiff+csl", 0.031, (-0.012, 0.07))
    assert "not clearly better" in first and "−1.2 to +7.0" in first

  def test_a_control_that_is_best(self):
    (_, first, _) = self.said("real+csl", "real+csl", "real+csl", 0.0, (0.0, 0.0))
    assert first == "real+csl scores highest, with or without synthetic data."

  def test_what_it_rests_on_and_how_the_test_set_agreed_is_said(self):
    basis, _, agreement = self.said("real+csl", "real+csl", "memdiff+csl", 0.0, (0.0, 0.0))
    assert (
      "by balanced accuracy in 5-fold cross-validation, 2 times, with a separate encoder" in basis
    )
    assert "memdiff+csl differs from real+csl by +2.0 points. 69 % of the pairs" in agreement
    assert "Kendall's tau 0.38" in agreement
    assert "the best of 3 methods is 1.3 points above the recommended one" in agreement

  def test_a_method_is_not_compared_with_itself(self):
    assert "against" not in self.said("real+csl", "real+csl", "real+csl", 0.0, (0.0, 0.0))[2]

  def test_the_criterion_of_the_choice_is_named(self):
    arguments = ("real+csl", "real+csl", "real+csl", 0.0, (0.0, 0.0))
    assert "by macro-F1 in 5-fold" in self.said(*arguments, criterion="macro_f1")[0]

  def test_features_that_were_trained_on_the_same_examples_are_warned_of(self):
    frozen = {"folds": 3, "repeats": 1, "encoder": "frozen"}
    basis = self.said("real+csl", "real+csl", "real+csl", 0.0, (0.0, 0.0), basis=frozen)[0]
    assert "in 3-fold cross-validation, on the features as they are" in basis
    assert "these scores are then misleading" in basis

  def test_without_selection_there_is_none(self):
    assert wording.decision(make_report() | {"recommendation": None}) == []


class TestUntested:
  def said(self, names):
    report = make_report()
    report["dataset"]["classes_without_test_rows"] = names
    return wording.untested(report)

  def test_classes_are_counted_and_named(self):
    assert self.said([]) == ""
    assert self.said(["owl"]) == (
      "1 class has no test examples and is left out of averages over classes: owl."
    )
    assert self.said(["owl", "elk"]).endswith("2 classes have no test examples and are left out of"
                                              " averages over classes: owl, elk.")  # fmt: skip

  def test_of_many_the_first_are_named(self):
    said = self.said([f"class {i}" for i in range(1008)])
    assert said.startswith("1,008 classes") and said.endswith("class 4 and 1,003 more.")
