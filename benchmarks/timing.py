"""Timing variants against each other on a machine that other work shares.

Variants run one after the other, round by round, in one process: what slows the machine for a
while slows all of them. Read the ratio of the medians together with the range of the ratios within
single rounds and the ratio of either side's fastest round, which comes nearest to a quiet machine;
where they are far apart, the machine was busy and the run should be repeated.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

_PAUSE = 0.02  # seconds after every call, in which spinning worker threads go to sleep


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds per unit of work of one variant, one entry per round."""

  seconds: tuple[float, ...]

  @property
  def median(self) -> float:
    return float(np.median(self.seconds))

  def as_dict(self) -> dict[str, Any]:
    return {
      "unit": "seconds per unit of work",
      "min": min(self.seconds),
      "median": self.median,
      "max": max(self.seconds),
      "rounds": list(self.seconds),
    }


@dataclasses.dataclass(frozen=True)
class Ratio:
  """How many times faster one variant is than another."""

  of_medians: float
  lowest: float  # of the ratios within single rounds
  highest: float
  of_fastest: float  # of the two fastest rounds

  def __str__(self) -> str:
    spread = f"{self.lowest:.2f} to {self.highest:.2f}"
    return f"{self.of_medians:.2f}x ({spread}; fastest {self.of_fastest:.2f})"


def speedup(slow: Timing, fast: Timing) -> Ratio:
  """`slow` over `fast`; both from one call of `interleave`."""
  per_round = np.divide(slow.seconds, fast.seconds)
  return Ratio(
    of_medians=slow.median / fast.median,
    lowest=float(per_round.min()),
    highest=float(per_round.max()),
    of_fastest=min(slow.seconds) / min(fast.seconds),
  )


def interleave(
  variants: Mapping[str, tuple[Callable[[], Any], float]],
  rounds: int,
  before_round: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
  """Times all variants `rounds` times, after one call of each that does not count.

  Args:
    variants: name -> (call, units of work that one call does). A call may return JAX arrays, which
      are waited for.
    rounds: every other round goes through the variants backwards.
    before_round: called at the start of each round, untimed.

  Returns:
    name -> Timing.
  """
  seconds: dict[str, list[float]] = {name: [] for name in variants}
  names = list(variants)
  for number in range(rounds + 1):
    before_round()
    for name in names if number % 2 else names[::-1]:
      call, work = variants[name]
      start = time.perf_counter()
      jax.block_until_ready(call())
      elapsed = time.perf_counter() - start
      if number:
        seconds[name].append(elapsed / work)
      time.sleep(_PAUSE)
  return {name: Timing(tuple(values)) for name, values in seconds.items()}


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of the printed table."""

  name: str
  value: str
  ratio: str = ""
  target: str = ""
  met: bool | None = None  # None: there is no target


def rounded(number: float) -> str:
  """Three digits, with thousands apart and no exponent: 11,300, 0.532."""
  digits = float(f"{number:.3g}")
  return f"{digits:,.0f}" if digits >= 100 else f"{digits:g}"


def table(rows: list[Row]) -> str:
  """The rows as text, columns aligned."""
  words = {None: "", True: "yes", False: "no"}
  cells = [("measured", "value", "ratio (range)", "target", "met")]
  cells += [(r.name, r.value, r.ratio, r.target, words[r.met]) for r in rows]
  widths = [max(len(row[i]) for row in cells) for i in range(5)]
  lines = [
    "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
  ]
  return "\n".join([lines[0], "-" * (sum(widths) + 8), *lines[1:]])


def environment() -> dict[str, Any]:
  """Versions and hardware, for the JSON file."""
  versions = {"python": platform.python_version()}
  for package in ("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn", "torch",
                  "imbalanced-learn"):  # fmt: skip
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
  names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  device = jax.devices()[0]
  return {
    "versions": versions,
    "hardware": {
      "cpu": names[0] if names else platform.processor(),
      "cpu_count": os.cpu_count(),
      "load_average": list(os.getloadavg()),
      "jax_platform": device.platform,
      "jax_device": device.device_kind,
      "xla_flags": os.environ.get("XLA_FLAGS", ""),
    },
  }
