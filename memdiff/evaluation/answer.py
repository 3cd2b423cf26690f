"""The first words of a run: what to use, what it is worth, and whether synthetic data add to it.

Terminal, page and TensorBoard begin with them. A claim follows its interval: a difference whose
95 % interval contains zero is called unclear, however large it looks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from memdiff.evaluation.lookup import description_of, is_reference, made_data, mean_of, row_of
from memdiff.evaluation.numerals import bounds, is_interval, is_number, percent, place, points, to

# criterion -> (name, meaning, the column of the table that holds it)
CRITERIA = {
  "balanced_accuracy": (
    "balanced accuracy",
    "the share of test examples classified correctly in each class, averaged over classes",
    "balanced_accuracy",
  ),
  "accuracy": ("accuracy", "the share of all test examples classified correctly", "top1"),
  "macro_f1": ("macro-F1", "the F1 score of each class, averaged over classes", "macro_f1"),
}

_PLAIN = "plain training"
_KNOWLEDGE = "real+class_knowledge"  # the row that knows more of classes than their examples
_TOO_GOOD = 0.1  # so much more in cross-validation than on the test set is no accident


@dataclasses.dataclass(frozen=True)
class Effect:
  """One difference between two methods on the test set, in words.

  Attributes:
    title: what is measured.
    verdict: "better", "worse" or "unclear".
    ours, theirs: percent.
    change: signed percentage points.
    interval: its 95 % interval; empty if unknown.
    sentence: all of it.
  """

  title: str
  verdict: str
  ours: str
  theirs: str
  change: str
  interval: str
  sentence: str


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a reader needs first.

  Attributes:
    title: "Use X", without a full stop.
    explanation: what X is, or why nothing is recommended; whole sentences or nothing.
    verdict: "better" or "worse" than plain training if the intervals say so, otherwise "unclear".
    method: X.
    effects: of X over plain training; the rarest classes first.
    synthetic: sentences about synthetic data; the first is the finding.
    synthetic_verdict: "better", "worse" or "unclear"; empty if none were made.
    terms: what the words mean, the criterion first.
  """

  title: str
  explanation: str
  verdict: str
  method: str | None
  effects: tuple[Effect, ...]
  synthetic: tuple[str, ...]
  synthetic_verdict: str
  terms: tuple[str, ...]

  def lines(self) -> list[str]:
    """The essence as plain lines of text, for terminal and TensorBoard."""
    first = f"{self.title}. {self.explanation}".strip()
    return [first, *(e.sentence for e in self.effects), *self.synthetic[:1], *self.terms[:1]]


def verdict(difference: Mapping[str, Any] | None) -> str:
  """Whether the 95 % interval of a difference lies above zero, below it, or on both sides."""
  interval = (difference or {}).get("interval")
  if not is_interval(interval) or interval[0] <= 0 <= interval[1]:
    return "unclear"
  return "better" if interval[0] > 0 else "worse"


def answer(report: Mapping[str, Any]) -> Answer | None:
  """The answer that a report supports; None if it has no rows at all."""
  headline = report.get("headline") or {}
  advice = report.get("recommendation") or {}
  method = headline.get("recommended") or advice.get("method")
  if not method:
    return _best_row(report)
  judged = headline.get("by", "cross-validation") == "cross-validation"
  effects = () if method == headline.get("plain") else _effects(report, headline)
  overall = verdict((headline.get("over_plain") or {}).get("overall")) if effects else "unclear"
  synthetic = headline.get("synthetic")
  return Answer(
    title=f"Use {method}" if judged else "No recommendation",
    explanation=_explanation(report, method, headline, judged),
    verdict=overall if judged else "unclear",
    method=method,
    effects=effects,
    synthetic=tuple(_synthetic_sentences(report, synthetic, judged)) if synthetic else (),
    synthetic_verdict=verdict(synthetic.get("overall")) if synthetic else "",
    terms=tuple(_terms(report, headline)),
  )


def _best_row(report: Mapping[str, Any]) -> Answer | None:
  """Where nothing was chosen beforehand: the row with the highest score, and a warning."""
  rows = [row for row in report.get("classification") or [] if not is_reference(report, row)]
  name, _, key = CRITERIA.get(report.get("criterion"), CRITERIA["accuracy"])
  scored = [(mean_of(row, key), row["method"]) for row in rows]
  scored = [(score, method) for score, method in scored if score is not None]
  if not scored:
    return None
  score, method = max(scored, key=lambda pair: pair[0])
  explanation = _as_sentence(description_of(report, method))
  if len(scored) > 1:
    explanation += (
      f" This is the highest of {len(scored)} scores on the test set. Nothing was chosen"
      " beforehand, so part of its lead may be chance."
    )
  return Answer(
    title=f"{method}: {percent(score)} % {name}",
    explanation=explanation.strip(),
    verdict="unclear",
    method=method,
    effects=(),
    synthetic=(),
    synthetic_verdict="",
    terms=tuple(_terms(report, {})),
  )


def _explanation(
  report: Mapping[str, Any], method: str, headline: Mapping[str, Any], judged: bool
) -> str:
  described = description_of(report, method)
  if not judged:
    looked_at = f"{method} ({described})" if described else method
    return (
      "The methods were not compared by cross-validation; to compare them, set selection.folds to"
      f" 2 or more. This run looked at {looked_at}."
    )
  overall = (headline.get("over_plain") or {}).get("overall")
  warning = f"On the test set it is worse than {_PLAIN}." if verdict(overall) == "worse" else ""
  if method == headline.get("plain"):
    warning = "This is plain training; nothing is clearly better."
  sentences = (_as_sentence(described), warning, _knowledge(report), _doubt(report, method))
  return " ".join(sentence for sentence in sentences if sentence)


def _knowledge(report: Mapping[str, Any]) -> str:
  """Whether embeddings of the classes are used, if the run was given some."""
  scores = (report.get("recommendation") or {}).get("scores") or {}
  found = (scores.get(_KNOWLEDGE) or {}).get("in_blend")
  if not found:
    return ""
  if found["interval"] == [0, 0]:
    return "Embeddings of the classes are not used: in cross-validation they change nothing."
  use = "are used" if found["used"] else "are not used, since they bring no clear gain"
  return (
    f"Embeddings of the classes {use}: in cross-validation they change the blend's score by"
    f" {_change(found | {'mean': found['gain']})}."
  )


def _doubt(report: Mapping[str, Any], method: str) -> str:
  """What to think of a choice by cross-validation that scored far more than the test set does."""
  advice = report.get("recommendation") or {}
  expected = ((advice.get("scores") or {}).get(method) or {}).get("score")
  name, _, key = CRITERIA.get(report.get("criterion"), CRITERIA["balanced_accuracy"])
  found = mean_of(row_of(report, method), key)
  if expected is None or found is None or expected - found < _TOO_GOOD:
    return ""
  sentence = (
    f"This choice may be wrong: in cross-validation its {name} is {percent(expected)} %, on the"
    f" test set {percent(found)} %. Either the encoder has memorised the training examples, or the"
    " test set differs from them in kind."
  )
  if (advice.get("basis") or {}).get("encoder") == "frozen":
    sentence += (
      " Cross-validation is reliable only if the encoder has not seen the held-out examples."
    )
    trained = ((report.get("config") or {}).get("classifier") or {}).get("num_epochs")
    if trained:
      sentence += " To train an encoder for each fold, set selection.encoder=retrained."
  return sentence


def _as_sentence(text: str) -> str:
  return f"{text[0].upper()}{text[1:]}." if text else ""


def _effects(report: Mapping[str, Any], headline: Mapping[str, Any]) -> tuple[Effect, ...]:
  """Few and overall; the common classes only if they pay for it."""
  over = headline.get("over_plain") or {}
  name = CRITERIA.get(report.get("criterion"), CRITERIA["accuracy"])[0]
  many = over.get("many") if verdict(over.get("many")) == "worse" else None
  found = (
    ("Rarest classes", "right", over.get("few")),
    ("All classes", name, over.get("overall")),
    ("Most common classes", "right", many),
  )
  effects = [_effect(*words, d) for *words, d in found if d and is_number(d.get("mean"))]
  if effects and headline.get("plain"):  # named once
    named = effects[0].sentence.replace(_PLAIN, f"{_PLAIN} ({headline['plain']})", 1)
    effects[0] = dataclasses.replace(effects[0], sentence=named)
  return tuple(effects)


def _effect(title: str, measure: str, difference: Mapping[str, Any]) -> Effect:
  side = verdict(difference)
  ours, theirs = percent(difference.get("ours")), percent(difference.get("theirs"))
  comparison = {
    "better": f" instead of {theirs} % with {_PLAIN}",
    "worse": f", below the {theirs} % of {_PLAIN}",
    "unclear": f", no clear difference from the {theirs} % of {_PLAIN}",
  }[side]
  return Effect(
    title=title if measure == "right" else f"{title}, {measure}",
    verdict=side,
    ours=ours,
    theirs=theirs,
    change=points(difference["mean"]),
    interval=to(difference["interval"]) if is_interval(difference.get("interval")) else "",
    sentence=f"{title}: {ours} % {measure}{comparison}: {_change(difference)}.",
  )


def _change(difference: Mapping[str, Any], interval_of: str = "95 % interval") -> str:
  """`+8.6 points, 95 % interval +5.1 to +12.0`."""
  text = f"{points(difference['mean'])} points"
  if not is_interval(difference.get("interval")):
    return text
  return f"{text}, {interval_of} {to(difference['interval'])}"


def _synthetic_sentences(
  report: Mapping[str, Any], synthetic: Mapping[str, Any], judged: bool
) -> list[str]:
  difference = synthetic.get("overall") or {}
  if not is_number(difference.get("mean")):
    return []
  first = _finding(report, bool(synthetic.get("recommended")), verdict(difference), judged)
  best = ("the best method with them, ", ", the best without") if judged else ("", "")
  sentences = [
    f"{first}: {best[0]}{synthetic['method']}{',' if judged else ''} is {place(difference['mean'])}"
    f" {synthetic['control']}{best[1]}{bounds(difference)}."
  ]
  few, expected = synthetic.get("few"), synthetic.get("expected")
  if few and is_number(few.get("mean")):
    sentences.append(f"On the rarest classes the difference is {_change(few)}.")
  if expected and is_number(expected.get("mean")):
    words = "interval over all methods at once"
    sentences.append(f"Cross-validation expected {_change(expected, words)}.")
  return [*sentences, *_room_sentences((report.get("headline") or {}).get("room"))]


def _finding(report: Mapping[str, Any], recommended: bool, side: str, judged: bool) -> str:
  """What the test set says of synthetic data, beside what cross-validation had said."""
  made = made_data(report).capitalize()
  if recommended:
    return {
      "better": f"{made} are part of this gain",
      "unclear": f"{made} were better in cross-validation, but make no clear difference on the test"
      " set",
      "worse": f"{made} were better in cross-validation, but are worse on the test set",
    }[side]
  surprise = "do better on the test set, although cross-validation did not predict it"
  return f"{made} " + {
    "better": surprise if judged else "do better on the test set",
    "unclear": "bring no clear gain",
    "worse": "do not help",
  }[side]  # fmt: skip


def _room_sentences(room: Mapping[str, Any] | None) -> list[str]:
  difference = (room or {}).get("overall") or {}
  if not is_number(difference.get("mean")):
    return []
  if verdict(difference) == "better":
    return [
      f"The real examples that were left out would add {_change(difference)}"
      f" ({room['reference']}). This is the most that synthetic examples could add."
    ]
  return [
    f"Even the left-out real examples bring no clear gain ({room['reference']}:"
    f" {_change(difference)}), so synthetic examples have little room to help."
  ]


def _terms(report: Mapping[str, Any], headline: Mapping[str, Any]) -> list[str]:
  terms = []
  if report.get("criterion") in CRITERIA:
    name, meaning, _ = CRITERIA[report["criterion"]]
    terms.append(f"Criterion: {name}, {meaning}.")
  if headline.get("plain"):
    described = description_of(report, headline["plain"])
    terms.append(f"Plain training: {headline['plain']}{described and ', ' + described}.")
  if (headline.get("over_plain") or {}).get("few"):
    rules = [g["rule"] for g in report.get("groups") or [] if g["name"] == "few"]
    terms += [f"Rarest classes: {rule}." for rule in rules]
  return terms
