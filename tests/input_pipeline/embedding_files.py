"""Small files of embeddings in every format, and what reading them gives; shared by tests."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
from ml_collections import ConfigDict
from pyarrow import parquet

from input_pipeline import embeddings
from input_pipeline.embeddings import EmbeddingsConfig
from memdiff import config as config_lib
from memdiff.errors import DataError

FEATURES = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 1, 0], [2, 2, 5], [3, 0, 1]], float)
LABELS = np.array([1, 0, 1, 2, 0, 1])
FLOATS = pa.list_(pa.float32())
TEST = np.array([[9, 9, 9], [5, 4, 3]], float)
TEST_LABELS = np.array([2, 0])


def config_of(path, **changes):
  """The defaults, with the test set split off unless it is given; fields by dotted names."""
  values = ConfigDict(dataclasses.asdict(EmbeddingsConfig()))
  if not {"test_path", "test_share"} & set(changes):
    changes["test_share"] = 0.2
  values.update_from_flattened_dict({"train_path": str(path)} | changes)
  return config_lib.build(EmbeddingsConfig, values.to_dict(), "dataset")


def load(path, **changes):
  return embeddings.load(config_of(path, **changes))


def refusal(path, kind=DataError, **changes) -> str:
  with pytest.raises(kind) as caught:
    load(path, **changes)
  message = str(caught.value)
  assert "\n" not in message and message.endswith(".")
  return message


def npz(path, features=FEATURES, labels=LABELS, **more):
  np.savez(path, features=features, labels=labels, **more)
  return path


def write_parquet(path, features, labels, kind=FLOATS, **options):
  labels = labels if isinstance(labels, pa.Array) else pa.array(labels)
  table = pa.table({"features": pa.array(features, kind), "label": labels})
  parquet.write_table(table, path, write_page_checksum=True, **options)
  return path


def write_named(path, labels, metadata):
  labels = labels if isinstance(labels, pa.Array) else pa.array(labels)
  table = pa.table({"features": FEATURES[: len(labels)].tolist(), "label": labels})
  parquet.write_table(table.replace_schema_metadata(metadata), path)
  return path


def write_columns(path, columns, **more):
  """FEATURES in columns of these names, in reverse order behind the labels and a text."""
  table = {"label": LABELS, "id": list("uvwxyz")} | more
  for name, values in reversed(list(zip(columns, FEATURES.T, strict=True))):
    table.setdefault(name, values)
  parquet.write_table(pa.table(table), path)
  return path


def write(folder, form, features, labels):
  """The same rows in any format; returns the settings that read them."""
  labels = np.asarray(labels)
  if form == "npz":
    return {"path": npz(folder / "train.npz", features, labels)}
  if form == "parquet":
    return {"path": write_parquet(folder / "train.parquet", features.tolist(), labels.tolist())}
  np.save(folder / "x.npy", features)
  np.save(folder / "y.npy", labels)
  return {"path": folder / "x.npy", "train_labels_path": str(folder / "y.npy")}


def class_label(names, column="label"):
  """Metadata of a schema, as Hugging Face's datasets write it."""
  known = {"info": {"features": {column: {"names": names, "_type": "ClassLabel"}}}}
  return {"huggingface": json.dumps(known)}


def rows_of(data):
  """Everything that a split has of the file, as sorted (label, features) per row."""
  parts = ("train", "left_out", "test")
  return sorted(
    (int(label), *row.tolist())
    for part in parts
    for label, row in zip(
      getattr(data, f"{part}_labels"), getattr(data, f"{part}_features"), strict=True
    )
  )


def expected_rows(features, labels):
  return sorted((int(y), *map(float, x)) for x, y in zip(features, labels, strict=True))
