"""Sets of images, or of their features, to be compared: folders and .npz files."""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from input_pipeline import identity, image_files
from memdiff.errors import DataError

BLOCK = 256  # images at a time


@dataclasses.dataclass(frozen=True)
class ImageSet:
  """Images that are read block by block.

  Attributes:
    path: where they are, for messages.
    source: paths of files, or an array [N, H, W, 1 or 3], uint8 or of one of two ranges.
    scale: (factor, offset) from the array's numbers to 0..255.
  """

  path: str
  source: list[pathlib.Path] | np.ndarray
  scale: tuple[float, float] = (1.0, 0.0)

  def __len__(self) -> int:
    return len(self.source)

  def sha256(self) -> str:
    """Of all pixels, or of the files as they are."""
    if isinstance(self.source, np.ndarray):
      return identity.digest(self.source)
    return identity.of_bytes(*(identity.of_bytes(p.read_bytes()).encode() for p in self.source))

  def blocks(self, side: int) -> Iterator[np.ndarray]:
    """uint8 RGB [n, side, side, 3]; other sizes are resized by Pillow's bicubic filter.

    With the side 0 images stay as they are, [n, H, W, 3].

    Raises:
      DataError: if an image cannot be read, or images that stay as they are differ in size.
    """
    size = None
    for start in range(0, len(self), BLOCK):
      part = self.source[start : start + BLOCK]
      images = map(self._decoded, part) if isinstance(part, list) else map(self._image, part)
      images = [np.asarray(_resized(image, side) if side else image) for image in images]
      size = size or images[0].shape
      if any(image.shape != size for image in images):
        raise DataError(
          f"The images of {self.path} differ in size; give the side they should have."
        )
      yield np.stack(images)

  def _decoded(self, path: pathlib.Path) -> Image.Image:
    try:
      return image_files.decode(path)
    except image_files.UnreadableError as error:
      raise DataError(f"The image {path} cannot be used: {error}.") from error

  def _image(self, pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8:
      factor, offset = self.scale
      pixels = np.clip(np.round(pixels * factor + offset), 0, 255).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _resized(image: Image.Image, side: int) -> Image.Image:
  return (
    image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BICUBIC)
  )


def read(path: str) -> ImageSet | np.ndarray:
  """Images or their features, out of a folder or a file.

  A folder holds images at any depth or, as a run leaves them, .npz files; a .npz file holds
  `images`, or `features` [N, D] of them.

  Raises:
    DataError: if there is nothing of that kind, or numbers are of no known range.
  """
  place = pathlib.Path(path)
  if place.is_dir() and (parts := sorted(place.glob("*.npz"))):
    return _joined(path, [_arrays(part) for part in parts])
  if place.is_dir():
    files = sorted(p for p in place.rglob("*") if p.suffix.lower() in image_files.suffixes())
    if not files:
      raise DataError(f"There is no image in {path} that Pillow can read.")
    return ImageSet(path, files)
  if not place.exists():
    raise DataError(f"There is no folder or file {path}.")
  return _joined(path, [_arrays(place)])


def read_labels(path: str) -> np.ndarray:
  """Names of the classes of a set's images, in their order. [N] text.

  They are `labels` in .npz files, and the first folders of a folder.

  Raises:
    DataError: if the set does not tell them.
  """
  place = pathlib.Path(path)
  files = sorted(place.glob("*.npz")) if place.is_dir() else [place]
  if files:
    parts = [_arrays(file) for file in files]
    if all("labels" in part and part["labels"].ndim == 1 for part in parts):
      return np.concatenate([part["labels"] for part in parts]).astype(str)
  else:
    found = read(path)
    names = [file.relative_to(place).parts for file in found.source]
    if all(len(parts) > 1 for parts in names):
      return np.array([parts[0] for parts in names])
  raise DataError(
    f"{path} does not tell the classes of its images; it needs `labels` [N] beside them, or a"
    " folder per class."
  )


def _arrays(file: pathlib.Path) -> dict[str, np.ndarray]:
  """`images` or `features` of a .npz file, or both, and `labels` if there are any."""
  try:
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
      names = ("images", "features", "labels")
      found = {name: arrays[name] for name in names if name in arrays.files}
  except Exception as error:  # zipfile and zlib raise many types for torn files
    raise DataError(f"Cannot read {file} as a .npz file ({error}).") from error
  if not {"images", "features"} & set(found):
    raise DataError(f"{file} holds neither `images` [N, H, W, 1 or 3] nor `features` [N, D].")
  return found


def _joined(path: str, parts: list[dict[str, np.ndarray]]) -> ImageSet | np.ndarray:
  """The parts as one set: of features, if all have them."""
  name = "features" if all("features" in part for part in parts) else "images"
  arrays = [part[name] for part in parts if name in part]
  kinds = {(array.shape[1:], str(array.dtype)) for array in arrays}
  if len(arrays) < len(parts) or len(kinds) > 1:
    raise DataError(
      f"The .npz files in {path} differ in what they hold; they must be images, or features, of"
      " one shape and type."
    )
  whole = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
  return _features(path, whole) if name == "features" else _images(path, whole)


def _features(path: str, features: np.ndarray) -> np.ndarray:
  if features.ndim != 2 or features.dtype.kind not in "fiu" or not len(features):
    raise DataError(
      f"`features` in {path} have the shape {features.shape} and the type {features.dtype}; they"
      " must be numbers [N, D]."
    )
  return features


def _images(path: str, images: np.ndarray) -> ImageSet:
  if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
    raise DataError(
      f"`images` in {path} have the shape {images.shape}; they must be [N, H, W, 1 or 3]."
    )
  if images.dtype == np.uint8:
    return ImageSet(path, images)
  if images.dtype.kind == "f":
    low, high = float(images.min()), float(images.max())
    if low >= 0 and high <= 1:
      return ImageSet(path, images, (255.0, 0.0))
    if low >= -1 and high <= 1:
      return ImageSet(path, images, (127.5, 127.5))
    seen = f"{images.dtype} from {low:g} to {high:g}"
  else:
    seen = str(images.dtype)
  raise DataError(
    f"`images` in {path} are {seen}; they must be uint8, or floating-point numbers from 0 to 1 or"
    " from -1 to 1."
  )
