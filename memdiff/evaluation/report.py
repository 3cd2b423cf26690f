"""Turns a run's report into words: one HTML page for people and one text table for the terminal.

The page is a single file that needs nothing else: pictures are embedded, styles are inline, there
is no script and nothing is loaded from anywhere, so it can be mailed, archived and printed. What it
claims is computed from the numbers: a gain that the seeds cannot tell from noise is called noise, a
loss is called a loss. Parts of the report that are missing leave out their section and no more.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from scipy.special import stdtrit

_TEMPLATE = "report.html.j2"
HEADLINE_COLUMNS = (
  ("top1", "top-1"),
  ("many", "many"),
  ("medium", "medium"),
  ("few", "few"),
  ("macro_f1", "macro-F1"),
)
_MAX_DETAILED_CLASSES = 200

# The pictures that the page has a place and a caption for; others are shown at its end.
FIGURES = (
  "long_tail_profile",
  "per_class_accuracy",
  "feature_map",
  "confidence_histogram",
  "training_curves",
)

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

_METRIC_TITLES = {
  "diversity": "Diversity",
  "kl_gaussian": "Gaussian KL divergence",
  "mmd": "Maximum mean discrepancy",
  "separation": "Class separation",
  "memorization_ratio": "Memorisation ratio",
  "frechet": "Fréchet distance",
  "precision": "Precision",
  "recall": "Recall",
}


def render_html(report: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
  """The whole report as one self-contained HTML page.

  Args:
    report: the run's report, as it is written to report.json.
    figures: PNG files by name; those named in `FIGURES` have a section of their own.
  """
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters["tied"] = _tied
  return environment.get_template(_TEMPLATE).render(_view(report, figures))


def text_table(report: Mapping[str, Any]) -> str:
  """The results as aligned text: one line per method, `mean ± std` over seeds, in percent.

  Lines above the table say what was run and by which rule classes are called many, medium or few.
  With a single seed there is no spread, and only the mean is printed.
  """
  header = ["method", *(title for _, title in HEADLINE_COLUMNS)]
  table = [header]
  for row in report.get("classification") or []:
    seeds = len(row.get("seeds") or [])
    table.append([row["method"], *(_mean_std(row.get(key), seeds) for key, _ in HEADLINE_COLUMNS)])
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  lines = []
  for cells in table:
    rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    lines.append("   ".join([cells[0].ljust(widths[0]), *rest]))
  return "\n".join([*_preamble(report), "", lines[0], "-" * len(lines[0]), *lines[1:]])


def headline(report: Mapping[str, Any]) -> list[str]:
  """What the run shows, in sentences that its numbers support; the most important one first."""
  sentences = (
    _gain_sentence(report),
    _headroom_sentence(report),
    _groups_sentence(report),
    _rival_sentence(report),
  )
  return [sentence for sentence in sentences if sentence]


def verdict(mean: float | None, std: float | None, num_seeds: int) -> str:
  """Classifies a paired difference of two fractions over seeds.

  Returns:
    "unknown"; "same", when it rounds to 0.0 points; "one seed"; "noise", when the 95 % t interval
    of the mean contains zero; "better"; or "worse".
  """
  if not _is_number(mean):
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
  if not _is_number(std):
    return math.inf
  return float(stdtrit(num_seeds - 1, 0.975)) * std / math.sqrt(num_seeds)


# Numbers as text.


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and math.isfinite(value)


def _percent(fraction: float | None) -> str:
  return f"{100 * fraction:.1f}" if _is_number(fraction) else "–"


def _points(fraction: float) -> str:
  """A difference of two fractions in signed percentage points."""
  size = f"{abs(100 * fraction):.1f}"
  return size if float(size) == 0 else ("+" if fraction > 0 else "−") + size


def _mean_std(stat: Mapping[str, Any] | None, num_seeds: int) -> str:
  """`mean ± std` in percent; the mean alone for one seed, a dash where there is nothing."""
  if not stat or not _is_number(stat.get("mean")):
    return "–"
  if num_seeds == 1 or not _is_number(stat.get("std")):
    return _percent(stat["mean"])
  return f"{_percent(stat['mean'])} ± {_percent(stat['std'])}"


def _number(value: float | None, decimals: int | None = None) -> str:
  """Three significant digits, or as many decimals as asked for."""
  if not _is_number(value):
    return "–"
  if 0 < abs(value) < 5e-5:
    digits, power = f"{value:.1e}".split("e")
    return f"{digits} × 10{str(int(power)).translate(_SUPERSCRIPTS)}".replace("-", "−")
  decimals = _decimals(value) if decimals is None else decimals
  return f"{value:,.{decimals}f}".replace("-", "−")


def _decimals(value: float) -> int:
  """The decimals that show three significant digits, at most 5."""
  return min(5, max(0, 2 - math.floor(math.log10(abs(value))))) if value else 0


def _number_std(stat: Mapping[str, Any], num_seeds: int) -> str:
  mean, std = stat.get("mean"), stat.get("std")
  if num_seeds == 1 or not _is_number(mean) or not _is_number(std):
    return _number(mean)
  return f"{_number(mean)} ± {_number(std, _decimals(mean or std))}"


def _tied(text: str) -> str:
  """Keeps numbers and their units on one line."""
  return text.replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")


def _seconds(value: float | None) -> str:
  if not _is_number(value):
    return "–"
  if value < 99.95:
    return f"{value:.1f} s"
  minutes, rest = divmod(round(value), 60)
  return f"{minutes} min {rest:02d} s"


def _count(number: int, one: str, many: str | None = None) -> str:
  return f"{number:,} {one if number == 1 else many or one + 's'}"


def _listed(items: Sequence[str]) -> str:
  """The items within a sentence: `a, b and c`."""
  return " and ".join(part for part in (", ".join(items[:-1]), *items[-1:]) if part)


# Looking things up in a report that may lack them.


def _row(report: Mapping[str, Any], method: str | None) -> Mapping[str, Any]:
  rows = report.get("classification") or []
  return next((row for row in rows if row["method"] == method), {})


def _mean(row: Mapping[str, Any], key: str) -> float | None:
  value = (row.get(key) or {}).get("mean")
  return value if _is_number(value) else None


def _num_seeds(report: Mapping[str, Any]) -> int:
  """The seeds behind the comparison: those of its method, or the most that any method has."""
  rows = report.get("classification") or []
  method = (report.get("comparison") or {}).get("method")
  counts = {row["method"]: len(row.get("seeds") or []) for row in rows}
  return counts.get(method, max(counts.values(), default=0))


def _truth_test(report: Mapping[str, Any]) -> Mapping[str, Any]:
  nested = (report.get("features") or {}).get("truth_test")
  return nested or report.get("truth_test") or {}


def _described(report: Mapping[str, Any], method: str) -> str:
  text = (_row(report, method).get("description") or "").strip().rstrip(".")
  if text[1:2].islower():
    text = text[0].lower() + text[1:]
  return f"{method} ({text})" if text else method


# Sentences.


def _preamble(report: Mapping[str, Any]) -> list[str]:
  """The lines above the text table: the data set, the seeds, the groups' rule."""
  dataset = report.get("dataset") or {}
  parts = [f"test accuracy in % on {dataset.get('name', 'the test set')}"]
  counts = dataset.get("train_counts") or []
  if counts:
    parts.append(f"{_count(len(counts), 'class', 'classes')}")
    parts.append(f"{max(counts):,} to {min(counts):,} training examples per class")
  seeds = _num_seeds(report)
  if seeds:
    parts.append("1 seed, so no spread" if seeds == 1 else f"mean ± std over {seeds} seeds")
  groups = [
    f"{group['name']} = {group['rule']} ({_count(len(group['classes']), 'class', 'classes')})"
    for group in report.get("groups") or []
  ]
  return [", ".join(parts), *(["; ".join(groups)] if groups else [])]


def _gain_sentence(report: Mapping[str, Any]) -> str:
  comparison = report.get("comparison") or {}
  gain = comparison.get("gain") or {}
  mean, std, seeds = gain.get("mean"), gain.get("std"), _num_seeds(report)
  outcome = verdict(mean, std, seeds)
  if outcome == "unknown":
    return ""
  method, control = comparison["method"], _described(report, comparison["control"])
  if outcome == "same":
    return f"{method} scores the same as {control}: the difference rounds to 0.0 points."
  spread = f" ± {_percent(std)}" if seeds > 1 and _is_number(std) else ""
  side = "above" if mean > 0 else "below"
  claim = f"{method} scores {_percent(abs(mean))}{spread} points {side} {control}"
  if outcome == "one seed":
    return f"{claim}. One seed was run, so nothing tells how much of this is chance."
  half = _half_interval(std, seeds)
  interval = f"95 % interval {_points(mean - half)} to {_points(mean + half)}"
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
  mean, std, seeds = headroom.get("mean"), headroom.get("std"), _num_seeds(report)
  outcome = verdict(mean, std, seeds)
  if outcome == "unknown":
    return ""
  reference = _described(report, comparison["reference"])
  control = comparison["control"]
  spread = f" ± {_percent(std)}" if seeds > 1 and _is_number(std) else ""
  if outcome in ("same", "worse") or (outcome == "one seed" and mean < 0):
    place = "level with" if outcome == "same" else f"{_percent(-mean)}{spread} points below"
    return (
      f"The {reference} is {place} {control}: even real additional examples do not help here, "
      "so this run leaves no room for synthetic ones."
    )
  if outcome == "noise":
    side = "above" if mean > 0 else "below"
    return (
      f"The {reference} is {_percent(abs(mean))}{spread} points {side} {control}, within the "
      "noise between seeds: there is little room that synthetic features could fill."
    )
  return (
    f"The {reference} is {_percent(mean)}{spread} points above {control}: that is the room which "
    f"synthetic features could fill. {_closed(comparison, seeds)}"
  ).strip()


def _has_room(comparison: Mapping[str, Any], seeds: int) -> bool:
  """Whether the reference is above the control, as far as the seeds can tell."""
  headroom = comparison.get("headroom") or {}
  outcome = verdict(headroom.get("mean"), headroom.get("std"), seeds)
  return outcome == "better" or (outcome == "one seed" and headroom["mean"] > 0)


def _closed(comparison: Mapping[str, Any], seeds: int) -> str:
  closed = comparison.get("gap_closed") or {}
  share, std = closed.get("mean"), closed.get("std")
  if not _is_number(share):
    return ""
  if share <= 0:
    return f"{comparison['method']} fills none of it."
  spread = f" ± {100 * std:.0f}" if seeds > 1 and _is_number(std) else ""
  return f"{comparison['method']} fills {100 * share:.0f}{spread} % of it."


def _groups_sentence(report: Mapping[str, Any]) -> str:
  comparison = report.get("comparison") or {}
  method, control = (_row(report, comparison.get(key)) for key in ("method", "control"))
  parts = []
  for key in ("few", "medium", "many"):
    ours, theirs = _mean(method, key), _mean(control, key)
    if ours is not None and theirs is not None:
      parts.append(f"{_percent(ours)} % against {_percent(theirs)} % on {key}")
  if not parts:
    return ""
  start = f"By group, {comparison['method']} against {comparison['control']}: "
  return f"{start}{_listed(parts)}."


def _rival_sentence(report: Mapping[str, Any]) -> str:
  """Names a method that beats ours without the reference's extra data, if there is one."""
  comparison = report.get("comparison") or {}
  ours = _mean(_row(report, comparison.get("method")), "top1")
  named = {comparison.get(key) for key in ("method", "control", "reference")}
  rivals = [row for row in report.get("classification") or [] if row["method"] not in named]
  scores = [(score, row["method"]) for row in rivals if (score := _mean(row, "top1")) is not None]
  if ours is None or not scores or round(100 * max(scores)[0], 1) <= round(100 * ours, 1):
    return ""
  score, name = max(scores)
  return f"{name} scores higher than {comparison['method']} in this run: {_percent(score)} % top-1."


# What the template shows.


def _view(report: Mapping[str, Any], figures: Mapping[str, bytes]) -> dict[str, Any]:
  seeds = _num_seeds(report)
  comparison = report.get("comparison") or {}
  gain = comparison.get("gain") or {}
  pictures = {name: _data_uri(png) for name, png in figures.items() if png}
  return {
    "name": report.get("name") or "memdiff run",
    "summary": _summary(report),
    "steps": _steps(report),
    "verdict": verdict(gain.get("mean"), gain.get("std"), seeds),
    "headline": headline(report),
    "cards": _cards(report),
    "seeds": seeds,
    "reference": comparison.get("reference"),
    "columns": HEADLINE_COLUMNS,
    "rows": _result_rows(report),
    "axis": [_percent(end) for end in _top1_range(report)],
    "groups": _groups(report),
    "by_class": _by_class(report),
    "figures": {name: pictures.get(name) for name in FIGURES},
    "further_figures": {n: p for n, p in pictures.items() if n not in FIGURES},
    "metrics": _metric_tables(report),
    "timing": _timing(report),
    "command": report.get("command"),
    "versions": report.get("versions") or {},
    "hardware": report.get("hardware") or {},
    "split": (report.get("dataset") or {}).get("split_sha256"),
    "config": _pretty(report.get("config")),
  }


def _data_uri(png: bytes) -> str:
  return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _pretty(config: Mapping[str, Any] | None) -> str:
  return json.dumps(config, indent=2, default=str, ensure_ascii=False) if config else ""


def _summary(report: Mapping[str, Any]) -> str:
  """One paragraph for a reader who knows nothing about the method."""
  dataset = report.get("dataset") or {}
  counts = dataset.get("train_counts") or []
  synthetic = [n for n in report.get("synthetic_counts") or [] if n]
  text = []
  if counts:
    imbalance = dataset.get("imbalance")
    factor = f" (imbalance factor {imbalance:g})" if _is_number(imbalance) else ""
    text.append(
      f"The data set {dataset.get('name', '')} has {_count(len(counts), 'class', 'classes')}, and "
      f"they are not equally common: the largest one has {_count(max(counts), 'training example')},"
      f" the smallest {min(counts):,}{factor}. A classifier trained on such a long tail learns the"
      " common classes well and neglects the rare ones."
    )
  if synthetic:
    text.append(
      f"memdiff invented {_count(sum(synthetic), 'synthetic example')} for "
      f"{_helped_classes(counts, report['synthetic_counts'])}, not as pictures but as features, "
      "the lists of numbers in which the classifier itself describes what it sees, and trained the "
      "classifier’s last layer again with them. This page tells whether that helped."
    )
  seeds, tested = _num_seeds(report), dataset.get("test_count")
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
  return _count(number, "class", "classes")


def _steps(report: Mapping[str, Any]) -> list[tuple[str, str]]:
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


def _cards(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
  """The key figures at the top: (value, unit, what it is)."""
  comparison = report.get("comparison") or {}
  method, control = comparison.get("method"), comparison.get("control")
  seeds = _num_seeds(report)
  ours = _row(report, method)
  cards = []
  if _mean(ours, "top1") is not None:
    cards.append((_mean_std(ours["top1"], seeds), "%", f"of test examples right with {method}"))
  gain = comparison.get("gain") or {}
  if _is_number(gain.get("mean")):
    spread = f" ± {_percent(gain.get('std'))}" if seeds > 1 else ""
    cards.append((_points(gain["mean"]) + spread, "points", f"against {control}, seed by seed"))
  if _mean(ours, "few") is not None:
    cards.append((_mean_std(ours["few"], seeds), "%", "on the rarest classes (few)"))
  closed = comparison.get("gap_closed") or {}
  if _is_number(closed.get("mean")) and _has_room(comparison, seeds):
    spread = f" ± {100 * closed['std']:.0f}" if seeds > 1 and _is_number(closed.get("std")) else ""
    share = f"{100 * closed['mean']:.0f}{spread}".replace("-", "−")
    cards.append((share, "%", f"of the gap from {control} to {comparison['reference']} closed"))
  return cards


def _result_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
  rows = report.get("classification") or []
  reference = (report.get("comparison") or {}).get("reference")
  best = {
    key: max((_percent_value(r, key) for r in rows if r["method"] != reference), default=-1.0)
    for key, _ in HEADLINE_COLUMNS
  }
  low, high = _top1_range(report)
  result = []
  for row in rows:
    seeds = len(row.get("seeds") or [])
    is_reference = row["method"] == reference
    result.append({
      "method": row["method"],
      "description": row.get("description") or "",
      "kind": _kind(report, row["method"]),
      "cells": [_mean_std(row.get(key), seeds) for key, _ in HEADLINE_COLUMNS],
      "best": [
        not is_reference and _percent_value(row, key) == best[key] >= 0
        for key, _ in HEADLINE_COLUMNS
      ],
      "strip": _strip(row.get("top1") or {}, low, high),
    })  # fmt: skip
  return result


def _kind(report: Mapping[str, Any], method: str) -> str:
  """The part a method plays in the comparison: method, control, reference or other."""
  comparison = report.get("comparison") or {}
  roles = ("method", "control", "reference")
  return next((role for role in roles if comparison.get(role) == method), "other")


def _percent_value(row: Mapping[str, Any], key: str) -> float:
  value = _mean(row, key)
  return -1.0 if value is None else round(100 * value, 1)


def _top1_range(report: Mapping[str, Any]) -> tuple[float, float]:
  """The lowest `mean - std` and the highest `mean + std` of any method's top-1."""
  stats = [row.get("top1") or {} for row in report.get("classification") or []]
  known = [(s["mean"], s.get("std") or 0.0) for s in stats if _is_number(s.get("mean"))]
  low = min((mean - std for mean, std in known), default=0.0)
  high = max((mean + std for mean, std in known), default=1.0)
  return low, max(high, low + 1e-9)


def _strip(stat: Mapping[str, Any], low: float, high: float) -> tuple[float, ...] | None:
  """Places `mean ± std` between `low` and `high`: left end, width and centre in percent."""
  if not _is_number(stat.get("mean")):
    return None
  mean, std = stat["mean"], stat.get("std") or 0.0
  left, right, centre = (
    4 + 92 * (value - low) / (high - low) for value in (mean - std, mean + std, mean)
  )
  return round(left, 2), round(right - left, 2), round(centre, 2)


def _groups(report: Mapping[str, Any]) -> list[tuple[str, str]]:
  return [
    (g["name"], f"{g['rule']} ({_count(len(g['classes']), 'class', 'classes')})")
    for g in report.get("groups") or []
  ]


def _by_class(report: Mapping[str, Any]) -> dict[str, Any] | None:
  """Accuracy of every class under every method, for the table behind the picture."""
  dataset = report.get("dataset") or {}
  names, counts = dataset.get("class_names") or [], dataset.get("train_counts") or []
  rows = [r for r in report.get("classification") or [] if r.get("per_class_top1")]
  if not rows or not counts or len(names) != len(counts) or len(names) > _MAX_DETAILED_CLASSES:
    return None
  synthetic = report.get("synthetic_counts") or [0] * len(names)
  order = sorted(range(len(names)), key=lambda c: -counts[c])
  lines = [
    (names[c], f"{counts[c]:,}", f"{synthetic[c]:,}", [_class_cell(row, c) for row in rows])
    for c in order
  ]
  return {"methods": [row["method"] for row in rows], "lines": lines}


def _class_cell(row: Mapping[str, Any], c: int) -> str:
  mean, std = row["per_class_top1"]["mean"], row["per_class_top1"].get("std")
  stat = {"mean": mean[c], "std": std[c] if std else None}
  return _mean_std(stat, len(row.get("seeds") or []))


def _metric_tables(report: Mapping[str, Any]) -> list[dict[str, Any]]:
  features = {k: v for k, v in (report.get("features") or {}).items() if k != "truth_test"}
  tables = (
    ("Against the training features", "Do the synthetic features behave like the features that the "
     "classifier was trained on, without copying them?", features),
    ("The truth test", "The long tail was made by leaving real examples out. The methods never saw "
     "them; here the synthetic features are compared with their features.", _truth_test(report)),
  )  # fmt: skip
  seeds = _num_seeds(report)
  names = (report.get("dataset") or {}).get("class_names") or []
  return [
    {
      "title": title,
      "intro": intro,
      "lines": [_metric_line(key, stat, seeds) for key, stat in metrics.items()],
      "by_class": _metrics_by_class(metrics, names),
    }
    for title, intro, metrics in tables
    if metrics
  ]


def _metric_title(key: str) -> str:
  return _METRIC_TITLES.get(key, key.replace("_", " "))


def _metric_line(key: str, stat: Mapping[str, Any], seeds: int) -> dict[str, str]:
  reference = stat.get("reference") or {}
  return {
    "title": _metric_title(key),
    "value": _number_std(stat, seeds),
    "reference": _number_std(reference, seeds) if reference else "",
    "reference_label": reference.get("label") or "",
    "better": stat.get("better") or "",
    "meaning": stat.get("meaning") or "",
  }


def _metrics_by_class(metrics: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
  """Values of the metrics for the classes that have any, for the table behind the means."""
  known = {k: s["per_class"] for k, s in metrics.items() if len(s.get("per_class") or []) > 0}
  if not known or len(names) > _MAX_DETAILED_CLASSES:
    return None
  lines = []
  for c, name in enumerate(names):
    values = [values[c] if c < len(values) else None for values in known.values()]
    if any(_is_number(value) for value in values):
      lines.append((name, [_number(value) for value in values]))
  return {"titles": [_metric_title(key) for key in known], "lines": lines} if lines else None


def _timing(report: Mapping[str, Any]) -> dict[str, Any] | None:
  timing = report.get("timing") or {}
  phases = timing.get("phases") or {}
  if not phases:
    return None
  longest = max(max(p.get("seconds") or 0.0 for p in phases.values()), 1e-9)
  lines = []
  for name, phase in phases.items():
    total = phase.get("seconds") or 0.0
    compiling = min(phase.get("compile_seconds") or 0.0, total)
    lines.append({
      "name": name.replace("_", " "),
      "seconds": _seconds(phase.get("seconds")),
      "compile": _seconds(phase.get("compile_seconds")),
      "compile_width": round(100 * compiling / longest, 2),
      "rest_width": round(100 * (total - compiling) / longest, 2),
    })  # fmt: skip
  return {
    "lines": lines,
    "total": _seconds(timing.get("total_seconds")),
    "total_compile": _seconds(timing.get("total_compile_seconds")),
  }
