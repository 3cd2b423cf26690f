"""Parquet as people have it: types of columns, lists, one column per number."""

import decimal
import functools
import pathlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from input_pipeline import parquet_files
from memdiff.errors import DataError
from tests.input_pipeline.embedding_files import (
  FEATURES,
  FLOATS,
  LABELS,
  expected_rows,
  load,
  refusal,
  rows_of,
  write_columns,
  write_parquet,
)


@pytest.mark.parametrize("kind", [
  pa.list_(pa.float16()), pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.int8()),
  pa.list_(pa.float32(), 3), pa.list_(pa.float16(), 3), pa.large_list(pa.float64()),
  pa.list_view(pa.float32()), pa.large_list_view(pa.float16()), pa.list_(pa.decimal128(9, 2)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("missing", [None, "number", "row"])
def test_parquet_lists_of_every_type(tmp_path, kind, missing):
  numpy_type = pa.array([], kind.value_type).to_numpy(zero_copy_only=False).dtype.type
  if numpy_type is np.object_:
    numpy_type = decimal.Decimal
  features = [[numpy_type(value) for value in row] for row in FEATURES.tolist()]
  if missing:
    features[5] = None if missing == "row" else [numpy_type(1), None, numpy_type(1)]
  path = write_parquet(tmp_path / "a.parquet", features, LABELS, kind=kind)
  if not missing:
    assert rows_of(load(path)) == expected_rows(FEATURES, LABELS)
    return
  assert f"Row 5 of {path} (features, label) has a NaN" in refusal(path)
  data = load(path, skip_non_finite=True)
  assert rows_of(data) == expected_rows(FEATURES[:5], LABELS[:5]) and data.num_skipped == 1


@pytest.mark.parametrize("labels", [
  pa.array(list("bab"), pa.large_string()), pa.array(list("bab")).dictionary_encode(),
  pa.array([1, 0, 1], pa.uint8()), pa.array([1, 0, 1]).dictionary_encode(),
  pa.array(list("bab"), pa.string_view()), pa.array([b"b", b"a", b"b"], pa.binary_view()),
  pa.array([b"b", b"a", b"b"]), pa.array([b"b", b"a", b"b"], pa.binary(1)),
  pa.array([b"b", b"a", b"b"], pa.large_binary()), pa.array([7.0, -2.0, 7.0], pa.float32()),
  pa.array([2**63 + 9, 2**63 + 8, 2**63 + 9], pa.uint64()), pa.array([True, False, True]),
  pa.array([7, -2, 7]).cast(pa.decimal128(38, 0)), pa.array(["7.00", "1.00", "7.00"]).cast(
    pa.decimal256(50, 2)
  ),
], ids=lambda labels: str(labels.type))  # fmt: skip
def test_parquet_labels_of_every_type(tmp_path, labels):
  data = load(write_parquet(tmp_path / "a.parquet", FEATURES[:3].tolist(), labels))
  assert rows_of(data) == expected_rows(FEATURES[:3], [1, 0, 1])
  expected = sorted(set(labels.to_pylist()))
  if isinstance(expected[0], bytes):
    expected = [value.decode() for value in expected]
  assert data.label_values.tolist() == expected
  assert data.label_values.dtype.kind in "biuU"


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_parquet_is_read_in_pieces_in_its_order(batch, group, seed):
  rng = np.random.default_rng(seed)
  features, labels = rng.normal(size=(13, 2)).astype(np.float32), rng.permutation(13)
  features[rng.random(13) < 0.2] = np.nan
  listed = [None if np.isnan(row[0]) else row.tolist() for row in features]
  sink = pa.BufferOutputStream()
  write_parquet(sink, listed, labels.tolist(), row_group_size=group)
  reader = functools.partial(parquet.ParquetFile, pa.BufferReader(sink.getvalue()))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parquet_files, "_BATCH", batch)
    patch.setattr(parquet, "ParquetFile", lambda _, **options: reader(**options))
    rows = parquet_files.read(pathlib.Path("a.parquet"), "features", "label")
  np.testing.assert_array_equal(rows.features, features)
  np.testing.assert_array_equal(rows.labels, labels)


def tensors(*shape):
  """Two rows of tensors of this shape."""
  size = int(np.prod(shape))
  flat = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(2.0 * size, dtype=np.float32)), size)
  return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), shape), flat)


LISTS = FEATURES.tolist()
RAGGED = [*LISTS[:4], [1.0], LISTS[5]]


@pytest.mark.parametrize(("columns", "words"), [
  ({"features": [1.0, 2.0], "label": [0, 1]}, "'features' of .* has the type double; it must hold"),
  ({"features": [["a"], ["b"]], "label": [0, 1]}, "type list<.*string>; it must hold a list"),
  ({"features": [[["a"]], [["b"]]], "label": [0, 1]}, "must hold a list of numbers per row: conv"),
  ({"features": [[[1.0], [3.0]], [[2.0], [1.0]]], "label": [0, 1]}, "Row 0 of .* has 2 lists in"),
  ({"features": [[[1.0]], None, []], "label": [0, 1, 1]}, "Row 2 of .* has 0 lists in the column"),
  ({"features": ["[1, 2]", "[2, 1]"], "label": [0, 1]}, "per row: turn texts .* json.loads"),
  ({"features": [{"values": [1.0]}, {"values": [2.0]}], "label": [0, 1]}, "store the list in it"),
  ({"features": tensors(2, 3), "label": [0, 1]}, r"holds tensors of the shape \(2, 3\); store one"),
  ({"features": LISTS, "label": [0.5] * 6}, "Row 0 of .* has the label 0.5; labels must be whole"),
  ({"features": LISTS, "label": LISTS}, "'label' of .* type list.*; labels must be whole numbers"),
  ({"features": LISTS, "label": pa.nulls(6)}, "type null; labels must be whole numbers or texts"),
  ({"features": LISTS, "label": pa.array([1] * 6, pa.date32())}, "date32.* convert them to int64"),
  ({"features": LISTS, "label": pa.array([decimal.Decimal("0.5")] * 6)}, "has the label 0.5;"),
  ({"features": LISTS, "label": [b"\xff"] * 6}, "labels that are not texts in UTF"),
  ({"features": LISTS, "label": [0.0, 1.0, None, 1.0, 0.0, 2.0]}, "Row 2 of .* has no label"),
  ({"features": LISTS, "label": [None, 1, 0, 1, None, 2]}, "Row 0 of .* has no label in the"),
  ({"features": LISTS, "label": ["a", "b", None, "a", "b", "c"]}, "Row 2 of .* has no label"),
  ({"features": RAGGED, "label": LABELS}, "Row 4 of .* has 1 numbers .* before it have 3"),
  ({"features": [None, *RAGGED], "label": [0, *LABELS]}, "Row 5 of .* but rows before it have 3"),
  ({"features": pa.array([None] * 6, FLOATS), "label": LABELS},
   "column 'features' of .* is empty in every row"),
  ({"features": [[]] * 6, "label": LABELS}, "must hold a list of numbers"),
  ({"features": pa.array([[]] * 6, FLOATS), "label": LABELS}, "without a number"),
  ({"features": pa.array([], FLOATS), "label": pa.array([], pa.int64())},
   "holds no rows"),
  ({"embedding": LISTS, "y": LABELS}, "it has embedding, y; choose .*[.]columns[.]features"),
  ({"features": LISTS, "y": LABELS}, "'label'; it has features, y; choose .*[.]columns[.]label"),
])  # fmt: skip
def test_columns_that_do_not_fit_are_refused(tmp_path, columns, words):
  parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
  with pytest.raises(DataError, match=words):
    load(tmp_path / "a.parquet")


# --- lists of another kind -------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 1), (1, 3, 1)])
def test_tensors_of_fixed_shape_are_lists_if_one_axis_is_long(tmp_path, shape):
  table = pa.table({"features": tensors(*shape), "label": ["b", "a"]})
  parquet.write_table(table, tmp_path / "a.parquet")
  data = parquet_files.read(tmp_path / "a.parquet", "features", "label")
  np.testing.assert_array_equal(data.features, [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("kind", [
  pa.list_(FLOATS), pa.large_list(pa.list_(pa.float64(), 3)), pa.list_(pa.list_(FLOATS)),
  pa.list_(pa.list_(pa.float32(), 3), 1),
], ids=str)  # fmt: skip
def test_a_list_in_a_list_of_one_is_that_list(tmp_path, kind):
  depth = 2 if kind == pa.list_(pa.list_(FLOATS)) else 1
  features = [[row] if depth == 1 else [[row]] for row in FEATURES.tolist()]
  features[3] = None
  path = write_parquet(tmp_path / "a.parquet", features, LABELS % 2, kind=kind)
  data = load(path, skip_non_finite=True)
  present = [0, 1, 2, 4, 5]
  assert rows_of(data) == expected_rows(FEATURES[present], LABELS[present] % 2)


# --- one column per number -------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "columns"), [
  ("dim_*", ["dim_0", "dim_1", "dim_2"]),
  ("dim_*", ["dim_2", "dim_9", "dim_10"]),  # gaps, and an order that is not the alphabet's
  ("dim_*", ["dim_008", "dim_009", "dim_010"]),
  ("dim_*", ["dim_9", "dim_010", "dim_0011"]),
  ("*", ["0", "1", "10"]),
  ("emb[*]", ["emb[0]", "emb[7]", "emb[30]"]),
  ("*_x", ["2_x", "3_x", "20_x"]),
  ("layer*.dim*", ["layer2.dim9", "layer2.dim10", "layer10.dim0"]),
])  # fmt: skip
def test_numbered_columns_are_read_in_the_order_of_their_numbers(tmp_path, pattern, columns):
  path = write_columns(tmp_path / "a.parquet", columns, dim_count=[9] * 6, dim_=[9] * 6)
  data = load(path, **{"columns.features": pattern})
  assert rows_of(data) == expected_rows(FEATURES, LABELS)


def test_numbered_columns_may_differ_in_type_and_lack_numbers(tmp_path):
  columns = {
    "x1": pa.array([1, 4, 7, 0, 2, 3], pa.int8()),
    "x2": pa.array([decimal.Decimal(v) for v in (2, 5, 8, 1, 2, 0)]),
    "x3": pa.array(FEATURES[:, 2].astype(np.float16)),
    "x4": pa.array([True, False, None, True, True, False]),
    "x5": pa.array([1e300, 0, 0, 0, 0, 0]),
  }
  path = tmp_path / "a.parquet"
  parquet.write_table(pa.table(columns | {"label": LABELS}), path)
  rows = parquet_files.read(path, "x*", "label")
  expected = np.c_[FEATURES, [1, 0, np.nan, 1, 1, 0], [np.inf, 0, 0, 0, 0, 0]]
  np.testing.assert_array_equal(rows.features, expected)
  assert "Row 0 and 1 more of" in refusal(path, **{"columns.features": "x*"})


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9))
def test_numbered_columns_are_read_in_pieces(group, batch, width):
  features = np.random.default_rng(width).normal(size=(11, width)).astype(np.float32)
  sink = pa.BufferOutputStream()
  table = {f"x{i}": features[:, i] for i in range(width)} | {"label": np.arange(11)}
  parquet.write_table(pa.table(table), sink, row_group_size=7)
  reader = functools.partial(parquet.ParquetFile, pa.BufferReader(sink.getvalue()))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parquet_files, "_COLUMNS", group)
    patch.setattr(parquet_files, "_BATCH", batch)
    patch.setattr(parquet, "ParquetFile", lambda _, **options: reader(**options))
    rows = parquet_files.read(pathlib.Path("a.parquet"), "x*", "label")
  np.testing.assert_array_equal(rows.features, features)


@pytest.mark.parametrize(("columns", "pattern"), [
  (["dim_0", "dim_1", "dim_2"], "dim_*"), (["0", "1", "2"], "*"),
  (["e[3]", "e[4]", "e[5]"], "e[*]"),
  (["l2_0", "l2_1", "l2_2"], "l2_*"),
])  # fmt: skip
def test_the_option_that_reads_numbered_columns_is_named_and_works(tmp_path, columns, pattern):
  path = write_columns(tmp_path / "a.parquet", columns, year_1=[3] * 6)
  for wanted in ("features", "nothing_*"):
    message = refusal(path, **{"columns.features": wanted})
    assert message.endswith(
      f"to read its 3 columns {pattern}, set --config.dataset.columns.features='{pattern}'."
    )
  assert rows_of(load(path, **{"columns.features": pattern})) == expected_rows(FEATURES, LABELS)


def test_a_column_of_this_very_name_comes_first(tmp_path):
  table = pa.table({"x*": FEATURES.tolist(), "x1": LABELS, "label": LABELS})
  parquet.write_table(table, tmp_path / "a.parquet")
  data = load(tmp_path / "a.parquet", **{"columns.features": "x*"})
  assert rows_of(data) == expected_rows(FEATURES, LABELS)


def test_numbered_columns_that_do_not_fit_are_refused(tmp_path):
  path = write_columns(tmp_path / "a.parquet", ["x0", "x1", "x2"], x3=list("abcdef"))
  message = refusal(path, **{"columns.features": "x*"})
  assert "The column 'x3' of" in message and "rename it if it is no feature" in message
  message = refusal(path, **{"columns.features": "x1"})
  assert "type double; it must hold a list" in message and "columns.features='dim_*'" in message
  path = write_parquet(tmp_path / "b.parquet", FEATURES.tolist(), LABELS)
  message = refusal(path, **{"columns.features": "x*"})
  assert "has no columns 'x*', in which * stands for a number; it has features, label" in message


def test_a_test_set_must_have_the_numbered_columns_of_the_training_set(tmp_path):
  train = write_columns(tmp_path / "a.parquet", ["x0", "x1", "x3"])
  test = write_columns(tmp_path / "b.parquet", ["x0", "x1", "x2"])
  settings = {"test_path": str(test), "columns.features": "x*"}
  message = refusal(train, **settings)
  assert "have different columns of features, for example 'x2'; both must" in message
  assert len(load(test, **settings).test_labels) == 6


# --- columns twice ---------------------------------------------------------------------------


@pytest.mark.parametrize("twice", ["features", "label", "unused"])
def test_a_column_that_is_there_twice_is_refused_if_it_is_read(tmp_path, twice):
  columns = [pa.array(FEATURES.tolist()), pa.array(LABELS), pa.array(LABELS)]
  names = ["features", "label", "unused"]
  table = pa.table([*columns, columns[names.index(twice)]], names=[*names, twice])
  parquet.write_table(table, tmp_path / "a.parquet")
  if twice == "unused":
    assert rows_of(load(tmp_path / "a.parquet")) == expected_rows(FEATURES, LABELS)
  else:
    message = refusal(tmp_path / "a.parquet")
    assert message.endswith(f"has 2 columns {twice!r}; rename or remove all but one.")
