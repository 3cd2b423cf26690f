"""Embeddings from .npz, .npy and Parquet: what is read, how it is split, what is refused."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from input_pipeline import long_tail
from memdiff.errors import ConfigError
from tests.input_pipeline.embedding_files import (
  FEATURES,
  LABELS,
  TEST,
  TEST_LABELS,
  expected_rows,
  load,
  npz,
  refusal,
  rows_of,
  write,
)

# --- settings --------------------------------------------------------------------------------


def test_a_test_set_is_either_given_or_split_off(tmp_path):
  path = npz(tmp_path / "a.npz")
  message = refusal(path, ConfigError, test_path=str(path), test_share=0.2)
  assert "config.dataset: test_path is" in message and "give one of them" in message


@pytest.mark.parametrize(("name", "value"), [
  ("test_share", 0.6), ("test_share", -0.1), ("profile", "list"), ("imbalance", 0.5),
  ("split_seed", -1), ("test_seed", 2**32),
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
  for part in ("train", "test", "left_out"):
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


def test_rows_are_numbered_as_in_the_file_where_some_are_left_out(tmp_path, capsys):
  path = balanced(tmp_path, spoilt=(0, 7, 11))
  data = load(path, test_share=0.0, profile="step", imbalance=3.0, skip_non_finite=True)
  assert data.num_skipped == 3 and data.train_counts.tolist() == [9, 3, 3]
  np.testing.assert_array_equal(data.train_features[:, 0], data.train_rows)
  np.testing.assert_array_equal(data.train_labels, data.train_rows % 3)
  assert sorted([*data.train_rows, *data.left_out_features[:, 0]]) == sorted(
    set(range(30)) - {0, 7, 11}
  )
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
