"""Strict settings: an `ml_collections.ConfigDict` becomes frozen dataclasses, or one clear error.

Each part of memdiff declares its settings as a frozen dataclass beside the code that reads them.
`build` fills such a dataclass from a config file's values and refuses unknown fields, missing
fields, wrong types and values outside their range, so a typo never survives to a running job.
"""

import dataclasses
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from memdiff import paths
from memdiff.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Allowed:
  """What a field accepts: a predicate, and the words that describe it to a user."""

  accepts: Callable[[Any], bool]
  words: Callable[[], str]


def _setting(accepts: Callable[[Any], bool], words: str | Callable[[], str]) -> Any:
  say = words if callable(words) else lambda: words
  return dataclasses.field(metadata={"allowed": Allowed(accepts, say)})


def at_least(low: float) -> Any:
  return _setting(lambda v: v >= low, f"at least {low}")


def above(low: float) -> Any:
  return _setting(lambda v: v > low, f"above {low}")


def between(low: float, high: float) -> Any:
  return _setting(lambda v: low <= v <= high, f"between {low} and {high}")


def one_of(names: Collection[str]) -> Any:
  """One of `names`, for example of a table, which may get further rows later."""
  return _setting(lambda v: v in names, lambda: "one of " + ", ".join(names))


def some_of(names: Collection[str]) -> Any:
  """A tuple of distinct names out of `names`, as in `one_of`, possibly empty."""
  return _setting(
    lambda v: set(v) <= set(names) and len(set(v)) == len(v),
    lambda: "distinct names out of " + ", ".join(names),
  )


def each(accepts: Callable[[Any], bool], words: str) -> Any:
  """A non-empty tuple whose every item is accepted."""
  return _setting(lambda v: len(v) > 0 and all(accepts(item) for item in v), words)


def each_if_any(accepts: Callable[[Any], bool], words: str) -> Any:
  """A tuple, possibly empty, whose every item is accepted."""
  return _setting(lambda v: all(accepts(item) for item in v), words)


def path_text() -> Any:
  """A path, in which ~ at the beginning is the home folder; "" is left as it is."""
  return dataclasses.field(metadata={"is_path": True})


_TYPE_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def _convert_scalar(kind: type, value: Any) -> Any:
  """Returns `value` as `kind`, or raises TypeError; never rounds and never guesses."""
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if kind is float and is_number and abs(value) <= sys.float_info.max:
    return float(value)
  if kind is int and is_number and isinstance(value, int):
    return value
  if kind in (bool, str) and isinstance(value, kind):
    return value
  raise TypeError(_TYPE_WORDS[kind])


def _convert(kind: Any, value: Any) -> Any:
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is tuple:
    if isinstance(value, str) or not isinstance(value, (tuple, list)):
      raise TypeError("a tuple, for example (1, 2)")
    try:
      return tuple(_convert_scalar(arguments[0], item) for item in value)
    except TypeError as error:
      raise TypeError(f"a tuple in which each item is {error}") from None
  return _convert_scalar(kind, value)


def _field_value(path: str, field: dataclasses.Field, value: Any) -> Any:
  if dataclasses.is_dataclass(field.type):
    if not isinstance(value, Mapping):
      raise ConfigError(f"config.{path} must be a group of fields, not {value!r}.")
    return build(field.type, value, path)
  try:
    value = _convert(field.type, value)
  except TypeError as error:
    raise ConfigError(f"config.{path} is {value!r}, but must be {error}.") from None
  if field.metadata.get("is_path"):
    value = paths.expand_home(value, f"config.{path}")
  allowed = field.metadata.get("allowed")
  if allowed is not None and not allowed.accepts(value):
    raise ConfigError(f"config.{path} is {value!r}, but must be {allowed.words()}.")
  return value


def build(cls: type, values: Mapping[str, Any], path: str = "") -> Any:
  """Builds the settings dataclass `cls` from `values`.

  Args:
    cls: a frozen dataclass whose fields are bool, int, float, str or tuples of these, or
      further settings dataclasses. Field types must be real types, not strings.
    values: a mapping with exactly the fields of `cls`.
    path: where `values` stands in the whole config, for error messages.

  Returns:
    An instance of `cls`.

  Raises:
    ConfigError: naming the field, its value, and what is allowed.
  """
  prefix = f"{path}." if path else ""
  fields = {field.name: field for field in dataclasses.fields(cls)}
  for name in values:
    if name not in fields:
      raise ConfigError(
        f"config.{prefix}{name} does not exist; the fields there are {', '.join(fields)}."
      )
  missing = [name for name in fields if name not in values]
  if missing:
    raise ConfigError(f"config.{prefix}{missing[0]} is missing from the config file.")
  converted = {n: _field_value(prefix + n, f, values[n]) for n, f in fields.items()}
  try:
    return cls(**converted)
  except ValueError as error:  # a rule between fields, stated in the class's __post_init__
    raise ConfigError(f"config.{path}: {error}" if path else f"config: {error}") from None


def as_dict(settings: Any) -> dict[str, Any]:
  """The settings as plain nested dictionaries and lists, ready for JSON."""

  def plain(value):
    if isinstance(value, dict):
      return {key: plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value

  return plain(dataclasses.asdict(settings))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
  flat = {}
  for key, value in values.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[f"{prefix}{key}"] = value
  return flat
