"""Whatever stands in a config or a data file: it is accepted, or refused with a sentence."""

import copy
import pathlib
import tempfile

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs import digits_lt, features
from input_pipeline import dataset as dataset_lib
from input_pipeline import digits
from input_pipeline.source import Source
from memdiff import pipeline
from memdiff.errors import MemdiffError

# What people, scripts and slips of the keyboard put into a field.
VALUES = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-3, 3),
  st.sampled_from([2**31, 2**32, 2**63, 10**30, -(10**30)]),
  st.floats(),
  st.sampled_from(["", "cosine", "memdiff", "real", "../..", "\x00", "ä" * 300, "none"]),
  st.lists(st.one_of(st.integers(-3, 2000), st.floats(), st.text(max_size=3)), max_size=4).map(
    tuple
  ),
  st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places(config, path=()):
  """The paths of all fields and groups of a nested dictionary."""
  for name, value in config.items():
    yield (*path, name)
    if isinstance(value, dict):
      yield from places(value, (*path, name))


def changed(config, changes):
  config = copy.deepcopy(config)
  for path, value, rename in changes:
    group = config
    for name in path[:-1]:
      if not isinstance(group.get(name), dict):
        break
      group = group[name]
    else:
      if rename:
        group[path[-1] + "s"] = group.pop(path[-1], None)
      else:
        group[path[-1]] = value
  return config


def expect_sentence(error):
  text = str(error)
  assert text and "\n" not in text and len(text) < 3000
  assert error.exit_code in (1, 2)


DIGITS = digits_lt.get_config("smoke").to_dict()
DIGITS_PLACES = sorted(places(DIGITS))


@settings(max_examples=400)
@given(
  st.lists(
    st.tuples(st.sampled_from(DIGITS_PLACES), VALUES, st.sampled_from([False] * 9 + [True])),
    min_size=1,
    max_size=3,
  )
)
@example([(("dataset", "data_dir"), "\x00", False), (("dataset", "name"), "folder", False)])
@example([(("encoder", "init_from"), "\x00", False)])
@example([(("dataset", "list_path"), "..", False), (("dataset", "profile"), "list", False)])
def test_any_config_is_accepted_or_refused_with_a_sentence(changes):
  try:
    pipeline.prepare(changed(DIGITS, changes))
  except MemdiffError as error:
    expect_sentence(error)


ARRAYS = st.one_of(
  st.tuples(
    st.lists(st.integers(0, 6), min_size=0, max_size=3),
    st.sampled_from(["float32", "float64", "float16", "int32", "uint8", "bool", "complex64", "U3"]),
    st.sampled_from(["plain", "nan", "huge", "negative", "zero"]),
  ),
)


def make_array(spec):
  shape, dtype, kind = spec
  rng = np.random.default_rng(0)
  base = rng.integers(0, 3, shape).astype(dtype) if dtype != "U3" else np.full(shape, "a", "U3")
  if base.size and base.dtype.kind == "f" and kind in ("nan", "huge"):
    base.flat[0] = np.nan if kind == "nan" else np.finfo(base.dtype).max
  if base.size and base.dtype.kind in "if" and kind == "negative":
    base.flat[-1] = -1
  return np.zeros_like(base) if kind == "zero" else base


@settings(max_examples=200)
@given(
  arrays=st.fixed_dictionaries(
    {},
    optional={
      name: ARRAYS for name in ("features", "labels", "test_features", "test_labels", "class_names")
    },
  ),
  skip=st.booleans(),
  share=st.sampled_from([0.0, 0.3]),
)
def test_any_file_of_embeddings_is_accepted_or_refused_with_a_sentence(arrays, skip, share):
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "rows.npz"
    np.savez(path, **{name: make_array(spec) for name, spec in arrays.items()})
    config = features.get_config().to_dict()
    config["dataset"] |= {
      "train_path": str(path), "skip_non_finite": skip, "test_share": share,
    }  # fmt: skip
    try:
      _, _, data = pipeline.prepare(config)
    except MemdiffError as error:
      expect_sentence(error)
    else:
      assert np.isfinite(data.train_features).all() and np.isfinite(data.test_features).all()
      assert data.train_labels.min() >= 0 and data.train_labels.max() < data.num_classes
      assert (data.train_counts > 0).all()


@settings(max_examples=100)
@given(
  data=st.binary(max_size=300), suffix=st.sampled_from([".npz", ".npy", ".parquet", ".csv", ""])
)
def test_any_bytes_for_embeddings_are_refused_with_a_sentence(data, suffix):
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / f"rows{suffix}"
    path.write_bytes(data)
    config = features.get_config().to_dict()
    config["dataset"]["train_path"] = str(path)
    with pytest.raises(MemdiffError) as caught:
      pipeline.prepare(config)
    expect_sentence(caught.value)


@settings(max_examples=150)
@given(images=ARRAYS, labels=ARRAYS, number=st.integers(0, 4))
def test_any_source_of_images_is_accepted_or_refused_with_a_sentence(images, labels, number):
  good = digits.load()
  source = Source(
    train_images=make_array(images), train_labels=make_array(labels),
    test_images=good.test_images, test_labels=good.test_labels,
    class_names=good.class_names[:number],
  )  # fmt: skip
  with pytest.raises(MemdiffError) as caught:  # none of these is ten classes of digits
    dataset_lib.check(source, "made up")
  expect_sentence(caught.value)
