"""Files with the weights of networks that judge images: which file, its arrays, their shapes."""

import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors.numpy

from memdiff.errors import DataError
from memdiff.evaluation import torch_files

GIVE = "with --weights or config.evaluation.weights"


def given(path: str, network: str, needed: str) -> str:
  """`path`, for a network whose weights come with no package.

  Args:
    path: as the user gave it; "" if not at all.
    network: its name in the config.
    needed: which file it takes, in words.

  Raises:
    DataError: if there is no such file.
  """
  if not path:
    raise DataError(f"The network {network} needs its weights: give {needed} {GIVE}.")
  if not pathlib.Path(path).is_file():
    raise DataError(f"There is no file {path}, which should be {needed}.")
  return path


def read(path: str) -> dict[str, np.ndarray]:
  """The arrays of a state dict: a .safetensors file, or PyTorch's own file otherwise.

  Raises:
    DataError: if the file is missing, torn, or holds anything but arrays.
  """
  if pathlib.Path(path).suffix != ".safetensors":
    return torch_files.read(path)
  try:
    return safetensors.numpy.load_file(path)
  except FileNotFoundError:
    raise DataError(f"There is no file {path}.") from None
  except Exception as error:  # safetensors raises many types for torn files
    raise DataError(f"Cannot read {path} as a .safetensors file ({error}).") from error


def fitting(
  path: str, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], network: str
) -> dict[str, np.ndarray]:
  """The arrays that `shapes` names, as float32.

  Args:
    path: for messages.
    arrays: may hold more than is needed.
    shapes: of all that is needed.
    network: its name for people, with its article.

  Raises:
    DataError: at the first array that is missing, of another shape, or not finite.
  """
  for name, shape in shapes.items():
    if name not in arrays:
      raise DataError(f"{path} has no array {name}, so it is not {network}.")
    if arrays[name].shape != shape:
      raise DataError(
        f"{path} has {name} of the shape {arrays[name].shape}, not {shape}, so it is not {network}."
      )
    if not np.isfinite(arrays[name].astype(np.float32)).all():
      raise DataError(f"{path} has numbers in {name} that are not finite.")
  return {name: np.asarray(arrays[name], np.float32) for name in shapes}
