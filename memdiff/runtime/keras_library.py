"""KerasHub on JAX, an extra that few runs need."""

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

from memdiff.errors import ConfigError, DataError

INSTALL = "pip install --no-deps -r requirements-text-to-image.txt"


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
  """Reads a model; whatever is wrong with it is one sentence.

  Raises:
    DataError: naming `what`; Keras itself raises many types for torn files.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      yield
  except Exception as error:
    reason = str(error).strip().split("\n")[0]
    raise DataError(f"Cannot read {what} ({type(error).__name__}: {reason}).") from error


def check(needed_by: str) -> None:
  """Raises ConfigError if KerasHub is not installed; `needed_by` is the subject of a sentence."""
  if importlib.util.find_spec("keras_hub") is None:
    raise ConfigError(f"{needed_by} needs KerasHub: {INSTALL}.")


def keras_hub(needed_by: str) -> ModuleType:
  """The module keras_hub.

  Args:
    needed_by: what asks for it, the subject of a sentence.

  Raises:
    ConfigError: if it is not installed, or Keras runs on another library than JAX.
  """
  os.environ.setdefault("KERAS_BACKEND", "jax")
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # those of libraries are theirs
      import keras
      import keras_hub
      import tensorflow
  except ImportError as error:
    raise ConfigError(f"{needed_by} needs KerasHub ({error}): {INSTALL}.") from None
  tensorflow.config.set_visible_devices([], "GPU")  # KerasHub only reads texts with it
  if keras.backend.backend() != "jax":
    raise ConfigError(
      f"Keras runs on {keras.backend.backend()}, but has to run on JAX; set KERAS_BACKEND=jax."
    )
  return keras_hub
