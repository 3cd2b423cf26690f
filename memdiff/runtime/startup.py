"""What a process settles before JAX is imported: how it compiles, and how text is printed."""

import codecs
import os
import pathlib
import sys
from collections.abc import MutableMapping

_IN_ASCII = {"±": "+-", "–": "-", "×": "x", "→": "->", "…": "..."}


def print_anything() -> None:
  """Makes standard output and error print every text, whatever their encoding lacks."""
  codecs.register_error("memdiff.in_ascii", _in_ascii)
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):  # not if it is closed or something else's
      stream.reconfigure(errors="memdiff.in_ascii")


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
  """What stands for a character that cannot be encoded, escaped if nothing like it is in ASCII."""
  character = error.object[error.start]
  return _IN_ASCII.get(character, ascii(character)[1:-1]), error.start + 1


def choose_cache(environment: MutableMapping[str, str]) -> None:
  """Has JAX keep compiled programs in the user's home folder, unless the user has said otherwise.

  JAX reads the variables when it is imported. Small programs are kept as well, since a run has
  hundreds of them. Users without a home folder that can be written, as in a container that runs
  under any number, have no cache.
  """
  environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  if "JAX_COMPILATION_CACHE_DIR" in environment:
    return
  try:
    folder = pathlib.Path.home() / ".cache" / "memdiff" / "jax"
  except RuntimeError:  # neither HOME nor an entry in the list of users
    return
  if _is_usable(folder):
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder)


def use_threefry_kernel(environment: MutableMapping[str, str]) -> None:
  """Has JAX draw random numbers by one kernel on GPUs, unless the user has said otherwise.

  The numbers are the same. Without it every draw is compiled by itself, and the first weights of
  LDMLR's U-Net had not compiled after a minute on an H200. JAX reads the variable when it is
  imported.
  """
  environment.setdefault("JAX_THREEFRY_GPU_KERNEL_LOWERING", "1")


def _is_usable(folder: pathlib.Path) -> bool:
  """Makes the folder; whether files can be written to it."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:
    return False
  return os.access(folder, os.W_OK | os.X_OK)
