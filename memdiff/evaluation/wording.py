"""A run's report in words: sentences that its numbers support, and numbers as people write them.

What is claimed is computed: a gain that the seeds cannot tell from noise is called noise, a loss is
called a loss. Parts of the report that are missing leave out their sentence and no more.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.special import stdtrit

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

# --- sentences -------------------------------------------------------------------------------


def headline(report: Mapping[str, Any]) -> list[str]:
  """What the run shows, in sentences that its numbers support; the most important one first."""
  sentences = (
    _gain_sentence(report),
    _headroom_sentence(report),
    _groups_sentence(report),
    _rival_sentence(report),
  )
  return [sentence for sentence in sentences if sentence]


def _gain_sentence(report: Mapping[str, Any]) -> str:
  comparison = report.get("comparison") or {}
  gain = comparison.get("gain") or {}
  mean, std, seeds = gain.get("mean"), gain.get("std"), num_seeds(report)
  outcome = verdict(mean, std, seeds)
  if outcome == "unknown":
    return ""
  method, control = comparison["method"], _described(report, comparison["control"])
  if outcome == "same":
    return f"{method} scores the same as {control}: the difference rounds to 0.0 points."
  spread = f" ± {percent(std)}" if seeds > 1 and is_number(std) else ""
  side = "above" if mean > 0 else "below"
  claim = f"{method} scores {percent(abs(mean))}{spread} points {side} {control}"
  if outcome == "one seed":
    return f"{claim}. One seed was run, so nothing tells how much of this is chance."
  half = _half_interval(std, seeds)
  interval = f"95 % interval {points(mean - half)} to {points(mean + half)}"
  if outcome == "noise":
    return (
      f"{claim}. This is within the noise between the {seeds} seeds ({interval}), "
      "so this run does not show that the synthetic features change the result."
    )
  return {
    "better": f"{claim}, which is more than the noise between the {seeds} seeds ({interval}).",
    "worse": (
      f"{claim}, which is more than the noise between the {seeds} seeds ({interval}): "
      "in this run the synthetic features did harm."
    ),
  }[outcome]


def _headroom_sentence(report: Mapping[str, Any]) -> str:
  comparison = report.get("comparison") or {}
  headroom = comparison.get("headroom") or {}
  mean, std, seeds = headroom.get("mean"), headroom.get("std"), num_seeds(report)
  outcome = verdict(mean, std, seeds)
  if outcome == "unknown":
    return ""
  reference = _described(report, comparison["reference"])
  control = comparison["control"]
  spread = f" ± {percent(std)}" if seeds > 1 and is_number(std) else ""
  if outcome in ("same", "worse") or (outcome == "one seed" and mean < 0):
    place = "level with" if outcome == "same" else f"{percent(-mean)}{spread} points below"
    return (
      f"The {reference} is {place} {control}: even real additional examples do not help here, "
      "so this run leaves no room for synthetic ones."
    )
  if outcome == "noise":
    side = "above" if mean > 0 else "below"
    return (
      f"The {reference} is {percent(abs(mean))}{spread} points {side} {control}, within the "
      "noise between seeds: there is little room that synthetic features could fill."
    )
  return (
    f"The {reference} is {percent(mean)}{spread} points above {control}: that is the room which "
    f"synthetic features could fill. {_closed(comparison, seeds)}"
  ).strip()


def has_room(comparison: Mapping[str, Any], seeds: int) -> bool:
  """Whether the reference is above the control, as far as the seeds can tell."""
  headroom = comparison.get("headroom") or {}
  outcome = verdict(headroom.get("mean"), headroom.get("std"), seeds)
  return outcome == "better" or (outcome == "one seed" and headroom["mean"] > 0)


def _closed(comparison: Mapping[str, Any], seeds: int) -> str:
  closed = comparison.get("gap_closed") or {}
  share, std = closed.get("mean"), closed.get("std")
  if not is_number(share):
    return ""
  if share <= 0:
    return f"{comparison['method']} fills none of it."
  spread = f" ± {100 * std:.0f}" if seeds > 1 and is_number(std) else ""
  return f"{comparison['method']} fills {100 * share:.0f}{spread} % of it."


def _groups_sentence(report: Mapping[str, Any]) -> str:
  comparison = report.get("comparison") or {}
  method, control = (row_of(report, comparison.get(key)) for key in ("method", "control"))
  parts = []
  for key in ("few", "medium", "many"):
    ours, theirs = mean_of(method, key), mean_of(control, key)
    if ours is not None and theirs is not None:
      parts.append(f"{percent(ours)} % against {percent(theirs)} % on {key}")
  if not parts:
    return ""
  start = f"By group, {comparison['method']} against {comparison['control']}: "
  return f"{start}{_listed(parts)}."


def _rival_sentence(report: Mapping[str, Any]) -> str:
  """Names a method that beats ours without the reference's extra data, if there is one."""
  comparison = report.get("comparison") or {}
  ours = mean_of(row_of(report, comparison.get("method")), "top1")
  named = {comparison.get(key) for key in ("method", "control")}
  rows = report.get("classification") or []
  rivals = [r for r in rows if r["method"] not in named and not is_reference(report, r)]
  scores = [(score, row["method"]) for row in rivals if (score := mean_of(row, "top1")) is not None]
  if ours is None or not scores or round(100 * max(scores)[0], 1) <= round(100 * ours, 1):
    return ""
  score, name = max(scores)
  return f"{name} scores higher than {comparison['method']} in this run: {percent(score)} % top-1."


def recommendation(report: Mapping[str, Any]) -> list[str]:
  """What cross-validation on training data recommends, in sentences; none where it was not run."""
  advice = report.get("recommendation")
  if not advice:
    return []
  gain, (low, high) = advice["expected_gain"], advice["interval"]
  difference = (
    f"{points(gain)} points against {advice['control']}, 95 % interval {points(low)} to"
    f" {points(high)}"
  )
  if advice["method"] == advice["best"] != advice["control"]:
    first = f"Use {_described(report, advice['method'])}: {difference}."
  elif advice["best"] == advice["control"]:
    first = (
      f"Use {_described(report, advice['method'])}: no method that adds synthetic features scores"
      " higher in cross-validation."
    )
  else:
    first = (
      f"Use {_described(report, advice['method'])}: the best method with synthetic features,"
      f" {advice['best']}, is not better for certain ({difference})."
    )
  sentences = [first, _basis_sentence(advice["basis"])]
  if advice.get("agreement"):
    sentences.append(_agreement_sentence(advice))
  return sentences


def _basis_sentence(basis: Mapping[str, Any]) -> str:
  encoders = {
    "retrained": "with an encoder per fold that never saw what it is judged on",
    "frozen": "on the features as they are; if their encoder was trained on these very examples, it"
    " knows them by heart and such scores mislead",
  }
  repeats = f", {basis['repeats']} times" if basis["repeats"] > 1 else ""
  return (
    f"This was decided on training data alone, by {basis['folds']}-fold cross-validation{repeats}, "
    f"{encoders[basis['encoder']]}. A score is the accuracy averaged over classes."
  )


def _agreement_sentence(advice: Mapping[str, Any]) -> str:
  agreement = advice["agreement"]
  gain = agreement["test_gain"]
  return (
    f"The test set, looked at afterwards: {advice['best']} against {advice['control']} gives"
    f" {points(gain['mean'])} points, {100 * agreement['pairs']:.0f} % of the pairs of methods"
    f" stand in the same order (Kendall's tau {agreement['kendall_tau']:.2f}), and the best of"
    f" {agreement['methods']} methods is {percent(agreement['regret_of_recommended'])} points"
    " above the recommended one."
  )


def verdict(mean: float | None, std: float | None, num_seeds: int) -> str:
  """Classifies a paired difference of two fractions over seeds.

  Returns:
    "unknown"; "same", when it rounds to 0.0 points; "one seed"; "noise", when the 95 % t interval
    of the mean contains zero; "better"; or "worse".
  """
  if not is_number(mean):
    return "unknown"
  if abs(100 * mean) < 0.05:
    return "same"
  if num_seeds < 2:
    return "one seed"
  if abs(mean) <= _half_interval(std, num_seeds):
    return "noise"
  return "better" if mean > 0 else "worse"


def _half_interval(std: float | None, num_seeds: int) -> float:
  """Half the width of the 95 % t interval of a mean over at least two seeds."""
  if not is_number(std):
    return math.inf
  return float(stdtrit(num_seeds - 1, 0.975)) * std / math.sqrt(num_seeds)


def preamble(report: Mapping[str, Any]) -> list[str]:
  """The lines above the text table: the data set, the seeds, the groups' rule."""
  dataset = report.get("dataset") or {}
  parts = [f"test accuracy in % on {dataset.get('name', 'the test set')}"]
  counts = dataset.get("train_counts") or []
  if counts:
    parts.append(f"{count(len(counts), 'class', 'classes')}")
    parts.append(f"{max(counts):,} to {min(counts):,} training examples per class")
  seeds = num_seeds(report)
  if seeds:
    parts.append("1 seed, so no spread" if seeds == 1 else f"mean ± std over {seeds} seeds")
  groups = [
    f"{group['name']} = {group['rule']} ({count(len(group['classes']), 'class', 'classes')})"
    for group in report.get("groups") or []
  ]
  return [", ".join(parts), *(["; ".join(groups)] if groups else [])]


def summary(report: Mapping[str, Any]) -> str:
  """One paragraph for a reader who knows nothing about the method."""
  dataset = report.get("dataset") or {}
  counts = dataset.get("train_counts") or []
  synthetic = [n for n in report.get("synthetic_counts") or [] if n]
  text = []
  if counts:
    imbalance = dataset.get("imbalance")
    factor = f" (imbalance factor {imbalance:g})" if is_number(imbalance) else ""
    text.append(
      f"The data set {dataset.get('name', '')} has {count(len(counts), 'class', 'classes')}, and "
      f"they are not equally common: the largest one has {count(max(counts), 'training example')},"
      f" the smallest {min(counts):,}{factor}. A classifier trained on such a long tail learns the"
      " common classes well and neglects the rare ones."
    )
  if synthetic:
    text.append(
      f"memdiff invented {count(sum(synthetic), 'synthetic example')} for "
      f"{_helped_classes(counts, report['synthetic_counts'])}, not as pictures but as features, "
      "the lists of numbers in which the classifier itself describes what it sees, and trained the "
      "classifier’s last layer again with them. This page tells whether that helped."
    )
  seeds, tested = num_seeds(report), dataset.get("test_count")
  if seeds:
    times = "once," if seeds == 1 else f"{seeds} times, from different random seeds,"
    tests = f" and tested on the same {tested:,} examples that took no part in it" if tested else ""
    text.append(f"Every method was trained {times}{tests}".rstrip(",") + ".")
  return " ".join(text)


def _helped_classes(counts: Sequence[int], synthetic: Sequence[int]) -> str:
  """Which classes got synthetic features, in words that the counts bear out."""
  helped = [n for n, added in zip(counts, synthetic, strict=False) if added]
  others = [n for n, added in zip(counts, synthetic, strict=False) if not added]
  number = sum(1 for added in synthetic if added)
  if helped and others and max(helped) <= min(others):
    return f"the {number} rarest classes" if number > 1 else "the rarest class"
  return count(number, "class", "classes")


def steps(report: Mapping[str, Any]) -> list[tuple[str, str]]:
  dataset = report.get("dataset") or {}
  counts = dataset.get("train_counts") or []
  synthetic = [n for n in report.get("synthetic_counts") or [] if n]
  if not counts or not synthetic:
    return []
  return [
    ("Encode", f"A network learns from {sum(counts):,} examples to turn each into a feature, a "
     "list of numbers that describes it."),
    ("Remember", f"A memory bank keeps, for each of {len(counts):,} classes, the mean feature and a"
     " sample of single ones."),
    ("Hallucinate", "A diffusion model looks at a class’s memory and turns noise into new features:"
     f" {sum(synthetic):,} of them."),
    ("Weigh", "Each new feature gets a confidence: how well it fits its class."),
    ("Retrain", "The last layer learns again from real and new features; a doubtful one counts"
     " less."),
  ]  # fmt: skip


# --- numbers as text -------------------------------------------------------------------------


def is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and math.isfinite(value)


def percent(fraction: float | None) -> str:
  return f"{100 * fraction:.1f}" if is_number(fraction) else "–"


def points(fraction: float) -> str:
  """A difference of two fractions in signed percentage points."""
  size = f"{abs(100 * fraction):.1f}"
  return size if float(size) == 0 else ("+" if fraction > 0 else "−") + size


def mean_std(stat: Mapping[str, Any] | None, num_seeds: int) -> str:
  """`mean ± std` in percent; the mean alone for one seed, a dash where there is nothing."""
  if not stat or not is_number(stat.get("mean")):
    return "–"
  if num_seeds == 1 or not is_number(stat.get("std")):
    return percent(stat["mean"])
  return f"{percent(stat['mean'])} ± {percent(stat['std'])}"


def number(value: float | None, decimals: int | None = None) -> str:
  """Three significant digits, or as many decimals as asked for."""
  if not is_number(value):
    return "–"
  if 0 < abs(value) < 5e-5:
    digits, power = f"{value:.1e}".split("e")
    return f"{digits} × 10{str(int(power)).translate(_SUPERSCRIPTS)}".replace("-", "−")
  decimals = _decimals(value) if decimals is None else decimals
  return f"{value:,.{decimals}f}".replace("-", "−")


def _decimals(value: float) -> int:
  """The decimals that show three significant digits, at most 5."""
  return min(5, max(0, 2 - math.floor(math.log10(abs(value))))) if value else 0


def number_std(stat: Mapping[str, Any], num_seeds: int) -> str:
  mean, std = stat.get("mean"), stat.get("std")
  if num_seeds == 1 or not is_number(mean) or not is_number(std):
    return number(mean)
  return f"{number(mean)} ± {number(std, _decimals(mean or std))}"


def tied(text: str) -> str:
  """Keeps numbers and their units on one line."""
  return text.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")


def seconds(value: float | None) -> str:
  if not is_number(value):
    return "–"
  if value < 99.95:
    return f"{value:.1f} s"
  minutes, rest = divmod(round(value), 60)
  return f"{minutes} min {rest:02d} s"


def count(number: int, one: str, many: str | None = None) -> str:
  return f"{number:,} {one if number == 1 else many or one + 's'}"


def _listed(items: Sequence[str]) -> str:
  """The items within a sentence: `a, b and c`."""
  return " and ".join(part for part in (", ".join(items[:-1]), *items[-1:]) if part)


# --- looking things up in a report that may lack them -----------------------------------------


def row_of(report: Mapping[str, Any], method: str | None) -> Mapping[str, Any]:
  rows = report.get("classification") or []
  return next((row for row in rows if row["method"] == method), {})


def is_reference(report: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
  """Whether a row was given real examples that no method may use."""
  reference = (report.get("comparison") or {}).get("reference")
  return bool(row.get("reference")) or row["method"] == reference


def mean_of(row: Mapping[str, Any], key: str) -> float | None:
  value = (row.get(key) or {}).get("mean")
  return value if is_number(value) else None


def num_seeds(report: Mapping[str, Any]) -> int:
  """The seeds behind the comparison: those of its method, or the most that any method has."""
  rows = report.get("classification") or []
  method = (report.get("comparison") or {}).get("method")
  counts = {row["method"]: len(row.get("seeds") or []) for row in rows}
  return counts.get(method, max(counts.values(), default=0))


def _described(report: Mapping[str, Any], method: str) -> str:
  text = (row_of(report, method).get("description") or "").strip().rstrip(".")
  if text[1:2].islower():
    text = text[0].lower() + text[1:]
  return f"{method} ({text})" if text else method
