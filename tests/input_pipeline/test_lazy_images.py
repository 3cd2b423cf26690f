"""Images that are read when they are asked for, and how they are resized, against Pillow."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from input_pipeline.lazy_images import LazyImages, resize_and_crop, subset

SIZE = 28


class Reader:
  """Images of many sizes; remembers which were read."""

  def __init__(self, number=9):
    rng = np.random.default_rng(0)
    shapes = rng.integers(20, 60, (number, 2))
    self.images = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in shapes]
    self.read = []

  def __len__(self):
    return len(self.images)

  def __getitem__(self, index):
    self.read.append(index)
    return Image.fromarray(self.images[index])


def view(image, size=SIZE):
  """The evaluation view: the shorter side to 8/7 of the size, then the centre."""
  return with_pillow(image, size, round(size * 256 / 224))


def with_pillow(image, size, shorter):
  picture = Image.fromarray(image)
  scale = shorter / min(picture.size)
  new = tuple(max(size, round(side * scale)) for side in picture.size)
  left, top = (round((side - size) / 2) for side in new)
  resized = picture.resize(new, Image.Resampling.BILINEAR)
  return np.asarray(resized)[top : top + size, left : left + size]


@pytest.fixture
def reader():
  return Reader()


def test_squares_hold_all_of_the_shorter_side(reader):
  images = LazyImages(reader, SIZE).take([4, 0, 7])
  expected = [with_pillow(reader.images[i], SIZE, SIZE) for i in (4, 0, 7)]
  np.testing.assert_array_equal(images.squares(), expected)
  assert images.take([]).squares().shape == (0, SIZE, SIZE, 3)


# --- resizing --------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.sampled_from([1.0, 8 / 7]))
def test_the_shorter_side_is_resized_and_the_centre_cut_out(height, width, size, margin):
  rng = np.random.default_rng(height * 41 + width)
  image = rng.integers(0, 256, (height, width, 3), np.uint8)
  result = resize_and_crop(Image.fromarray(image), size, margin)
  assert result.shape == (size, size, 3) and result.dtype == np.uint8
  np.testing.assert_array_equal(result, with_pillow(image, size, round(size * margin)))


@pytest.mark.parametrize(("shape", "rows", "columns"), [
  ((6, 10), slice(None), slice(2, 8)), ((10, 6), slice(2, 8), slice(None)),
  ((6, 6), slice(None), slice(None)),
])  # fmt: skip
def test_an_image_of_the_right_height_or_width_is_only_cropped(shape, rows, columns):
  image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
  np.testing.assert_array_equal(resize_and_crop(Image.fromarray(image), 6), image[rows, columns])


def test_an_even_colour_stays_and_a_gradient_keeps_its_direction():
  image = Image.new("RGB", (17, 31), (10, 200, 77))
  assert (resize_and_crop(image, 8, 8 / 7) == (10, 200, 77)).all()
  right = np.broadcast_to(np.arange(0, 240, 8, dtype=np.uint8)[None, :, None], (20, 30, 3))
  columns = resize_and_crop(Image.fromarray(right), 8).astype(int)
  assert (np.diff(columns, axis=1) > 0).all() and (np.diff(columns, axis=0) == 0).all()


# --- LazyImages ------------------------------------------------------------------------------


def test_it_looks_like_an_array_of_images_and_reads_none(reader):
  images = LazyImages(reader, SIZE)
  assert images.shape == (9, SIZE, SIZE, 3) and images.ndim == 4 and images.dtype == np.uint8
  assert len(images) == 9 and images.size == SIZE
  assert len(images.take([1, 2])) == 2 and len(subset(images, np.array([4]))) == 1
  assert reader.read == []


def test_one_number_gives_one_view_and_reads_one_image(reader):
  images = LazyImages(reader, SIZE)
  for index in (3, np.int64(3), -6):
    np.testing.assert_array_equal(images[index], view(reader.images[3]))
  assert reader.read == [3, 3, 3]
  with pytest.raises(IndexError):
    images[9]


@pytest.mark.parametrize("key", [
  slice(2, 5), slice(None), slice(None, None, -3), slice(7, 99), [8, 0, 8], np.array([5]),
  np.arange(9) % 2 == 0,
], ids=str)  # fmt: skip
def test_slices_and_arrays_give_views_in_their_order(reader, key):
  expected = np.stack([view(image) for image in reader.images])[key]
  result = LazyImages(reader, SIZE)[key]
  assert result.dtype == np.uint8
  np.testing.assert_array_equal(result, expected)
  assert sorted(reader.read) == sorted(np.arange(9)[key].tolist())


@pytest.mark.parametrize("key", [slice(3, 3), [], np.zeros(0, int), np.zeros(9, bool)], ids=str)
def test_nothing_asked_for_is_no_image(reader, key):
  result = LazyImages(reader, SIZE)[key]
  assert result.shape == (0, SIZE, SIZE, 3) and result.dtype == np.uint8
  assert reader.read == []


def test_the_whole_image_can_be_read(reader):
  images = LazyImages(reader, SIZE, np.array([4, 2]))
  np.testing.assert_array_equal(images.read(1), reader.images[2])
  np.testing.assert_array_equal(images.read(-2), reader.images[4])


@given(st.lists(st.integers(0, 8), min_size=1, max_size=6), st.data())
def test_a_selection_of_a_selection_is_that_of_arrays(first, data):
  reader = Reader()
  views = np.stack([view(image) for image in reader.images])
  second = data.draw(st.lists(st.integers(0, len(first) - 1), max_size=4))
  images = LazyImages(reader, SIZE).take(first).take(second)
  assert images.shape == (len(second), SIZE, SIZE, 3)
  np.testing.assert_array_equal(images[:], views[first][np.array(second, int)])


@pytest.mark.parametrize("key", [
  np.arange(9) % 2 == 0, (np.arange(9) > 6).tolist(), np.zeros(9, bool), [-1, 3, 3], [],
  np.array([2, 0], np.uint8), slice(1, None, 3),
], ids=str)  # fmt: skip
def test_a_selection_is_that_of_an_array(reader, key):
  views = np.stack([view(image) for image in reader.images])
  np.testing.assert_array_equal(LazyImages(reader, SIZE).take(key)[:], views[key])


@pytest.mark.parametrize("key", [[9], [-10], np.ones(8, bool), [0.0, 1.0]], ids=str)
def test_a_selection_that_an_array_refuses_is_refused(reader, key):
  with pytest.raises(IndexError):
    LazyImages(reader, SIZE).take(key)


def test_a_loop_goes_over_all_views_once(reader):
  images = LazyImages(reader, SIZE, np.array([1, 0]))
  results = list(images)
  np.testing.assert_array_equal(results, [view(reader.images[i]) for i in (1, 0)])


def test_subsets_of_arrays_are_arrays(reader):
  views = np.stack([view(image) for image in reader.images])
  index = np.array([2, 7, 7])
  np.testing.assert_array_equal(subset(views, index), views[index])
  np.testing.assert_array_equal(subset(LazyImages(reader, SIZE), index)[:], views[index])
