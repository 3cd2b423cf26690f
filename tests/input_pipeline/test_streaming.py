"""Batches of sets on disk: functions of seed and step, whatever reads them, and random crops."""

import os
import pathlib
import threading
import time

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from input_pipeline import streaming
from input_pipeline.folder import FolderImages
from input_pipeline.lazy_images import LazyImages
from input_pipeline.streaming import Order, StreamConfig, train_batches
from memdiff.errors import ConfigError, DataError
from tests import support

N, SIZE = 23, 6
CONFIG = StreamConfig(num_threads=2, num_workers=0, prefetch=1)
NUMBERS = np.arange(N, dtype=np.int32)  # as labels, they tell which examples a batch has
CLASSES = np.array([0] * 14 + [2] * 3 + [1] + [3] * 5, np.int32)


class Plain:
  """Image i is grey i; counts what is read."""

  def __init__(self, number=N):
    self.number, self.reads = number, 0

  def __len__(self):
    return self.number

  def __getitem__(self, index):
    self.reads += 1
    return Image.new("RGB", (9, 11), (index,) * 3)


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> LazyImages:
  """Images of noise and of many sizes, on disk."""
  folder, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
  paths = [pathlib.Path(folder, f"{i}.png") for i in range(N)]
  for path in paths:
    shape = (*rng.integers(9, 30, 2), 3)
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
  return LazyImages(FolderImages(paths), SIZE)


def take(
  images, steps, *, labels=NUMBERS, batch_size=6, config=CONFIG, processes=None, seed=3, **order
):
  """The first batches of a stream, which is closed then."""
  stream = train_batches(
    images, labels, batch_size, Order(seed, **order), config, **(processes or {})
  )
  try:
    return [next(stream) for _ in range(steps)]
  finally:
    stream.close()


def assert_same(some, other):
  assert len(some) == len(other)
  for one, two in zip(some, other, strict=True):
    assert one.keys() == two.keys() == {"images", "labels"}
    np.testing.assert_array_equal(one["images"], two["images"])
    np.testing.assert_array_equal(one["labels"], two["labels"])


# --- batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("first_step", [1, 4, 11])  # 23 examples: step 4 is in the second epoch
def test_a_resumed_stream_is_the_tail_of_the_undisturbed_one(noise, first_step, balanced):
  whole = take(noise, 13, labels=CLASSES, balanced=balanced)
  resumed = take(noise, 13 - first_step, labels=CLASSES, balanced=balanced, first_step=first_step)
  assert_same(resumed, whole[first_step:])
  assert not np.array_equal(whole[0]["images"], whole[1]["images"])


@pytest.mark.parametrize("config", [StreamConfig(1, 0, 1), StreamConfig(8, 0, 3)])
def test_threads_and_reading_ahead_change_nothing(noise, config):
  assert_same(take(noise, 9, config=config), take(noise, 9))


@pytest.mark.parametrize("balanced", [False, True])
def test_worker_processes_change_nothing(noise, balanced):
  processes = {"process_index": 1, "process_count": 2}
  more = {"balanced": balanced, "first_step": 2, "processes": processes}
  workers = take(noise, 9, labels=CLASSES, config=StreamConfig(2, 3 if balanced else 2, 2), **more)
  assert_same(workers, take(noise, 9, labels=CLASSES, **more))


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_each_worker_is_dealt_whole_batches_in_turn(rows, workers, turn):
  dealt = grain.MapDataset.range(10**6).map(streaming._InTurns(range(10**6), rows, workers))
  for worker in range(workers):
    own = dealt[worker::workers]  # as grain slices it
    batch = [own[turn * rows + row] for row in range(rows)]
    first = (turn * workers + worker) * rows
    assert batch == list(range(first, first + rows))


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("processes", [2, 3])
def test_the_parts_of_all_hosts_interleave_to_the_global_batch(noise, processes, balanced):
  whole = take(noise, 6, balanced=balanced, first_step=1)
  for process in range(processes):
    part = take(
      noise,
      6,
      balanced=balanced,
      first_step=1,
      processes={"process_index": process, "process_count": processes},
    )
    assert_same(part, [{key: x[process::processes] for key, x in batch.items()} for batch in whole])


@pytest.mark.parametrize("batch_size", [1, 5, 6, 23])
def test_every_example_comes_once_per_epoch_in_an_order_of_its_own(batch_size):
  steps = -(-3 * N // batch_size)
  batches = take(LazyImages(Plain(), SIZE), steps, batch_size=batch_size)
  orders = np.concatenate([batch["labels"] for batch in batches])[: 3 * N].reshape(3, N)
  for order in orders:
    assert sorted(order) == list(range(N))
  assert len({tuple(order) for order in orders}) == 3
  assert not any((order == np.arange(N)).all() for order in orders)


def test_images_have_their_labels_and_the_promised_types():
  for batch in take(LazyImages(Plain(), SIZE), 5):
    images, labels = batch["images"], batch["labels"]
    assert images.shape == (6, SIZE, SIZE, 3) and images.dtype == np.uint8
    assert labels.shape == (6,) and labels.dtype == np.int32
    assert (images == labels[:, None, None, None]).all()


def test_another_seed_gives_other_orders_and_other_crops(noise):
  one, other = take(noise, 4), take(noise, 4, seed=4)
  for key in ("images", "labels"):
    assert not np.array_equal(one[0][key], other[0][key])
  again = {int(y): x for b in other for x, y in zip(b["images"], b["labels"], strict=True)}
  same = [(again[y] == x).all() for b in one for x, y in zip(b["images"], b["labels"], strict=True)]
  assert not any(same)


def test_an_example_is_cropped_anew_in_every_epoch(noise):
  crops = {number: set() for number in range(N)}
  for batch in take(noise, 4, batch_size=N):
    for image, number in zip(batch["images"], batch["labels"], strict=True):
      crops[number].add(image.tobytes())
  assert min(len(own) for own in crops.values()) == 4


def test_balanced_batches_draw_classes_alike_and_examples_alike_within_them():
  number = LazyImages(Plain(), 1)
  batches = take(number, 12, labels=CLASSES, batch_size=250, balanced=True)
  labels = np.concatenate([batch["labels"] for batch in batches])
  examples = np.concatenate([batch["images"][:, 0, 0, 0] for batch in batches])
  np.testing.assert_array_equal(CLASSES[examples], labels)
  assert stats.chisquare(np.bincount(labels, minlength=4)).pvalue > 1e-3
  for label in (0, 2, 3):
    counts = np.bincount(examples[labels == label], minlength=N)[label == CLASSES]
    assert stats.chisquare(counts).pvalue > 1e-3
  following = stats.contingency.crosstab(labels[:-1], labels[1:]).count
  assert stats.chi2_contingency(following).pvalue > 1e-3  # one draw tells nothing of the next


@pytest.mark.parametrize("processes", [2, 4])
def test_a_batch_that_the_processes_cannot_share_is_refused(processes):
  with pytest.raises(
    ConfigError, match=f"batch_size is 7, .* multiple of the {processes} processes"
  ):
    take(LazyImages(Plain(), SIZE), 1, batch_size=7, processes={"process_count": processes})


def test_whole_batches_are_read_while_one_is_in_use():
  reader = Plain(200)
  config = StreamConfig(num_threads=2, num_workers=0, prefetch=2)
  stream = train_batches(LazyImages(reader, SIZE), np.zeros(200, np.int32), 20, Order(0), config)
  next(stream)
  deadline = time.monotonic() + support.HANG
  while reader.reads < 60 and time.monotonic() < deadline:
    time.sleep(0.01)
  time.sleep(0.05)
  assert reader.reads == 60
  stream.close()


def test_a_closed_stream_reads_no_more_and_leaves_no_thread():
  before = set(threading.enumerate())
  reader = Plain()
  stream = train_batches(LazyImages(reader, SIZE), NUMBERS, 6, Order(0), CONFIG)
  next(stream)
  threads = set(threading.enumerate()) - before
  assert threads
  stream.close()
  stream.close()
  for thread in threads:
    thread.join(timeout=support.HANG)
    assert not thread.is_alive()
  reads = reader.reads
  with pytest.raises(ValueError, match="closed"):
    next(stream)
  assert reader.reads == reads


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_the_same_sentence_from_threads_and_workers(tmp_path, workers):
  (tmp_path / "0.png").write_bytes(b"no picture")
  images = LazyImages(FolderImages([tmp_path / "0.png"]), SIZE)
  with pytest.raises(DataError, match=r"Cannot read the image .*0\.png"):
    take(images, 1, labels=NUMBERS[:1], batch_size=1, config=StreamConfig(1, workers, 1))


def test_every_stage_and_seed_has_a_stream_of_its_own():
  seeds = [streaming.stream_seed(s, name) for s in range(40) for name in ("classifier/csl", "crt")]
  assert len(set(seeds)) == len(seeds)
  assert all(0 <= seed < 2**32 for seed in seeds)
  assert streaming.stream_seed(0, "crt") == 2678205403  # runs go on after an upgrade


# --- random crops ----------------------------------------------------------------------------


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**32 - 1))
def test_boxes_lie_in_the_image_with_the_allowed_area_and_ratio(width, height, seed):
  left, top, w, h = streaming._random_box(width, height, np.random.default_rng(seed))
  assert w >= 1 and h >= 1
  assert 0 <= left <= width - w and 0 <= top <= height - h
  half = 0.5 + 1e-9  # what rounding to pixels may add or take
  assert (w - half) / (h + half) <= 4 / 3 and (w + half) / max(h - half, 1e-9) >= 3 / 4
  if 3 / 4 <= width / height <= 4 / 3:
    assert (w + half) * (h + half) >= 0.08 * width * height


def test_area_ratio_and_place_of_boxes_have_torchvisions_distribution():
  side, number = 10_000, 3000
  rng = np.random.default_rng(0)
  boxes = [streaming._random_box(side, side, rng) for _ in range(number)]
  left, top, w, h = np.array(boxes, float).T

  other = np.random.default_rng(1)  # draws are repeated until they fit
  area = other.uniform(0.08, 1, 4 * number)
  ratio = np.exp(other.uniform(np.log(3 / 4), np.log(4 / 3), 4 * number))
  fits = (area * ratio <= 1) & (area / ratio <= 1)
  assert stats.ks_2samp(w * h / side**2, area[fits]).pvalue > 1e-3
  assert stats.ks_2samp(w / h, ratio[fits]).pvalue > 1e-3
  for start, length in ((left, w), (top, h)):
    free = length < side
    assert stats.kstest(start[free] / (side - length[free]), "uniform").pvalue > 1e-3


def test_every_place_of_a_box_occurs():
  rng = np.random.default_rng(0)
  boxes = [streaming._random_box(4, 4, rng) for _ in range(1000)]
  for axis in (0, 1):
    places = {(box[axis], box[axis + 2]) for box in boxes}
    assert places == {(start, size) for size in (1, 2, 3, 4) for start in range(5 - size)}


@pytest.mark.parametrize(
  ("width", "height", "box"),
  [(1000, 10, (493, 0, 13, 10)), (10, 1000, (0, 493, 10, 13)), (1000, 1, (499, 0, 1, 1))],
)
def test_where_no_box_fits_the_largest_central_part_is_taken(width, height, box):
  for seed in range(5):
    assert streaming._random_box(width, height, np.random.default_rng(seed)) == box


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 12), st.integers(0, 1000))
def test_a_crop_is_cut_and_resized_as_pillow_does(width, height, size, seed):
  image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
  left, top, w, h = streaming._random_box(width, height, np.random.default_rng(seed))
  part = Image.fromarray(image).crop((left, top, left + w, top + h))
  expected = np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))
  crop = streaming.random_resized_crop(Image.fromarray(image), size, np.random.default_rng(seed))
  assert crop.dtype == np.uint8
  np.testing.assert_array_equal(crop, expected)


def test_there_are_as_many_threads_as_cores_where_none_are_asked_for(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
  threads = {w: StreamConfig(0, w, 1).threads_per_process for w in (0, 1, 2, 9)}
  assert threads == {0: 6, 1: 6, 2: 3, 9: 1}
  assert StreamConfig(16, 0, 1).threads_per_process == 16
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)), raising=False)
  assert StreamConfig(0, 0, 1).threads_per_process == 16
