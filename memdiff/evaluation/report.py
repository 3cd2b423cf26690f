"""A run's report laid out: one HTML page for people and one text table for the terminal.

The page is a single file that needs nothing else: pictures are embedded, styles are inline, there
is no script and nothing is loaded from anywhere, so it can be mailed, archived and printed. Parts
of the report that are missing leave out their section and no more; the sentences are in `wording`.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from memdiff.evaluation import wording

_TEMPLATE = "report.html.j2"
HEADLINE_COLUMNS = (
  ("top1", "top-1"),
  ("many", "many"),
  ("medium", "medium"),
  ("few", "few"),
  ("macro_f1", "macro-F1"),
)
_MAX_DETAILED_CLASSES = 200
_MAX_DETAILED_METHODS = 8

# The pictures that the page has a place and a caption for; others are shown at its end.
FIGURES = (
  "long_tail_profile",
  "per_class_accuracy",
  "gap_closed",
  "feature_map",
  "confidence_histogram",
  "confidence_reliability",
  "training_curves",
)

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
  environment.filters["tied"] = wording.tied
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
    table.append(
      [row["method"], *(wording.mean_std(row.get(key), seeds) for key, _ in HEADLINE_COLUMNS)]
    )
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  lines = []
  for cells in table:
    rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    lines.append("   ".join([cells[0].ljust(widths[0]), *rest]))
  text = [*wording.preamble(report), "", lines[0], "-" * len(lines[0]), *lines[1:]]
  advice = wording.recommendation(report)
  return "\n".join([*text, *(["", f"recommendation: {advice[0]}"] if advice else [])])


def _truth_test(report: Mapping[str, Any]) -> Mapping[str, Any]:
  nested = (report.get("features") or {}).get("truth_test")
  return nested or report.get("truth_test") or {}


def _view(report: Mapping[str, Any], figures: Mapping[str, bytes]) -> dict[str, Any]:
  seeds = wording.num_seeds(report)
  comparison = report.get("comparison") or {}
  gain = comparison.get("gain") or {}
  pictures = {name: _data_uri(png) for name, png in figures.items() if png}
  return {
    "name": report.get("name") or "memdiff run",
    "summary": wording.summary(report),
    "steps": wording.steps(report),
    "verdict": wording.verdict(gain.get("mean"), gain.get("std"), seeds),
    "headline": wording.headline(report),
    "cards": _cards(report),
    "recommendation": wording.recommendation(report),
    "advice": _advice(report),
    "seeds": seeds,
    "reference": comparison.get("reference"),
    "columns": HEADLINE_COLUMNS,
    "rows": _result_rows(report),
    "axis": [wording.percent(end) for end in _top1_range(report)],
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


def _cards(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
  """The key figures at the top: (value, unit, what it is)."""
  comparison = report.get("comparison") or {}
  method, control = comparison.get("method"), comparison.get("control")
  seeds = wording.num_seeds(report)
  ours = wording.row_of(report, method)
  cards = []
  if wording.mean_of(ours, "top1") is not None:
    cards.append(
      (wording.mean_std(ours["top1"], seeds), "%", f"of test examples right with {method}")
    )
  gain = comparison.get("gain") or {}
  if wording.is_number(gain.get("mean")):
    spread = f" ± {wording.percent(gain.get('std'))}" if seeds > 1 else ""
    cards.append(
      (wording.points(gain["mean"]) + spread, "points", f"against {control}, seed by seed")
    )
  if wording.mean_of(ours, "few") is not None:
    cards.append((wording.mean_std(ours["few"], seeds), "%", "on the rarest classes (few)"))
  closed = comparison.get("gap_closed") or {}
  if wording.is_number(closed.get("mean")) and wording.has_room(comparison, seeds):
    spread = (
      f" ± {100 * closed['std']:.0f}" if seeds > 1 and wording.is_number(closed.get("std")) else ""
    )
    share = f"{100 * closed['mean']:.0f}{spread}".replace("-", "−")
    cards.append((share, "%", f"of the gap from {control} to {comparison['reference']} closed"))
  return cards


def _result_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
  rows = report.get("classification") or []
  methods = [row for row in rows if not wording.is_reference(report, row)]
  best = {
    key: max((_percent_value(row, key) for row in methods), default=-1.0)
    for key, _ in HEADLINE_COLUMNS
  }
  low, high = _top1_range(report)
  result = []
  for row in rows:
    seeds = len(row.get("seeds") or [])
    is_reference = wording.is_reference(report, row)
    result.append({
      "method": row["method"],
      "description": row.get("description") or "",
      "kind": _kind(report, row),
      "cells": [wording.mean_std(row.get(key), seeds) for key, _ in HEADLINE_COLUMNS],
      "best": [
        not is_reference and _percent_value(row, key) == best[key] >= 0
        for key, _ in HEADLINE_COLUMNS
      ],
      "strip": _strip(row.get("top1") or {}, low, high),
    })  # fmt: skip
  return result


def _kind(report: Mapping[str, Any], row: Mapping[str, Any]) -> str:
  """The part a row plays in the comparison: method, control, reference or other."""
  comparison = report.get("comparison") or {}
  role = next((r for r in ("method", "control") if comparison.get(r) == row["method"]), "other")
  return "reference" if wording.is_reference(report, row) else role


def _advice(report: Mapping[str, Any]) -> list[dict[str, Any]]:
  """All methods by their score in cross-validation, the best first."""
  advice = report.get("recommendation")
  if not advice:
    return []
  ranked = sorted(advice["scores"].items(), key=lambda item: -item[1]["score"])
  return [
    {
      "method": method,
      "score": f"{100 * entry['score']:.1f}",
      "gain": wording.points(entry["gain"]),
      "interval": " to ".join(map(wording.points, entry["interval"])),
      "test": wording.percent(wording.mean_of(wording.row_of(report, method), "top1")),
      "kind": "method" if method == advice["method"] else "other",
    }
    for method, entry in ranked
  ]


def _percent_value(row: Mapping[str, Any], key: str) -> float:
  value = wording.mean_of(row, key)
  return -1.0 if value is None else round(100 * value, 1)


def _top1_range(report: Mapping[str, Any]) -> tuple[float, float]:
  """The lowest `mean - std` and the highest `mean + std` of any method's top-1."""
  stats = [row.get("top1") or {} for row in report.get("classification") or []]
  known = [(s["mean"], s.get("std") or 0.0) for s in stats if wording.is_number(s.get("mean"))]
  low = min((mean - std for mean, std in known), default=0.0)
  high = max((mean + std for mean, std in known), default=1.0)
  return low, max(high, low + 1e-9)


def _strip(stat: Mapping[str, Any], low: float, high: float) -> tuple[float, ...] | None:
  """Places `mean ± std` between `low` and `high`: left end, width and centre in percent."""
  if not wording.is_number(stat.get("mean")):
    return None
  mean, std = stat["mean"], stat.get("std") or 0.0
  left, right, centre = (
    4 + 92 * (value - low) / (high - low) for value in (mean - std, mean + std, mean)
  )
  return round(left, 2), round(right - left, 2), round(centre, 2)


def _groups(report: Mapping[str, Any]) -> list[tuple[str, str]]:
  return [
    (g["name"], f"{g['rule']} ({wording.count(len(g['classes']), 'class', 'classes')})")
    for g in report.get("groups") or []
  ]


def _by_class(report: Mapping[str, Any]) -> dict[str, Any] | None:
  """Accuracy of every class under every method, for the table behind the picture."""
  dataset = report.get("dataset") or {}
  names, counts = dataset.get("class_names") or [], dataset.get("train_counts") or []
  rows = report.get("classification") or []
  rows = _detailed(report, [row for row in rows if row.get("per_class_top1")])
  if not rows or not counts or len(names) != len(counts) or len(names) > _MAX_DETAILED_CLASSES:
    return None
  synthetic = report.get("synthetic_counts") or [0] * len(names)
  order = sorted(range(len(names)), key=lambda c: -counts[c])
  lines = [
    (names[c], f"{counts[c]:,}", f"{synthetic[c]:,}", [_class_cell(row, c) for row in rows])
    for c in order
  ]
  return {"methods": [row["method"] for row in rows], "lines": lines}


def _detailed(report: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """The rows that a wide table has room for: all, or those that are compared or recommended."""
  if len(rows) <= _MAX_DETAILED_METHODS:
    return rows
  comparison, advice = report.get("comparison") or {}, report.get("recommendation") or {}
  named = {comparison.get(key) for key in ("method", "control", "reference")}
  named |= {advice.get(key) for key in ("method", "best")}
  return [row for row in rows if row["method"] in named]


def _class_cell(row: Mapping[str, Any], c: int) -> str:
  mean, std = row["per_class_top1"]["mean"], row["per_class_top1"].get("std")
  stat = {"mean": mean[c], "std": std[c] if std else None}
  return wording.mean_std(stat, len(row.get("seeds") or []))


def _metric_tables(report: Mapping[str, Any]) -> list[dict[str, Any]]:
  features = {k: v for k, v in (report.get("features") or {}).items() if k != "truth_test"}
  tables = (
    ("Against the training features", "Do the synthetic features behave like the features that the "
     "classifier was trained on, without copying them?", features),
    ("The truth test", "The long tail was made by leaving real examples out. The methods never saw "
     "them; here the synthetic features are compared with their features.", _truth_test(report)),
  )  # fmt: skip
  seeds = wording.num_seeds(report)
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
    "value": wording.number_std(stat, seeds),
    "reference": wording.number_std(reference, seeds) if reference else "",
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
    if any(wording.is_number(value) for value in values):
      lines.append((name, [wording.number(value) for value in values]))
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
      "seconds": wording.seconds(phase.get("seconds")),
      "compile": wording.seconds(phase.get("compile_seconds")),
      "compile_width": round(100 * compiling / longest, 2),
      "rest_width": round(100 * (total - compiling) / longest, 2),
    })  # fmt: skip
  return {
    "lines": lines,
    "stages": [_stage_speed(name, speed) for name, speed in (timing.get("stages") or {}).items()],
    "total": wording.seconds(timing.get("total_seconds")),
    "total_compile": wording.seconds(timing.get("total_compile_seconds")),
  }


def _stage_speed(name: str, speed: Mapping[str, float]) -> dict[str, str]:
  """A line of the table of speeds."""
  mfu, peak = speed.get("mfu"), speed.get("peak_device_bytes", speed.get("program_device_bytes"))
  return {
    "name": name,
    "steps": f"{speed['steps_per_second']:,.3g}",
    "examples": f"{speed['examples_per_second_per_device']:,.4g}",
    "wait": f"{100 * speed['data_wait_share']:.0f} %",
    "checkpoint": wording.seconds(speed["checkpoint_seconds"]),
    "compile": wording.seconds(speed["compile_seconds"]),
    "mfu": "–" if mfu is None else f"{100 * mfu:.1f} %",
    "memory": "–" if peak is None else f"{peak / 2**20:,.0f} MiB",
  }
