"""Weights from elsewhere: PyTorch state dicts, stored as .npz or .safetensors, into our ResNets.

Both formats hold arrays and nothing else; nothing is unpickled. Names are those of torchvision and
of the CIFAR ResNets derived from it: `conv1.weight`, `layer1.0.bn2.running_mean`,
`layer2.0.downsample.0.weight`, and the head as `fc` or `linear`; a leading `module.` is dropped.
"""

import pathlib
import re
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from memdiff.errors import DataError

_READERS = {".npz": "an .npz file", ".safetensors": "a .safetensors file"}
_WEIGHTS = {  # PyTorch's name of a layer's array -> ours, by kind of layer
  "conv": {"weight": ("params", "kernel")},
  "head": {"weight": ("params", "kernel"), "bias": ("params", "bias")},
  "bn": {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
  },
}


def read(path: str) -> dict[str, np.ndarray]:
  """The arrays of a state dict.

  Raises:
    DataError: if the file is missing, of another format, or holds anything but arrays.
  """
  file = pathlib.Path(path)
  if file.suffix not in _READERS:
    raise DataError(
      f"{path} is neither {' nor '.join(_READERS.values())}; store the state dict as arrays, for"
      " example with safetensors.torch.save_file(model.state_dict(), path)."
    )
  try:
    if file.suffix == ".safetensors":
      return safetensors.numpy.load_file(path)
    with file.open("rb") as opened:
      arrays = np.load(opened, allow_pickle=False)
      if isinstance(arrays, np.ndarray):
        raise ValueError("it holds one array without a name")
      return dict(arrays)
  except FileNotFoundError:
    raise DataError(f"There is no file {path} to take the encoder's weights from.") from None
  except Exception as error:  # zipfile, zlib and safetensors raise many types for torn files
    raise DataError(f"Cannot read the weights in {path} ({error}).") from error


def load(path: str, variables: dict[str, Any], *, head: bool) -> dict[str, Any]:
  """`variables` with the weights of the state dict in `path`.

  Args:
    path: an .npz or .safetensors file.
    variables: {"params", "batch_stats"} of a backbone, as `init` drew them.
    head: whether the head's weights are read too; otherwise it stays as it was drawn.

  Returns:
    A tree like `variables`.

  Raises:
    DataError: listing every array that is missing, left over, of another shape, or not finite.
  """
  wanted = flax.traverse_util.flatten_dict(variables)
  found, left_over = {}, []
  for name, array in read(path).items():
    place = _place(name)
    if place is None or place not in wanted:
      if not name.endswith("num_batches_tracked") and (head or not _is_head(name)):
        left_over.append(name)
    elif head or place[1] != "head":
      found[place] = (name, _to_flax(array))
  problems = [f"{name} has no place in the backbone" for name in left_over]
  for place, ours in wanted.items():
    if place in found:
      name, array = found[place]
      if array.shape != ours.shape:
        problems.append(f"{name} gives {array.shape} where {ours.shape} is needed")
    elif place[1] != "head" or head:
      problems.append(f"{'/'.join(place[1:])} is missing")
  if problems:
    raise DataError(
      f"The weights in {path} do not fit config.encoder.backbone: {'; '.join(problems)}. Choose"
      " another config.encoder.backbone.name"
      + ("." if not head else ", or config.encoder.init_head=False if only the head differs.")
    )
  damaged = [name for name, array in found.values() if not np.isfinite(array).all()]
  if damaged:
    raise DataError(f"The weights in {path} are not finite in {', '.join(damaged)}.")
  read_in = {place: jnp.asarray(array, jnp.float32) for place, (_, array) in found.items()}
  return flax.traverse_util.unflatten_dict(wanted | read_in)


def _is_head(name: str) -> bool:
  return re.fullmatch(r"(module\.)?(fc|linear)\.(weight|bias)", name) is not None


def _place(name: str) -> tuple[str, ...] | None:
  """Where an array of a state dict belongs in our variables; None if it has no place."""
  *layers, array = name.removeprefix("module.").split(".")
  if layers in (["fc"], ["linear"]):
    kind, modules = "head", ("head",)
  elif layers and (match := re.fullmatch(r"(conv|bn)\d", layers[-1])):
    kind, modules = match[1], _modules(layers)
  elif len(layers) >= 2 and layers[-2] == "downsample" and layers[-1] in ("0", "1"):
    kind = ("conv", "bn")[int(layers[-1])]
    modules = (*_modules(layers[:-1]), kind)
  else:
    return None
  if array not in _WEIGHTS[kind]:
    return None
  collection, ours = _WEIGHTS[kind][array]
  return (collection, *modules, ours)


def _modules(layers: list[str]) -> tuple[str, ...]:
  """["layer1", "0", "conv1"] -> ("layer1_0", "conv1")."""
  return tuple(re.sub(r"\.(\d+)\b", r"_\1", ".".join(layers)).split("."))


def _to_flax(array: np.ndarray) -> np.ndarray:
  """Kernels with the inputs before the outputs: OIHW -> HWIO, OI -> IO."""
  if array.ndim == 4:
    return array.transpose(2, 3, 1, 0)
  return array.T if array.ndim == 2 else array
