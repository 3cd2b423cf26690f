"""Every field of a config for users: its value, what it means and what it accepts."""

import dataclasses
import textwrap
from typing import Any

_INDENT = " " * 6


def describe(settings: Any) -> str:
  """A page for the terminal, group by group.

  Args:
    settings: an instance of a settings dataclass, as `memdiff.config.build` makes it.
  """
  intro = "Change a field with --config.FIELD=VALUE. A * marks what is not at its default."
  return "\n".join([intro, "", *_lines(settings, type(settings)(), "")])


def _lines(group: Any, default: Any, prefix: str) -> list[str]:
  """A group's fields, and its groups behind them; `default` is the same group at its defaults."""
  lines, groups = [], []
  for field in dataclasses.fields(group):
    path = f"{prefix}{field.name}"
    value, usual = getattr(group, field.name), getattr(default, field.name)
    if dataclasses.is_dataclass(value):
      title = f"{path}: {field.metadata['meaning']}"
      groups += ["", title, *_lines(value, usual, f"{path}.")]
      continue
    lines.append(f"  {path} = {value!r}" if value == usual else f"* {path} = {value!r}")
    if value != usual:
      lines[-1] += f"  (default {usual!r})"
    lines += textwrap.wrap(_meaning(field), 100, initial_indent=_INDENT, subsequent_indent=_INDENT)
  return lines + groups


def _meaning(field: dataclasses.Field) -> str:
  """What a field is, and what it accepts."""
  allowed, words = field.metadata.get("allowed"), field.metadata["meaning"]
  if allowed is not None:
    return f"{words}; {allowed.words()}"
  return f"{words}; True or False" if field.type is bool else words
