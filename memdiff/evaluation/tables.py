"""The tables of a report as rows of text, for the page and the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from memdiff.evaluation.answer import CRITERIA, Answer
from memdiff.evaluation.lookup import is_reference, mean_of, num_seeds, row_of
from memdiff.evaluation.numerals import (
  count,
  is_number,
  mean_std,
  number,
  number_std,
  percent,
  points,
  seconds,
  share,
  share_bounds,
  to,
)
from memdiff.evaluation.scores import METRICS

# The columns of published tables; a report puts balanced accuracy before them.
HEADLINE_COLUMNS = (
  ("top1", METRICS["top1"].title),
  ("many", "many"),
  ("medium", "medium"),
  ("few", "few"),
  ("macro_f1", METRICS["macro_f1"].title),
)
_MAX_DETAILED_CLASSES = 200
_MAX_DETAILED_METHODS = 8

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


def columns(report: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
  """(key, title) of the scores in the table of methods: balanced accuracy first, new ones last."""
  known = {key for key, _ in HEADLINE_COLUMNS}
  there = {key for row in report.get("classification") or [] for key in row}
  others = [(n, metric.title) for n, metric in METRICS.items() if n in there and n not in known]
  first = [column for column in others if column[0] == "balanced_accuracy"]
  return (*first, *HEADLINE_COLUMNS, *(column for column in others if column not in first))


def short(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """The rows of the short table; all of them if none is marked."""
  rows = report.get("classification") or []
  return [row for row in rows if row.get("shown")] or rows


def text_cells(report: Mapping[str, Any]) -> list[list[str]]:
  """The short table as text: its header, then one line per method."""
  shown = columns(report)
  lines = [["method", *(title for _, title in shown)]]
  for row in short(report):
    seeds = len(row.get("seeds") or [])
    lines.append([row["method"], *(mean_std(row.get(key), seeds) for key, _ in shown)])
  return lines


def methods(report: Mapping[str, Any], found: Answer | None) -> dict[str, Any] | None:
  """The short table and, if that leaves rows out, the full one; None without any row."""
  rows = report.get("classification") or []
  if not rows:
    return None
  few = short(report)
  line = _line_maker(report, found)
  return {
    "columns": columns(report),
    "criterion": _criterion_column(report),
    "short": [line(row) for row in few],
    "full": [line(row) for row in rows] if len(few) < len(rows) else [],
    "with_gap": any(row.get("gap_closed") for row in rows),
  }


def _criterion_column(report: Mapping[str, Any]) -> str:
  key = CRITERIA.get(report.get("criterion"), CRITERIA["accuracy"])[2]
  return key if key in dict(columns(report)) else "top1"


def _line_maker(report: Mapping[str, Any], found: Answer | None):
  """A function that lays out one row of the table of methods."""
  rows, keys = report.get("classification") or [], [key for key, _ in columns(report)]
  rivals = [row for row in rows if not is_reference(report, row)]
  best = {key: max((_percent_value(r, key) for r in rivals), default=-1.0) for key in keys}
  low, high = _range(report)

  def line(row):
    seeds, given_more = len(row.get("seeds") or []), is_reference(report, row)
    return {
      "method": row["method"],
      "description": row.get("description") or "",
      "roles": _roles(report, row, found),
      "kind": _kind(report, row, found),
      "cells": [mean_std(row.get(key), seeds) for key in keys],
      "best": [not given_more and _percent_value(row, k) == best[k] >= 0 for k in keys],
      "strip": _strip(row.get(_criterion_column(report)) or {}, low, high),
      "gap": share(row.get("gap_closed")),
      "gap_bounds": share_bounds(row.get("gap_closed")),
    }

  return line


def _kind(report: Mapping[str, Any], row: Mapping[str, Any], found: Answer | None) -> str:
  """The look of a row: method (the answer), control (plain training), reference or other."""
  if is_reference(report, row):
    return "reference"
  if found and row["method"] == found.method:
    return "method"
  plain = (report.get("headline") or {}).get("plain")
  return "control" if row["method"] == plain else "other"


def _roles(report: Mapping[str, Any], row: Mapping[str, Any], found: Answer | None) -> list[str]:
  """What a row is to the answer, in words."""
  headline, method = report.get("headline") or {}, row["method"]
  judged = headline.get("by") == "cross-validation"
  roles = (
    ("recommended", judged and method == headline.get("recommended")),
    ("plain training", method == headline.get("plain")),
    (
      "best with synthetic data",
      judged and method == (headline.get("synthetic") or {}).get("method"),
    ),
    ("given more real examples", is_reference(report, row)),
  )
  return [words for words, is_so in roles if is_so]


def advice(report: Mapping[str, Any]) -> list[dict[str, Any]]:
  """All methods by their score in cross-validation, the best first."""
  recommendation = report.get("recommendation")
  if not recommendation:
    return []
  ranked = sorted(recommendation["scores"].items(), key=lambda item: -item[1]["score"])
  column = _criterion_column(report)
  return [
    {
      "method": method,
      "score": percent(entry["score"]),
      "gain": points(entry["gain"]),
      "interval": to(entry["interval"]),
      "settings": entry.get("settings", "–"),
      "test": percent(mean_of(row_of(report, method), column)),
      "kind": "method" if method == recommendation["method"] else "other",
    }
    for method, entry in ranked
  ]


def _percent_value(row: Mapping[str, Any], key: str) -> float:
  value = mean_of(row, key)
  return -1.0 if value is None else round(100 * value, 1)


def _range(report: Mapping[str, Any]) -> tuple[float, float]:
  """The lowest `mean - std` and the highest `mean + std` of any method by the criterion."""
  column = _criterion_column(report)
  stats = [row.get(column) or {} for row in report.get("classification") or []]
  known = [(s["mean"], s.get("std") or 0.0) for s in stats if is_number(s.get("mean"))]
  low = min((mean - std for mean, std in known), default=0.0)
  high = max((mean + std for mean, std in known), default=1.0)
  return low, max(high, low + 1e-9)


def _strip(stat: Mapping[str, Any], low: float, high: float) -> tuple[float, ...] | None:
  """Places `mean ± std` between `low` and `high`: left end, width and centre in percent."""
  if not is_number(stat.get("mean")):
    return None
  mean, std = stat["mean"], stat.get("std") or 0.0
  left, right, centre = (
    4 + 92 * (value - low) / (high - low) for value in (mean - std, mean + std, mean)
  )
  return round(left, 2), round(right - left, 2), round(centre, 2)


def groups(report: Mapping[str, Any]) -> list[tuple[str, str]]:
  return [
    (g["name"], f"{g['rule']} ({count(len(g['classes']), 'class', 'classes')})")
    for g in report.get("groups") or []
  ]


def by_class(report: Mapping[str, Any]) -> dict[str, Any] | None:
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
  comparison, chosen = report.get("comparison") or {}, report.get("recommendation") or {}
  named = {comparison.get(key) for key in ("method", "control", "reference")}
  named |= {chosen.get(key) for key in ("method", "best")}
  named |= {(report.get("headline") or {}).get("plain")}
  return [row for row in rows if row["method"] in named]


def _class_cell(row: Mapping[str, Any], c: int) -> str:
  mean, std = row["per_class_top1"]["mean"], row["per_class_top1"].get("std")
  stat = {"mean": mean[c], "std": std[c] if std else None}
  return mean_std(stat, len(row.get("seeds") or []))


def _truth_test(report: Mapping[str, Any]) -> Mapping[str, Any]:
  nested = (report.get("features") or {}).get("truth_test")
  return nested or report.get("truth_test") or {}


def metric_tables(report: Mapping[str, Any]) -> list[dict[str, Any]]:
  features = {k: v for k, v in (report.get("features") or {}).items() if k != "truth_test"}
  tables = (
    ("Against the training features", "Do the synthetic features behave like the features that the "
     "classifier was trained on, without copying them?", features),
    ("The truth test", "The long tail was made by leaving real examples out. The methods never saw "
     "them; here the synthetic features are compared with their features.", _truth_test(report)),
  )  # fmt: skip
  seeds = num_seeds(report)
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
    "value": number_std(stat, seeds),
    "reference": number_std(reference, seeds) if reference else "",
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
    if any(is_number(value) for value in values):
      lines.append((name, [number(value) for value in values]))
  return {"titles": [_metric_title(key) for key in known], "lines": lines} if lines else None


def timing(report: Mapping[str, Any]) -> dict[str, Any] | None:
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
      "seconds": seconds(phase.get("seconds")),
      "compile": seconds(phase.get("compile_seconds")),
      "cpu": seconds(phase.get("cpu_seconds")),
      "compile_width": round(100 * compiling / longest, 2),
      "rest_width": round(100 * (total - compiling) / longest, 2),
    })  # fmt: skip
  return {
    "lines": lines,
    "stages": [_stage_speed(name, speed) for name, speed in (timing.get("stages") or {}).items()],
    "total": seconds(timing.get("total_seconds")),
    "total_compile": seconds(timing.get("total_compile_seconds")),
    "total_cpu": seconds(timing.get("total_cpu_seconds")),
    "killed": [n.replace("_", " ") for n, p in phases.items() if p.get("killed", 0) > 0],
  }


def _stage_speed(name: str, speed: Mapping[str, float]) -> dict[str, str]:
  """A line of the table of speeds."""
  mfu, peak = speed.get("mfu"), speed.get("peak_device_bytes", speed.get("program_device_bytes"))
  return {
    "name": name,
    "steps": f"{speed['steps_per_second']:,.3g}",
    "examples": f"{speed['examples_per_second_per_device']:,.4g}",
    "wait": f"{100 * speed['data_wait_share']:.0f} %",
    "checkpoint": seconds(speed["checkpoint_seconds"]),
    "compile": seconds(speed["compile_seconds"]),
    "mfu": "–" if mfu is None else f"{100 * mfu:.1f} %",
    "memory": "–" if peak is None else f"{peak / 2**20:,.0f} MiB",
  }
