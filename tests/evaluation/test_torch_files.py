"""State dicts of PyTorch: both layouts, views of storages, and files that must not be trusted."""

import os
import pickle

import numpy as np
import pytest

from memdiff.errors import DataError
from memdiff.evaluation import torch_files
from tests.evaluation import torch_writer
from tests.evaluation.torch_writer import view

LAYOUTS = pytest.mark.parametrize("zipped", [True, False])
NUMBERS = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@LAYOUTS
def test_tensors_are_read_as_they_were_written(zipped, tmp_path):
  path, steps = tmp_path / "a.pth", np.array([5, -7], np.int64)
  torch_writer.write(path, {"weight": view("0", NUMBERS), "steps": view("1", steps)}, zipped)
  found = torch_files.read(str(path))
  np.testing.assert_array_equal(found["weight"], NUMBERS)
  np.testing.assert_array_equal(found["steps"], steps)
  assert found["weight"].dtype == np.float32 and found["steps"].dtype == np.int64


@LAYOUTS
def test_views_share_a_storage(zipped, tmp_path):
  path = tmp_path / "a.pth"
  tensors = {
    "all": view("0", NUMBERS),
    "part": view("0", NUMBERS, offset=12, shape=(2, 4)),
    "transposed": view("0", NUMBERS, shape=(4, 3), strides=(1, 4)),
    "scalar": view("0", NUMBERS, offset=5, shape=()),
  }
  torch_writer.write(path, tensors, zipped)
  found = torch_files.read(str(path))
  np.testing.assert_array_equal(found["part"], NUMBERS[1, :2])
  np.testing.assert_array_equal(found["transposed"], NUMBERS[0].T)
  assert found["scalar"] == 5


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_pytorch_itself_are_read(zipped, tmp_path):
  torch = pytest.importorskip("torch")
  layer, path = torch.nn.Conv2d(3, 4, 3), tmp_path / "a.pth"
  whole = {"epoch": 3, "state_dict": layer.state_dict()}
  torch.save(whole, path, _use_new_zipfile_serialization=zipped)
  found = torch_files.read(str(path))
  assert set(found) == {"weight", "bias"}
  np.testing.assert_array_equal(found["weight"], layer.weight.detach().numpy())


class Evil:
  def __init__(self, mark):
    self.mark = mark

  def __reduce__(self):
    return os.system, (f"touch {self.mark}",)


def test_nothing_is_executed(tmp_path):
  path, mark = tmp_path / "evil.pth", tmp_path / "mark"
  headers = pickle.dumps(torch_writer.MAGIC) + 2 * pickle.dumps(1)
  path.write_bytes(headers + pickle.dumps(Evil(mark)))
  with pytest.raises(DataError, match=r"asks for \w+\.system, which is no array"):
    torch_files.read(str(path))
  assert not mark.exists()


@LAYOUTS
def test_a_tensor_beyond_its_storage_is_refused(zipped, tmp_path):
  path = tmp_path / "a.pth"
  torch_writer.write(path, {"weight": view("0", NUMBERS, offset=20, shape=(2, 4))}, zipped)
  with pytest.raises(DataError, match="reaches beyond its storage"):
    torch_files.read(str(path))


@LAYOUTS
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_torn_file_is_one_sentence(zipped, share, tmp_path):
  path = tmp_path / "a.pth"
  torch_writer.write(path, {"weight": view("0", NUMBERS)}, zipped)
  content = path.read_bytes()
  path.write_bytes(content[: int(share * len(content))])
  with pytest.raises(DataError, match=r"Cannot read .*a\.pth as a PyTorch state dict"):
    torch_files.read(str(path))


def test_a_file_that_is_not_there_is_named(tmp_path):
  with pytest.raises(DataError, match=r"There is no file .*gone\.pth"):
    torch_files.read(str(tmp_path / "gone.pth"))
