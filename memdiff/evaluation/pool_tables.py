"""What a page says of generated images that classifiers were trained on."""

from collections.abc import Mapping
from typing import Any

from memdiff.evaluation.answer import verdict
from memdiff.evaluation.numerals import is_interval, listed, percent, points, to


def pools(report: Mapping[str, Any]) -> list[dict[str, str]]:
  """A line per generator and filter."""
  signs = {row["method"]: row for row in report.get("pool_signs") or []}
  lines = []
  for row in report.get("pools") or []:
    of_method = signs.get(row["method"]) or {}
    lines.append(
      {
        "method": row["method"],
        "filter": row["filter"],
        "drawn": f"{sum(row['drawn']):,.0f}",
        "used": f"{sum(row['used']):,.0f}",
        "right": percent((of_method.get("right") or {}).get("mean")),
        "copied": percent((of_method.get("copied") or {}).get("mean")),
        "without": listed(row["classes_with_real_images_only"]) or "–",
      }
    )
  return lines


def same_loss(report: Mapping[str, Any]) -> list[dict[str, str]]:
  """A line per method with generated images, against the best control of the same loss."""
  return [
    {
      "method": row["method"],
      "control": row["control"],
      "gain": points(row["gain"]["mean"]),
      "interval": to(row["gain"]["interval"]) if is_interval(row["gain"].get("interval")) else "–",
      "kind": verdict(row["gain"]),
    }
    for row in report.get("same_loss") or []
  ]
