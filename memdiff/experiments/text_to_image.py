"""Images by a text-to-image model that was trained elsewhere, for runs that train on them.

text_to_image   names of classes, or captions -> images, as many as any run lacks   *.npz
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from input_pipeline.dataset import LongTailDataset
from input_pipeline.lazy_images import resize_and_crop
from memdiff.errors import ConfigError
from memdiff.experiments import prompting
from memdiff.experiments.augmented_critic import real_features
from memdiff.experiments.augmented_runs import members, part_of, parts, save, wanted
from memdiff.experiments.augmented_settings import AugmentedConfig
from memdiff.experiments.base import Experiment
from memdiff.experiments.drawer import Chunk, chunks
from memdiff.runtime.workdir import read_arrays
from memdiff.synthesis.text_to_image import backends, prompts, tuning
from memdiff.synthesis.text_to_image.tuning import Examples

_FILE = 32  # images in a file: what an interruption costs at most


def check(settings: AugmentedConfig, data: LongTailDataset) -> None:
  """Raises MemdiffError if there is no model, or not what is to be said of the classes."""
  if not settings.text_to_image.model:
    return
  backends.check(settings.text_to_image)
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
  if config.source != "names" and settings.text_to_image.tuning.needs_words:
    raise ConfigError(
      f"config.text_to_image.tuning.method is {settings.text_to_image.tuning.method}, which names"
      " classes by words of their own, but config.text_to_image.prompts.source is captions; take"
      " names, or lora."
    )
  by_name = config.source == "names" or settings.text_to_image.tuning.needs_prior
  for c, name in enumerate(data.class_names):
    if by_name or not _captions_of(data, c):
      prompts.words_of(name)


def _captions_of(data: LongTailDataset, c: int) -> list[str]:
  rows = np.flatnonzero(data.train_labels == c)
  return [data.train_captions[row] for row in rows if data.train_captions[row]]


def _words(experiment: Experiment, backend: backends.TunableBackend) -> list[str]:
  """By which a tuned model knows the classes, one of each; none if it knows them by name."""
  data, config = experiment.dataset, experiment.config.text_to_image
  if not config.tuning.needs_words:
    return []
  texts = [*config.prompts.templates, *config.prompts.contexts]
  avoid = [*texts, *map(prompts.words_of, data.class_names)]
  return backend.words(data.num_classes, avoid)


def _called(experiment: Experiment, words: Sequence[str]) -> list[str]:
  """What every class is called in prompts."""
  names = experiment.dataset.class_names
  if not words:
    return list(names)
  if experiment.config.text_to_image.tuning.method == tuning.INVERSION:
    return list(words)
  return [f"{word} {name}" for word, name in zip(words, names, strict=True)]


def _prompts(experiment: Experiment, words: Sequence[str]) -> list[list[str]]:
  """Of every class."""
  data, config = experiment.dataset, experiment.config.text_to_image.prompts
  called = _called(experiment, words)
  if config.source == "names":
    return [prompts.from_name(config, name) for name in called]
  features = real_features(members(experiment, part_of(experiment, "final"))[0])
  captions, found = data.train_captions, []
  for c, name in enumerate(called):
    rows = np.flatnonzero(data.train_labels == c)
    own = prompts.typical_captions(features[rows], [captions[i] for i in rows], config.per_class)
    found.append(own or prompts.from_name(config, name))
  return found


def folder(experiment: Experiment) -> pathlib.Path:
  return experiment.workdir.folder("text_to_image")


def ask(experiment: Experiment) -> dict:
  """Draws images of the classes that lack some in any run; those that are there are kept."""
  config, shape = experiment.config.text_to_image, experiment.dataset.train_images.shape[1:]
  progress = experiment.run.progress
  lacking = np.concatenate([wanted(experiment, part) for part in parts(experiment)]).max(axis=0)
  numbers = np.ceil(experiment.config.pool.surplus * lacking).astype(int)
  labels = np.repeat(np.arange(len(numbers)), numbers)
  asked, work = None, list(chunks(labels, _FILE))
  progress.start_stage(0)
  for number, chunk in enumerate(work, 1):
    experiment.run.preemption.check("while asking the text-to-image model")
    path = folder(experiment) / f"{chunk.start:06d}.npz"
    if not path.exists():
      backend, said = asked = asked or _ready(experiment)
      texts = _said_of(said, chunk)
      seeds = config.seed + chunk.start + np.arange(len(texts))
      images = backend.generate(texts, config.negative, seeds.tolist(), config.guidance)
      arrays = {"images": _fitting(images, shape)}
      arrays |= {"labels": chunk.labels.astype(np.int32), "prompt": np.array(texts)}
      save(path, arrays | {"seed": seeds})
    progress.step("asking the text-to-image model", number, len(work), {})
  return {"images": len(labels)}


def _ready(experiment: Experiment) -> tuple[backends.Backend, list[list[str]]]:
  """(the model, tuned if that is asked for, prompts of every class)."""
  config = experiment.config.text_to_image
  backend = backends.load(config)
  words = _words(experiment, backend)
  said = _prompts(experiment, words)
  _name_long(experiment, backend, said)
  if config.tuning.is_on:
    run = dataclasses.replace(experiment.run, seeds=experiment.seeds[:1])
    place = folder(experiment) / "tuning"
    real, prior = _real_examples(experiment, words, said), None
    if config.tuning.needs_prior:
      prior = _prior_examples(experiment, backend, place / "prior.npz")
    backend.tune(config.tuning, real, prior, run, place)
  return backend, said


def _real_examples(
  experiment: Experiment, words: Sequence[str], said: Sequence[Sequence[str]]
) -> Examples:
  """The training images with their captions, or with what their classes are called."""
  data, config = experiment.dataset, experiment.config.text_to_image.prompts
  images = np.broadcast_to(data.train_images, (*data.train_images.shape[:3], 3))
  if not words:
    return Examples(images, data.train_labels, prompting.captions_of(data, config))
  every = next(chunks(data.train_labels, len(images)))
  names = map(prompts.words_of, data.class_names)
  return Examples(
    images, data.train_labels, _said_of(said, every), dict(zip(words, names, strict=True))
  )


def _said_of(said: Sequence[Sequence[str]], chunk: Chunk) -> list[str]:
  """The prompts of a class come in turn."""
  return [said[c][turn % len(said[c])] for c, turn in zip(chunk.labels, chunk.turns, strict=True)]


def _prior_examples(
  experiment: Experiment, backend: backends.Backend, path: pathlib.Path
) -> Examples:
  """What the model draws of every class before it is tuned; kept in a file."""
  data, config = experiment.dataset, experiment.config.text_to_image
  labels = np.repeat(np.arange(data.num_classes), config.tuning.prior_images)
  texts = [prompts.from_name(config.prompts, data.class_names[c])[0] for c in labels]
  if not path.exists():
    experiment.run.progress.say(f"drawing {len(labels):,} images that keep what the model knows")
    seeds = (config.seed + np.arange(len(labels))).tolist()
    images = backend.generate(texts, config.negative, seeds, config.guidance)
    save(path, {"images": images})
  return Examples(read_arrays(path, ("images",))["images"], labels, texts)


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
  """Training images that the model or its prompts know, by number."""
  if experiment.config.text_to_image.knows_no_image:
    return np.zeros(0, int)
  return np.arange(len(experiment.dataset.train_labels))
