"""Images that are read when they are asked for, for sets too large for memory."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from PIL import Image

_THREADS = 8  # decoding releases Python's lock


class Reader(Protocol):
  """Images by number, whole or at least as large as crops need; picklable for worker processes.

  They stay Pillow's until they have their final size: an array in between costs two copies.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Image.Image:
    """RGB."""
    ...

  def fingerprint(self, indices: np.ndarray) -> str:
    """SHA-256 that tells the images at `indices`, in this order, from others."""
    ...


def resize_and_crop(image: Image.Image, size: int, margin: float = 1.0) -> np.ndarray:
  """The centre square of side `size`, of an image whose shorter side is made `size` x `margin`.

  Bilinear with antialiasing, as Pillow resizes. RGB -> uint8 [size, size, 3].
  """
  width, height = image.size
  ratio = round(size * margin) / min(height, width)
  new_width, new_height = max(size, round(width * ratio)), max(size, round(height * ratio))
  if (new_width, new_height) != (width, height):
    image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
  left, top = round((new_width - size) / 2), round((new_height - size) / 2)
  return np.asarray(image.crop((left, top, left + size, top + size)))


class LazyImages:
  """Looks like uint8 [N, size, size, 3] when it is sliced; holds no image.

  Indexing gives evaluation views; `read` gives the reader's image, for random crops.
  """

  margin = 256 / 224  # an evaluation view is the centre of an image this much larger
  dtype = np.dtype(np.uint8)
  ndim = 4

  def __init__(self, reader: Reader, size: int, indices: np.ndarray | None = None):
    self._reader = reader
    self._size = size
    self._indices = np.arange(len(reader)) if indices is None else np.asarray(indices)

  @property
  def size(self) -> int:
    """Side of the views, pixels."""
    return self._size

  @property
  def shape(self) -> tuple[int, int, int, int]:
    return (len(self), self._size, self._size, 3)

  def __len__(self) -> int:
    return len(self._indices)

  def take(self, indices: Sequence[int] | np.ndarray) -> "LazyImages":
    """The images at `indices`, or where a mask [N] bool is True, still unread."""
    return LazyImages(self._reader, self._size, self._indices[indices])

  def read(self, index: int) -> Image.Image:
    """The image as the reader gives it, RGB."""
    return self._reader[int(self._indices[index])]

  def squares(self) -> np.ndarray:
    """The largest centre square of every image. [N, size, size, 3]."""
    squares = np.empty(self.shape, np.uint8)  # filled in place: no second copy of a large set

    def fill(index: int) -> None:
      squares[index] = resize_and_crop(self.read(index), self._size)

    with ThreadPoolExecutor(_THREADS) as pool:
      list(pool.map(fill, range(len(self))))  # raises what reading has raised
    return squares

  def fingerprint(self) -> str:
    """SHA-256 of what is on disk, as the reader samples it."""
    return self._reader.fingerprint(self._indices)

  def _view(self, index: int) -> np.ndarray:
    return resize_and_crop(self.read(index), self._size, self.margin)

  def __getitem__(self, key) -> np.ndarray:
    """Evaluation views: [size, size, 3] of one number, [n, size, size, 3] of a slice or array."""
    if isinstance(key, (int, np.integer)):
      return self._view(int(key))
    chosen = np.arange(len(self))[key]
    if len(chosen) == 0:
      return np.zeros((0, *self.shape[1:]), np.uint8)
    with ThreadPoolExecutor(_THREADS) as pool:
      return np.stack(list(pool.map(self._view, chosen.tolist())))


def subset(images, indices: np.ndarray):
  """The images at `indices`, of an array or of LazyImages."""
  return images.take(indices) if isinstance(images, LazyImages) else images[indices]
