"""Data sets that TensorFlow Datasets (TFDS) prepares; the only file that knows TFDS.

Reading needs no TensorFlow: `input_pipeline.prepare` writes array_record files, and images are
decoded with Pillow. TFDS stores examples in an order of its own; here they come in the official
one, which the long-tailed splits are defined on. Nothing here downloads.

To add a set that TFDS has: a row in SETS.
"""

import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import re
import shlex
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from input_pipeline import identity
from input_pipeline.lazy_images import LazyImages
from input_pipeline.source import Source
from memdiff.errors import ConfigError, DataError

_CHUNK = 1000  # records read at a time
_SAMPLED = 1000  # records of a large set that its fingerprint reads
# What Pillow and array_record raise.
_DAMAGED = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)
INDEX_FILE = "memdiff_index.npz"
_INDEX_ARRAYS = {
  f"{part}_{what}" for part in ("train", "test") for what in ("labels", "names", "stored")
}


@dataclasses.dataclass(frozen=True)
class TfdsSet:
  """How a TFDS data set is read.

  Attributes:
    name: in TFDS.
    test: its split that is tested on.
    streamed: whether images stay on disk; needs `image_size`.
    name_feature: of the official name of an example, or None.
    official_name: from that feature to the name in official lists, if they differ.
    label: example -> class, or None if the example is not used; None reads "label".
    class_names: where the label is not a feature of TFDS.
    hashed_keys: whether examples are numbered in TFDS's generator, so that the official order can
      be found from its hash.
  """

  name: str
  test: str
  streamed: bool
  name_feature: str | None = None
  official_name: Callable[[str], str] = str
  label: Callable[[Mapping[str, Any]], int | None] | None = None
  class_names: tuple[str, ...] | None = None
  hashed_keys: bool = False


CELEBA_5 = ("Black_Hair", "Brown_Hair", "Blond_Hair", "Gray_Hair", "Bald")


def celeba_5(example: Mapping[str, Any]) -> int | None:
  """The one of five hair classes that an image of CelebA shows; None for none or several.

  The five non-overlapping classes of Kim et al., "Imbalanced image classification with complement
  cross entropy", 2020, which imbalanced generation calls CelebA-5.
  """
  shown = [i for i, name in enumerate(CELEBA_5) if example["attributes"][name]]
  return shown[0] if len(shown) == 1 else None


def places_name(name: str) -> str:
  """`data_256/a/arena/hockey/1.jpg` -> `arena-hockey/1.jpg`, as Places-LT's lists have it."""
  *folders, file = name.split("/")
  return f"{'-'.join(folders[2:])}/{file}"


SETS = {
  "cifar10": TfdsSet("cifar10", "test", False, "id"),
  "cifar100": TfdsSet("cifar100", "test", False, "id"),
  "fashion_mnist": TfdsSet("fashion_mnist", "test", False, hashed_keys=True),
  "imagenet2012": TfdsSet("imagenet2012", "validation", True, "file_name"),
  "imagenet_lt": TfdsSet("imagenet_lt", "test", True, "file_name"),
  "i_naturalist2018": TfdsSet("i_naturalist2018", "validation", True, "id"),
  "celeb_a": TfdsSet("celeb_a", "test", True, label=celeba_5, class_names=CELEBA_5),
  "food101": TfdsSet("food101", "validation", True),
  "places": TfdsSet("places365_small", "validation", True, "filename", places_name),
}


def load(name: str, data_dir: str, image_size: int) -> Source:
  """A prepared data set, in its official order.

  Args:
    name: a key of SETS.
    data_dir: where TFDS keeps its data sets, "" for its default.
    image_size: side of streamed images, pixels; 0 for the others.

  Raises:
    DataError: if the set is not there, with the command that gets it.
  """
  spec = SETS[name]
  if spec.streamed and image_size < 1:
    raise ConfigError(
      f"config.dataset.image_size is {image_size}, but {name} has images of many sizes; give the"
      " side in pixels, for example 224."
    )
  if not spec.streamed and image_size:
    raise ConfigError(
      f"config.dataset.image_size is {image_size}, but {name} is used as it is stored; set it to 0."
    )
  builder = prepared_builder(name, data_dir)
  read = _read_streamed if spec.streamed else _read_arrays
  return read(name, builder, image_size)


def make_builder(name: str, data_dir: str):
  """The TFDS builder of a set, prepared or not."""
  import tensorflow_datasets as tfds

  try:
    return tfds.builder(
      SETS[name].name, data_dir=str(pathlib.Path(data_dir).expanduser()) if data_dir else None
    )
  except Exception as error:  # of many types, where what lies there is damaged
    raise DataError(f"TFDS cannot open the data set {name}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
  """What TFDS says, often over many lines."""
  return " ".join(str(error).split())[:600] or repr(error)


def prepare_command(name: str, data_dir: str) -> str:
  place = f" --data_dir={shlex.quote(data_dir)}" if data_dir else ""
  return f"python -m input_pipeline.prepare --dataset={name}{place}"


def prepared_builder(name: str, data_dir: str):
  """The builder of a set that is there; DataError with the command to type where it is not."""
  builder = make_builder(name, data_dir)
  if not builder.is_prepared():
    raise DataError(
      f"The data set {name} is not in {data_dir or 'the default folder of TFDS'}; get it once with:"
      f" {prepare_command(name, data_dir)}"
    )
  if builder.info.file_format.value != "array_record":
    raise DataError(
      f"The data set {name} in {builder.data_path} is stored as {builder.info.file_format.value},"
      " which needs TensorFlow to read; store it as array_record in another folder:"
      f" {prepare_command(name, 'OTHER')}"
    )
  return builder


def class_names_of(name: str, builder) -> tuple[str, ...]:
  return SETS[name].class_names or tuple(builder.info.features["label"].names)


# --- small sets ------------------------------------------------------------------------------


def _read_arrays(name: str, builder, image_size: int) -> Source:
  del image_size
  parts = {part: read_split(name, builder, split) for part, split in splits(name).items()}
  (train_images, train_labels), (test_images, test_labels) = parts["train"], parts["test"]
  return Source(class_names_of(name, builder), train_images, train_labels, test_images, test_labels)


def splits(name: str) -> dict[str, str]:
  return {"train": "train", "test": SETS[name].test}


def read_split(name: str, builder, split: str) -> tuple[np.ndarray, np.ndarray]:
  """Images [N, H, W, ch] uint8 and labels [N] of a split, in the official order."""
  spec, stored = SETS[name], stored_examples(builder, split)
  chunks = [range(i, min(i + _CHUNK, len(stored))) for i in range(0, len(stored), _CHUNK)]
  with _undamaged(name, builder, split):
    examples = [example for chunk in chunks for example in stored.__getitems__(list(chunk))]
    images = np.stack([decode(example["image"]) for example in examples])
  if spec.name_feature:
    order = np.argsort([_number(example[spec.name_feature]) for example in examples])
  elif spec.hashed_keys:
    order = official_order(split, len(examples))
  else:
    order = np.arange(len(examples))
  labels = np.array([example["label"] for example in examples], np.int32)
  return images[order], labels[order]


def stored_examples(builder, split: str):
  """The examples of a split as they are stored, images as encoded bytes."""
  import tensorflow_datasets as tfds

  return builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})


@contextlib.contextmanager
def _undamaged(name: str, builder, split: str):
  """Turns what reading damaged files raises into a DataError."""
  try:
    yield
  except _DAMAGED as error:
    raise DataError(
      f"The {split} split of {name} in {builder.data_path} is damaged ({error}); remove this folder"
      f" and get it anew with: {prepare_command(name, _data_dir(builder))}"
    ) from error


def _data_dir(builder) -> str:
  return str(pathlib.Path(builder.data_path).parents[1])


def decode(data: bytes) -> np.ndarray:
  """uint8 [h, w, ch] of an encoded image, one channel if it is grey."""
  image = np.asarray(Image.open(io.BytesIO(data)))
  return image[..., None] if image.ndim == 2 else image


def _number(name: bytes | str) -> int:
  """`train_16399` -> 16399."""
  text = name.decode() if isinstance(name, bytes) else name
  return int(re.search(r"(\d+)$", text)[1])


def official_order(split: str, number: int) -> np.ndarray:
  """Where the examples 0, 1, ... of TFDS's generator lie in its files, which it sorts by a hash."""
  from tensorflow_datasets.core import hashing

  hasher = hashing.Hasher(split)
  stored = sorted(range(number), key=lambda key: hasher.hash_key(key))
  return np.argsort(np.array(stored))


# --- large sets ------------------------------------------------------------------------------


class _StoredImages:
  """Whole images of a TFDS split by their stored number; opened where it is used."""

  def __init__(self, name: str, data_dir: str, split: str, number: int):
    self._name, self._data_dir, self._split, self._number = name, data_dir, split, number

  @functools.cached_property
  def _examples(self):
    return stored_examples(make_builder(self._name, self._data_dir), self._split)

  def __getstate__(self):
    return {key: value for key, value in self.__dict__.items() if key != "_examples"}

  def __len__(self) -> int:
    return self._number

  def __getitem__(self, index: int) -> Image.Image:
    with self._readable(index):
      return Image.open(io.BytesIO(self._encoded(index))).convert("RGB")

  def _encoded(self, index: int) -> bytes:
    with self._readable(index):
      return self._examples[index]["image"]

  @contextlib.contextmanager
  def _readable(self, index: int):
    """Turns what reading a damaged record raises into a DataError."""
    try:
      yield
    except _DAMAGED as error:
      raise DataError(
        f"Image {index} of the {self._split} split of {self._name} cannot be read ({error})."
      ) from error

  def fingerprint(self, indices: np.ndarray) -> str:
    """SHA-256 of name, version and split, the numbers of the records, and a spread sample of them.

    Not of the folder, nor of how the records are spread over files.
    """
    builder = make_builder(self._name, self._data_dir)
    facts = f"{builder.info.full_name} {self._split} {self._number}"
    sample = [self._encoded(int(i)) for i in indices[identity.spread(len(indices), _SAMPLED)]]
    return identity.of_bytes(facts.encode(), identity.digest(indices).encode(), *sample)


def _read_streamed(name: str, builder, image_size: int) -> Source:
  index = read_index(name, builder)
  data_dir, parts = _data_dir(builder), {}
  for part, split in splits(name).items():
    stored = index[f"{part}_stored"]
    reader = _StoredImages(name, data_dir, split, builder.info.splits[split].num_examples)
    parts[part] = LazyImages(reader, image_size, stored)
  names = index["train_names"]
  return Source(
    class_names_of(name, builder),
    parts["train"],
    index["train_labels"],
    parts["test"],
    index["test_labels"],
    names if names.size else None,
  )


def read_index(name: str, builder) -> dict[str, np.ndarray]:
  """Labels and names of a large set, as `write_index` left them beside it."""
  path = pathlib.Path(builder.data_path) / INDEX_FILE
  try:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
      index = dict(arrays)
    if missing := _INDEX_ARRAYS - set(index):
      raise ValueError(f"it has no {', '.join(sorted(missing))}")
    return index
  except FileNotFoundError:
    raise DataError(
      f"The data set {name} has no index at {path}; make it once with:"
      f" {prepare_command(name, _data_dir(builder))}"
    ) from None
  except (OSError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise DataError(
      f"Cannot read {path} ({error}); make it anew with:"
      f" {prepare_command(name, _data_dir(builder))}"
    ) from error


def write_index(name: str, builder, progress: Callable[[str, int, int], None]) -> None:
  """Writes labels, names and places of all used examples of a large set beside it.

  Reads every record once without decoding its image. In order of names if there are names.

  Args:
    progress: called with (split, records read, records in all).

  Raises:
    DataError: if a record cannot be read or the index cannot be written.
  """
  spec, arrays = SETS[name], {}
  for part, split in splits(name).items():
    examples = stored_examples(builder, split)
    labels, names, stored = [], [], []
    for i in range(len(examples)):
      with _undamaged(name, builder, split):
        example = examples[i]
      label = spec.label(example) if spec.label else int(example["label"])
      if label is not None:
        labels.append(label)
        stored.append(i)
        names.append(
          spec.official_name(_text(example[spec.name_feature])) if spec.name_feature else ""
        )
      if i % 10_000 == 0 or i + 1 == len(examples):
        progress(split, i + 1, len(examples))
    order = np.argsort(np.array(names), kind="stable")
    arrays[f"{part}_labels"] = np.array(labels, np.int32)[order]
    arrays[f"{part}_stored"] = np.array(stored, np.int64)[order]
    arrays[f"{part}_names"] = np.array(names if spec.name_feature else [], np.str_)
    if spec.name_feature:
      arrays[f"{part}_names"] = arrays[f"{part}_names"][order]
  path = pathlib.Path(builder.data_path) / INDEX_FILE
  partial = path.with_suffix(".partial.npz")  # so that a kill leaves no half index
  try:
    np.savez(partial, **arrays)
    os.replace(partial, path)
  except OSError as error:
    raise DataError(f"Cannot write {path} ({error}).") from error


def _text(value: bytes | str) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)
