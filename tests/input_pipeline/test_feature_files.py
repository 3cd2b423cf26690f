"""Files in NumPy's formats: what is converted, what is refused, and what the sentence says then."""

import shlex
import sys
import types
import unittest.mock

import ml_dtypes
import numpy as np
import pytest

from memdiff.errors import ConfigError, DataError
from tests.input_pipeline.embedding_files import (
  FEATURES,
  LABELS,
  TEST,
  expected_rows,
  load,
  npz,
  refusal,
  rows_of,
  write,
)

NO_ROW = np.zeros((0, 3))


@pytest.mark.parametrize(("features", "labels", "words"), [
  (FEATURES[0], LABELS[0], r"have the shape \(3,\); they must be \[rows, numbers\]"),
  (FEATURES[None], LABELS, r"have the shape \(1, 6, 3\)"),
  (FEATURES, LABELS[:5], r"has 6 rows of features and labels of the shape \(5,\); there must be"),
  (FEATURES, np.eye(3)[LABELS], r"labels of the shape \(6, 3\); .* by labels.argmax\(axis=1\)"),
  (FEATURES[:, :2, None] * [[[1.0, 2.0]]], LABELS, r"have the shape \(6, 2, 2\); .*reshape"),
  (FEATURES.astype(complex), LABELS, "have the type complex128; .* features.real takes"),
  (FEATURES.astype("V3"), LABELS, "have the type [|]V3; .* save features.astype"),
  (FEATURES, LABELS.astype("M8[D]"), "labels in .* type datetime64.D.; .* labels.astype.int"),
  (FEATURES.astype(str), LABELS, "The features in .* have the type <U32; they must be numbers"),
  (FEATURES, LABELS + 0.5, "Row 0 of .* has the label 1.5; labels must be whole numbers or texts"),
  (FEATURES, np.where(LABELS == 2, np.nan, LABELS), "Row 3 of .* has NaN as its label; give it"),
  (FEATURES, np.where(LABELS == 2, np.inf, LABELS), "Row 3 of .* has the label inf; labels must"),
  (FEATURES, np.where(LABELS == 0, 1e16, LABELS), "Row 1 of .* has the label 1e.16; labels must"),
  (FEATURES, LABELS.astype(complex), "labels in .* type complex128; they must be whole numbers"),
  (NO_ROW, LABELS[:0], "holds no rows"),
  (FEATURES[:, :0], LABELS, "holds rows without a number"),
  (FEATURES.astype(object), LABELS, "holds Python objects, which memdiff does not read because"),
  (FEATURES, LABELS.astype(object), "holds Python objects, .* save texts with labels.astype"),
])  # fmt: skip
@pytest.mark.parametrize("form", ["npz", "npy"])
def test_arrays_that_do_not_fit_are_refused(tmp_path, form, features, labels, words):
  with pytest.raises(DataError, match=words):
    load(**write(tmp_path, form, features, labels))


def test_a_missing_array_lists_those_there_are(tmp_path):
  path = tmp_path / "a.npz"
  np.savez(path, x=FEATURES, labels=LABELS)
  choose = "choose one with --config.dataset.arrays"
  assert refusal(path) == f"{path} has no array 'features'; it has x, labels; {choose}.features."
  np.savez(path, features=FEATURES)
  assert f"has no array 'labels'; it has features; {choose}.labels." in refusal(path)
  np.savez(path)
  assert "has no array 'features'; it has none." in refusal(path)
  npz(path, test_features=TEST)
  message = refusal(path, test_share=0.0)
  assert "no array 'test_labels'; it has features, labels, test_features; choose" in message
  assert message.endswith("config.dataset.arrays.test_labels.")
  np.savez(path, **{f"a{i}": FEATURES for i in range(20)})
  assert "it has a0, a1, a2, a3, a4, a5, a6, a7 and 12 more; choose" in refusal(path)


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.parquet"])
def test_files_that_are_not_there_are_named(tmp_path, name):
  labels = {"train_labels_path": "y.npy"} if name == "a.npy" else {}
  assert refusal(tmp_path / name, **labels) == f"There is no file {tmp_path / name}."
  (tmp_path / name).mkdir()
  words = "holds no Parquet files" if name == "a.parquet" else f"Cannot read {tmp_path / name} ("
  assert words in refusal(tmp_path / name, **labels)
  good = npz(tmp_path / "good.npz")
  test = {"test_path": str(tmp_path / "none.parquet")}
  assert refusal(good, **test) == f"There is no file {tmp_path / 'none.parquet'}."


def test_a_missing_file_of_labels_is_named(tmp_path):
  settings = write(tmp_path, "npy", FEATURES, LABELS)
  (tmp_path / "y.npy").unlink()
  assert refusal(**settings) == f"There is no file {tmp_path / 'y.npy'}."


def test_paths_that_cannot_be_are_refused():
  assert "config.dataset.train_path is empty; give a file" in refusal("")
  for path in ("x" * 5000, "a\0", "x" * 5000 + ".parquet", "a\0.parquet", "nowhere"):
    refusal(path)
  message = refusal("a.pkl")
  assert message.startswith(
    "config.dataset.train_path is a.pkl, but must end in one of .npz, .npy, .parquet, .pq, or be a"
    " folder of Parquet files; numpy.savez("
  )
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


# --- conversions -----------------------------------------------------------------------------


def convert(monkeypatch, message: str) -> None:
  """Runs the line of Python that a sentence advises, as a shell would."""
  program, *arguments = shlex.split(message[message.index("python -c ") :])[2:5]
  monkeypatch.setattr(sys, "argv", ["-c", *arguments])
  exec(program, {})


@pytest.mark.parametrize(("name", "separator"), [("it's a.csv", ","), ("b.TSV", "\t")])
def test_the_line_that_converts_a_table_of_text_is_right(tmp_path, monkeypatch, name, separator):
  head = ["dim_0", "dim_1", "dim_2", "label"]
  rows = [[*map(str, row), str(label)] for row, label in zip(FEATURES, LABELS, strict=True)]
  text = "\n".join(separator.join(row) for row in [head, *rows])
  path = tmp_path / name
  path.write_text(text)
  convert(monkeypatch, refusal(path))
  data = load(path.with_suffix(".parquet"), **{"columns.features": "dim_*"})
  assert rows_of(data) == expected_rows(FEATURES, LABELS)


@pytest.mark.parametrize("name", ["a.pt", "a.PTH"])
def test_the_line_that_converts_tensors_is_right(tmp_path, monkeypatch, name):
  tensor = unittest.mock.Mock()
  tensor.float.return_value.numpy.return_value = FEATURES
  tensor.numpy.return_value = LABELS
  torch = types.ModuleType("torch")
  torch.load = lambda path, **_: {"features": tensor, "labels": tensor}
  monkeypatch.setitem(sys.modules, "torch", torch)
  convert(monkeypatch, refusal(tmp_path / name))
  assert rows_of(load(tmp_path / "a.npz")) == expected_rows(FEATURES, LABELS)


def test_the_line_that_converts_labels_in_a_text_file_is_right(tmp_path, monkeypatch):
  settings = write(tmp_path, "npy", FEATURES, LABELS)
  path = tmp_path / "names.txt"
  path.write_text("\n".join(np.array(["n", "o", "p"])[LABELS]))
  message = refusal(settings["path"], train_labels_path=str(path))
  convert(monkeypatch, message)
  data = load(settings["path"], train_labels_path=str(tmp_path / "names.npy"))
  assert data.class_names == ("n", "o", "p") and rows_of(data) == expected_rows(FEATURES, LABELS)


@pytest.mark.parametrize("form", ["npz", "npy"])
def test_bfloat16_is_read_without_its_name(tmp_path, form, capsys):
  rng = np.random.default_rng(0)
  exact = rng.normal(size=(6, 4)) * 10.0 ** rng.integers(-30, 30, (6, 4))
  exact[0] = [0.0, -0.0, 1.0, -256.0]
  stored = exact.astype(ml_dtypes.bfloat16)
  data = load(**write(tmp_path, form, np.asfortranarray(stored), LABELS))
  assert rows_of(data) == expected_rows(stored.astype(np.float32), LABELS)
  assert "as bfloat16" in capsys.readouterr().err
  stored[3, 2] = np.nan
  assert "Row 3 of" in refusal(**write(tmp_path, form, stored, LABELS))


def test_other_types_without_a_name_are_refused(tmp_path):
  pairs = np.zeros((6, 3), [("a", "i1"), ("b", "i1")])  # two bytes as well
  for features in (FEATURES.astype(ml_dtypes.float8_e4m3fn), pairs):
    assert "save features.astype('float32')" in refusal(npz(tmp_path / "a.npz", features))


@pytest.mark.parametrize("shape", [(6, 1, 3), (6, 3, 1, 1), (6, 1, 3, 1)])
@pytest.mark.parametrize("form", ["npz", "npy"])
def test_axes_of_length_one_are_dropped(tmp_path, form, shape):
  settings = write(tmp_path, form, FEATURES.reshape(shape), LABELS[:, None])
  assert rows_of(load(**settings)) == expected_rows(FEATURES, LABELS)


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f8", "g"])
def test_whole_labels_may_be_stored_as_floats(tmp_path, dtype):
  labels = (LABELS * 7 - 9).astype(dtype)
  data = load(npz(tmp_path / "a.npz", labels=labels, test_features=TEST, test_labels=[5, -9]),
              test_share=0.0)  # fmt: skip
  assert data.label_values.tolist() == [-9, -2, 5] and data.class_names == ("-9", "-2", "5")
  assert data.label_values.dtype == np.int64 and data.test_labels.tolist() == [2, 0]


def test_booleans_are_numbers(tmp_path):
  data = load(npz(tmp_path / "a.npz", FEATURES > 2))
  assert rows_of(data) == expected_rows(FEATURES > 2, LABELS)


# --- damage ----------------------------------------------------------------------------------

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
