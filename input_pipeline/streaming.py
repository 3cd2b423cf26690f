"""Training batches of sets that stay on disk, read and cropped on the host by grain.

The batch of a step is a function of (seed, step) alone, whatever the number of threads and workers,
so that a run resumes at its step without a saved iterator. Hosts read disjoint rows of each batch.
"""

import dataclasses
import math
import os
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from input_pipeline.lazy_images import LazyImages
from memdiff.config import at_least, setting
from memdiff.errors import ConfigError

_SCALE, _RATIO, _ATTEMPTS = (0.08, 1.0), (3 / 4, 4 / 3), 10
_MAX_THREADS = 16
_ENDLESS = 2**62  # examples; where grain's own length ends, batches of one overflow


@dataclasses.dataclass(frozen=True)
class StreamConfig:
  num_threads: int = setting(
    0, "that read and decode, in each process; 0: one per core, up to 16", at_least(0)
  )
  num_workers: int = setting(0, "processes beside them; 0: threads of this one", at_least(0))
  prefetch: int = setting(2, "batches that each process reads ahead", at_least(1))

  @property
  def threads_per_process(self) -> int:
    """More threads than cores keep the training loop from its turn, and decode no faster."""
    if self.num_threads:
      return self.num_threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(min(cores or 1, _MAX_THREADS) // max(self.num_workers, 1), 1)


def stream_seed(seed: int, name: str) -> int:
  """The seed of a stage's stream; below 2^32."""
  return zlib.crc32(f"{seed}/{name}".encode())


def random_resized_crop(
  image: Image.Image, size: int, generator: np.random.Generator
) -> np.ndarray:
  """A random part of an image, resized to a square (Szegedy et al. 2015).

  Its area is 8 to 100 % of the image's, its ratio of width to height 3/4 to 4/3, log-uniform; after
  ten attempts that do not fit, the largest central part of an allowed ratio. Bilinear with
  antialiasing. These are torchvision's rules.

  Args:
    image: RGB.
    size: side of the result.
    generator: decides the part.

  Returns:
    uint8 [size, size, 3].
  """
  left, top, width, height = _random_box(image.width, image.height, generator)
  # Not resize(box=...), which would also mix in what lies beside the box.
  part = image.crop((left, top, left + width, top + height))
  return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))


def _random_box(width: int, height: int, generator: np.random.Generator):
  """(left, top, width, height) within an image of `width` x `height`."""
  for _ in range(_ATTEMPTS):
    area = width * height * generator.uniform(*_SCALE)
    ratio = math.exp(generator.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      return (
        int(generator.integers(0, width - w + 1)),
        int(generator.integers(0, height - h + 1)),
        w,
        h,
      )
  w = min(width, max(1, round(height * _RATIO[1])))
  h = min(height, max(1, round(width / _RATIO[0])))
  return (width - w) // 2, (height - h) // 2, w, h


@dataclasses.dataclass(frozen=True)
class _Crops:
  """Example number -> a random crop and its label; picklable for worker processes."""

  images: LazyImages
  labels: np.ndarray

  def __call__(self, index: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    crop = random_resized_crop(self.images.read(index), self.images.size, generator)
    return {"images": crop, "labels": self.labels[index]}


@dataclasses.dataclass(frozen=True)
class _OfAnyClass:
  """Whatever number -> an example of a class that is drawn first."""

  by_class: tuple[np.ndarray, ...]

  def __call__(self, _: int, generator: np.random.Generator) -> int:
    members = self.by_class[generator.integers(len(self.by_class))]
    return int(members[generator.integers(len(members))])


@dataclasses.dataclass(frozen=True)
class _InTurns:
  """Examples such that every `workers`-th, from the w-th on, are those of every such batch.

  Grain deals single examples to its workers; batches are the same as without them where each
  worker is dealt whole ones.
  """

  examples: Any  # grain.MapDataset
  rows: int
  workers: int

  def __call__(self, number: int) -> dict[str, np.ndarray]:
    dealt, worker = divmod(number, self.workers)
    turn, row = divmod(dealt, self.rows)
    return self.examples[(turn * self.workers + worker) * self.rows + row]


@dataclasses.dataclass(frozen=True)
class Order:
  """Which images the batches of a stream hold.

  Attributes:
    seed: of order and crops, below 2^32.
    first_step: of the first batch.
    balanced: draws a class, then one of its examples, in place of shuffled epochs.
  """

  seed: int
  first_step: int = 0
  balanced: bool = False


def train_batches(
  images: LazyImages,
  labels: np.ndarray,
  batch_size: int,
  order: Order,
  config: StreamConfig,
  *,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """An endless iterator over this host's part of the batches; close it when done.

  Args:
    images, labels: N of them, labels int32.
    batch_size: B of all hosts together.
    order: of the images.
    config: threads of each process and worker processes, which do not change the batches, and
      how many of them each process reads ahead.
    process_index, process_count: of this host.

  Yields:
    {"images" uint8 [B / process_count, S, S, 3], "labels" int32 [B / process_count]}.
  """
  import grain  # takes half a second, and only sets on disk need it

  if batch_size % process_count:
    raise ConfigError(
      f"config.classifier.batch_size is {batch_size}, but must be a multiple of the"
      f" {process_count} processes."
    )
  numbers = grain.MapDataset.range(len(images)).seed(order.seed)
  if order.balanced:
    by_class = tuple(np.flatnonzero(labels == c) for c in range(labels.max() + 1))
    numbers = numbers.repeat().random_map(_OfAnyClass(by_class))
  else:
    numbers = numbers.shuffle().repeat()
  examples = numbers.random_map(_Crops(images, labels))[process_index:_ENDLESS:process_count]
  rows = batch_size // process_count
  examples = examples[order.first_step * rows :]
  # In images: a batch is made of what all threads have read.
  threads = grain.ReadOptions(
    num_threads=config.threads_per_process, prefetch_buffer_size=config.prefetch * rows
  )
  if not config.num_workers:
    return iter(examples.to_iter_dataset(threads).batch(rows))
  if not flags.FLAGS.is_parsed():  # grain asks for its own; outside main.py nobody parsed them
    flags.FLAGS.mark_as_parsed()
  dealt = grain.MapDataset.range(_ENDLESS).map(_InTurns(examples, rows, config.num_workers))
  batches = dealt.to_iter_dataset(threads).batch(rows)
  return iter(batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.num_workers)))
