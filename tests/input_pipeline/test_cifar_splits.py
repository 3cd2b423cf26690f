"""The standard splits, from the genuine sets; where TFDS has not prepared one, its tests skip.

MEMDIFF_TFDS_DIR is the folder of TFDS, its default folder where unset.
"""

import functools
import hashlib
import os

import numpy as np
import pytest

from input_pipeline import dataset, tfds_sources
from input_pipeline.dataset import DatasetConfig
from memdiff.errors import DataError

FOLDER = os.environ.get("MEMDIFF_TFDS_DIR", "")
NUM_CLASSES = {"cifar10": 10, "cifar100": 100}
SPLITS = {  # (set, imbalance): training images, SHA-256 of their indices
  ("cifar10", 10): (20431, "a17d69f192b1cf6df09676b6c424e2ad5e7d7863ccc4b9ba70ef128885973218"),
  ("cifar10", 50): (13996, "d7edcfaf02772bee1e2310a33be8b6c46232f043641158348b9de3ec731e26ac"),
  ("cifar10", 100): (12406, "4bf45bff8878d2786e47dccd702f96ff33b2b11d8c7da3b5015f10937290f866"),
  ("cifar100", 10): (19573, "b4fbf1bf0a7f33381467493f50b953ce21b03a2b6d45b0d5e8da5d95d9ffd736"),
  ("cifar100", 50): (12608, "561fa940cc7d3551d441643e310c7e439bf84f86b7863a3f7364963522d2984a"),
  ("cifar100", 100): (10847, "e0d58a4d2700c46062da852554e5d185bbee74d3c612b052ea2a839bdadf939e"),
}
CONTENT = {  # of (images, labels), training and test, in the order of the official files
  "cifar10": (
    ("47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
     "1431253c7e60f5a2b7e2531aeca20b26a5e5951dcc4977b9c457ebfc43aedb75"),
    ("f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
     "46759f9470c7bc483fc69c725b42c97033013de7690e19b600cf30381a76b9e5"),
  ),
  "cifar100": (
    ("4e457917601a66aed021f5fa37957b56c6319557c0a8ed5484de3c390af45430",
     "cc36d8adc63eba707c4a64bc5c63269658a93515bdb6f7c5d23320ac1dbc7546"),
    ("4cb8e5d9309da489bf6b19cc10cd96c3ae6f8daf225380b605aaee4c0d6aee19",
     "7dc601c25ed6971c7f00570fece3408e23e3b1f63a66c2fc221e62db60753d02"),
  ),
  "fashion_mnist": (
    ("2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
     "d69b1d6e0b8064974aa5aecc2786f961b8b2be829ee3a39dd8989efee46cad5a"),
    ("c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
     "53fdd09ed9cbcd893df0e3b0af7802f2d62457de11c87273d4b4186f4992a40c"),
  ),
}  # fmt: skip
SHAPES = {
  "cifar10": (50_000, 10_000, (32, 32, 3)),
  "cifar100": (50_000, 10_000, (32, 32, 3)),
  "fashion_mnist": (60_000, 10_000, (28, 28, 1)),
}


@functools.cache
def source_of(name):
  """The whole set, read once, or None where it is not prepared."""
  try:
    tfds_sources.prepared_builder(name, FOLDER)
  except DataError:
    return None
  return tfds_sources.load(name, FOLDER, 0)


@pytest.fixture(scope="module", autouse=True)
def forget_the_sets():
  yield
  source_of.cache_clear()


def source_or_skip(name):
  source = source_of(name)
  if source is None:
    pytest.skip(f"get {name} with: {tfds_sources.prepare_command(name, FOLDER)}")
  return source


def config(name, imbalance):
  return DatasetConfig(
    name=name, data_dir=FOLDER, profile="exponential", imbalance=float(imbalance), split_seed=0,
    list_path="", holdout=0.0, image_size=0, skip_unreadable=False, test_share=0.0,
    test_seed=0,
  )  # fmt: skip


def sha256(array, dtype):
  return hashlib.sha256(np.ascontiguousarray(array, dtype).tobytes()).hexdigest()


@pytest.mark.parametrize("name", SHAPES)
def test_sets_come_complete_and_in_the_official_order(name):
  source = source_or_skip(name)
  num_train, num_test, shape = SHAPES[name]
  assert source.train_images.shape == (num_train, *shape)
  assert source.test_images.shape == (num_test, *shape)
  for part, content in zip(("train", "test"), CONTENT[name], strict=True):
    images, labels = getattr(source, f"{part}_images"), getattr(source, f"{part}_labels")
    assert (sha256(images, np.uint8), sha256(labels, "<i4")) == content
  dataset.check(source, name)


def ldam_indices(labels, num_classes, imbalance):
  """imbalance_cifar.py of LDAM-DRW: sizes and selection, on NumPy's global generator as there."""
  largest = len(labels) / num_classes
  state = np.random.get_state()
  try:
    np.random.seed(0)
    chosen = []
    for c in range(num_classes):
      size = int(largest * (1 / imbalance) ** (c / (num_classes - 1.0)))
      positions = np.where(np.array(labels, np.int64) == c)[0]
      np.random.shuffle(positions)
      chosen.extend(positions[:size].tolist())
    return chosen
  finally:
    np.random.set_state(state)


@pytest.mark.parametrize(("name", "imbalance"), SPLITS)
def test_the_standard_splits_are_those_of_ldam(name, imbalance, monkeypatch):
  source = source_or_skip(name)
  monkeypatch.setitem(dataset.SOURCES, name, lambda _: source)  # read once for all splits
  data = dataset.load(config(name, imbalance))
  total, digest = SPLITS[name, imbalance]
  assert len(data.train_labels) == data.train_counts.sum() == total
  assert data.split_sha256 == digest
  expected = ldam_indices(source.train_labels, NUM_CLASSES[name], imbalance)
  assert sha256(expected, "<i8") == digest
  np.testing.assert_array_equal(data.train_labels, source.train_labels[expected])
  np.testing.assert_array_equal(data.train_images, source.train_images[expected])
  rest = np.setdiff1d(np.arange(50_000), expected)
  np.testing.assert_array_equal(
    np.bincount(data.left_out_labels, minlength=data.num_classes),
    np.bincount(source.train_labels[rest], minlength=data.num_classes),
  )
  assert data.train_counts[0] == 50_000 // data.num_classes
  assert data.train_counts[-1] == data.train_counts[0] // imbalance


def test_class_names_are_the_official_ones():
  assert source_or_skip("cifar10").class_names == (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
  )  # fmt: skip
  assert source_or_skip("cifar100").class_names[::33] == ("apple", "forest", "raccoon", "worm")
