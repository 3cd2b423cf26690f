"""A generated set with the sizes and weight of photographs, stored as TFDS stores ImageNet."""

import io
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from input_pipeline import prepare, tfds_sources

NAME = "imagenet2012"
_SIDE, _SIZES, _QUALITY = 2048, ((500, 375), (375, 500)), 92  # 111 kB on average, as ImageNet's
_CLASSES, _IMBALANCE, _KB, _TEST = 100, 100, 111, 512


def _texture(seed: int) -> np.ndarray:
  """Noise with the spectrum of photographs, 1/f, colours going together. uint8 [2048, 2048, 3]."""
  rng = np.random.default_rng(seed)
  frequency = np.hypot(np.fft.fftfreq(_SIDE)[:, None], np.fft.rfftfreq(_SIDE)[None])
  frequency[0, 0] = 1
  grey, *colours = (
    rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)
    for _ in range(4)
  )
  channels = [np.fft.irfft2((grey + 0.6 * colour) / frequency**1.1) for colour in colours]
  texture = np.stack([(x - x.mean()) / x.std() for x in channels], axis=-1)
  return np.clip(118 + 48 * texture, 0, 255).astype(np.uint8)


def jpegs(number: int, sizes: Sequence[tuple[int, int]] = _SIZES, seed: int = 0) -> Iterator[bytes]:
  """JPEG files, each of one of the sizes (width, height)."""
  rng, texture = np.random.default_rng(seed), _texture(seed)
  for _ in range(number):
    width, height = sizes[rng.integers(len(sizes))]
    left, top = rng.integers(_SIDE - width), rng.integers(_SIDE - height)
    data = io.BytesIO()
    image = Image.fromarray(texture[top : top + height, left : left + width])
    image.save(data, "JPEG", quality=_QUALITY)
    yield data.getvalue()


def _examples(labels: np.ndarray, names: Sequence[str], seed: int) -> Iterator[tuple[str, dict]]:
  """(key, example) as TFDS's generator of ImageNet gives them."""
  for i, data in enumerate(jpegs(len(labels), seed=seed)):
    name = names[labels[i]]
    yield f"{name}_{i}", {"image": io.BytesIO(data), "label": name, "file_name": f"{name}_{i}.JPEG"}


def prepare_set(data_dir: pathlib.Path, gigabytes: float) -> None:
  """Writes the set, 100 classes with a tail of 1 in 100, where it is not there; and its index."""
  builder = tfds_sources.make_builder(NAME, str(data_dir))
  if not builder.is_prepared():
    import tensorflow_datasets as tfds

    number = round(gigabytes * 1e6 / _KB)
    shares = _IMBALANCE ** -np.linspace(0, 1, _CLASSES)
    counts = np.maximum(1, np.round(number * shares / shares.sum())).astype(int)
    train, test = np.repeat(np.arange(_CLASSES), counts), np.arange(_TEST) % _CLASSES
    names = builder.info.features["label"].names
    tfds.dataset_builders.AdhocBuilder(
      name=NAME, version=str(builder.version), features=builder.info.features, data_dir=data_dir,
      file_format="array_record",
      split_datasets={
        "train": _examples(train, names, 0),
        "validation": _examples(test, names, 1),
      },
    ).download_and_prepare()  # fmt: skip
  prepare.prepare(NAME, str(data_dir))
