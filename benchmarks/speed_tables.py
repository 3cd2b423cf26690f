"""Tables of speed in Markdown, made from the JSON that the benchmarks of speed write."""

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.timing import rounded

_MET = {None: "", True: "yes", False: "**no**"}


def machine(result: Mapping[str, Any]) -> str:
  """What was measured on, in one sentence."""
  hardware, versions = result["hardware"], result["versions"]
  packages = f"Python {versions['python']}, JAX {versions['jax']}"
  if versions.get("torch"):
    packages += f", PyTorch {versions['torch']}"
  load = hardware["load_average"][0]
  cores = f"{hardware['cpu_count']} cores, load average {load:.1f} before"
  return f"{hardware['cpu']}, {cores}; {packages}."


def measured(rows: Iterable[Mapping[str, Any]]) -> str:
  """The rows of a benchmark's `table`."""
  lines = ["| measured | value | ratio (range) | target | met |", "|---|---|---|---|---|"]
  for row in rows:
    cells = row["name"], row["value"], row["ratio"], row["target"], _MET[row["met"]]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def profile(result: Mapping[str, Any], peer: str) -> str:
  """Operations per example and their rate, of `benchmarks.peers`."""
  lines = [
    "| | | operations per example | operations/s | of a matrix product's |",
    "|---|---|---|---|---|",
  ]
  for row in result[peer]["profile"]:
    rate, millions = row["operations_per_second"], row["operations"] / 1e6
    shown = rounded(millions)
    share = rate / result["matmul_rate"]
    lines.append(f"| {row['what']} | {row['who']} | {shown} M | {rate / 1e9:.0f} G | {share:.0%} |")
  return "\n".join(lines)


def banks(result: Mapping[str, Any]) -> str:
  """Milliseconds of `benchmarks.bank_scaling`."""
  devices = sorted((name for name in result if name.isdigit()), key=int)
  heads = [f"{what}, {n} device{'s' * (n != '1')}" for n in devices for what in ("update", "read")]
  lines = ["| classes | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
  for classes in sorted((name for name in result[devices[0]] if name.isdigit()), key=int):
    times = [result[n][classes][what] for n in devices for what in ("update", "read")]
    shown = [f"{ms:.1f}" if ms < 20 else f"{ms:,.0f}" for ms in times]
    lines.append(f"| {int(classes):,} | " + " | ".join(shown) + " |")
  return "\n".join(lines)
