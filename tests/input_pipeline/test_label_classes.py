"""Classes from labels: their order, their names, and names that do not fit."""

import numpy as np
import pyarrow as pa
import pytest

from memdiff.errors import DataError
from tests.input_pipeline.embedding_files import (
  FEATURES,
  LABELS,
  class_label,
  expected_rows,
  load,
  npz,
  refusal,
  rows_of,
  write_named,
)


def test_class_names_number_the_classes(tmp_path):
  names = ["cat", "ant", "bee"]
  data = load(npz(tmp_path / "a.npz", class_names=names))
  assert data.class_names == ("cat", "ant", "bee") and data.label_values.tolist() == [0, 1, 2]
  assert rows_of(data) == expected_rows(FEATURES, LABELS)
  texts = load(npz(tmp_path / "b.npz", labels=np.array(names)[LABELS], class_names=names))
  assert texts.class_names == data.class_names and texts.label_values.tolist() == names
  assert rows_of(texts) == rows_of(data)


def test_bytes_are_texts_in_utf8(tmp_path):
  words = ["ü".encode(), b"a", b"b"]
  path = npz(tmp_path / "a.npz", labels=np.array(words)[LABELS], class_names=np.array(words))
  assert load(path).class_names == ("ü", "a", "b")
  path = npz(tmp_path / "a.npz", labels=np.array([b"\xff", b"a", b"b"])[LABELS])
  assert "is not in UTF-8" in refusal(path)


@pytest.mark.parametrize(("labels", "names", "words"), [
  (LABELS, list("abcd"), "has 4 class names, but no row with the label 3;"),
  (LABELS, list("abcdefghijkl"), "has 12 class names, but no row with the label 3;"),
  (LABELS + 1, list("abc"), "has 3 class names, but no row with the label 0;"),
  (LABELS, list("ab"), "has the label 2, but no class name for it among 2"),
  (LABELS, list("aba"), "class names in .* have 'a' more than once"),
  (np.array(list("abc"))[LABELS], list("abd"), "no row with the label 'd'"),
  (np.array(list("abc"))[LABELS], list("ab"), "has the label 'c', but no class name"),
  (LABELS, [1, 2, 3], r"The array 'class_names' of .*shape \(3,\) and type int64.*row of texts"),
  (LABELS, [["a", "b", "c"]], r"shape \(1, 3\) and type <U1; it must be one row of texts"),
])  # fmt: skip
def test_class_names_that_do_not_fit_are_refused(tmp_path, labels, names, words):
  path = npz(tmp_path / "a.npz", labels=labels, class_names=np.array(names))
  with pytest.raises(DataError, match=words):
    load(path)


def test_configured_class_names_must_be_there(tmp_path):
  message = refusal(npz(tmp_path / "a.npz"), **{"arrays.class_names": "nmaes"})
  assert "has no array 'nmaes'" in message and "config.dataset.arrays.class_names" in message


def test_one_class_is_no_classification(tmp_path):
  message = refusal(npz(tmp_path / "a.npz", labels=np.full(6, 4)))
  assert "has one class, '4'; a classifier needs at least two" in message


# --- names in the metadata of Parquet ----------------------------------------------------------


def test_class_labels_of_hugging_face_name_the_classes(tmp_path, capsys):
  path = write_named(tmp_path / "a.parquet", LABELS, class_label(["cat", "ant", "bee"]))
  data = load(path)
  assert data.class_names == ("cat", "ant", "bee") and data.label_values.tolist() == [0, 1, 2]
  assert rows_of(data) == expected_rows(FEATURES, LABELS) and not capsys.readouterr().err
  names = [f"n{i}" for i in range(12)]
  data = load(write_named(tmp_path / "a.parquet", LABELS * 5, class_label(names)))
  assert data.class_names == ("n0", "n5", "n10") and data.label_values.tolist() == [0, 5, 10]
  assert rows_of(data) == expected_rows(FEATURES, LABELS)
  assert "dropped 9 class names" in (said := capsys.readouterr().err)
  assert said.endswith(": n1, n2, n3, n4, n6, ...\n")


def test_class_labels_that_do_not_fit_are_refused(tmp_path):
  path = write_named(tmp_path / "a.parquet", LABELS - 1, class_label(["cat", "ant"]))
  assert "has the label -1, but no class name for it among 2." in refusal(path)
  path = write_named(tmp_path / "a.parquet", LABELS, class_label(["cat", "ant", "cat"]))
  assert "have 'cat' more than once" in refusal(path)
  path = write_named(tmp_path / "a.parquet", LABELS, class_label(["cat", "ant", "bee"]))
  test = write_named(tmp_path / "b.parquet", LABELS, class_label(["ant", "cat", "bee"]))
  assert "name the classes differently" in refusal(path, test_path=str(test))
  test = write_named(tmp_path / "b.parquet", LABELS, {})
  assert load(path, test_path=str(test)).class_names == ("cat", "ant", "bee")


@pytest.mark.parametrize("metadata", [
  {"huggingface": "no JSON"}, {"huggingface": "[]"}, {"huggingface": '{"info": null}'}, {},
  {"huggingface": '{"info": {"features": {"label": {"names": "abc", "_type": "ClassLabel"}}}}'},
  {"huggingface": '{"info": {"features": {"label": {"dtype": "int64", "_type": "Value"}}}}'},
  class_label(list("abc"), "another"),
])  # fmt: skip
def test_other_metadata_name_nothing(tmp_path, metadata):
  path = write_named(tmp_path / "a.parquet", LABELS, metadata)
  assert load(path).class_names == ("0", "1", "2")


def test_class_labels_do_not_name_texts(tmp_path):
  texts = np.array(["y", "x", "z"])[LABELS].tolist()
  path = write_named(tmp_path / "a.parquet", texts, class_label(list("abc")))
  assert load(path).class_names == ("x", "y", "z")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.int16()])
def test_categories_without_a_row_are_no_classes(tmp_path, kind):
  indices = pa.array([2, 1, 2, 3, 1, 2], pa.int8())
  words = pa.array(["7", "9", "3", "5"]).cast(kind)
  labels = pa.DictionaryArray.from_arrays(indices, words, ordered=True)
  data = load(write_named(tmp_path / "a.parquet", labels, {}))
  assert data.class_names == ("3", "5", "9")
  assert rows_of(data) == expected_rows(FEATURES, [0, 2, 0, 1, 2, 0])
