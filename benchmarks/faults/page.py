"""The account of a campaign for docs/results/faults.md."""

from collections.abc import Mapping
from typing import Any

_COLUMNS = {
  "times": "tried", "refused": "refused with a sentence", "equal": "ended equal",
  "lost_phases": "lost phases", "lost_steps": "lost steps", "divergences": "divergences",
  "failures": "failures",
}  # fmt: skip
_BAD = ("lost_phases", "lost_steps", "divergences", "failures")


def markdown(result: Mapping[str, Any]) -> str:
  """The campaign's command and machine, the count of its kills, and the table of faults."""
  rows, hardware, versions = result["rows"], result["hardware"], result["versions"]
  trials = sum(row["times"] for row in rows)
  bad = ", ".join(f"{_COLUMNS[key]}: {sum(row[key] for row in rows)}" for key in _BAD)
  phases = ", ".join(f"{name} {count}" for name, count in result["kills_by_phase"].items())
  lines = [
    "| fault | " + " | ".join(_COLUMNS.values()) + " |",
    "|---" * (1 + len(_COLUMNS)) + "|",
    *(
      f"| {row['fault']} | " + " | ".join(str(row[key]) for key in _COLUMNS) + " |" for row in rows
    ),
  ]
  return "\n".join(
    [
      f"{hardware['cpu']}, {hardware['cpu_count']} cores; Python {versions['python']}, JAX"
      f" {versions['jax']}; {result['seconds'] / 60:.0f} minutes beside other work.",
      "",
      f"**{result['kills']} kills at random moments, {result['kills_in_checkpoint_writes']} of them"
      f" while a checkpoint was written. Over all {trials} trials: {bad}.**"
      f" Kills by phase: {phases}.",
      "",
      *lines,
    ]
  )
