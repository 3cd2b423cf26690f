"""The first words: what is recommended and what is claimed of it follows from the intervals."""

import pytest

from memdiff.evaluation import answer as answers
from tests.evaluation.sample_report import difference, make_report

pytestmark = pytest.mark.filterwarnings("error")


def told(**headline) -> answers.Answer:
  report = make_report()
  report["headline"] |= headline
  return answers.answer(report)


def over_plain(**differences) -> answers.Answer:
  return told(over_plain={"overall": None, "many": None, "medium": None, "few": None} | differences)


BETTER, UNCLEAR, WORSE = (
  difference(mean, mean - 0.02, mean + 0.02, theirs=0.8) for mean in (0.05, 0.01, -0.05)
)


# --- the verdict -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("interval", "expected"),
  [
    ([0.001, 0.1], "better"), ([-0.1, -0.001], "worse"), ([-0.001, 0.1], "unclear"),
    ([0.0, 0.1], "unclear"), ([-0.1, 0.0], "unclear"), ([0.0, 0.0], "unclear"),
    (None, "unclear"), ([None, None], "unclear"), ([float("nan"), 0.1], "unclear"),
  ],
)  # fmt: skip
def test_a_claim_needs_an_interval_without_zero(interval, expected):
  assert answers.verdict({"mean": 0.5, "interval": interval}) == expected


def test_without_a_difference_nothing_is_claimed():
  assert answers.verdict(None) == answers.verdict({}) == "unclear"


@pytest.mark.parametrize(
  ("overall", "expected"), [(BETTER, "better"), (UNCLEAR, "unclear"), (WORSE, "worse")]
)
def test_the_colour_is_that_of_the_recommended_method_over_plain_training(overall, expected):
  for few in (BETTER, UNCLEAR, WORSE, None):
    assert over_plain(overall=overall, few=few).verdict == expected


def test_a_recommendation_that_the_test_set_contradicts_says_so():
  words = "On the test set it is worse than plain training."
  assert words in over_plain(overall=WORSE).explanation
  assert words not in over_plain(overall=UNCLEAR).explanation


@pytest.mark.parametrize(
  ("score", "encoder", "classifier", "words"),
  [
    (0.97, "frozen", {"num_epochs": 2.0}, "set selection.encoder=retrained."),
    (0.97, "frozen", {"num_epochs": 0.0}, "if the encoder has not seen the held-out examples."),
    (0.97, "frozen", None, "if the encoder has not seen the held-out examples."),  # embeddings
    (0.97, "retrained", {"num_epochs": 2.0}, "or the test set differs from them in kind."),
    (0.95, "frozen", {"num_epochs": 2.0}, None),  # 0.86 on the test set
    (0.2, "frozen", {"num_epochs": 2.0}, None),
  ],
)
def test_a_choice_by_scores_that_the_test_set_does_not_reach_is_doubted(
  score, encoder, classifier, words
):
  report = make_report()
  advice = report["recommendation"]
  advice["scores"]["memdiff+csl"]["score"] = score
  advice["basis"]["encoder"] = encoder
  report["config"] = {"classifier": classifier} if classifier else {}
  said = answers.answer(report).explanation
  assert ("This choice may be wrong" in said) == (words is not None)
  if words:
    assert said.endswith(words)
    assert "in cross-validation its balanced accuracy is 97.0 %, on the test set 86.0 %." in said


@pytest.mark.parametrize("synthetic", [BETTER, UNCLEAR, WORSE])
def test_what_synthetic_data_are_worth_does_not_colour_the_answer(synthetic):
  given = make_report()["headline"]["synthetic"]
  for recommended in (True, False):
    changed = given | {"overall": synthetic, "recommended": recommended}
    assert told(synthetic=changed).verdict == "better"


# --- what to use and what it is worth --------------------------------------------------------


def test_the_first_words_name_the_method_and_its_worth_on_the_rarest_classes():
  first, few, overall, synthetic, criterion = answers.answer(make_report()).lines()
  assert first == "Use memdiff+csl. Description of memdiff+csl."
  assert few == (
    "Rarest classes: 83.6 % right instead of 75.0 % with plain training (own_head): +8.6 points,"
    " 95 % interval +5.1 to +12.0."
  )
  assert overall == (
    "All classes: 86.0 % balanced accuracy instead of 79.0 % with plain training: +7.0 points,"
    " 95 % interval +5.0 to +9.0."
  )
  assert synthetic.startswith("Synthetic features are part of this gain: ")
  assert criterion == (
    "Criterion: balanced accuracy, the share of test examples classified correctly in each class,"
    " averaged over classes."
  )


@pytest.mark.parametrize(
  ("given", "words"),
  [
    (UNCLEAR, "81.0 % right, no clear difference from the 80.0 % of plain training"),
    (WORSE, "75.0 % right, below the 80.0 % of plain training"),
  ],
)
def test_what_is_not_better_is_not_called_better(given, words):
  sentence = over_plain(few=given).effects[0].sentence
  assert words in sentence and "instead" not in sentence


@pytest.mark.parametrize(
  ("criterion", "words"),
  [("accuracy", "% accuracy"), ("macro_f1", "% macro-F1"), ("balanced_accuracy", "% balanced acc")],
)
def test_the_criterion_is_named(criterion, words):
  found = answers.answer(make_report() | {"criterion": criterion})
  assert words in found.effects[1].sentence
  assert found.terms[0].startswith(f"Criterion: {answers.CRITERIA[criterion][0]}, ")


@pytest.mark.parametrize(("many", "is_told"), [(BETTER, False), (UNCLEAR, False), (WORSE, True)])
def test_common_classes_are_spoken_of_if_they_pay(many, is_told):
  titles = [e.title for e in over_plain(few=BETTER, many=many).effects]
  assert ("Most common classes" in titles) == is_told


def test_plain_training_is_not_compared_with_itself():
  zero = difference(0.0, 0.0, 0.0, theirs=0.8)
  found = told(recommended="own_head", over_plain={"overall": zero, "few": zero})
  assert found.title == "Use own_head" and found.effects == () and found.verdict == "unclear"
  assert "This is plain training; nothing is clearly better." in found.explanation


def test_without_cross_validation_nothing_is_recommended():
  found = told(by="default")
  assert found.title == "No recommendation" and found.verdict == "unclear"
  assert "selection.folds" in found.explanation and "looked at memdiff+csl" in found.explanation
  given = make_report()["headline"]["synthetic"] | {"recommended": False}
  said = told(by="default", synthetic=given).synthetic[0]
  assert said.startswith("Synthetic features do better on the test set: memdiff+csl is 2.0 points")
  assert "best" not in said
  assert "+8.6 points" in found.effects[0].sentence


# --- what synthetic data add -----------------------------------------------------------------


def synthetic(recommended, overall, **more):
  given = make_report()["headline"]["synthetic"]
  return told(synthetic=given | {"recommended": recommended, "overall": overall} | more)


@pytest.mark.parametrize(
  ("recommended", "overall", "opening"),
  [
    (True, BETTER, "Synthetic features are part of this gain"),
    (True, UNCLEAR, "Synthetic features were better in cross-validation, but make no clear"),
    (True, WORSE, "Synthetic features were better in cross-validation, but are worse"),
    (False, BETTER, "Synthetic features do better on the test set, although cross-validation did"),
    (False, UNCLEAR, "Synthetic features bring no clear gain"),
    (False, WORSE, "Synthetic features do not help"),
  ],
)
def test_the_finding_says_what_both_cross_validation_and_the_test_set_say(
  recommended, overall, opening
):
  first = synthetic(recommended, overall).synthetic[0]
  assert first.startswith(opening)
  assert "the best method with them, memdiff+csl, is" in first and "real+csl" in first


def test_the_size_stands_beside_its_interval_and_its_direction():
  first = synthetic(False, difference(-0.004, -0.011, 0.003, theirs=0.9)).synthetic[0]
  assert first.endswith(
    "is 0.4 points below real+csl, the best without (95 % interval −1.1 to +0.3)."
  )
  level = synthetic(False, difference(0.0001, -0.011, 0.011, theirs=0.9)).synthetic[0]
  assert "is level with real+csl" in level


def test_details_and_room_follow_if_they_are_known():
  rest = " ".join(answers.answer(make_report()).synthetic[1:])
  assert "On the rarest classes the difference is +3.0 points, 95 % interval −1.0 to +7.0." in rest
  assert "Cross-validation expected +3.1 points, interval over all methods at once" in rest
  assert "left out would add +7.0 points, 95 % interval +5.8 to +8.2 (oracle+csl)" in rest
  bare = make_report()["headline"]["synthetic"] | {"few": None, "expected": None}
  assert len(told(synthetic=bare, room=None).synthetic) == 1


@pytest.mark.parametrize("overall", [UNCLEAR, WORSE])
def test_no_room_is_called_so(overall):
  said = told(room={"reference": "oracle+csl", "overall": overall}).synthetic[-1]
  assert "have little room" in said


def test_without_synthetic_data_nothing_is_said_of_them():
  found = told(synthetic=None)
  assert found.synthetic == () and found.synthetic_verdict == ""
  assert not any("ynthetic" in line for line in found.lines())


# --- other kinds of experiment ---------------------------------------------------------------


def classifiers(**changes) -> dict:
  kept = ("dataset", "groups", "classification", "criterion")
  return {key: make_report()[key] for key in kept} | changes


def test_without_recommendation_the_best_row_comes_first_with_a_warning():
  found = answers.answer(classifiers())
  assert found.title == "memdiff+csl: 86.0 % balanced accuracy"  # references take no part
  assert found.verdict == "unclear"
  assert "the highest of 4 scores on the test set" in found.explanation


def test_a_single_row_needs_no_warning():
  report = classifiers(classification=make_report()["classification"][:1])
  assert answers.answer(report).explanation == "Description of own_head."


def test_rows_without_the_criterion_are_ranked_by_top1():
  report = classifiers(criterion=None)
  assert answers.answer(report).title == "memdiff+csl: 87.0 % accuracy"


@pytest.mark.parametrize("rows", [[], None])
def test_nothing_is_the_answer_to_nothing(rows):
  assert answers.answer(classifiers(classification=rows)) is None
  assert answers.answer({}) is None
