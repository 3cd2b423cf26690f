"""Strict settings: an `ml_collections.ConfigDict` becomes frozen dataclasses, or one clear error.

Each part of memdiff declares its settings as a frozen dataclass beside the code that reads them.
A field has its default, its meaning and its range in one place; files in configs/ say only what
they change, and `describe` prints the fields. `build` fills such a dataclass from a config file's
values and refuses unknown fields, missing fields, wrong types and values outside their range, so
a typo never survives to a running job.
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


def setting(default: Any, meaning: str, allowed: Allowed | None = None) -> Any:
  """A field of a settings dataclass.

  Args:
    default: its value if a config file does not change it; for a group, an instance of its class.
    meaning: what it is, with its unit, for users.
    allowed: the values that it accepts; without it, all of its type.
  """
  return dataclasses.field(default=default, metadata={"meaning": meaning, "allowed": allowed})


def path_setting(meaning: str, default: str | tuple = "") -> Any:
  """A path, or several if `default` is (). In them, ~ at the beginning becomes the home folder."""
  return dataclasses.field(default=default, metadata={"meaning": meaning, "is_path": True})


def at_least(low: float) -> Allowed:
  return Allowed(lambda v: v >= low, lambda: f"at least {low}")


def above(low: float) -> Allowed:
  return Allowed(lambda v: v > low, lambda: f"above {low}")


def between(low: float, high: float) -> Allowed:
  return Allowed(lambda v: low <= v <= high, lambda: f"between {low} and {high}")


def one_of(names: Collection[str]) -> Allowed:
  """One of `names`, for example of a table, which may get further rows later."""
  return Allowed(lambda v: v in names, lambda: "one of " + ", ".join(names))


def some_of(names: Collection[str]) -> Allowed:
  """A tuple of distinct names out of `names`, as in `one_of`, possibly empty."""
  return Allowed(
    lambda v: set(v) <= set(names) and len(set(v)) == len(v),
    lambda: "distinct names out of " + ", ".join(names),
  )


def each(accepts: Callable[[Any], bool], words: str) -> Allowed:
  """A non-empty tuple whose every item is accepted."""
  return Allowed(lambda v: len(v) > 0 and all(accepts(item) for item in v), lambda: words)


def each_if_any(accepts: Callable[[Any], bool], words: str) -> Allowed:
  """A tuple, possibly empty, whose every item is accepted."""
  return Allowed(lambda v: all(accepts(item) for item in v), lambda: words)


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


def _expand_home(value: str | tuple[str, ...], name: str) -> Any:
  """Of a path, or of each of several."""
  if isinstance(value, tuple):
    return tuple(paths.expand_home(path, name) for path in value)
  return paths.expand_home(value, name)


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
    value = _expand_home(value, f"config.{path}")
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
