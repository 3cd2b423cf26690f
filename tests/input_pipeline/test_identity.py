"""Whatever enters a run changes its fingerprints; copying data does not."""

import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from configs import digits_lt, features
from configs import folder as folder_config
from input_pipeline import dataset, embeddings, folder, identity
from input_pipeline.source import Source
from memdiff.config import build
from memdiff.errors import DataError

PARTS = ("train", "holdout", "left_out", "test")


def changed(before, after):
  """Names of the fingerprints that differ."""
  assert set(before) == set(after)
  return {name for name in before if before[name] != after[name]}


# --- digests ---------------------------------------------------------------------------------


def test_equal_content_has_one_digest():
  x = np.arange(12, dtype=np.float32).reshape(3, 4)
  wide = np.zeros((3, 8), np.float32)
  wide[:, ::2] = x
  for same in (x.copy(), np.asfortranarray(x), wide[:, ::2]):
    assert identity.digest(same) == identity.digest(x)
  assert identity.digest(("a", "b")) == identity.digest(("a", "b"))


def test_different_content_has_different_digests():
  x = np.arange(6, dtype=np.int32)
  y = x.copy()
  y[-1] += 1
  values = [
    *(x, y, x[::-1], x.reshape(2, 3), x.reshape(3, 2), x.astype(np.int64), x.view(np.float32)),
    *(x[:0], x[:0].reshape(0, 3), np.array(["a", "b"]), np.array(["a", "c"])),
    *((), ("ab",), ("a", "b"), ("b", "a"), ("a, b",), ("a", "b", "")),
  ]
  digests = [identity.digest(value) for value in values]
  assert len(set(digests)) == len(values)
  assert all(len(digest) == 64 for digest in digests)


def test_lengths_of_bytes_count():
  parts = [(b"",), (), (b"ab",), (b"a", b"b"), (b"", b"ab")]
  assert len({identity.of_bytes(*p) for p in parts}) == len(parts)


@pytest.mark.parametrize(("number", "most"), [(0, 3), (1, 3), (3, 3), (10, 3), (1000, 7), (8, 7)])
def test_samples_are_spread_from_the_first_to_the_last(number, most):
  chosen = identity.spread(number, most)
  assert len(chosen) == min(number, most) == len(set(chosen.tolist()))
  assert not number or (chosen[0], chosen[-1]) == (0, number - 1)
  if len(chosen) > 1:
    assert np.diff(chosen).max() - np.diff(chosen).min() <= 1


def test_what_has_no_digest_is_not_passed_over():
  with pytest.raises(AttributeError):
    identity.digest({"a": 1})


# --- sets in memory --------------------------------------------------------------------------


def source(seed=0, num_classes=3, each=20):
  """Images whose number is in their pixels, and a test set of other ones."""
  images = np.random.default_rng(seed).integers(0, 256, (num_classes * each, 4, 4, 1), np.uint8)
  labels = np.arange(len(images)) % num_classes
  names = tuple("abcdefgh"[:num_classes])
  return Source(names, images, labels, images[::2].copy(), labels[::2].copy())


@pytest.fixture
def images(monkeypatch):
  """A function from a source and changes of the config to fingerprints."""

  def fingerprints(of, **changes):
    monkeypatch.setitem(dataset.SOURCES, "digits", lambda _: of)
    config = digits_lt.get_config().dataset.to_dict()
    config |= {"imbalance": 4.0, "holdout": 0.2} | changes
    return dataset.load(build(dataset.DatasetConfig, config)).fingerprints

  return fingerprints


def test_every_part_of_a_set_of_images_has_a_fingerprint(images):
  first = images(source())
  assert set(first) == {f"{p}_{what}" for p in PARTS for what in ("images", "labels")} | {
    "class_names"
  }
  assert images(source()) == first
  assert len(set(first.values())) == len(first)


def test_one_changed_pixel_is_told_in_the_part_that_holds_it(images):
  before, found = images(source()), set()
  for index in range(60):
    other = source()
    other.train_images[index, 3, 0, 0] ^= 1
    (name,) = changed(before, images(other))
    found.add(name)
  assert found == {"train_images", "holdout_images", "left_out_images"}
  other = source()
  other.test_images[-1, 0, 0, 0] ^= 1
  assert changed(before, images(other)) == {"test_images"}


def test_labels_names_and_order_are_told(images):
  before, other = images(source()), source()
  other.test_labels[[0, 1]] = other.test_labels[[1, 0]]
  assert changed(before, images(other)) == {"test_labels"}
  other = source()
  order = np.random.default_rng(1).permutation(len(other.test_labels))
  other.test_images[:], other.test_labels[:] = other.test_images[order], other.test_labels[order]
  assert changed(before, images(other)) == {"test_images", "test_labels"}
  other = source()
  other.train_images[[0, 3]] = other.train_images[[3, 0]]  # of one class
  assert changed(before, images(other)) <= {f"{p}_images" for p in PARTS} - {"test_images"}
  assert changed(before, images(other))
  renamed = Source(("a", "B", "c"), *list(vars(source()).values())[1:])
  assert changed(before, images(renamed)) == {"class_names"}


def test_an_edited_list_is_told(images, tmp_path):
  path, kept = tmp_path / "kept.npz", np.arange(30)
  np.savez(path, kept=kept)
  before = images(source(), profile="list", list_path=str(path))
  np.savez(path, kept=np.r_[kept[:-1], 33])  # another image of the same class
  found = changed(before, images(source(), profile="list", list_path=str(path)))
  assert "left_out_images" in found and found & {"train_images", "holdout_images"}


# --- embeddings ------------------------------------------------------------------------------


def write_rows(path, **changes):
  labels = np.repeat([0, 1, 2], [20, 10, 5])
  features = np.random.default_rng(0).normal(size=(35, 6))
  arrays = {"features": features, "labels": labels, "class_names": np.array(["a", "b", "c"])}
  np.savez(path, **(arrays | {name: change(arrays[name]) for name, change in changes.items()}))


def rows(path):
  config = features.get_config().dataset.to_dict()
  config |= {"train_path": str(path), "test_share": 0.2, "skip_non_finite": True}
  return embeddings.load(build(embeddings.EmbeddingsConfig, config)).fingerprints


def with_value(index, value):
  def change(array):
    array = array.copy()
    array[index] = value
    return array

  return change


@pytest.mark.parametrize(
  ("change", "expected"),
  [
    ({"class_names": with_value(1, "z")}, {"class_names"}),
    ({"labels": lambda y: 2 - y}, None),
    ({"features": lambda x: x + 1e-3}, {"train_features", "test_features"}),
    ({"features": with_value((0, 0), np.nan)}, None),
    ({"features": lambda x: np.roll(x, 1, axis=1)}, None),
  ],
)
def test_changed_rows_are_told(tmp_path, change, expected):
  write_rows(tmp_path / "x.npz")
  before = rows(tmp_path / "x.npz")
  write_rows(tmp_path / "x.npz", **change)
  found = changed(before, rows(tmp_path / "x.npz"))
  assert found and expected in (None, found)


def test_rows_that_are_written_anew_are_the_same(tmp_path):
  write_rows(tmp_path / "x.npz")
  before = rows(tmp_path / "x.npz")
  parts = ("train", "left_out", "test")
  assert {f"{p}_{what}" for p in parts for what in ("features", "labels")} < set(before)
  write_rows(tmp_path / "x.npz")
  os.utime(tmp_path / "x.npz", (1, 1))
  assert rows(tmp_path / "x.npz") == before


# --- files that stay on disk -----------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
  """Files of many sizes in two folders, in order."""
  paths = [tmp_path / "files" / name for name in ("a/1", "a/2", "b/1", "b/2", "b/3")]
  for seed, (path, size) in enumerate(zip(paths, (0, 10, 5000, 30_000, 100_000), strict=True)):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.random.default_rng(seed).bytes(size))
  return paths


def test_a_copy_elsewhere_and_a_touch_change_nothing(files, tmp_path):
  before = identity.of_files(files)
  for path in files:
    os.utime(path, (1, 1))
  assert identity.of_files(files) == before
  shutil.copytree(tmp_path / "files", tmp_path / "deeper" / "place")
  moved = [tmp_path / "deeper" / "place" / path.relative_to(tmp_path / "files") for path in files]
  assert identity.of_files(moved) == before
  assert identity.of_files([str(path) for path in files]) == before


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_file_of_the_same_size_with_other_content_is_told(files, number, where):
  before, path = identity.of_files(files), files[number]
  content = bytearray(path.read_bytes())
  content[{"first": 0, "middle": len(content) // 2, "last": -1}[where]] ^= 1
  path.write_bytes(content)
  assert identity.of_files(files) != before


def test_names_sizes_and_order_of_files_are_told(files, monkeypatch):
  monkeypatch.setattr(identity, "_SAMPLED", 1)  # of the others only names and sizes count
  before = identity.of_files(files)
  assert identity.of_files(files[::-1]) != before
  assert identity.of_files(files[:-1]) != before
  with files[3].open("ab") as file:
    file.write(b"x")
  longer = identity.of_files(files)
  assert longer != before
  files[3] = files[3].rename(files[3].with_name("2b"))
  assert identity.of_files(files) not in (before, longer)


def test_many_files_are_sampled_and_a_change_of_all_is_told(tmp_path, monkeypatch):
  monkeypatch.setattr(identity, "_SAMPLED", 10)
  paths, opened = [tmp_path / f"{i:03d}" for i in range(600)], []
  for path in paths:
    path.write_bytes(b"old")
  monkeypatch.setattr("builtins.open", lambda p, *a, **k: opened.append(p) or os.fdopen(
    os.open(p, os.O_RDONLY), *a, **k))  # fmt: skip
  before = identity.of_files(paths)
  monkeypatch.undo()
  assert len(opened) == 10
  monkeypatch.setattr(identity, "_SAMPLED", 10)
  for path in paths:
    path.write_bytes(b"new")
  assert identity.of_files(paths) != before


def test_no_files_have_a_digest_and_a_missing_one_is_named(files):
  assert identity.of_files([]) == identity.of_files([])
  files[2].unlink()
  with pytest.raises(DataError, match=rf"Cannot read the file {files[2]} \(No such file"):
    identity.of_files(files)


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes")
def test_names_that_are_no_text_have_a_digest(tmp_path):
  path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")
  with open(path, "wb") as file:
    file.write(b"x")
  assert len(identity.of_files([path])) == 64


@pytest.fixture
def photographs(tmp_path, monkeypatch):
  """A folder that is read lazily, with nine images of every class to train on."""
  monkeypatch.setattr(folder, "_IN_MEMORY", 0)
  for part, each in (("train", 9), ("test", 2)):
    for c in ("cat", "dog"):
      for i in range(each):
        path = tmp_path / "data" / part / c / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(
          np.random.default_rng(i).integers(0, 256, (9, 8, 3), np.uint8)
        ).save(path)  # fmt: skip
  return tmp_path / "data"


def folder_fingerprints(root):
  config = folder_config.get_config().dataset.to_dict()
  config |= {"data_dir": str(root), "image_size": 8, "holdout": 0.3}
  data = dataset.load(build(dataset.DatasetConfig, config))
  assert data.streamed
  return data.fingerprints


def test_a_folder_read_lazily_tells_its_replaced_images(photographs, tmp_path):
  before = folder_fingerprints(photographs)
  shutil.copytree(photographs, tmp_path / "copy", copy_function=shutil.copyfile)
  assert folder_fingerprints(tmp_path / "copy") == before
  found = set()
  for i in range(9):
    path = photographs / "train" / "dog" / f"{i}.png"
    content = path.read_bytes()
    Image.fromarray(np.full((9, 8, 3), 7, np.uint8)).save(path)
    path.write_bytes(path.read_bytes().ljust(len(content), b"\0"))
    assert path.stat().st_size == len(content)
    (name,) = changed(before, folder_fingerprints(photographs))
    found.add(name)
    path.write_bytes(content)
  assert found == {"train_images", "holdout_images"}
  (photographs / "test" / "cat" / "1.png").unlink()
  assert changed(before, folder_fingerprints(photographs)) == {"test_images", "test_labels"}
  assert folder_fingerprints(tmp_path / "copy") == before
