"""Inputs without labels, for classifiers that are trained: images, or rows of numbers.

An input that cannot be used does not stop the others: it is zeros, and `errors` says why.
"""

import pathlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from input_pipeline import class_folders, feature_files, image_files
from input_pipeline.image_files import UnreadableError
from input_pipeline.lazy_images import resize_and_crop
from memdiff.errors import DataError

_THREADS = 8  # decoding releases Python's lock
_ARRAYS = (".npz", ".npy")


class ArrayInputs:
  """Rows of an array [N, ...].

  Attributes:
    paths: None; rows are told by their numbers.
    errors: number of an input -> why it cannot be used.
  """

  paths = None

  def __init__(self, array: np.ndarray):
    self._array = array
    self.errors: dict[int, str] = {}
    if array.dtype.kind == "f":
      bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
      self.errors = dict.fromkeys(bad.tolist(), "it has a NaN or an infinity")

  @property
  def shape(self) -> tuple[int, ...]:
    return self._array.shape

  def __len__(self) -> int:
    return len(self._array)

  def __getitem__(self, rows: slice) -> np.ndarray:
    found = self._array[rows]
    return np.nan_to_num(found, posinf=0.0, neginf=0.0) if found.dtype.kind == "f" else found


class ImageInputs:
  """Images of files, read when they are sliced.

  Attributes:
    paths: of the files.
    errors: number of an image -> why it cannot be used, once it has been read.
  """

  def __init__(self, paths: Sequence[pathlib.Path], shape: Sequence[int], margin: float):
    self.paths = list(paths)
    self.errors: dict[int, str] = {}
    self._shape, self._margin = tuple(shape), margin

  @property
  def shape(self) -> tuple[int, ...]:
    return (len(self), *self._shape)

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, rows: slice) -> np.ndarray:
    numbers = range(len(self))[rows]
    if not numbers:
      return np.zeros((0, *self._shape), np.uint8)
    with ThreadPoolExecutor(_THREADS) as pool:
      return np.stack(list(pool.map(self._view, numbers)))

  def _view(self, number: int) -> np.ndarray:
    try:
      return _view(self.paths[number], self._shape, self._margin)
    except UnreadableError as error:
      self.errors[number] = str(error)
      return np.zeros(self._shape, np.uint8)


def _view(path: pathlib.Path, shape: tuple[int, ...], margin: float) -> np.ndarray:
  """An image as training saw those of its test set. uint8 [H, W, ch]."""
  height, width, channels = shape
  image = image_files.decode(path, image_files.DECODED * min(height, width))
  if height == width:
    pixels = resize_and_crop(image, width, margin)
  elif image.size == (width, height):
    pixels = np.asarray(image)
  else:
    raise UnreadableError(
      f"it has {image.size[0]} x {image.size[1]} pixels, but training images had {width} x {height}"
    )
  return np.asarray(Image.fromarray(pixels).convert("L"))[..., None] if channels == 1 else pixels


def read_images(
  path: str, shape: Sequence[int], margin: float, array: str = "images"
) -> ImageInputs | ArrayInputs:
  """Images of a folder at any depth, of one file, or of an array.

  Args:
    path: of a folder, of an image, or of a .npz or .npy file with uint8 [N, H, W, ch].
    shape: (H, W, ch) that the classifier takes.
    margin: of `resize_and_crop`.
    array: its name in a .npz file.

  Raises:
    DataError: if there is nothing to read.
  """
  place = pathlib.Path(path).expanduser()
  if place.is_dir():
    paths, left_out = class_folders.find_images(place)
    if not paths:
      raise DataError(f"There is no image in {place} ({class_folders.describe(left_out, place)}).")
    told = class_folders.describe(left_out, place)
    print(f"memdiff: {len(paths)} images taken from {place}; {told}.", file=sys.stderr)
    return ImageInputs(paths, shape, margin)
  if place.suffix.lower() in _ARRAYS:
    found = feature_files.read_array(place, array)
    if found.shape[1:] != tuple(shape) or found.dtype != np.uint8:
      wanted = f"uint8 [N, {', '.join(map(str, shape))}]"
      raise DataError(
        f"{path} holds an array of the shape {found.shape} and type {found.dtype}, but the"
        f" classifier takes images as {wanted}; give files of images, which are resized."
      )
    if not len(found):
      raise DataError(f"{path} holds no images.")
    return ArrayInputs(found)
  if not place.is_file():
    raise DataError(f"There is no file or folder {place}.")
  return ImageInputs([place], shape, margin)


def read_features(
  path: str, dim: int, array: str = "features", columns: str = "features"
) -> ArrayInputs:
  """Rows of numbers.

  Args:
    path: .npz, .npy, .parquet, or a folder of .parquet files.
    dim: D, how many numbers a row has.
    array: name in a .npz file.
    columns: in a Parquet file, as `config.dataset.columns.features`.

  Raises:
    DataError: if they cannot be read, or are of another width.
  """
  place = pathlib.Path(path).expanduser()
  if feature_files.format_of(place, "--input") == ".parquet":
    from input_pipeline import parquet_files  # Arrow takes its time to load

    found = parquet_files.read_features(place, columns)
  else:
    found = feature_files.as_rows(path, feature_files.read_array(place, array))
  if found.shape[1] != dim:
    raise DataError(
      f"The rows of {path} have {found.shape[1]} numbers, but the classifier takes {dim}; they must"
      " be of the encoder that the training features are of."
    )
  if not len(found):
    raise DataError(f"{path} holds no rows.")
  return ArrayInputs(found)
