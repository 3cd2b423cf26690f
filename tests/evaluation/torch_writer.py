"""Writes PyTorch's two layouts of .pth files without PyTorch; shared by tests."""

import collections
import pickle
import sys
import types
import zipfile

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C


def _rebuild_tensor_v2(*_):
  """Pickled by its name alone."""


class FloatStorage:
  pass


class LongStorage:
  pass


class _Storage:
  def __init__(self, key, array):
    self.key, self.array = key, array


class _Tensor:
  """A view of `storage`, in elements."""

  def __init__(self, storage, offset, shape, strides):
    self.arguments = storage, offset, shape, strides, False, collections.OrderedDict()

  def __reduce__(self):
    return _rebuild_tensor_v2, self.arguments


class _Pickler(pickle.Pickler):
  def persistent_id(self, thing):
    if isinstance(thing, _Storage):
      kind = LongStorage if thing.array.dtype == np.int64 else FloatStorage
      return "storage", kind, thing.key, "cpu", thing.array.size
    return None


def view(key, array, offset=0, shape=None, strides=None):
  """A tensor of `array`'s numbers; by default all of them in order."""
  shape = array.shape if shape is None else shape
  contiguous = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
  return _Tensor(_Storage(key, array.ravel()), offset, shape, strides or contiguous)


def write(path, tensors, zipped):
  """A file with {name: `view`}."""
  torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
  torch.FloatStorage, torch.LongStorage = FloatStorage, LongStorage
  utils._rebuild_tensor_v2 = _rebuild_tensor_v2
  before = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
  sys.modules |= {"torch": torch, "torch._utils": utils}
  places = {_rebuild_tensor_v2: "torch._utils", FloatStorage: "torch", LongStorage: "torch"}
  own = {thing: thing.__module__ for thing in places}
  for thing, module in places.items():
    thing.__module__ = module
  try:
    _write(path, collections.OrderedDict(tensors), zipped)
  finally:
    for thing, module in own.items():
      thing.__module__ = module
    for name, module in before.items():
      if module is None:
        del sys.modules[name]
      else:
        sys.modules[name] = module


def _write(path, tensors, zipped):
  storages = {t.arguments[0].key: t.arguments[0].array for t in tensors.values()}
  if zipped:
    with zipfile.ZipFile(path, "w") as archive:
      with archive.open("model/data.pkl", "w") as file:
        _Pickler(file, 2).dump(tensors)
      for key, array in storages.items():
        archive.writestr(f"model/data/{key}", array.tobytes())
    return
  with open(path, "wb") as file:
    for header in (MAGIC, 1001, {"little_endian": True}):
      pickle.dump(header, file, 2)
    _Pickler(file, 2).dump(tensors)
    pickle.dump(list(storages), file, 2)
    for array in storages.values():
      file.write(array.size.to_bytes(8, "little") + array.tobytes())
