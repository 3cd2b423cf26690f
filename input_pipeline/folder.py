"""A folder of images per class: DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg (or DIR/val)."""

import contextlib
import pathlib
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps

from input_pipeline import identity
from input_pipeline.lazy_images import LazyImages, resize_and_crop
from input_pipeline.source import Source
from memdiff.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_IN_MEMORY = 2 * 2**30  # bytes of images, train and test, up to which they are kept
_THREADS = 8  # decoding releases Python's lock
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # Pillow's errors


class FolderImages:
  """Whole images by number, RGB."""

  def __init__(self, paths: Sequence[pathlib.Path]):
    self._paths = list(paths)

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> Image.Image:
    try:
      return _decode(self._paths[index])
    except _UNREADABLE as error:
      raise DataError(f"Cannot read the image {self._paths[index]} ({error}).") from error

  def fingerprint(self, indices: np.ndarray) -> str:
    """SHA-256 of the files at `indices`: paths, sizes, samples of content."""
    return identity.of_files([self._paths[i] for i in indices])


def load(data_dir: str, image_size: int, skip_unreadable: bool) -> Source:
  """Reads a folder.

  Args:
    data_dir: holds train/CLASS and test/CLASS, or val/CLASS where there is no test.
    image_size: side of the square that is cut out of each image after its shorter side was made
      as long; 0 takes the images as they are, which must then all have one size.
    skip_unreadable: leave out images that cannot be read, and say how many on stderr.

  Returns:
    Classes in alphabetical order, their images too. Images in memory, or LazyImages where all
    squares together would take more than 2 GiB.

  Raises:
    DataError: naming the folder, class or image.
  """
  root = pathlib.Path(data_dir).expanduser()
  train, test = root / "train", root / "test"
  if not test.is_dir() and (root / "val").is_dir():
    test = root / "val"
  for folder, what in ((train, "train"), (test, "test (or val)")):
    if not folder.is_dir():
      raise DataError(
        f"config.dataset.data_dir is {data_dir or repr('')}, which has no folder {what}; it needs"
        " train/CLASS/ and test/CLASS/ with images."
      )
  class_names = tuple(sorted(path.name for path in train.iterdir() if path.is_dir()))
  if not class_names:
    raise DataError(f"{train} has no folders; it needs one per class, with images.")
  unknown = sorted({p.name for p in test.iterdir() if p.is_dir()} - set(class_names))
  if unknown:
    raise DataError(f"{test} has a folder {unknown[0]!r} for a class that {train} does not have.")
  readers, labels = [], []
  for folder in (train, test):
    paths, classes = _find(folder, class_names)
    readable = _readable(paths, skip_unreadable)
    if not readable.any():
      raise DataError(f"None of the {len(paths)} images in {folder} can be read.")
    readers.append(FolderImages([path for path, ok in zip(paths, readable, strict=True) if ok]))
    labels.append(classes[readable])
  lazy = sum(map(len, readers)) * image_size**2 * 3 > _IN_MEMORY
  train_images, test_images = (
    LazyImages(reader, image_size) if lazy else _images(reader, image_size) for reader in readers
  )
  return Source(class_names, train_images, labels[0], test_images, labels[1])


def _find(folder: pathlib.Path, class_names: Sequence[str]):
  """Paths of the images of all classes, and their labels [N]."""
  paths, labels = [], []
  for label, name in enumerate(class_names):
    own = folder / name
    found = sorted(p for p in own.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
      raise DataError(
        f"The class {name!r} has no image in {own}; every class needs at least one"
        f" ({', '.join(SUFFIXES)})."
      )
    paths += found
    labels += [label] * len(found)
  return paths, np.array(labels, np.int32)


def _readable(paths: Sequence[pathlib.Path], skip: bool) -> np.ndarray:
  """[N] bool. Raises DataError for images that cannot be read, or says that they are skipped."""
  with ThreadPoolExecutor(_THREADS) as pool:
    ok = np.array(list(pool.map(_opens, paths)))
  broken = [str(path) for path, good in zip(paths, ok, strict=True) if not good]
  if broken and not skip:
    more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    raise DataError(
      f"Cannot read the image {broken[0]}{more}; repair or remove it, or leave such images out with"
      " --config.dataset.skip_unreadable=True."
    )
  if broken:
    print(f"memdiff: left out {len(broken)} unreadable images: {', '.join(broken[:5])}"
          + (", ..." if len(broken) > 5 else ""), file=sys.stderr)  # fmt: skip
  return ok


def _opens(path: pathlib.Path) -> bool:
  try:
    _decode(path)
  except _UNREADABLE:
    return False
  return True


def _decode(path: pathlib.Path) -> Image.Image:
  """RGB, upright; of 16-bit grey the upper 8 bits, without transparency."""
  with Image.open(path) as image:
    image.load()  # what is torn fails here
    # Cameras write which side is up beside the pixels. Pillow raises many types where that is
    # damaged; the pixels are then used as they lie.
    with contextlib.suppress(Exception):
      ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # Pillow itself would clip at 255
      image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif "transparency" in image.info:  # of palettes; Pillow warns without this step
      image = image.convert("RGBA")
    return image.convert("RGB")


def _images(reader: FolderImages, image_size: int) -> np.ndarray:
  """[N, H, W, 3] uint8."""
  if image_size:  # one at a time: whole photographs may take a thousand times more
    return np.stack([resize_and_crop(reader[i], image_size) for i in range(len(reader))])
  images = [np.asarray(reader[i]) for i in range(len(reader))]
  shapes = {image.shape for image in images}
  if len(shapes) > 1:
    some = ", ".join(f"{w} x {h}" for h, w, _ in sorted(shapes)[:3])
    raise DataError(
      f"The images have different sizes ({some}{', ...' if len(shapes) > 3 else ''} pixels); give"
      " one with --config.dataset.image_size."
    )
  return np.stack(images)
