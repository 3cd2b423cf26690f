"""Paths as people type them: `~`, addresses of buckets, names that would go wrong later."""

import os
import pathlib
import re
import sys
from collections.abc import Sequence

from memdiff.errors import ConfigError

# Local folders that etils, by which Orbax reaches files, takes for buckets.
_TAKEN_FOR_BUCKETS = ("gs", "s3", "az", "hf")


def expand_home(path: str, name: str) -> str:
  """`path` with `~` or `~user` at its beginning written out; shells do not for `--flag=~/x`.

  Args:
    path: as it was typed.
    name: of the flag or field, for the error.

  Raises:
    ConfigError: if there is no such home folder.
  """
  expanded = os.path.expanduser(path)
  if expanded.startswith("~"):
    raise ConfigError(
      f"{name} is {path!r}, but the home folder of {path.split('/')[0]} is not known; write the"
      f" whole path, or ./{path} if the name begins with ~."
    )
  return expanded


def workdir(path: str) -> pathlib.Path:
  """The absolute path that --workdir means.

  Raises:
    ConfigError: if it is no path on this machine, or one that checkpoints cannot be saved under.
  """
  if not path.strip():
    raise ConfigError("--workdir is empty; give a folder, for example --workdir=runs/first.")
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
    raise ConfigError(
      f"--workdir is {path}, an address; give a folder of this machine, on which the storage is"
      " mounted if need be."
    )
  absolute = pathlib.Path(expand_home(path, "--workdir")).absolute()
  problem = None
  if "\\" in str(absolute):  # TensorStore takes it for a slash
    problem = "a backslash"
  elif not _is_text(str(absolute)):  # TensorStore and JSON take UTF-8 alone
    problem = "a name that is not UTF-8"
  elif absolute.parts[1:2] and absolute.parts[1] in _TAKEN_FOR_BUCKETS:
    problem = f"/{absolute.parts[1]}, which would be taken for a bucket"
  if problem:
    raise ConfigError(
      f"--workdir is {str(absolute)!a}, which has {problem}; choose another folder, since"
      " checkpoints cannot be saved there."
    )
  return absolute


def check_arguments(arguments: Sequence[str]) -> None:
  """Raises ConfigError if the command line holds bytes that the locale cannot read."""
  for argument in arguments:
    if not _is_text(argument):
      raise ConfigError(
        f"The argument {argument!a} is no text in the encoding {sys.getfilesystemencoding()};"
        " set PYTHONUTF8=1 if it is UTF-8, or rename what it names."
      )


def _is_text(path: str) -> bool:
  """Whether a path, as Python reads it from the system, is made of characters alone."""
  return not any("\ud800" <= character <= "\udfff" for character in path)
