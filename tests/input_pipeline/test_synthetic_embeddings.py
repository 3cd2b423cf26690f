"""Synthetic embeddings written to files, and read back."""

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from input_pipeline import embeddings
from input_pipeline.embeddings import SyntheticRows
from memdiff.errors import ConfigError, WorkdirError
from tests.input_pipeline.embedding_files import (
  FEATURES,
  LABELS,
  class_label,
  load,
  npz,
  refusal,
  rows_of,
)
from tests.input_pipeline.test_feature_files import DAMAGE


def synthetic(data, number=7):
  rng = np.random.default_rng(3)
  return {
    "features": rng.normal(size=(number, data.train_features.shape[1])).astype(np.float32),
    "labels": np.arange(number, dtype=np.int32) % data.num_classes,
    "confidence": rng.random(number).astype(np.float32),
    "number": np.arange(number, dtype=np.int32) // data.num_classes,
    "num_exemplars": np.full(number, 4, np.int32),
    "nearest_index": rng.integers(0, len(data.train_labels), number),
    "nearest_distance": rng.random(number),
  }


LABEL_KINDS = {"numbers": [-3, 8, 41], "texts": ["cat", "ü dog", ""], "booleans": [False, True]}


@pytest.mark.parametrize("kind", LABEL_KINDS)
@pytest.mark.parametrize("suffix", [".npz", ".parquet", ".NPZ"])
def test_synthetic_features_are_read_back_as_they_were_written(tmp_path, suffix, kind):
  original = np.array(LABEL_KINDS[kind])[LABELS % len(LABEL_KINDS[kind])]
  data = load(npz(tmp_path / "train.npz", labels=original))
  made, path = synthetic(data), tmp_path / f"made{suffix}"
  embeddings.write_synthetic(path, data, SyntheticRows("memdiff", **made))
  assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["train.npz", path.name])
  again = load(path, test_path=str(tmp_path / "train.npz"))
  assert again.class_names == data.class_names
  assert again.label_values.tolist() == data.label_values.tolist()
  np.testing.assert_array_equal(again.train_features, made["features"][again.train_rows])
  np.testing.assert_array_equal(again.train_labels, made["labels"][again.train_rows])
  assert rows_of(again)[0] is not None and len(again.train_labels) == 7
  if suffix == ".parquet":
    table = parquet.read_table(path)
    assert table.schema.field("features").type == pa.list_(pa.float32(), 3)
    found = {name: table[name].to_pylist() for name in table.column_names}
    found["labels"] = found.pop("label")
  else:
    with np.load(path, allow_pickle=False) as file:
      found = {name: file[name].tolist() for name in file}
  assert set(found) == {"features", "labels", "confidence", "method", "number", "num_exemplars",
                        "nearest_row", "nearest_distance"}  # fmt: skip
  assert found["labels"] == data.label_values[made["labels"]].tolist()
  assert found["method"] == ["memdiff"] * 7
  assert found["nearest_row"] == data.train_rows[made["nearest_index"]].tolist()
  for name in ("features", "confidence", "number", "num_exemplars", "nearest_distance"):
    assert found[name] == made[name].tolist()


def test_synthetic_features_in_parquet_carry_checksums(tmp_path):
  data, path = load(npz(tmp_path / "train.npz")), tmp_path / "made.parquet"
  embeddings.write_synthetic(path, data, SyntheticRows("memdiff", **synthetic(data, 60)))
  assert load(path).num_classes == 3
  path.write_bytes(DAMAGE["spoilt"](path.read_bytes()))
  assert f"Cannot read {path} (" in refusal(path)


def test_each_row_may_have_a_method_of_its_own(tmp_path):
  data = load(npz(tmp_path / "train.npz"))
  methods = list("abcdefg")
  embeddings.write_synthetic(
    tmp_path / "made.parquet", data, SyntheticRows(methods, **synthetic(data))
  )
  assert parquet.read_table(tmp_path / "made.parquet")["method"].to_pylist() == methods


@pytest.mark.parametrize(("path", "suffix"), [
  ("a.npz", ".npz"), ("dir/a.NPY", ".npz"), ("a.parquet", ".parquet"), ("a.pq", ".parquet"),
  ("~/parts", ".parquet"), ("parts.v2/", ".parquet"),
])  # fmt: skip
def test_synthetic_features_go_back_in_the_format_of_the_training_file(path, suffix):
  assert embeddings.export_suffix(path) == suffix


def test_synthetic_features_of_a_folder_of_named_classes_train_with_its_test_set(tmp_path):
  (tmp_path / "parts").mkdir()
  table = pa.table({"features": FEATURES.tolist(), "label": LABELS}).replace_schema_metadata(
    class_label(["cat", "ant", "bee", "fly"])
  )
  parquet.write_table(table, tmp_path / "parts" / "part-0.parquet")
  data, path = load(tmp_path / "parts"), tmp_path / "made.parquet"
  embeddings.write_synthetic(path, data, SyntheticRows("memdiff", **synthetic(data, 30)))
  again = load(path, test_path=str(tmp_path / "parts"))
  assert again.label_values.tolist() == data.label_values.tolist() == [0, 1, 2]
  np.testing.assert_array_equal(again.test_labels, LABELS)


def test_what_cannot_be_written_is_one_sentence(tmp_path):
  data = load(npz(tmp_path / "train.npz"))
  with pytest.raises(ConfigError, match=r"made\.csv, must end in \.npz or \.parquet"):
    embeddings.write_synthetic(
      tmp_path / "made.csv", data, SyntheticRows("memdiff", **synthetic(data))
    )
  with pytest.raises(WorkdirError, match=r"Cannot write .*nowhere/made\.npz"):
    embeddings.write_synthetic(
      tmp_path / "nowhere/made.npz", data, SyntheticRows("memdiff", **synthetic(data))
    )
