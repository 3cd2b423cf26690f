"""Captions that lie beside the classes of a folder."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from input_pipeline import captions, dataset, folder
from input_pipeline.dataset import DatasetConfig
from memdiff.errors import DataError

TEXTS = {"cat/0.png": "a grey cat", "cat/1.png": 'a cat, "asleep"', "dog/0.png": "a dog\n at sea"}


def make_folder(root, numbers=(("cat", 3), ("dog", 2))):
  for part in ("train", "test"):
    for name, number in numbers:
      (root / part / name).mkdir(parents=True)
      for i in range(number):
        pixels = np.full((4, 4, 3), 40 * i, np.uint8)
        Image.fromarray(pixels).save(root / part / name / f"{i}.png")
  return root


def as_csv(path, texts=None, header="file_name,text"):
  with open(path / "metadata.csv", "w", encoding="utf-8-sig", newline="") as file:
    csv.writer(file).writerows([header.split(","), *(texts or TEXTS).items()])


def as_json(path, key="text"):
  lines = [json.dumps({"file_name": name, key: text}) for name, text in TEXTS.items()]
  (path / "metadata.jsonl").write_text("\n\n".join(lines), encoding="utf-8")


EXPECTED = ("a grey cat", 'a cat, "asleep"', "", "a dog at sea", "")


@pytest.mark.parametrize(
  "write", [as_csv, as_json, lambda path: as_json(path, "caption")], ids=["csv", "json", "caption"]
)
def test_captions_belong_to_the_images_that_their_paths_name(tmp_path, write):
  write(make_folder(tmp_path) / "train")
  source = folder.load(str(tmp_path), 0, False)
  assert source.train_captions == EXPECTED and source.test_captions is None


def test_without_a_file_there_are_none(tmp_path):
  source = folder.load(str(make_folder(tmp_path)), 0, False)
  assert source.train_captions is None


def test_the_file_is_neither_image_nor_left_out_and_their_number_is_said(tmp_path, capsys):
  as_csv(make_folder(tmp_path) / "train")
  folder.load(str(tmp_path), 0, False)
  said = capsys.readouterr().err
  assert "5 train with 3 captions of 5" in said and "0 files left out" in said


def test_captions_stay_with_their_images_when_a_test_set_is_split_off(tmp_path):
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    for i in range(6):
      value = 10 * i + (name == "b")
      Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(tmp_path / name / f"{i}.png")
  as_csv(tmp_path, {f"{n}/{i}.png": f"{10 * i + (n == 'b')}" for n in "ab" for i in range(6)})
  config = DatasetConfig(
    name="folder", data_dir=str(tmp_path), test_share=0.34, imbalance=2.0, profile="exponential"
  )
  data = dataset.load(config)
  for part in ("train", "test"):
    images, texts = (getattr(data, f"{part}_{kind}") for kind in ("images", "captions"))
    assert [str(pixels[0, 0, 0]) for pixels in images] == list(texts) and len(texts) > 1


def test_changed_captions_are_other_data(tmp_path):
  as_csv(make_folder(tmp_path) / "train")
  config = DatasetConfig(name="folder", data_dir=str(tmp_path), profile="natural")
  before = dataset.load(config).fingerprints
  as_csv(tmp_path / "train", TEXTS | {"dog/1.png": "another"})
  after = dataset.load(config).fingerprints
  assert {name for name in before if before[name] != after[name]} == {"train_captions"}


def broken(path, kind):
  if kind == "two":
    as_csv(path)
    as_json(path)
  elif kind == "header":
    as_csv(path, header="path,text")
  elif kind == "foreign":
    as_csv(path, {"train/cat/0.png": "a cat"})
  elif kind == "torn":
    (path / "metadata.jsonl").write_text('{"file_name": "cat/0.png", "te')
  elif kind == "list":
    (path / "metadata.jsonl").write_text("[1, 2]")
  elif kind == "number":
    (path / "metadata.jsonl").write_text('{"file_name": "cat/0.png", "text": 3}')
  elif kind == "quote":
    (path / "metadata.csv").write_text('file_name,text\ncat/0.png,"a cat\ncat/1.png,a cat\n')
  elif kind == "latin":
    (path / "metadata.csv").write_bytes(b"file_name,text\ncat/0.png,caf\xe9")


@pytest.mark.parametrize(
  ("kind", "words"),
  [
    ("two", "has both metadata.csv and metadata.jsonl; keep one"),
    ("header", "line 2: it needs file_name and text or caption"),
    ("foreign", "has no caption for any image of"),
    ("torn", "Cannot read the captions in"),
    ("list", "line 1 is no object"),
    ("number", "line 1: it needs file_name and text or caption"),
    ("latin", "Cannot read the captions in"),
    ("quote", "after line 1: unexpected end of data; look at its quotes"),
  ],
)
def test_a_broken_file_is_named_in_one_sentence(tmp_path, kind, words):
  broken(make_folder(tmp_path) / "train", kind)
  with pytest.raises(DataError, match="metadata") as error:
    folder.load(str(tmp_path), 0, False)
  assert words in str(error.value)


def test_captions_are_added_to_what_is_there(tmp_path):
  captions.append(tmp_path, {"a/0.png": 'a "red", round thing'})
  captions.append(tmp_path, {"a/1.png": "zwei Körbe", "b/0.png": "x"})
  expected = {"a/0.png": 'a "red", round thing', "a/1.png": "zwei Körbe", "b/0.png": "x"}
  assert captions.known(tmp_path) == expected
  paths = [tmp_path / "a" / "1.png", tmp_path / "c.png"]
  assert captions.read(tmp_path, paths) == ("zwei Körbe", "")


@pytest.mark.parametrize(
  ("name", "before"),
  [
    ("metadata.csv", "caption,file_name,by\nold,a/0.png,me"),
    ("metadata.jsonl", '{"file_name": "a/0.png", "text": "old", "by": "me"}'),
  ],
)
def test_other_columns_stay_and_a_last_line_is_ended(tmp_path, name, before):
  (tmp_path / name).write_text(before)
  captions.append(tmp_path, {"a/1.png": "new"})
  assert captions.known(tmp_path) == {"a/0.png": "old", "a/1.png": "new"}
  assert (tmp_path / name).read_text().startswith(before + "\n")
  assert captions.known(tmp_path / "none") == {}


@pytest.mark.parametrize("content", ["", "\n", "\ufeff", "file_name,text\n", "file_name,text"])
def test_a_file_without_rows_gets_its_first(tmp_path, content):
  (tmp_path / "metadata.csv").write_text(content, encoding="utf-8")
  captions.append(tmp_path, {"a/1.png": "new"})
  assert captions.known(tmp_path) == {"a/1.png": "new"}


def test_other_columns_alone_are_refused(tmp_path):
  (tmp_path / "metadata.csv").write_text("file_name,description\n")
  for act in (captions.known, lambda folder: captions.append(folder, {"a": "b"})):
    with pytest.raises(DataError, match=r"needs the columns file_name and text or caption"):
      act(tmp_path)


def test_of_two_texts_the_one_that_is_there_counts(tmp_path):
  (tmp_path / "metadata.csv").write_text("file_name,text,caption\na,,old\nb,new,old\n")
  assert captions.known(tmp_path) == {"a": "old", "b": "new"}


def test_no_file_is_described_by_nothing():
  assert captions.describe(None) == "" and captions.describe(("a", "")) == "with 1 captions of 2"
