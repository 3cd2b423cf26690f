"""Looking things up in a report that may lack them."""

from collections.abc import Mapping
from typing import Any

from memdiff.evaluation.numerals import is_number


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


def made_data(report: Mapping[str, Any]) -> str:
  """What the generators of a run make, in words."""
  return "generated images" if report.get("synthetic_kind") == "images" else "synthetic features"


def num_seeds(report: Mapping[str, Any]) -> int:
  """The seeds behind the comparison: those of its method, or the most that any method has."""
  rows = report.get("classification") or []
  method = (report.get("comparison") or {}).get("method")
  counts = {row["method"]: len(row.get("seeds") or []) for row in rows}
  return counts.get(method, max(counts.values(), default=0))


def description_of(report: Mapping[str, Any], method: str | None) -> str:
  """What a method is, to be put into a sentence; empty if nobody said."""
  text = (row_of(report, method).get("description") or "").strip().rstrip(".")
  return text[0].lower() + text[1:] if text[1:2].islower() else text
