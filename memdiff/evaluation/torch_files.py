"""PyTorch's .pth files as NumPy arrays, without PyTorch and without executing what they contain.

A .pth file is a pickle, and unpickling may run code. Here only tensors, dictionaries, lists,
numbers and texts are let through. Both layouts are read: the zip archive of PyTorch 1.6 and later,
and the sequence of pickles before that.
"""

import collections
import dataclasses
import io
import pathlib
import pickle
import zipfile
from typing import Any, BinaryIO

import numpy as np

from memdiff.errors import DataError

_DTYPES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of the old layout


@dataclasses.dataclass(frozen=True)
class _Storage:
  """Numbers that tensors are views of."""

  key: str
  dtype: type


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """A view of a storage; offset and strides count elements."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  def read(self, content: dict[str, bytes]) -> np.ndarray:
    numbers = np.frombuffer(content[self.storage.key], self.storage.dtype)
    last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
    if 0 not in self.shape and not 0 <= self.offset <= self.offset + last < len(numbers):
      raise ValueError(f"a tensor reaches beyond its storage {self.storage.key}")
    strides = [s * numbers.itemsize for s in self.strides]
    return np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, strides).copy()


def _tensor(storage: _Storage, offset: int, shape, strides, *_) -> _Tensor:
  return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _Unpickler(pickle.Unpickler):
  """Lets through what a state dict is made of."""

  def find_class(self, module: str, name: str) -> Any:
    allowed = {
      ("collections", "OrderedDict"): collections.OrderedDict,
      ("torch._utils", "_rebuild_tensor_v2"): _tensor,
      ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    }
    if module == "torch" and name in _DTYPES:
      return _DTYPES[name]
    if (module, name) not in allowed:
      raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
    return allowed[module, name]

  def persistent_load(self, description: Any) -> _Storage:
    _, dtype, key, *_ = description
    return _Storage(key, dtype)


def read(path: str) -> dict[str, np.ndarray]:
  """The arrays of a state dict, which may stand under "state_dict" or "model".

  Raises:
    DataError: if the file is missing, torn, or holds anything but arrays.
  """
  try:
    tree, content = _zipped(path) if zipfile.is_zipfile(path) else _in_sequence(path)
    for name in ("state_dict", "model"):
      tree = tree[name] if isinstance(tree.get(name), dict) else tree
    return {name: x.read(content) for name, x in tree.items() if isinstance(x, _Tensor)}
  except FileNotFoundError:
    raise DataError(f"There is no file {path}.") from None
  except Exception as error:  # pickle and zipfile raise many types for torn files
    raise DataError(f"Cannot read {path} as a PyTorch state dict ({error}).") from error


def _zipped(path: str) -> tuple[Any, dict[str, bytes]]:
  with zipfile.ZipFile(path) as archive:
    (index,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
    folder = index.removesuffix("data.pkl") + "data/"
    content = {
      name.removeprefix(folder): archive.read(name)
      for name in archive.namelist()
      if name.startswith(folder)
    }
    return _Unpickler(io.BytesIO(archive.read(index))).load(), content


def _in_sequence(path: str) -> tuple[Any, dict[str, bytes]]:
  with pathlib.Path(path).open("rb") as file:
    if _Unpickler(file).load() != _MAGIC:
      raise ValueError("it does not begin like one")
    for _ in range(2):  # version of the protocol, sizes of C's types
      _Unpickler(file).load()
    seen = _Recorder(file)
    tree = seen.load()
    content = {}
    for key in _Unpickler(file).load():
      content[key] = _numbers(file, seen.storages[key].dtype)
    return tree, content


class _Recorder(_Unpickler):
  """Remembers the storages it has met, whose numbers follow the pickle."""

  def __init__(self, file: BinaryIO):
    super().__init__(file)
    self.storages: dict[str, _Storage] = {}

  def persistent_load(self, description: Any) -> _Storage:
    storage = super().persistent_load(description)
    self.storages[storage.key] = storage
    return storage


def _numbers(file: BinaryIO, dtype: type) -> bytes:
  size = int.from_bytes(file.read(8), "little") * np.dtype(dtype).itemsize
  content = file.read(size)
  if len(content) < size:
    raise ValueError("it ends before its numbers do")
  return content
