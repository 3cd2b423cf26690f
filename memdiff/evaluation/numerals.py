"""Numbers as people write them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and math.isfinite(value)


def is_interval(value: Any) -> bool:
  return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_number, value))


def percent(fraction: float | None) -> str:
  return f"{100 * fraction:.1f}" if is_number(fraction) else "–"


def points(fraction: float) -> str:
  """A difference of two fractions in signed percentage points."""
  size = f"{abs(100 * fraction):.1f}"
  return size if float(size) == 0 else ("+" if fraction > 0 else "−") + size


def to(interval: Sequence[float]) -> str:
  """Both ends of an interval of differences in percentage points: `−0.6 to +0.2`."""
  return " to ".join(map(points, interval))


def place(fraction: float) -> str:
  """`1.2 points above`, `1.2 points below` or `level with`: of a difference of two fractions."""
  size = percent(abs(fraction))
  if float(size) == 0:
    return "level with"
  return f"{size} points {'above' if fraction > 0 else 'below'}"


def bounds(difference: Mapping[str, Any]) -> str:
  """` (95 % interval −0.6 to +0.2)`, or nothing if no interval is known."""
  interval = difference.get("interval")
  return f" (95 % interval {to(interval)})" if is_interval(interval) else ""


def mean_std(stat: Mapping[str, Any] | None, num_seeds: int) -> str:
  """`mean ± std` in percent; the mean alone for one seed, a dash if there is nothing."""
  if not stat or not is_number(stat.get("mean")):
    return "–"
  if num_seeds == 1 or not is_number(stat.get("std")):
    return percent(stat["mean"])
  return f"{percent(stat['mean'])} ± {percent(stat['std'])}"


def share(stat: Mapping[str, Any] | None) -> str:
  """A mean share in whole percent."""
  if not stat or not is_number(stat.get("mean")):
    return "–"
  return str(round(100 * stat["mean"])).replace("-", "−")


def share_bounds(stat: Mapping[str, Any] | None) -> str:
  """The ends of its interval, `10 to 38`; empty if it is unknown."""
  if not stat or not is_interval(stat.get("interval")):
    return ""
  return " to ".join(str(round(100 * end)) for end in stat["interval"]).replace("-", "−")


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


def listed(items: Sequence[str]) -> str:
  """The items within a sentence: `a, b and c`."""
  return " and ".join(part for part in (", ".join(items[:-1]), *items[-1:]) if part)
