"""Published lists: indices and file names, and one sentence for everything that is wrong."""

import dataclasses
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from input_pipeline import dataset, index_lists
from input_pipeline.dataset import DatasetConfig
from input_pipeline.source import Source
from memdiff.errors import DataError

LABELS = np.array([0, 0, 1, 1, 2, 2])
NAMES = np.array([f"n{label:03}/{i}.jpg" for i, label in enumerate(LABELS)])


def read(path, names=None, labels=LABELS):
  return index_lists.read(str(path), labels, names)


@pytest.fixture
def lines(tmp_path):
  """Writes a text list and returns its path."""

  def write(*entries, end="\n"):
    path = tmp_path / "list.txt"
    path.write_bytes(end.join([*entries, ""]).encode())
    return path

  return write


# --- indices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64, np.uint64])
def test_the_only_array_of_a_file_is_read(tmp_path, kind):
  np.savez(tmp_path / "one.npz", anything=np.array([5, 0, 3], kind))
  indices = read(tmp_path / "one.npz")
  assert indices.tolist() == [5, 0, 3] and indices.dtype == np.int64


def test_one_of_several_arrays_is_named(tmp_path):
  np.savez_compressed(tmp_path / "lists.npz", a_b=[1, 2], **{"if 100": [4]})
  assert read(f"{tmp_path}/lists.npz:a_b").tolist() == [1, 2]
  assert read(f"{tmp_path}/lists.npz:if 100").tolist() == [4]


def test_the_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  np.savez(tmp_path / "mine.npz", x=[1])
  assert read("~/mine.npz").tolist() == [1]


@given(st.permutations(range(6)), st.integers(1, 6))
def test_the_order_of_the_list_is_kept(tmp_path_factory, order, number):
  path = tmp_path_factory.getbasetemp() / "order.npz"
  np.savez(path, order[:number])
  assert read(path).tolist() == order[:number]


def archive(*arrays, **named):
  return lambda path: np.savez(path, *arrays, **named)


def array_file(path):
  with open(path, "wb") as file:
    np.save(file, np.array([1, 2]))


def text_inside(path):
  with zipfile.ZipFile(path, "w") as file:
    file.writestr("readme.txt", "hello")


def damaged(where):
  """Compressed, with the byte at `where` past the file's own name changed."""

  def make(path):
    np.savez_compressed(path, x=np.arange(5) % 3)
    data = bytearray(path.read_bytes())
    data[data.index(b"x.npy") + where] = 0xFF
    path.write_bytes(data)

  return make


def of_unknown_compression(path):
  np.savez_compressed(path, x=np.arange(5) % 3)
  data = bytearray(path.read_bytes())
  data[data.index(b"PK\x01\x02") + 10] = 0xFF
  path.write_bytes(data)


@pytest.mark.parametrize(("make", "words"), [
  (archive([6, 1, -1, 0]), r"2 of 4 indices in .*list.npz lie outside the training set of 6 images,"
                           " the first is 6"),
  (archive(np.array([2**63 + 1], np.uint64)), f"1 of 1 indices .* the first is {2**63 + 1}"),
  (archive([1, 3, 1, 2, 3]), "2 images stand more than once in .*list.npz, the first is index 1"),
  (archive(np.zeros(0, int)), "The list .*list.npz is empty"),
  (archive([1.0, 2.0]), r"has shape \(2,\) and type float64; it must be one row of whole numbers"),
  (archive([True, False]), r"type bool; it must be one row"),
  (archive([[1, 2]]), r"has shape \(1, 2\) and type int64; it must be one row"),
  (archive(np.int64(3)), r"has shape \(\) and type int64; it must be one row"),
  (archive(np.array(["a"])), "it must be one row of whole numbers"),
  (archive(np.array([None, 1], object)), "Cannot read the index list .*list.npz .*pickle"),
  (archive(), "list.npz holds no array"),
  (archive(if_10=[1], if_50=[2]), r"holds several arrays \(if_10, if_50\); name one, as in .*"
                                  "list.npz:if_10"),
  (array_file, r"Cannot read the index list .*list.npz \(it is one array in .npy format\)"),
  (text_inside, "list.npz has shape .*; it must be one row of whole numbers"),
  (lambda path: path.write_text("no archive"), "Cannot read the index list .*list.npz"),
  (lambda path: path.write_bytes(b""), "Cannot read the index list .*list.npz"),
  (lambda path: path.write_bytes(b"PK\x03\x04 and no more"), "Cannot read the index list"),
  (damaged(25), r"Cannot read the index list .*list.npz \(Error -3 while decompressing"),
  (damaged(45), "Cannot read the index list .*list.npz"),
  (of_unknown_compression, "Cannot read the index list .*list.npz"),
  (lambda path: path.mkdir(), "Cannot read the index list .*list.npz"),
  (lambda path: None, r"There is no file .*list.npz \(config.dataset.list_path\)"),
], ids=lambda value: value[:24] if isinstance(value, str) else "")  # fmt: skip
def test_index_files_that_do_not_fit_are_one_sentence(tmp_path, make, words):
  path = tmp_path / "list.npz"
  make(path)
  with pytest.raises(DataError, match=words) as raised:
    read(path)
  assert "\n" not in str(raised.value)


def test_an_array_that_is_not_there_is_named_with_those_that_are(tmp_path):
  np.savez(tmp_path / "list.npz", if_10=[1], if_50=[2])
  with pytest.raises(DataError, match=r"list.npz has no array 'if_100'; it has if_10, if_50\."):
    read(f"{tmp_path}/list.npz:if_100")
  with pytest.raises(DataError, match=r"There is no file .*other.npz \(config"):
    read(f"{tmp_path}/other.npz:if_10")


def test_no_path_is_a_sentence():
  with pytest.raises(DataError, match=r"profile is list, but config.dataset.list_path is empty"):
    read("")


# --- file names ------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "train/", "./data/train/", "/"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_names_are_found_whatever_folders_come_before(lines, prefix, end):
  path = lines(f"{prefix}n002/5.jpg 2", "", f"  {prefix}n000/.//1.jpg   0 ", end=end)
  indices = read(path, NAMES)
  assert indices.tolist() == [5, 1] and indices.dtype == np.int64


def test_names_without_folders_are_found_under_those_of_the_list(lines):
  names = np.array([f"n{label:03}_{i}.jpg" for i, label in enumerate(LABELS)])
  path = lines("train/n001/n001_3.jpg 1", "train/n000/n000_0.jpg 0")
  assert read(path, names).tolist() == [3, 0]


def test_names_may_lie_in_folders_of_different_depth(lines):
  """The deep one comes late."""
  names = np.array([f"{i}.jpg" for i in range(150)] + ["a/b/0.jpg"])
  path = lines("a/b/0.jpg 0", "7.jpg 0")
  assert read(path, names, np.zeros(151, int)).tolist() == [150, 7]


@pytest.mark.parametrize(("entries", "words"), [
  (["n000/0.jpg 0", "", "n000/1.jpg"], r"Line 3 of .*list.txt is 'n000/1.jpg', but must be a file"
                                       " name and a class number"),
  (["n000/0.jpg 0 7"], "Line 1 of .* is 'n000/0.jpg 0 7', but must be"),
  (["n000/0.jpg zero"], "Line 1 of .* is 'n000/0.jpg zero', but must be"),
  (["n000/0.jpg -1"], "Line 1 of .* is 'n000/0.jpg -1', but must be"),
  (["n000/0.jpg 1.0"], "Line 1 of .* is 'n000/0.jpg 1.0', but must be"),
  (["n000/0.jpg ²"], "Line 1 of .* is 'n000/0.jpg ²', but must be"),
  (["my cat.jpg 0"], "Line 1 of .* is 'my cat.jpg 0', but must be"),
  (["n000/0.jpg 0", "n000/8.jpg 0", "9.jpg 1"],
   r"2 of 3 files in .*list.txt are not in the training set, the first is n000/8.jpg\."),
  (["/ 0"], "1 of 1 files in .* are not in the training set, the first is /"),
  (["n000/0.jpg 0", "n001/2.jpg 2", "n001/3.jpg 1"],
   r"gives images of one class of the data set the classes 2 and 1 \(its entry 3\)"),
  (["n000/0.jpg 7", "n001/2.jpg 7"], "calls images of several classes of the data set the class 7"),
  (["n000/0.jpg 0", "train/n000/0.jpg 0"], "1 images stand more than once in .*the first is index"),
  ([], "The list .*list.txt is empty"),
], ids=lambda value: value[:24] if isinstance(value, str) else "")  # fmt: skip
def test_text_lists_that_do_not_fit_are_one_sentence(lines, entries, words):
  with pytest.raises(DataError, match=words):
    read(lines(*entries), NAMES)


def test_a_list_may_number_the_classes_its_own_way_and_leave_out_suffixes(lines):
  path = lines("n001/2 0", "n000/0.jpeg 99999999999999999999")
  assert read(path, NAMES).tolist() == read(lines("n001/2.jpg 1", "n000/0.jpg 0"), NAMES).tolist()


def test_text_lists_need_names(lines):
  with pytest.raises(DataError, match=r"lists file names, but this data set has none"):
    read(lines("n000/0.jpg 0"), None)


def test_text_lists_that_cannot_be_read_are_one_sentence(tmp_path):
  with pytest.raises(DataError, match=r"There is no file .*none.txt \(config.dataset.list_path\)"):
    read(tmp_path / "none.txt", NAMES)
  with pytest.raises(DataError, match="Cannot read the list"):
    read(tmp_path, NAMES)
  (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
  with pytest.raises(DataError, match=r"Cannot read the list .*binary.txt"):
    read(tmp_path / "binary.txt", NAMES)


# --- in a data set ---------------------------------------------------------------------------

CONFIG = DatasetConfig(
  name="digits", data_dir="", profile="list", imbalance=1.0, split_seed=0, list_path="",
  holdout=0.0, image_size=0, skip_unreadable=False, test_share=0.0,
  test_seed=0,
)  # fmt: skip


@pytest.fixture
def pets(monkeypatch):
  images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
  source = Source(("cat", "dog", "eel"), images, LABELS, images, LABELS, NAMES)
  monkeypatch.setitem(dataset.SOURCES, "digits", lambda _: source)


@pytest.mark.usefixtures("pets")
def test_a_data_set_is_cut_by_a_list(lines):
  path = lines("n002/4.jpg 2", "n000/1.jpg 0", "n001/2.jpg 1", "n000/0.jpg 0")
  data = dataset.load(dataclasses.replace(CONFIG, list_path=str(path)))
  assert data.train_images.ravel().tolist() == [4, 1, 2, 0]
  assert data.train_labels.tolist() == [2, 0, 1, 0]
  assert data.left_out_images.ravel().tolist() == [3, 5]
  assert data.left_out_labels.tolist() == [1, 2]
  assert data.imbalance == 2.0 and data.train_counts.tolist() == [2, 1, 1]


@pytest.mark.usefixtures("pets")
def test_a_list_without_a_class_is_refused(tmp_path):
  np.savez(tmp_path / "list.npz", [0, 1, 4])
  config = dataclasses.replace(CONFIG, list_path=f"{tmp_path}/list.npz")
  with pytest.raises(DataError, match=r"1 classes have no image in .*npz, the first is 'dog'"):
    dataset.load(config)
