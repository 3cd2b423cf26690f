"""Folders of Parquet files, and class names in their metadata."""

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from input_pipeline import parquet_files
from memdiff.errors import DataError
from tests.input_pipeline.embedding_files import (
  FEATURES,
  FLOATS,
  LABELS,
  TEST,
  class_label,
  expected_rows,
  load,
  refusal,
  rows_of,
  write_columns,
  write_named,
  write_parquet,
)


def write_parts(folder, names, sizes=(2, 1, 3)):
  """FEATURES and LABELS over these files, so many rows to each."""
  folder.mkdir()
  start = 0
  for name, size in zip(names, sizes, strict=True):
    rows = slice(start, start + size)
    table = pa.table({"features": pa.array(FEATURES[rows].tolist(), FLOATS), "label": LABELS[rows]})
    parquet.write_table(table, folder / name)
    start += size
  return folder


@pytest.mark.parametrize("folder", ["parts", "train.parquet", "data.v2"])
@pytest.mark.parametrize("names", [
  ["part-2.parquet", "part-10.parquet", "part-11.parquet"],
  ["a.pq", "b.PARQUET", "c.Pq"],
  ["part-00000-x.c000.snappy.parquet", "part-00001-x.c000.snappy.parquet", "part-1.parquet"],
])  # fmt: skip
def test_a_folder_is_its_parts_in_natural_order(tmp_path, capsys, folder, names):
  path = write_parts(tmp_path / folder, names)
  for hidden in ("_SUCCESS", "._SUCCESS.crc", ".DS_Store", "_metadata", "._part-2.parquet"):
    (path / hidden).write_text("")
  (path / "_temporary").mkdir()
  rows = parquet_files.read(path, "features", "label")
  np.testing.assert_array_equal(rows.features, FEATURES)
  np.testing.assert_array_equal(rows.labels, LABELS)
  data = load(path)
  assert rows_of(data) == expected_rows(FEATURES, LABELS) and data.name == folder
  np.testing.assert_array_equal(data.train_features, FEATURES[data.train_rows])
  assert not capsys.readouterr().err


def test_other_files_in_a_folder_are_left_out_and_said(tmp_path, capsys):
  path = write_parts(tmp_path / "parts", ["1.parquet", "2.parquet", "3.parquet"])
  for name in ("readme.txt", "4.parquet.part"):
    (path / name).write_text("")
  assert len(parquet_files.read(path, "features", "label").labels) == 6
  assert capsys.readouterr().err.endswith("are not Parquet: 4.parquet.part, readme.txt\n")


def test_empty_parts_are_passed_over(tmp_path):
  names = [f"{i}.parquet" for i in range(5)]
  path = write_parts(tmp_path / "parts", names, (0, 4, 0, 2, 0))
  assert rows_of(load(path)) == expected_rows(FEATURES, LABELS)
  path = write_parts(tmp_path / "empty", names[:2], (0, 0))
  assert refusal(path).endswith("empty holds no rows.")


def test_folders_that_cannot_be_read_are_one_sentence(tmp_path):
  (tmp_path / "parts").mkdir()
  assert "holds no Parquet files" in refusal(tmp_path / "parts")
  path = write_parts(tmp_path / "hive", ["1.parquet"], [6])
  (path / "label=cat").mkdir()
  assert "holds the folder label=cat; put all Parquet files into one folder" in refusal(path)
  (path / "label=cat").rmdir()
  (path / "2.parquet").write_text("no Parquet")
  assert refusal(path).startswith(f"Cannot read {path / '2.parquet'} (")
  message = refusal(tmp_path / "*.parquet")
  assert message.endswith("*.parquet; to read several files, give their folder.")
  assert "is '' with" not in message


@pytest.mark.parametrize(("columns", "words"), [
  ({"features": FEATURES.tolist(), "label": list("abcabc")}, "labels of different types"),
  ({"features": FEATURES.tolist(), "label": LABELS > 0}, "labels of different types"),
  ({"features": FEATURES.tolist(), "name": LABELS}, "b.parquet has no column 'label'; it has feat"),
  ({"x": FEATURES.tolist(), "label": LABELS}, "b.parquet has no column 'features'"),
  ({"features": FEATURES[:, :2].tolist(), "label": LABELS}, "Row 0 of .*b.parquet has 2"),
  ({"features": list("abcabc"), "label": LABELS}, "'features' of .*b.parquet has the type string"),
  ({"features": FEATURES.tolist(), "label": [1, 0, None, 1, 1, 2]}, "Row 2 of .*b.parquet has no"),
])  # fmt: skip
def test_parts_that_differ_are_refused(tmp_path, columns, words):
  path = write_parts(tmp_path / "parts", ["a.parquet"], [6])
  parquet.write_table(pa.table(columns), path / "b.parquet")
  with pytest.raises(DataError, match=words):
    load(path)


def test_parts_may_differ_in_the_precision_of_their_types(tmp_path):
  path = write_parts(tmp_path / "parts", ["a.parquet"], [6])
  more = pa.table({"features": pa.array(TEST.tolist(), pa.list_(pa.float64(), 3)),
                   "label": pa.array([2.0, 0.0])})  # fmt: skip
  parquet.write_table(more, path / "b.parquet")
  assert rows_of(load(path)) == expected_rows([*FEATURES, *TEST], [*LABELS, 2, 0])


def test_parts_must_have_the_same_numbered_columns_and_class_names(tmp_path):
  path = tmp_path / "parts"
  path.mkdir()
  write_columns(path / "a.parquet", ["x0", "x1", "x2"])
  write_columns(path / "b.parquet", ["x2", "x1", "x0"], x0=FEATURES[:, 0], x2=FEATURES[:, 2])
  data = load(path, **{"columns.features": "x*"})
  assert rows_of(data) == expected_rows([*FEATURES, *FEATURES], [*LABELS, *LABELS])
  write_columns(path / "b.parquet", ["x1", "x2", "x3"])
  message = refusal(path, **{"columns.features": "x*"})
  assert "b.parquet have different columns of features, for example 'x0'; all parts" in message
  write_named(path / "a.parquet", LABELS, class_label(list("abc")))
  write_named(path / "b.parquet", LABELS, class_label(list("acb")))
  assert "b.parquet name the classes differently; write both with the same" in refusal(path)


def test_a_folder_may_be_the_test_set(tmp_path):
  path = write_parquet(tmp_path / "a.parquet", FEATURES.tolist(), LABELS)
  test = write_parts(tmp_path / "parts", ["1.parquet", "2.parquet", "3.parquet"])
  data = load(path, test_path=str(test))
  np.testing.assert_array_equal(data.test_features, FEATURES)
  np.testing.assert_array_equal(data.test_labels, LABELS)
