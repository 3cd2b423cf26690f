"""Images by a text-to-image model that was trained elsewhere, for runs that train on them.

text_to_image   names of classes, or captions -> images, as many as any run lacks   *.npz
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from input_pipeline.dataset import LongTailDataset
from input_pipeline.lazy_images import resize_and_crop
from memdiff.errors import ConfigError
from memdiff.experiments.augmented_critic import real_features
from memdiff.experiments.augmented_runs import part_of, parts, save, wanted
from memdiff.experiments.augmented_settings import AugmentedConfig
from memdiff.experiments.base import Experiment
from memdiff.experiments.drawer import chunks
from memdiff.synthesis.text_to_image import backends, prompts

_FILE = 32  # images in a file: what an interruption costs at most


def check(settings: AugmentedConfig, data: LongTailDataset) -> None:
  """Raises ConfigError if what is to be said of the classes is not there."""
  if not settings.text_to_image.model:
    return
  config = settings.text_to_image.prompts
  if config.source == "mapped":
    raise ConfigError(
      "config.text_to_image.prompts.source is mapped, but that makes soft prompts, which no"
      " text-to-image model reads; take names or captions."
    )
  if config.source == "captions" and not data.train_captions:
    raise ConfigError(
      "config.text_to_image.prompts.source is captions, but the data set has none; add a"
      " metadata.csv, or take names."
    )
  for c, name in enumerate(data.class_names):
    if config.source == "names" or not _captions_of(data, c):
      prompts.words_of(name)


def _captions_of(data: LongTailDataset, c: int) -> list[str]:
  rows = np.flatnonzero(data.train_labels == c)
  return [data.train_captions[row] for row in rows if data.train_captions[row]]


def _prompts(experiment: Experiment) -> list[list[str]]:
  """Of every class."""
  data, config = experiment.dataset, experiment.config.text_to_image.prompts
  named = [prompts.from_name(config, name) for name in data.class_names]
  if config.source == "names":
    return named
  features = real_features(experiment, part_of(experiment, "final"), 0)
  captions, found = data.train_captions, []
  for c, of_name in enumerate(named):
    rows = np.flatnonzero(data.train_labels == c)
    own = prompts.typical_captions(features[rows], [captions[i] for i in rows], config.per_class)
    found.append(own or of_name)
  return found


def folder(experiment: Experiment) -> pathlib.Path:
  return experiment.workdir.folder("text_to_image")


def ask(experiment: Experiment) -> dict:
  """Draws images of the classes that lack some in any run; those that are there are kept."""
  config, shape = experiment.config.text_to_image, experiment.dataset.train_images.shape[1:]
  progress = experiment.run.progress
  lacking = np.concatenate([wanted(experiment, part) for part in parts(experiment)]).max(axis=0)
  numbers = np.ceil(experiment.config.pool.surplus * lacking).astype(int)
  labels, said = np.repeat(np.arange(len(numbers)), numbers), _prompts(experiment)
  backend, work = None, list(chunks(labels, _FILE))
  progress.start_stage(0)
  for number, chunk in enumerate(work, 1):
    experiment.run.preemption.check("while asking the text-to-image model")
    path = folder(experiment) / f"{chunk.start:06d}.npz"
    if not path.exists():
      if backend is None:
        backend = backends.load(config)
        _name_long(experiment, backend, said)
      texts = [
        said[c][turn % len(said[c])] for c, turn in zip(chunk.labels, chunk.turns, strict=True)
      ]
      seeds = config.seed + chunk.start + np.arange(len(texts))
      images = backend.generate(texts, config.negative, seeds.tolist(), config.guidance)
      arrays = {"images": _fitting(images, shape)}
      arrays |= {"labels": chunk.labels.astype(np.int32), "prompt": np.array(texts)}
      save(path, arrays | {"seed": seeds})
    progress.step("asking the text-to-image model", number, len(work), {})
  return {"images": len(labels)}


def _name_long(
  experiment: Experiment, backend: backends.Backend, said: Sequence[Sequence[str]]
) -> None:
  every = list(dict.fromkeys(text for of_class in said for text in of_class))
  if cut := backend.too_long(every):
    experiment.run.progress.say(
      f"{len(cut)} prompts are longer than the text-to-image model reads, so that their ends do not"
      f" count; the first begins {cut[0][:60]!r}"
    )


def _fitting(images: np.ndarray, shape: Sequence[int]) -> np.ndarray:
  """Images [n, S, S, 3] as large as those of the data set, and grey if they are."""
  side, _, channels = shape
  resized = [Image.fromarray(resize_and_crop(Image.fromarray(image), side)) for image in images]
  mode = "L" if channels == 1 else "RGB"
  return np.stack([np.asarray(image.convert(mode)).reshape(shape) for image in resized])


def learned_from(experiment: Experiment) -> np.ndarray:
  """Training images that the prompts tell of, by number."""
  if experiment.config.text_to_image.prompts.source == "names":
    return np.zeros(0, int)
  return np.arange(len(experiment.dataset.train_labels))
