"""Errors that speak to people: one sentence that says what is wrong, where, and what to do."""

import sys
from collections.abc import Callable


class MemdiffError(Exception):
  """A failure whose message is meant for the user; `main.py` prints it without a traceback."""

  exit_code = 1


class ConfigError(MemdiffError):
  """The configuration or the command line is wrong; nothing was started."""

  exit_code = 2


class DataError(MemdiffError):
  """The data cannot be used as asked."""


class WorkdirError(MemdiffError):
  """The workdir cannot be used: locked, unwritable, corrupt, or of another run."""


class NonFiniteError(MemdiffError):
  """Training produced NaN or infinity."""


class Preempted(MemdiffError):
  """The run was asked to stop and saved what it had."""

  exit_code = 143  # 128 + SIGTERM, as schedulers expect of a job that they stopped


class OutOfMemoryError(MemdiffError):
  """A device cannot hold what a program needs; the same command would fail again."""


class LostProcessError(MemdiffError):
  """Another process of the run is gone; the same command on all hosts resumes it."""

  exit_code = 75  # EX_TEMPFAIL: try again


def exit_code(work: Callable[[], None]) -> int:
  """Does the work of a command; what fails becomes a sentence on stderr, and its exit code."""
  try:
    work()
  except MemdiffError as error:
    print(f"memdiff: {error}", file=sys.stderr)
    return error.exit_code
  return 0
