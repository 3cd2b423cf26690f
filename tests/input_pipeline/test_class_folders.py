"""Which files of a class's folder are images: links, hidden names, other files."""

import os
import pathlib
import unicodedata

import pytest

from input_pipeline import class_folders
from input_pipeline.class_folders import LeftOut, describe, find_classes, find_images
from memdiff.errors import DataError


def touch(*paths):
  for path in paths:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def found(folder):
  """(images, {file left out: reason}), as paths within the folder."""
  images, left_out = find_images(folder)
  return (
    [path.relative_to(folder).as_posix() for path in images],
    {item.path.relative_to(folder).as_posix(): item.reason for item in left_out},
  )


# --- files -----------------------------------------------------------------------------------


def test_images_are_taken_by_suffix_and_the_others_are_told_by_theirs(tmp_path):
  names = "b.JPG", "a.tiff", "c/d.gif", "c/a.Jfif", "c.webp", "photo.final.avif"
  touch(*(tmp_path / name for name in (*names, "x.TXT", "c/y.txt", "z.heic", "readme", "a.pdf")))
  (tmp_path / "folder.png").mkdir()
  images, left_out = found(tmp_path)
  assert images == sorted(names, key=lambda name: name.split("/")) and len(images) == 6
  assert left_out == {
    "x.TXT": ".txt", "c/y.txt": ".txt", "z.heic": ".heic", "readme": "without a suffix",
    "a.pdf": ".pdf",
  }  # fmt: skip


def test_what_is_no_file_is_not_opened(tmp_path):
  """Reading a pipe would wait for ever."""
  os.mkfifo(tmp_path / "a.png")
  assert found(tmp_path) == ([], {"a.png": "special file"})


HIDDEN = (".DS_Store", "._a.jpg", ".a.png", "Thumbs.db", "desktop.ini", "Desktop.ini",
          ".ipynb_checkpoints/a.jpg", "@eaDir/a.jpg/SYNOFILE_THUMB_M.jpg", "__MACOSX/a.jpg",
          "x/.cache/a.jpg", "x/@eaDir/a.jpg", "$RECYCLE.BIN/a.jpg", "#recycle/a.jpg")  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_names_and_litter_are_neither_images_nor_classes_nor_mentioned(tmp_path, name):
  touch(tmp_path / "cat/a.jpg", tmp_path / "cat" / name, tmp_path / name)
  assert found(tmp_path / "cat") == (["a.jpg"], {})
  if not name.startswith("x/"):
    classes, beside = find_classes(tmp_path)
    assert list(classes) == ["cat"] and beside == []


def test_a_folder_below_a_hidden_one_may_be_read(tmp_path):
  touch(tmp_path / ".cache/cat/a.jpg")
  assert found(tmp_path / ".cache/cat") == (["a.jpg"], {})


# --- links -----------------------------------------------------------------------------------


def test_links_to_folders_and_files_are_followed(tmp_path):
  names = ("else/1.jpg", "else/deep/2.jpg", "blobs/3f2a", "cat/0.jpg")
  touch(*(tmp_path / name for name in names))
  (tmp_path / "cat/more").symlink_to(tmp_path / "else")
  (tmp_path / "cat/x.jpg").symlink_to("../blobs/3f2a")
  images = ["0.jpg", "more/1.jpg", "more/deep/2.jpg", "x.jpg"]
  assert found(tmp_path / "cat") == (images, {})


def test_a_class_may_be_a_link(tmp_path):
  touch(tmp_path / "dogs/a.jpg", tmp_path / "dogs/b/c.jpg")
  (tmp_path / "train").mkdir()
  (tmp_path / "train/dog").symlink_to("../dogs")
  classes, beside = find_classes(tmp_path / "train")
  assert classes == {"dog": tmp_path / "train/dog"} and beside == []
  assert found(classes["dog"]) == (["a.jpg", "b/c.jpg"], {})


@pytest.mark.parametrize("target", [".", "..", "../..", "a", "a/b"])
def test_loops_end_and_nothing_is_taken_twice(tmp_path, target):
  dog = tmp_path / "train/dog"
  touch(dog / "0.jpg", dog / "a/b/1.jpg", tmp_path / "train/cat/2.jpg")
  (dog / "a/b/loop").symlink_to((dog / target).resolve())
  images, left_out = found(dog)
  assert images == ["0.jpg", "a/b/1.jpg"]
  above = target in (".", "..", "../..")
  assert left_out == {"a/b/loop": "link to a folder above it" if above else "linked twice"}


def test_a_loop_through_a_class_that_is_a_link(tmp_path):
  touch(tmp_path / "dogs/0.jpg", tmp_path / "train/cat/1.jpg")
  (tmp_path / "train/dog").symlink_to(tmp_path / "dogs")
  (tmp_path / "dogs/again").symlink_to(tmp_path / "train/dog")
  (tmp_path / "dogs/up").symlink_to(tmp_path / "train")
  images, left_out = found(tmp_path / "train/dog")
  assert images == ["0.jpg"]
  assert set(left_out.values()) == {"link to a folder above it"} and len(left_out) == 2


def test_two_linked_folders_that_hold_each_other(tmp_path):
  touch(tmp_path / "a/1.jpg", tmp_path / "b/2.jpg")
  (tmp_path / "a/b").symlink_to(tmp_path / "b")
  (tmp_path / "b/a").symlink_to(tmp_path / "a")
  (tmp_path / "cat").mkdir()
  (tmp_path / "cat/x").symlink_to(tmp_path / "a")
  assert found(tmp_path / "cat") == (["x/1.jpg", "x/b/2.jpg"], {"x/b/a": "linked twice"})


@pytest.mark.parametrize("link", ["0.jpg", "z.jpg"], ids=["before", "after"])
def test_a_link_beside_its_image_does_not_double_it(tmp_path, link):
  touch(tmp_path / "5.jpg", tmp_path / "old/1.jpg")
  (tmp_path / link).symlink_to("5.jpg")
  (tmp_path / "zoo").symlink_to("old")
  images, left_out = found(tmp_path)
  assert images == [min(link, "5.jpg"), "old/1.jpg"]
  assert left_out == {max(link, "5.jpg"): "linked twice", "zoo": "linked twice"}


def test_links_that_lead_nowhere_are_told(tmp_path):
  touch(tmp_path / "a.jpg")
  (tmp_path / "b.jpg").symlink_to(tmp_path / "nowhere.jpg")
  (tmp_path / "c").symlink_to(tmp_path / "nowhere")
  (tmp_path / "d.jpg").symlink_to(tmp_path / "d.jpg")  # to itself
  broken = dict.fromkeys(("b.jpg", "c", "d.jpg"), "broken link")
  assert found(tmp_path) == (["a.jpg"], broken)
  classes, beside = find_classes(tmp_path)
  assert classes == {}
  reasons = {item.path.name: item.reason for item in beside}
  assert reasons == broken | {"a.jpg": "outside the folders of classes"}


def test_a_relative_folder_is_the_same_as_an_absolute_one(tmp_path, monkeypatch):
  touch(tmp_path / "train/dog/0.jpg", tmp_path / "train/cat/1.jpg")
  (tmp_path / "train/dog/up").symlink_to("..")
  monkeypatch.chdir(tmp_path)
  assert found(pathlib.Path("train/dog")) == found(tmp_path / "train/dog")
  monkeypatch.chdir(tmp_path / "train/dog")
  assert found(pathlib.Path(".")) == found(tmp_path / "train/dog")


# --- names -----------------------------------------------------------------------------------


def test_names_of_classes_do_not_depend_on_how_letters_are_encoded(tmp_path):
  names = ["café", "zebra", "Ångström", "10", "9", "dog "]
  for name in names:
    (tmp_path / unicodedata.normalize("NFD", name)).mkdir()
  classes, _ = find_classes(tmp_path)
  assert list(classes) == sorted(names)
  (tmp_path / "café").mkdir()
  with pytest.raises(DataError, match=r"two folders 'café', .* encoded; merge them"):
    find_classes(tmp_path)


def test_a_folder_that_cannot_be_read_is_a_sentence(tmp_path, monkeypatch):
  def refuse(path):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(os, "scandir", refuse)
  with pytest.raises(DataError, match=r"Cannot read the folder .* \(Permission denied\)\."):
    find_images(tmp_path)


# --- words -----------------------------------------------------------------------------------


def test_reasons_are_counted_with_an_example_the_most_frequent_first(tmp_path):
  left_out = [
    LeftOut(tmp_path / "cat/a", "without a suffix"),
    LeftOut(tmp_path / "cat/b.txt", ".txt"),
    LeftOut(tmp_path / "cat/c.jpg", "unreadable", "torn"),
    LeftOut(tmp_path / "dog/d.txt", ".txt"),
  ]
  assert describe(left_out, tmp_path) == (
    "4 files left out: 2 .txt (cat/b.txt), 1 without a suffix (cat/a),"
    " 1 unreadable (cat/c.jpg: torn)"
  )
  assert describe(left_out[:1], tmp_path) == "1 file left out: 1 without a suffix (cat/a)"
  assert describe([], tmp_path) == "0 files left out"


def test_many_kinds_are_not_all_listed(tmp_path):
  """As of files numbered by their suffix."""
  left_out = [LeftOut(tmp_path / f"x.{i:03}", f".{i:03}") for i in range(100)]
  words = describe(left_out, tmp_path)
  shown = class_folders._KINDS
  assert words.startswith("100 files left out: 1 .000 (x.000), 1 .001 (x.001), ")
  assert words.endswith(f"{100 - shown} of other kinds (x.{shown:03})") and len(words) < 300
