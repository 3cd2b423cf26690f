"""Long tails by the published rule, and data that break the rules."""

import dataclasses
import hashlib
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from input_pipeline import dataset, digits, long_tail
from input_pipeline.dataset import DatasetConfig
from input_pipeline.source import Source
from memdiff.config import build
from memdiff.errors import ConfigError, DataError, MemdiffError

# --- the long tail ---------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("n_max", "num_classes", "imbalance", "total"),
  [(5000, 10, 10, 20431), (5000, 10, 50, 13996), (5000, 10, 100, 12406),
   (500, 100, 10, 19573), (500, 100, 50, 12608), (500, 100, 100, 10847)],
)  # fmt: skip
def test_cifar_long_tails_have_the_published_sizes(n_max, num_classes, imbalance, total):
  counts = long_tail.class_counts(n_max, num_classes, imbalance, "exponential")
  assert counts.sum() == total
  assert counts[0] == n_max and counts[-1] == n_max // imbalance
  assert (np.diff(counts) <= 0).all()


def test_cifar10_counts_are_those_of_ldam():
  counts = long_tail.class_counts(5000, 10, 100, "exponential")
  assert counts.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def test_a_step_profile_has_two_heights():
  assert long_tail.class_counts(50, 5, 10, "step").tolist() == [50, 50, 5, 5, 5]
  assert long_tail.class_counts(50, 4, 1, "exponential").tolist() == [50] * 4


def counts_or_refusal(*arguments):
  """What `class_counts` returns, or the words of its DataError."""
  try:
    return long_tail.class_counts(*arguments), None
  except DataError as error:
    return None, str(error)


@given(
  st.integers(1, 300),
  st.integers(2, 20),
  st.floats(1, 1000),
  st.sampled_from(["exponential", "step"]),
)
def test_no_class_is_ever_left_empty(n_max, num_classes, imbalance, profile):
  counts, refusal = counts_or_refusal(n_max, num_classes, imbalance, profile)
  if refusal is None:
    assert counts.min() >= 1 and counts.max() == n_max and len(counts) == num_classes
  else:
    assert imbalance >= n_max * (1 - 1e-9)
    assert f"{imbalance:g}" in refusal and "config.dataset.imbalance" in refusal


@pytest.mark.parametrize("n_max", [10, 49, 98, 103])
def test_the_limit_in_a_refusal_is_one_that_works(n_max):
  """int(49 * (1 / 49)) is 0: rounding can refuse an imbalance of n_max itself."""
  _, refusal = counts_or_refusal(n_max, 10, 2 * n_max, "exponential")
  assert f"must be below {n_max}." in refusal
  assert counts_or_refusal(n_max, 10, n_max - 1e-6, "exponential")[1] is None


def ldam_selection(labels, counts, seed):
  """The loop of LDAM-DRW's imbalance_cifar.py, on NumPy's global generator as there."""
  state = np.random.get_state()
  try:
    np.random.seed(seed)
    chosen = []
    for label, count in zip(np.unique(labels), counts, strict=True):
      positions = np.where(labels == label)[0]
      np.random.shuffle(positions)
      chosen.append(positions[:count])
    return np.concatenate(chosen)
  finally:
    np.random.set_state(state)


@given(st.integers(2, 6), st.integers(0, 1000), st.data())
def test_selection_equals_that_of_ldam(num_classes, seed, data):
  rng = np.random.default_rng(seed)
  labels = np.concatenate([np.arange(num_classes), rng.integers(0, num_classes, 60)])
  labels = rng.permutation(labels)
  present = np.bincount(labels)
  counts = np.array([data.draw(st.integers(1, int(n))) for n in present])
  kept, left_out = long_tail.select(labels, counts, seed)
  np.testing.assert_array_equal(kept, ldam_selection(labels, counts, seed))
  assert sorted([*kept, *left_out]) == list(range(len(labels)))
  np.testing.assert_array_equal(labels[kept], np.repeat(np.arange(num_classes), counts))
  assert (np.diff(labels[left_out]) >= 0).all()


def test_selection_does_not_touch_the_labels_or_the_global_generator():
  labels = np.array([1, 0, 1, 0, 1])
  before, state = labels.copy(), np.random.get_state()[1].copy()
  long_tail.select(labels, np.array([1, 2]), 0)
  np.testing.assert_array_equal(labels, before)
  np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_too_few_images_of_a_class_are_refused():
  with pytest.raises(
    DataError, match="Class 1 has 2 training images, but the long tail asks for 3"
  ):
    long_tail.select(np.array([0, 1, 0, 1, 0]), np.array([3, 3]), 0)


def test_the_fingerprint_is_sha256_of_little_endian_int64():
  indices = np.array([3, 1, 2], np.int32)
  raw = b"".join(int(i).to_bytes(8, "little") for i in indices)
  assert long_tail.fingerprint(indices) == hashlib.sha256(raw).hexdigest()
  assert long_tail.fingerprint(indices[:1], indices[1:]) == long_tail.fingerprint(indices)
  assert long_tail.fingerprint(indices[::-1]) != long_tail.fingerprint(indices)


# --- digits ----------------------------------------------------------------------------------

DIGITS = DatasetConfig(
  name="digits", data_dir="", profile="exponential", imbalance=50.0, split_seed=0, list_path="",
  holdout=0.0, image_size=0, skip_unreadable=False, test_share=0.0,
  test_seed=0,
)  # fmt: skip
DIGITS_SHA256 = "9fe34e9e60d4c7781329599719eeed6bc8735d5689ce3579750262c2b7ac786b"


@pytest.fixture(scope="module")
def long_tailed_digits():
  return dataset.load(DIGITS)


def test_the_long_tailed_digits_are_pinned(long_tailed_digits):
  data = long_tailed_digits
  assert data.split_sha256 == DIGITS_SHA256
  assert data.train_counts.tolist() == long_tail.class_counts(122, 10, 50, "exponential").tolist()
  assert len(data.test_labels) == 540
  assert len(data.train_labels) + len(data.left_out_labels) + 540 == 1797
  assert data.num_classes == 10 and data.class_names == tuple("0123456789")


def test_the_images_are_the_digits_as_bytes(long_tailed_digits):
  data = long_tailed_digits
  for split in ("train", "left_out", "test"):
    images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
    assert images.dtype == np.uint8 and images.shape[1:] == (8, 8, 1)
    assert labels.dtype == np.int32 and len(labels) == len(images)
  originals = load_digits()
  known = {
    np.round(image * 255 / 16).astype(np.uint8).tobytes(): int(label)
    for image, label in zip(originals.images, originals.target, strict=True)
  }
  splits = [(data.train_images, data.train_labels), (data.left_out_images, data.left_out_labels),
            (data.test_images, data.test_labels)]  # fmt: skip
  seen = []
  for images, labels in splits:
    assert all(known[i.tobytes()] == label for i, label in zip(images, labels, strict=True))
    seen.append({image.tobytes() for image in images})
  assert data.train_images.max() == 255
  assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_the_test_set_is_stratified_and_has_every_class(long_tailed_digits):
  counts = np.bincount(long_tailed_digits.test_labels)
  assert counts.min() >= 52 and counts.max() <= 56


def test_another_split_seed_keeps_other_images_and_the_same_test_set(long_tailed_digits):
  other = dataset.load(dataclasses.replace(DIGITS, split_seed=1))
  assert other.split_sha256 != long_tailed_digits.split_sha256
  np.testing.assert_array_equal(other.train_counts, long_tailed_digits.train_counts)
  np.testing.assert_array_equal(other.test_images, long_tailed_digits.test_images)


def test_an_imbalance_beyond_the_data_is_one_sentence():
  with pytest.raises(DataError, match=r"imbalance of 500 leaves \d of 10 classes without"):
    dataset.load(dataclasses.replace(DIGITS, imbalance=500.0))


# --- data that break the rules ---------------------------------------------------------------


def make_source(**changes):
  images = np.zeros((6, 4, 4, 1), np.uint8)
  source = Source(("cat", "dog"), images, np.array([0, 1] * 3), images[:4], np.array([0, 1] * 2))
  return dataclasses.replace(source, **changes)


def test_a_sound_source_passes():
  dataset.check(make_source(), "pets")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
  ("field", "broken", "words"),
  [
    ("images", lambda x: x[..., 0], r"images of shape \(\d, 4, 4\).*uint8"),
    ("images", lambda x: x.astype(np.float32), "type float32.*memdiff reads uint8"),
    ("images", lambda x: x[:-1], r"\d images and labels of shape .*one label per image"),
    ("labels", lambda y: y[:, None], "labels of shape .*one label per image"),
    ("labels", lambda y: y.astype(float), "labels of type float64.*whole numbers"),
    ("labels", lambda y: np.where(np.arange(len(y)) == 3, 2, y), "label 2 at index 3.*0 and 1"),
    ("labels", lambda y: np.where(np.arange(len(y)) == 2, -1, y), "label -1 at index 2"),
    ("labels", lambda y: y * 0, "no image of class 'dog'"),
  ],
)
def test_a_broken_source_is_refused_with_what_is_wrong(split, field, broken, words):
  name = f"{split}_{field}"
  source = make_source(**{name: broken(getattr(make_source(), name))})
  with pytest.raises(DataError, match=f"The {split} set of pets has .*{words}"):
    dataset.check(source, "pets")


def test_one_class_is_no_classification():
  images, labels = np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, int)
  with pytest.raises(DataError, match="pets has 1 class; a classifier needs at least two"):
    dataset.check(Source(("cat",), images, labels, images, labels), "pets")


def test_sets_that_come_with_a_test_set_have_none_split_off():
  values = dataclasses.asdict(DIGITS) | {"test_share": 0.2}
  with pytest.raises(ConfigError, match=r"test_share is 0\.2, but digits comes with a test set"):
    build(DatasetConfig, values)


def test_a_source_may_allow_classes_without_test_images_and_hold_out_its_own():
  labels, images = np.zeros(4, int), np.zeros((4, 4, 4, 1), np.uint8)
  allowed = make_source(test_labels=labels, every_class_tested=False)
  dataset.check(allowed, "pets")
  dataset.check(make_source(holdout_images=images, holdout_labels=labels), "pets")
  with pytest.raises(DataError, match="The train set of pets has no image of class 'dog'"):
    dataset.check(dataclasses.replace(allowed, train_labels=np.zeros(6, int)), "pets")
  with pytest.raises(DataError, match="The holdout set of pets has label 2 at index 0"):
    dataset.check(make_source(holdout_images=images, holdout_labels=labels + 2), "pets")


def test_train_and_test_images_of_different_shape_are_refused():
  source = make_source(test_images=np.zeros((4, 5, 4, 1), np.uint8))
  with pytest.raises(DataError, match=r"differ in shape: \(4, 4, 1\) and \(5, 4, 1\)"):
    dataset.check(source, "pets")


def test_every_data_set_by_name_is_checked_before_it_is_cut(monkeypatch):
  broken = make_source(train_labels=np.zeros(6, int))
  monkeypatch.setitem(dataset.SOURCES, "digits", lambda _: broken)
  with pytest.raises(DataError, match="no image of class 'dog'"):
    dataset.load(DIGITS)
  assert issubclass(DataError, MemdiffError) and DataError.exit_code == 1
  assert ConfigError.exit_code == 2


def test_the_digits_need_no_download():
  assert digits.load().train_images.shape == (1257, 8, 8, 1)
  assert "http" not in pathlib.Path(digits.__file__).read_text()
