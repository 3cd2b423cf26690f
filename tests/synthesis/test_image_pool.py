"""Files of generated images: what is read, and what is refused."""

import dataclasses
import re

import numpy as np
import pytest

from input_pipeline import dataset
from memdiff.errors import DataError
from memdiff.synthesis import image_pool

DATA = dataset.load(dataset.DatasetConfig(name="digits", imbalance=50.0))
NAMES = DATA.class_names
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1)).astype(np.uint8)
LABELS = np.array([0, 9, 3, 3, 1, 0])


@pytest.fixture
def path(tmp_path):
  return tmp_path / "pool.npz"


def test_images_come_back_as_they_were_written(path):
  image_pool.write(path, IMAGES, LABELS, NAMES, confidence=LABELS / 9, prompt=np.array(["a"] * 6))
  found = image_pool.read(str(path), DATA)
  np.testing.assert_array_equal(found.images, IMAGES)
  np.testing.assert_array_equal(found.labels, LABELS)
  np.testing.assert_array_equal(found.confidence, LABELS / 9)
  assert image_pool.never_saw_the_data(str(path))


def test_images_are_trusted_alike_if_nothing_else_is_said(path):
  image_pool.write(path, IMAGES, LABELS, NAMES)
  np.testing.assert_array_equal(image_pool.read(str(path), DATA).confidence, np.ones(6))


def test_images_learned_from_this_split_are_read_and_those_of_another_refused(path):
  image_pool.write(path, IMAGES, LABELS, NAMES, learned_from=(4, 7), train_sha256=DATA.split_sha256)
  assert image_pool.read(str(path), DATA).learned_from.tolist() == [4, 7]
  assert not image_pool.never_saw_the_data(str(path))
  other = dataclasses.replace(DATA, split_sha256="0" * 64)
  with pytest.raises(DataError, match="another split of the data"):
    image_pool.read(str(path), other)
  image_pool.write(path.with_name("unknown.npz"), IMAGES, LABELS, NAMES, learned_from=(4, 7))
  with pytest.raises(DataError, match="another split of the data"):
    image_pool.read(str(path.with_name("unknown.npz")), DATA)


GOOD = {"images": IMAGES, "labels": LABELS} | image_pool.provenance(NAMES, np.zeros(0), "")


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"images": IMAGES[:0], "labels": LABELS[:0]}, "holds no image; leave it out."),
    ({"images": IMAGES[:, :7]}, "are 7 x 8 pixels, 1 channels, but those of the data set 8 x 8"),
    ({"images": IMAGES[..., 0]}, "must be uint8 [M, H, W, channels]"),
    ({"images": IMAGES.astype(float)}, "but they are float64 [6, 8, 8, 1]"),
    ({"labels": LABELS[:5]}, "and the labels [5]"),
    ({"labels": LABELS + 1}, "must be whole numbers from 0 to 9"),
    ({"labels": LABELS - 1}, "must be whole numbers from 0 to 9"),
    ({"labels": LABELS / 1}, "must be whole numbers from 0 to 9"),
    ({"class_names": np.array(["cat", "dog"])}, "not those of the data set: cat, dog against"),
    ({"class_names": np.array(NAMES[::-1])}, "the same ones in the same order"),
    ({"version": np.array(2)}, "is of version 2, but this memdiff reads version 1"),
    ({"confidence": np.full(6, np.nan)}, "must be a number from 0 for each image"),
    ({"confidence": np.ones(5)}, "must be a number from 0 for each image"),
    ({"labels": None}, "has no array labels; memdiff.synthesis.image_pool.write makes"),
  ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(path, changes, words):
  arrays = {name: value for name, value in (GOOD | changes).items() if value is not None}
  np.savez(path, **arrays)
  with pytest.raises(DataError, match=re.escape(words)):
    image_pool.read(str(path), DATA)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 torn", "pickled"])
def test_a_file_that_cannot_be_read(path, content):
  if content == "pickled":
    np.savez(path, **(GOOD | {"labels": np.array([{}], object)}))
  elif content is not None:
    path.write_bytes(content)
  with pytest.raises(DataError, match=re.escape(f"Cannot read the images in {path}")):
    image_pool.read(str(path), DATA)
