"""A folder of images per class: DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg.

  train and test         train and are tested
  train, test and val    val is the held-out part as well (also: valid, validation)
  train and val          val is the test set
  train, or classes      the test set is split off (test_share)

Names of these parts may have capitals. A class may lack test images; it trains, and is not scored.
Captions may lie beside the classes (`captions`).
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from input_pipeline import captions, class_folders, identity, image_files, long_tail
from input_pipeline.class_folders import LeftOut
from input_pipeline.image_files import UnreadableError
from input_pipeline.lazy_images import LazyImages, resize_and_crop, subset
from input_pipeline.source import Source
from memdiff.errors import ConfigError, DataError

_PARTS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
_IN_MEMORY = 2 * 2**30  # bytes of images, of all parts, up to which they are kept
_THREADS = 8  # decoding releases Python's lock


class FolderImages:
  """Images by number, RGB; whole, or large photographs with both sides at least `least` pixels."""

  def __init__(self, paths: Sequence[pathlib.Path], least: int = 0):
    self._paths = list(paths)
    self._least = least

  @property
  def paths(self) -> list[pathlib.Path]:
    """Files, in the order of the images."""
    return self._paths

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> Image.Image:
    try:
      return image_files.decode(self._paths[index], self._least)
    except UnreadableError as error:
      raise DataError(f"Cannot read the image {self._paths[index]} ({error}).") from error

  def fingerprint(self, indices: np.ndarray) -> str:
    """SHA-256 of the files at `indices`: paths, sizes, samples of content."""
    return identity.of_files([self._paths[i] for i in indices])


class Part(NamedTuple):
  images: np.ndarray | LazyImages  # [N, H, W, ch] uint8
  labels: np.ndarray  # [N] int32
  captions: tuple[str, ...] | None  # N texts

  def subset(self, index: np.ndarray) -> "Part":
    texts = self.captions and tuple(self.captions[i] for i in index)
    return Part(subset(self.images, index), self.labels[index], texts)


def load(
  data_dir: str,
  image_size: int,
  skip_unreadable: bool,
  test_share: float = 0.0,
  test_seed: int = 0,
  grey: bool = False,
) -> Source:
  """Reads a folder, and says on stderr what was taken and what was left out.

  Args:
    data_dir: as above.
    image_size: side of the square that is cut out of each image after its shorter side was made
      as long; 0 takes the images as they are, which must then all have one size.
    skip_unreadable: leave out images that cannot be read.
    test_share: of each class that is split off as the test set, if there is none; at least one
      image of classes that have two.
    test_seed: decides which images these are.
    grey: make images grey, of one channel; only if they stay in memory.

  Returns:
    Classes in alphabetical order, their images too. Images in memory, or LazyImages if all
    squares together would take more than 2 GiB.

  Raises:
    ConfigError, DataError: naming the folder, class or image.
  """
  root = pathlib.Path(data_dir).expanduser()
  folders = _layout(root, data_dir, test_share)
  names, found, left_out = _find(folders)
  pixels = sum(len(paths) for paths, _ in found.values()) * image_size**2
  lazy = pixels * (1 if grey else 3) > _IN_MEMORY
  if lazy and grey:
    raise ConfigError(
      f"The images of {root} are too many to be kept in memory, and others cannot be made grey;"
      " lower config.dataset.image_size or leave config.dataset.grey out."
    )
  parts: dict[str, Part] = {}
  for part, (paths, labels) in found.items():
    images, kept, unreadable = _read(paths, image_size, lazy, skip_unreadable, grey)
    texts = captions.read(folders[part], [paths[i] for i in kept])
    parts[part] = Part(images, labels[kept], texts)
    left_out += unreadable
  if "test" not in parts:
    parts["train"], parts["test"] = _split_off(root, parts["train"], test_share, test_seed)
  print(f"memdiff: {_summary(root, folders, names, parts, left_out)}.", file=sys.stderr)
  train, test, holdout = parts["train"], parts["test"], parts.get("holdout")
  return Source(
    names,
    train.images,
    train.labels,
    test.images,
    test.labels,
    holdout_images=holdout and holdout.images,
    holdout_labels=holdout and holdout.labels,
    train_captions=train.captions,
    test_captions=test.captions,
    every_class_tested=False,
  )


# --- finding images --------------------------------------------------------------------------


def _layout(root: pathlib.Path, data_dir: str, test_share: float) -> dict[str, pathlib.Path]:
  """Folders of train, test and holdout; without test if it is to be split off."""
  if not data_dir:
    raise DataError("config.dataset.data_dir is empty; give the folder of images.")
  if not root.is_dir():
    raise DataError(f"config.dataset.data_dir is {data_dir}, but there is no such folder.")
  there = {}
  for entry in class_folders.visible(root):
    part = _PARTS.get(entry.name.lower())
    if part and class_folders.kind_of(entry) == "folder":
      if part in there:
        raise DataError(f"{root} has both {there[part].name} and {entry.name}; keep one of them.")
      there[part] = root / entry.name
  train, test = there.get("train"), there.get("test", there.get("val"))
  if test is None and test_share:
    return {"train": train or root}
  if train is None or test is None:
    raise DataError(
      f"config.dataset.data_dir is {data_dir}, which has no folder"
      f" {'train' if train is None else 'test (or val)'}; it needs train/CLASS/ and test/CLASS/"
      " with images, or CLASS/ alone and a test set that is split off, for example with"
      " --config.dataset.test_share=0.2."
    )
  if test_share:
    raise ConfigError(
      f"config.dataset.test_share is {test_share:g}, but {root} has a test set, {test.name}; set"
      " it to 0, or move that folder elsewhere."
    )
  return {"train": train, "test": test} | ({"holdout": there["val"]} if len(there) == 3 else {})


def _find(folders: Mapping[str, pathlib.Path]):
  """(class names, paths and labels [N] of each part, files left out); holdout only if not empty."""
  found, left_out, numbers = {}, [], {}
  for part, folder in folders.items():
    classes, beside = class_folders.find_classes(folder)
    left_out += [item for item in beside if item.path.name not in captions.NAMES]
    numbers = numbers or {name: c for c, name in enumerate(classes)}  # of train, the first part
    if not classes and part != "holdout":
      raise DataError(f"{folder} has no folders; it needs one per class, with images.")
    unknown = [name for name in classes if name not in numbers]
    if unknown:
      raise DataError(
        f"{folder} has a folder {unknown[0]!r} for a class that {folders['train']} does not have."
      )
    paths, labels = [], []
    for name, class_folder in classes.items():
      images, others = class_folders.find_images(class_folder)
      if not images and part == "train":
        raise DataError(
          f"The class {name!r} has no image in {class_folder}"
          + (f" ({class_folders.describe(others, class_folder)})" if others else "")
          + "; every class needs at least one, in a format that Pillow reads, such as .jpg."
        )
      paths += images
      labels += [numbers[name]] * len(images)
      left_out += others
    if not paths and part == "test":
      raise DataError(f"{folder} has no image of any class; it needs {folder.name}/CLASS/*.jpg.")
    if paths:
      found[part] = paths, np.array(labels, np.int32)
  return tuple(numbers), found, left_out


# --- reading ---------------------------------------------------------------------------------


def _read(
  paths: Sequence[pathlib.Path], image_size: int, lazy: bool, skip_unreadable: bool, grey: bool
):
  """(images, indices [N] of what can be read, LeftOut of the others); decodes each file once."""
  least, first = image_files.DECODED * image_size, {}

  def check_as_they_are(pixels: np.ndarray) -> None:
    """All must be as large as one of them, and fit into memory; said before all are read."""
    if len(shapes := {first.setdefault("shape", pixels.shape), pixels.shape}) > 1:
      some = " and ".join(f"{w} x {h}" for h, w, _ in sorted(shapes))
      raise DataError(
        f"The images have different sizes (such as {some} pixels); give one with"
        " --config.dataset.image_size."
      )
    if len(paths) * pixels.nbytes > _IN_MEMORY:
      raise ConfigError(
        f"The {len(paths):,} images beside {paths[0]} would take"
        f" {len(paths) * pixels.nbytes / 2**30:.1f} GiB as they are; give their side as"
        " --config.dataset.image_size, and they are read from disk if they are still too many."
      )

  def view(path: pathlib.Path) -> np.ndarray | UnreadableError | None:
    try:
      if lazy:  # only to see whether it can be read
        image_files.decode(path, least=1)
        return None
      image = image_files.decode(path, least)
      pixels = resize_and_crop(image, image_size) if image_size else np.asarray(image)
      if not image_size:
        check_as_they_are(pixels)
      return np.asarray(Image.fromarray(pixels).convert("L"))[..., None] if grey else pixels
    except UnreadableError as error:
      return error

  with ThreadPoolExecutor(_THREADS) as pool:
    views = list(pool.map(view, paths))
  broken = {i: view for i, view in enumerate(views) if isinstance(view, UnreadableError)}
  unreadable = [LeftOut(paths[i], "unreadable", str(error)) for i, error in broken.items()]
  kept = np.array([i for i in range(len(paths)) if i not in broken], int)
  if unreadable and not skip_unreadable:
    more = f" and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
    raise DataError(
      f"Cannot read the image {unreadable[0].path} ({unreadable[0].detail}){more}; repair or remove"
      " it, or leave such images out with --config.dataset.skip_unreadable=True."
    )
  if not len(kept):
    raise DataError(
      f"None of the {len(paths)} images beside {paths[0]} can be read ({unreadable[0].detail})."
    )
  if lazy:
    reader = FolderImages([paths[i] for i in kept], least)
    return LazyImages(reader, image_size), kept, unreadable
  return np.stack([views[i] for i in kept]), kept, unreadable


def _split_off(root: pathlib.Path, part: Part, share: float, seed: int) -> tuple[Part, Part]:
  """(train, test); a class of one image trains."""
  number = np.arange(len(part.labels))
  train, test = long_tail.hold_out(number, part.labels, share, seed, least=1)
  if not len(test):
    raise DataError(f"No class in {root} has two images, so that no test set can be split off.")
  return part.subset(train), part.subset(test)


def _summary(root, folders, names: Sequence[str], parts: Mapping[str, Part], left_out) -> str:
  """What was taken and what was not: the words of a sentence."""
  counts = {name: len(part.labels) for name, part in parts.items()}
  test = folders["test"].name if "test" in folders else "split off"
  words = [f"{counts['train']} train", f"{counts['test']} test" + f" ({test})" * (test != "test")]
  if "holdout" in counts:
    words.append(f"{counts['holdout']} held out ({folders['holdout'].name})")
  if told := captions.describe(parts["train"].captions):
    words[0] += f" {told}"
  tested = set(parts["test"].labels.tolist())
  untested = [repr(name) for label, name in enumerate(names) if label not in tested]
  more = f" and {len(untested) - 3} more" if len(untested) > 3 else ""
  return (
    f"{sum(counts.values())} images of {len(names)} classes taken from {root}: {', '.join(words)};"
    f" {class_folders.describe(left_out, root)}"
    + (f"; not scored, for lack of test images: {', '.join(untested[:3])}{more}" * bool(untested))
  )
