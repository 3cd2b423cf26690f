"""Embeddings from .npz, .npy and Parquet: what is read, how it is split, what is refused."""

import functools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from configs import base
from input_pipeline import embeddings, feature_files, long_tail
from input_pipeline.embeddings import EmbeddingsConfig
from memdiff import config as config_lib
from memdiff.errors import ConfigError, DataError, WorkdirError

FEATURES = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 1, 0], [2, 2, 5], [3, 0, 1]], float)
LABELS = np.array([1, 0, 1, 2, 0, 1])
FLOATS = pa.list_(pa.float32())
TEST = np.array([[9, 9, 9], [5, 4, 3]], float)
TEST_LABELS = np.array([2, 0])


def config_of(path, **changes):
  """base.embeddings(), with the test set split off unless it is given; fields by dotted names."""
  values = base.embeddings()
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


def rows_of(data):
  """Everything that a split has of the file, as sorted (label, features) per row."""
  parts = ("train", "holdout", "left_out", "test")
  return sorted(
    (int(label), *row.tolist())
    for part in parts
    for label, row in zip(
      getattr(data, f"{part}_labels"), getattr(data, f"{part}_features"), strict=True
    )
  )


def expected_rows(features, labels):
  return sorted((int(y), *map(float, x)) for x, y in zip(features, labels, strict=True))


# --- settings --------------------------------------------------------------------------------


def test_the_settings_in_configs_are_those_that_are_read():
  values = base.embeddings().to_dict()
  settings = config_lib.build(EmbeddingsConfig, values)
  assert config_lib.as_dict(settings) == values


def test_a_test_set_is_either_given_or_split_off(tmp_path):
  path = npz(tmp_path / "a.npz")
  message = refusal(path, ConfigError, test_path=str(path), test_share=0.2)
  assert "config.dataset: test_path is" in message and "give one of them" in message


@pytest.mark.parametrize(("name", "value"), [
  ("test_share", 0.6), ("test_share", -0.1), ("profile", "list"), ("imbalance", 0.5),
  ("split_seed", -1), ("test_seed", 2**32), ("holdout", 0.7),
])  # fmt: skip
def test_values_out_of_range_are_refused(name, value):
  message = refusal("x.npz", ConfigError, **{name: value})
  assert f"config.dataset.{name} is {value!r}, but must be" in message


# --- formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["npz", "npy", "parquet"])
@pytest.mark.parametrize(("labels", "values", "names"), [
  (LABELS, [0, 1, 2], ("0", "1", "2")),
  (LABELS * 10 - 7, [-7, 3, 13], ("-7", "3", "13")),
  (np.array(["b", "a", "b", "ü c", "a", "b"]), ["a", "b", "ü c"], ("a", "b", "ü c")),
  (LABELS > 0, [False, True], ("False", "True")),
], ids=["numbers", "gaps", "texts", "booleans"])  # fmt: skip
def test_every_format_reads_rows_and_labels_alike(tmp_path, form, labels, values, names):
  data = load(**write(tmp_path, form, FEATURES, labels))
  assert data.class_names == names and data.label_values.tolist() == values
  assert data.num_classes == len(names)
  codes = [values.index(value) for value in labels.tolist()]
  assert rows_of(data) == expected_rows(FEATURES, codes)
  for part in ("train", "test", "holdout", "left_out"):
    features, own = getattr(data, f"{part}_features"), getattr(data, f"{part}_labels")
    assert features.dtype == np.float32 and features.shape == (len(own), 3)
    assert own.dtype == np.int32
  np.testing.assert_array_equal(data.train_features, FEATURES[data.train_rows])
  np.testing.assert_array_equal(data.label_values[data.train_labels], labels[data.train_rows])
  assert data.name.startswith(("train", "x.npy")) and data.num_skipped == 0
  np.testing.assert_array_equal(data.train_counts, np.bincount(data.train_labels))


@pytest.mark.parametrize("dtype", [">f8", "f2", "f4", "u1", "i8", "g"])
def test_numbers_of_every_type_become_float32(tmp_path, dtype):
  data = load(npz(tmp_path / "a.npz", FEATURES.astype(dtype)))
  assert data.train_features.dtype == np.float32
  assert rows_of(data) == expected_rows(FEATURES, LABELS)


@pytest.mark.parametrize("kind", [
  pa.list_(pa.float16()), pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.int8()),
  pa.list_(pa.float32(), 3), pa.list_(pa.float16(), 3), pa.large_list(pa.float64()),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("missing", [None, "number", "row"])
def test_parquet_lists_of_every_type(tmp_path, kind, missing):
  numpy_type = pa.array([], kind.value_type).to_numpy(zero_copy_only=False).dtype.type
  features = FEATURES.astype(numpy_type).tolist()
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
], ids=lambda labels: str(labels.type))  # fmt: skip
def test_parquet_labels_of_every_type(tmp_path, labels):
  data = load(write_parquet(tmp_path / "a.parquet", FEATURES[:3].tolist(), labels))
  assert rows_of(data) == expected_rows(FEATURES[:3], [1, 0, 1])
  assert data.label_values.tolist() == sorted(set(labels.to_pylist()))


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
    patch.setattr(feature_files, "_BATCH", batch)
    patch.setattr(parquet, "ParquetFile", lambda _, **options: reader(**options))
    rows = feature_files.read_parquet("a.parquet", "features", "label")
  np.testing.assert_array_equal(rows.features, features)
  np.testing.assert_array_equal(rows.labels, labels)


def test_arrays_and_columns_are_found_by_their_configured_names(tmp_path):
  np.savez(tmp_path / "a.npz", x=FEATURES, y=LABELS, z=["n", "o", "p"], tx=TEST, ty=TEST_LABELS)
  names = {"features": "x", "labels": "y", "class_names": "z", "test_features": "tx",
           "test_labels": "ty"}  # fmt: skip
  changes = {f"arrays.{key}": value for key, value in names.items()}
  data = load(tmp_path / "a.npz", test_share=0.0, **changes)
  assert data.class_names == ("n", "o", "p")
  np.testing.assert_array_equal(data.test_features, TEST)
  np.testing.assert_array_equal(data.test_labels, TEST_LABELS)
  assert rows_of(data) == expected_rows([*FEATURES, *TEST], [*LABELS, *TEST_LABELS])
  table = pa.table({"label": FEATURES.tolist(), "features": LABELS})
  parquet.write_table(table, tmp_path / "a.PARQUET")
  columns = {"columns.features": "label", "columns.label": "features"}
  assert rows_of(load(tmp_path / "a.PARQUET", **columns)) == expected_rows(FEATURES, LABELS)


def test_the_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  write(tmp_path, "npy", FEATURES, LABELS)
  npz(tmp_path / "test.npz", TEST, TEST_LABELS)
  data = load("~/x.npy", train_labels_path="~/y.npy", test_path="~/test.npz")
  assert len(data.train_labels) == 6 and len(data.test_labels) == 2
  npz(tmp_path / "a.npz", test_features=TEST, test_labels=TEST_LABELS)
  assert len(load("~/a.npz", test_share=0.0).test_labels) == 2
  (tmp_path / "a.npz").rename(tmp_path / "b.NPZ")
  assert len(load("~/b.NPZ", test_share=0.0).test_labels) == 2


# --- classes ---------------------------------------------------------------------------------


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


# --- the test set ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["npz", "npy", "parquet"])
@pytest.mark.parametrize("test_form", ["npz", "npy", "parquet"])
def test_a_test_set_in_a_file_of_its_own(tmp_path, form, test_form):
  (tmp_path / "test").mkdir()
  settings = write(tmp_path, form, FEATURES, LABELS * 5)
  test = write(tmp_path / "test", test_form, TEST, TEST_LABELS * 5)
  settings["test_path"] = str(test["path"])
  settings["test_labels_path"] = test.get("train_labels_path", "")
  data = load(**settings)
  np.testing.assert_array_equal(data.test_features, TEST)
  assert data.test_labels.tolist() == [2, 0]
  assert sorted(data.train_rows) == list(range(6))
  np.testing.assert_array_equal(data.train_labels, np.sort(LABELS))


def test_a_test_file_may_lack_classes_but_not_bring_new_ones(tmp_path):
  path, test = npz(tmp_path / "a.npz"), tmp_path / "b.npz"
  npz(test, TEST, np.array([1, 1]))
  assert load(path, test_path=str(test)).test_labels.tolist() == [1, 1]
  npz(test, TEST, np.array([1, 7]))
  message = refusal(path, test_path=str(test))
  assert f"Row 1 of {test} (features, labels) has the label 7" in message
  assert f"which no row of {path}" in message
  npz(test, TEST, np.array(["1", "0"]))
  assert "Row 1 of" in (message := refusal(path, test_path=str(test))) and "'0'" in message


def test_a_test_file_must_fit_the_training_file(tmp_path):
  path, test = npz(tmp_path / "a.npz", class_names=list("abc")), tmp_path / "b.npz"
  npz(test, TEST[:, :2], TEST_LABELS)
  message = refusal(path, test_path=str(test))
  assert "have 3 numbers and those of" in message and f"{test} (features, labels) 2;" in message
  npz(test, TEST, TEST_LABELS, class_names=list("acb"))
  assert "name the classes differently" in refusal(path, test_path=str(test))
  for names in ({"class_names": list("abc")}, {}):
    npz(test, TEST, TEST_LABELS, **names)
    assert load(path, test_path=str(test)).test_labels.tolist() == [2, 0]


@pytest.mark.parametrize("form", ["npz", "npy", "parquet"])
def test_no_test_set_at_all_says_where_one_can_come_from(tmp_path, form):
  message = refusal(**write(tmp_path, form, FEATURES, LABELS), test_share=0.0)
  assert "holds no test set; give config.dataset.test_path, or split one off" in message


def test_a_test_set_in_the_file_is_not_passed_over(tmp_path):
  path = npz(tmp_path / "a.npz", test_features=TEST, test_labels=TEST_LABELS)
  message = refusal(path, ConfigError, test_share=0.2)
  assert "test_share is 0.2, but" in message and "holds a test set (test_features)" in message
  data = load(path, test_share=0.2, **{"arrays.test_features": "none"})
  assert rows_of(data) == expected_rows(FEATURES, LABELS)


COUNTS = st.lists(st.integers(1, 12), min_size=2, max_size=5).filter(lambda n: max(n) > 1)


@given(COUNTS, st.sampled_from([0.1, 0.25, 0.5]), st.integers(0, 50))
def test_a_split_is_stratified_and_leaves_every_class_in_training(counts, share, seed):
  labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
  rows = np.arange(len(labels)) + 100
  train, test = long_tail.hold_out(rows, labels, share, seed, least=1)
  assert sorted([*train, *test]) == rows.tolist()
  expected = [min(max(int(share * n), 1), n - 1) for n in counts]
  np.testing.assert_array_equal(np.bincount(labels[test - 100], minlength=len(counts)), expected)
  assert (np.bincount(labels[train - 100], minlength=len(counts)) >= 1).all()


def test_the_split_depends_on_its_own_seed(tmp_path):
  labels = np.repeat([0, 1], 20)
  path = npz(tmp_path / "a.npz", np.arange(40.0)[:, None], labels)
  first = load(path, profile="step", imbalance=4.0)
  assert np.bincount(first.test_labels).tolist() == [4, 4]
  assert first.train_counts.tolist() == [16, 4]
  again = load(path, profile="step", imbalance=4.0, split_seed=1)
  np.testing.assert_array_equal(first.test_features, again.test_features)
  assert first.split_sha256 != again.split_sha256
  other = load(path, test_seed=1)
  assert set(other.test_features[:, 0]) != set(first.test_features[:, 0])


def test_a_class_of_one_row_trains_and_is_not_tested(tmp_path):
  labels = np.array([0, 1, 1, 2, 2, 2])
  data = load(npz(tmp_path / "a.npz", labels=labels), test_share=0.5)
  assert data.train_counts.tolist() == [1, 1, 2] and data.test_labels.tolist() == [1, 2]
  assert data.imbalance == 2.0
  message = refusal(npz(tmp_path / "b.npz", FEATURES, np.arange(6)))
  assert "No class in" in message and "has two rows" in message


# --- the long tail ---------------------------------------------------------------------------


def balanced(tmp_path, spoilt=()):
  """30 rows of three classes in turn; the one number of a row is its number."""
  features = np.arange(30.0)[:, None]
  features[list(spoilt)] = np.inf
  test = {"test_features": np.zeros((3, 1)), "test_labels": np.arange(3)}
  return npz(tmp_path / "a.npz", features, np.arange(30) % 3, **test)


@pytest.mark.parametrize("profile", ["exponential", "step"])
@pytest.mark.parametrize("seed", [0, 5])
def test_a_balanced_file_is_cut_by_the_published_rule(tmp_path, profile, seed):
  data = load(balanced(tmp_path), test_share=0.0, profile=profile, imbalance=5.0, split_seed=seed)
  labels = np.arange(30) % 3
  counts = long_tail.class_counts(10, 3, 5.0, profile)
  kept, left_out = long_tail.select(labels, counts, seed)
  np.testing.assert_array_equal(data.train_rows, kept)
  np.testing.assert_array_equal(data.train_features[:, 0], kept)
  np.testing.assert_array_equal(data.train_labels, labels[kept])
  np.testing.assert_array_equal(data.left_out_features[:, 0], left_out)
  np.testing.assert_array_equal(data.left_out_labels, labels[left_out])
  assert data.split_sha256 == long_tail.fingerprint(kept)
  assert data.imbalance == 5.0 and data.profile == profile and len(data.holdout_labels) == 0
  assert data.train_counts.tolist() == counts.tolist()


def test_rows_are_held_out_and_the_split_stays_the_same(tmp_path):
  settings = {"test_share": 0.0, "profile": "step", "imbalance": 2.0}
  whole = load(balanced(tmp_path), **settings)
  data = load(balanced(tmp_path), holdout=0.4, **settings)
  assert np.bincount(data.holdout_labels).tolist() == [4, 2, 2]
  assert data.split_sha256 == whole.split_sha256
  held = data.holdout_features[:, 0].astype(int)
  np.testing.assert_array_equal(held % 3, data.holdout_labels)
  assert sorted([*data.train_rows, *held]) == sorted(whole.train_rows)


def test_rows_are_numbered_as_in_the_file_where_some_are_left_out(tmp_path, capsys):
  path = balanced(tmp_path, spoilt=(0, 7, 11))
  data = load(path, test_share=0.0, profile="step", imbalance=3.0, holdout=0.3,
              skip_non_finite=True)  # fmt: skip
  assert data.num_skipped == 3 and data.train_counts.tolist() == [7, 3, 3]
  np.testing.assert_array_equal(data.train_features[:, 0], data.train_rows)
  np.testing.assert_array_equal(data.train_labels, data.train_rows % 3)
  others = [*data.holdout_features[:, 0], *data.left_out_features[:, 0]]
  assert sorted([*data.train_rows, *others]) == sorted(set(range(30)) - {0, 7, 11})
  assert capsys.readouterr().err == (
    f"memdiff: left out 3 rows of {path} (features, labels) that have a NaN or an infinity: 0, 7,"
    " 11\n"
  )


def test_a_natural_set_keeps_every_row(tmp_path):
  data = load(npz(tmp_path / "a.npz", test_features=TEST, test_labels=TEST_LABELS), test_share=0.0)
  assert data.train_counts.tolist() == [2, 3, 1] and data.imbalance == 3.0
  assert len(data.left_out_labels) == 0 and data.left_out_features.shape == (0, 3)
  assert data.split_sha256 == long_tail.fingerprint(np.array([1, 4, 0, 2, 5, 3]))


def test_too_small_classes_cannot_be_made_rarer(tmp_path):
  path = npz(tmp_path / "b.npz", class_names=list("xyz"), test_features=TEST, test_labels=[0, 1])
  message = refusal(path, test_share=0.0, profile="step", imbalance=2.0)
  assert message.startswith("The class 'z' has only one training example")
  assert "profile to natural" in message
  message = refusal(balanced(tmp_path), test_share=0.0, profile="step")
  assert "imbalance of 100 leaves 2 of 3 classes without" in message
  assert "must be below 10." in message
  data = load(path, test_share=0.0, profile="step", imbalance=1.0)
  assert data.train_counts.tolist() == [1, 1, 1] and len(data.left_out_labels) == 3


# --- rows that cannot be used ----------------------------------------------------------------


SIGNALLING = np.uint64(0x7FF0_0000_0000_0001).view(np.float64)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, SIGNALLING])
def test_rows_that_are_not_finite_are_named_or_left_out(tmp_path, value):
  features, test = FEATURES.copy(), TEST.copy()
  features[4, 1] = value
  path = npz(tmp_path / "a.npz", features, test_features=test, test_labels=TEST_LABELS)
  message = refusal(path, test_share=0.0)
  assert f"Row 4 of {path} (features, labels) has a NaN or an infinity" in message
  assert "--config.dataset.skip_non_finite=True" in message
  features[2, 0], test[1] = np.nan, value
  npz(path, features, test_features=test, test_labels=TEST_LABELS)
  assert "Row 2 and 1 more of" in refusal(path, test_share=0.0)
  data = load(path, test_share=0.0, skip_non_finite=True)
  good = [0, 1, 3, 5]
  assert rows_of(data) == expected_rows([*FEATURES[good], TEST[0]], [*LABELS[good], 2])
  assert data.num_skipped == 3


@pytest.mark.parametrize("number", [5, 6])
def test_only_the_first_five_of_many_are_listed(tmp_path, capsys, number):
  load(balanced(tmp_path, spoilt=range(number)), test_share=0.0, skip_non_finite=True)
  end = ": 0, 1, 2, 3, 4\n" if number == 5 else ": 0, 1, 2, 3, 4, ...\n"
  assert capsys.readouterr().err.endswith(end)


def test_rows_of_the_test_set_are_named_too(tmp_path):
  test = TEST.copy()
  test[1] = np.nan
  path = npz(tmp_path / "a.npz", test_features=test, test_labels=TEST_LABELS)
  message = refusal(path, test_share=0.0)
  assert f"Row 1 of {path} (test_features, test_labels) has a NaN" in message


def test_a_class_or_a_set_without_usable_rows_is_named(tmp_path):
  features = np.where(LABELS[:, None] == 2, np.nan, FEATURES)
  message = refusal(npz(tmp_path / "a.npz", features), skip_non_finite=True)
  assert "Every row of the class '2' in" in message
  message = refusal(npz(tmp_path / "a.npz", FEATURES * np.nan), skip_non_finite=True)
  assert message.startswith(f"Every row of {tmp_path / 'a.npz'} (features, labels) has a NaN")


def test_constant_features_are_refused_and_a_constant_number_is_not(tmp_path):
  path = npz(tmp_path / "a.npz", np.ones((6, 3)))
  assert "All rows of features in" in refusal(path)
  features = np.ones((6, 3))
  features[5, 2] = np.nan
  assert "are the same" in refusal(npz(path, features), skip_non_finite=True)
  features[5, 2] = 2.0
  assert rows_of(load(npz(path, features))) == expected_rows(features, LABELS)


# --- files that cannot be used ---------------------------------------------------------------

NO_ROW = np.zeros((0, 3))


@pytest.mark.parametrize(("features", "labels", "words"), [
  (FEATURES[0], LABELS[0], r"have the shape \(3,\); they must be \[rows, numbers\]"),
  (FEATURES[None], LABELS, r"have the shape \(1, 6, 3\)"),
  (FEATURES, LABELS[:5], r"has 6 rows of features and labels of the shape \(5,\); there must be"),
  (FEATURES, LABELS[:, None], r"labels of the shape \(6, 1\)"),
  (FEATURES.astype(complex), LABELS, "have the type complex128; they must be numbers"),
  (FEATURES.astype(str), LABELS, "The features in .* have the type <U32; they must be numbers"),
  (FEATURES, LABELS.astype(float), "labels in .* type float64; they must be whole numbers or text"),
  (NO_ROW, LABELS[:0], "holds no rows"),
  (FEATURES[:, :0], LABELS, "holds rows without a number"),
  (FEATURES.astype(object), LABELS, "holds Python objects, which memdiff does not read because"),
  (FEATURES, LABELS.astype(object), "holds Python objects, .* save texts with labels.astype"),
])  # fmt: skip
@pytest.mark.parametrize("form", ["npz", "npy"])
def test_arrays_that_do_not_fit_are_refused(tmp_path, form, features, labels, words):
  with pytest.raises(DataError, match=words):
    load(**write(tmp_path, form, features, labels))


LISTS = FEATURES.tolist()
RAGGED = [*LISTS[:4], [1.0], LISTS[5]]


@pytest.mark.parametrize(("columns", "words"), [
  ({"features": [1.0, 2.0], "label": [0, 1]}, "'features' of .* has the type double; it must hold"),
  ({"features": [["a"], ["b"]], "label": [0, 1]}, "type list<.*string>; it must hold a list"),
  ({"features": [[[1.0]], [[2.0]]], "label": [0, 1]}, "must hold a list of numbers per row"),
  ({"features": LISTS, "label": [0.5] * 6}, "'label' of .* type double; labels must be whole"),
  ({"features": LISTS, "label": [None, 1, 0, 1, None, 2]}, "Row 0 of .* has no label in the"),
  ({"features": LISTS, "label": ["a", "b", None, "a", "b", "c"]}, "Row 2 of .* has no label"),
  ({"features": RAGGED, "label": LABELS}, "Row 4 of .* has 1 numbers .* but row 0 has 3; all must"),
  ({"features": [None, *RAGGED], "label": [0, *LABELS]}, "Row 5 of .* but row 1 has 3"),
  ({"features": pa.array([None] * 6, FLOATS), "label": LABELS},
   "column 'features' of .* is empty in every row"),
  ({"features": [[]] * 6, "label": LABELS}, "must hold a list of numbers"),
  ({"features": pa.array([[]] * 6, FLOATS), "label": LABELS}, "without a number"),
  ({"features": pa.array([], FLOATS), "label": pa.array([], pa.int64())},
   "holds no rows"),
  ({"embedding": LISTS, "y": LABELS}, "has no column 'features'; it has embedding, y"),
  ({"features": LISTS, "y": LABELS}, "has no column 'label'; it has features, y"),
])  # fmt: skip
def test_columns_that_do_not_fit_are_refused(tmp_path, columns, words):
  parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
  with pytest.raises(DataError, match=words):
    load(tmp_path / "a.parquet")


def test_a_missing_array_lists_those_there_are(tmp_path):
  path = tmp_path / "a.npz"
  np.savez(path, x=FEATURES, labels=LABELS)
  assert refusal(path) == f"{path} has no array 'features'; it has x, labels."
  np.savez(path, features=FEATURES)
  assert "has no array 'labels'; it has features." in refusal(path)
  np.savez(path)
  assert "has no array 'features'; it has none." in refusal(path)
  npz(path, test_features=TEST)
  message = refusal(path, test_share=0.0)
  assert "no array 'test_labels'; it has features, labels, test_features." in message


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.parquet"])
def test_files_that_are_not_there_are_named(tmp_path, name):
  labels = {"train_labels_path": "y.npy"} if name == "a.npy" else {}
  assert refusal(tmp_path / name, **labels) == f"There is no file {tmp_path / name}."
  (tmp_path / name).mkdir()
  assert f"Cannot read {tmp_path / name} (" in refusal(tmp_path / name, **labels)
  good = npz(tmp_path / "good.npz")
  test = {"test_path": str(tmp_path / "none.parquet")}
  assert refusal(good, **test) == f"There is no file {tmp_path / 'none.parquet'}."


def test_a_missing_file_of_labels_is_named(tmp_path):
  settings = write(tmp_path, "npy", FEATURES, LABELS)
  (tmp_path / "y.npy").unlink()
  assert refusal(**settings) == f"There is no file {tmp_path / 'y.npy'}."


def test_paths_that_cannot_be_are_refused():
  assert "config.dataset.train_path is empty; give a file" in refusal("")
  sentence = "config.dataset.train_path is a.csv, but must end in one of .npz, .npy, .parquet."
  assert refusal("a.csv") == sentence
  message = refusal("a.npy", ConfigError)
  assert "config.dataset.train_labels_path is '' with a.npy" in message
  message = refusal("a.npz", ConfigError, train_labels_path="y.npy")
  assert "train_labels_path is 'y.npy' with a.npz; the file of labels is for .npy" in message


def test_paths_of_the_test_set_are_refused_alike(tmp_path):
  path = npz(tmp_path / "a.npz")
  assert "config.dataset.test_path is b.txt, but must end in" in refusal(path, test_path="b.txt")
  message = refusal(path, ConfigError, test_path="b.npy")
  assert "config.dataset.test_labels_path is '' with b.npy" in message
  message = refusal(path, ConfigError, test_labels_path="b.npy")
  assert "test_labels_path is b.npy, but config.dataset.test_path is empty" in message


DAMAGE = {
  "empty": lambda data: b"",
  "text": lambda data: b"not this format, " * 20,
  "cut short": lambda data: data[: len(data) // 2],
  "spoilt": lambda data: data[:150] + bytes(255 - byte for byte in data[150:250]) + data[250:],
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("form", ["npz", "npy", "parquet"])
def test_damaged_files_are_one_sentence(tmp_path, form, how):
  features = np.random.default_rng(0).normal(size=(60, 3))
  settings = write(tmp_path, form, features, np.arange(60) % 3)
  path = settings["path"]
  path.write_bytes(DAMAGE[how](path.read_bytes()))
  if (form, how) == ("npy", "spoilt"):  # has no checksum
    assert load(**settings, skip_non_finite=True).num_classes == 3
    return
  message = refusal(**settings)
  assert message.startswith(f"Cannot read {path} (")
  if form == "npz" and how == "text":
    assert "not in NumPy's format" in message


def test_an_archive_is_no_array_and_an_array_no_archive(tmp_path):
  settings = write(tmp_path, "npy", FEATURES, LABELS)
  npz(tmp_path / "a.npz").rename(tmp_path / "b.npy")
  assert "it is an archive in .npz format" in refusal(
    tmp_path / "b.npy", train_labels_path=settings["train_labels_path"]
  )
  (tmp_path / "x.npy").rename(tmp_path / "c.npz")
  assert "it is one array in .npy format" in refusal(tmp_path / "c.npz")


class Trap:
  """Calls a function when it is unpickled."""

  def __reduce__(self):
    return pytest.fail, ("something was unpickled",)


@pytest.mark.parametrize("form", ["npz", "npy"])
def test_nothing_is_unpickled(tmp_path, form):
  labels = np.array([Trap() for _ in LABELS], object)
  assert "holds Python objects" in refusal(**write(tmp_path, form, FEATURES, labels))


# --- writing ---------------------------------------------------------------------------------


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
  embeddings.write_synthetic(path, data, "memdiff", **made)
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
  embeddings.write_synthetic(path, data, "memdiff", **synthetic(data, 60))
  assert load(path).num_classes == 3
  path.write_bytes(DAMAGE["spoilt"](path.read_bytes()))
  assert f"Cannot read {path} (" in refusal(path)


def test_each_row_may_have_a_method_of_its_own(tmp_path):
  data = load(npz(tmp_path / "train.npz"))
  methods = list("abcdefg")
  embeddings.write_synthetic(tmp_path / "made.parquet", data, methods, **synthetic(data))
  assert parquet.read_table(tmp_path / "made.parquet")["method"].to_pylist() == methods


def test_what_cannot_be_written_is_one_sentence(tmp_path):
  data = load(npz(tmp_path / "train.npz"))
  with pytest.raises(ConfigError, match=r"made\.csv, must end in \.npz or \.parquet"):
    embeddings.write_synthetic(tmp_path / "made.csv", data, "memdiff", **synthetic(data))
  with pytest.raises(WorkdirError, match=r"Cannot write .*nowhere/made\.npz"):
    embeddings.write_synthetic(tmp_path / "nowhere/made.npz", data, "memdiff", **synthetic(data))
