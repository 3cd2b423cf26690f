"""Captions and prompts of runs with a U-Net that reads them.

captions   captions of the training images -> their embeddings   captions/embeddings.npz
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_pipeline.dataset import LongTailDataset
from memdiff.errors import ConfigError
from memdiff.evaluation import caption_match
from memdiff.experiments.base import Experiment, Phase
from memdiff.runtime.workdir import read_arrays, write_arrays
from memdiff.synthesis import image_methods, pixel_tuning
from memdiff.synthesis.pixel_text import PixelTextConfig
from memdiff.synthesis.text_to_image import caption_map, prompts, sentences
from memdiff.synthesis.text_to_image.prompts import PromptConfig, Prompts

if TYPE_CHECKING:
  from matplotlib.figure import Figure


def _text_of(settings: Any) -> PixelTextConfig | None:
  return image_methods.text_of(settings.methods, settings.diffusion)


def reads_text(settings: Any) -> bool:
  """Whether any method reads captions."""
  return _text_of(settings) is not None


def _prompt_configs(settings: Any) -> list[PromptConfig]:
  """Of the methods that are told prompts."""
  return [
    image_methods.apply_drawing(method, settings.sampling).prompts
    for method in settings.methods
    if image_methods.apply(method, settings.diffusion).text.is_read
  ]


def check(settings: Any, data: LongTailDataset) -> None:
  """Raises MemdiffError if the encoder is not there, or a class lacks words that are needed."""
  text = _text_of(settings)
  if text is None:
    return
  encoder = _encoder(text.encoder, text.weights)
  texts = captions_of(data, settings.sampling.prompts)
  for config in _prompt_configs(settings):
    if config.source == "names":
      texts += [text for name in data.class_names for text in prompts.from_name(config, name)]
  if isinstance(encoder, sentences.Table):
    encoder.embed(texts)


def check_without_classifier(settings: Any, data: LongTailDataset) -> None:
  """Raises ConfigError if something is to come from features, but no classifier makes them."""
  del data
  if not reads_text(settings):
    for method in settings.methods:
      if image_methods.apply_drawing(method, settings.sampling).guide.needs_negative:
        raise ConfigError(
          f"{method} leads away from the class that is most alike, which captions tell, or a"
          " classifier of the long-tailed images; add prompted, or take a config of"
          " configs/augmented."
        )
  for method in settings.methods:
    if image_methods.apply_drawing(method, settings.sampling).seeds.iterations:
      raise ConfigError(
        f"{method} chooses noise by the features of a classifier of the long-tailed images, which"
        " this kind of experiment does not train; take a config of configs/augmented."
      )
  if any(config.source == "mapped" for config in _prompt_configs(settings)):
    raise ConfigError(
      "Prompts by_map come from the features of a classifier of the long-tailed images, which this"
      " kind of experiment does not train; take by_caption or by_name, or a config of"
      " configs/augmented."
    )


def _own_captions(data: LongTailDataset) -> tuple[str, ...]:
  return data.train_captions or ("",) * len(data.train_labels)


def captions_of(data: LongTailDataset, config: PromptConfig) -> list[str]:
  """Of the training images; one that has none is told by the name of its class. N texts.

  Raises:
    ConfigError: if that is no name in words.
  """
  return [
    caption or prompts.from_name(config, data.class_names[c])[0]
    for caption, c in zip(_own_captions(data), data.train_labels, strict=True)
  ]


@functools.lru_cache(maxsize=1)
def _encoder(name: str, path: str) -> sentences.Encoder:
  return sentences.load(name, path)


def _embed(experiment: Experiment, texts: Sequence[str], what: str) -> np.ndarray:
  """Embeddings [n, D]; says so if the encoder does not read a text to its end."""
  text = _text_of(experiment.config)
  encoder = _encoder(text.encoder, text.weights)
  if cut := encoder.too_long(list(dict.fromkeys(texts))):
    experiment.run.progress.say(
      f"{len(cut)} {what} are longer than the sentence encoder reads, so that their ends do not"
      f" count; the first begins {cut[0][:60]!r}"
    )
  return sentences.embed(encoder, texts)


def _path(experiment: Experiment):
  return experiment.workdir.folder("captions") / "embeddings.npz"


def embed_captions(experiment: Experiment) -> dict:
  """Writes what the captions of the training images are to the denoiser."""
  data, config = experiment.dataset, experiment.config.sampling.prompts
  texts = captions_of(data, config)
  told = [text for text, own in zip(texts, _own_captions(data), strict=True) if not own]
  if told:
    experiment.run.progress.say(
      f"{len(told):,} of {len(texts):,} training images have no caption; they are told by the name"
      f" of their class, as {told[0]!r}"
    )
  vectors = _embed(experiment, texts, "captions")
  write_arrays(_path(experiment), {"vectors": vectors})
  return {"captions": len(set(texts))}


def caption_vectors(experiment: Experiment) -> np.ndarray | None:
  """[N, D] of the training images; None if no method reads captions."""
  if not reads_text(experiment.config):
    return None
  return read_arrays(_path(experiment), ("vectors",))["vectors"]


def make_prompts(
  experiment: Experiment,
  method: str,
  rows: np.ndarray,
  features: Callable[[], np.ndarray] | None = None,
) -> Prompts | None:
  """What a method's U-Net is told of every class; None if it reads nothing.

  Args:
    experiment: the experiment.
    method: by name.
    rows: [n] the training images that the run knows.
    features: of a classifier that has seen no others -> [n, D] of these; None: captions are
      typical if their own embeddings are.
  """
  settings, data = experiment.config, experiment.dataset
  if not image_methods.apply(method, settings.diffusion).text.is_read:
    return None
  config = image_methods.apply_drawing(method, settings.sampling).prompts
  if config.source == "names":
    return _embedded(experiment, [prompts.from_name(config, name) for name in data.class_names])
  captions = np.array(captions_of(data, config))[rows].tolist()
  vectors, labels = caption_vectors(experiment)[rows], data.train_labels[rows]
  space = features() if features else vectors
  members = [np.flatnonzero(labels == c) for c in range(data.num_classes)]
  if config.source == "captions":
    texts = [
      prompts.typical_captions(space[of_class], [captions[i] for i in of_class], config.per_class)
      for of_class in members
    ]
    return _embedded(experiment, texts)
  mapped = caption_map.fit(space, vectors, captions)
  soft = [mapped.soft(_typical(space[of_class], config.per_class)) for of_class in members]
  return Prompts([mapped.words(of_class) for of_class in soft], soft)


def learned_prompts(experiment: Experiment, params: Any, rows: np.ndarray) -> Prompts | None:
  """The sentences that a U-Net learned, each shown as the nearest caption; None: it learned none.

  Args:
    experiment: the experiment.
    params: of the U-Net.
    rows: [n] the training images that the run knows.
  """
  if pixel_tuning.SENTENCES not in params:
    return None
  learned = np.asarray(params[pixel_tuning.SENTENCES])
  captions = captions_of(experiment.dataset, experiment.config.sampling.prompts)
  nearest = rows[(learned @ caption_vectors(experiment)[rows].T).argmax(axis=1)]
  return Prompts([[captions[i]] for i in nearest], learned[:, None])


def _typical(features: np.ndarray, number: int) -> np.ndarray:
  """The mean of a class's features [n, D], and those nearest to it: `number` rows at most."""
  nearest = features[prompts.by_typicality(features)][: number - 1]
  return np.concatenate([features.mean(axis=0, keepdims=True), nearest])


def _embedded(experiment: Experiment, texts: Sequence[Sequence[str]]) -> Prompts:
  """Prompts of the classes, as sentences."""
  every = [text for of_class in texts for text in of_class]
  ends = np.cumsum([len(of_class) for of_class in texts])[:-1]
  return Prompts(texts, np.split(_embed(experiment, every, "prompts"), ends))


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionJudge:
  """Tells whether images show what they were asked for, by a map learned from real images.

  Attributes:
    experiment: whose encoder embeds captions.
    mapped: from a network's features to sentences.
  """

  experiment: Experiment
  mapped: caption_map.CaptionMap

  def hits(self, features: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """Whether images [n, D] lie nearer to their own captions, n texts, than to 99 others. [n]."""
    own = _embed(self.experiment, captions.tolist(), "prompts")
    return caption_match.own_is_nearest(self.mapped.soft(features), own, self.mapped.vectors)


def learn_captions(experiment: Experiment, features: np.ndarray) -> CaptionJudge:
  """From features [N, D] of the training images."""
  captions = captions_of(experiment.dataset, experiment.config.sampling.prompts)
  vectors = caption_vectors(experiment)
  return CaptionJudge(experiment, caption_map.fit(features, vectors, captions))


def draw_sheet(experiment: Experiment, method: str, drawn: Mapping[str, np.ndarray]) -> "Figure":
  """Generated images of some classes, from common to rare, each over its prompt."""
  from memdiff.evaluation import plots  # matplotlib takes a second

  data, labels = experiment.dataset, drawn["labels"]
  shown = [c for c in plots.shown_classes(data.train_counts) if (labels == c).any()]
  return plots.prompt_sheet(
    f"{method}: images and their prompts",
    [f"{data.class_names[c]} ({data.train_counts[c]:,})" for c in shown],
    [(drawn["images"][labels == c], drawn["prompt"][labels == c].tolist()) for c in shown],
  )


EMBED_CAPTIONS = Phase(
  "captions",
  "reading the captions of the training images",
  embed_captions,
  (
    "dataset",
    "methods",
    "diffusion.text",
    "sampling.prompts.templates",
    "sampling.prompts.contexts",
  ),
  reads_text,
)
