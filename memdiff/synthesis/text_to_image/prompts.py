"""Prompts of classes: from their names, or from captions of the images that are most typical."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from memdiff.config import Allowed, at_least, one_of, setting
from memdiff.errors import ConfigError

SOURCES = {
  "names": "templates with the name of the class",
  "captions": "captions of the training images nearest to the prototype of the class",
  "mapped": "the prototype and such images, mapped from features to sentences",
}
CLASS, CONTEXT = "{class}", "{context}"


@dataclasses.dataclass(frozen=True)
class PromptConfig:
  source: str = setting("captions", "what prompts are made from", one_of(SOURCES))
  templates: tuple[str, ...] = setting(
    (f"a photo of a {CLASS}",),
    f"names: the prompts, with {CLASS} in each, {CONTEXT} perhaps",
    Allowed(
      lambda texts: len(texts) > 0 and all(CLASS in text for text in texts),
      lambda: f"texts with {CLASS} in each",
    ),
  )
  contexts: tuple[str, ...] = setting(
    ("",), f"names: what stands for {CONTEXT}", Allowed(len, lambda: "one text at least")
  )
  per_class: int = setting(8, "prompts of a class, at most", at_least(1))

  def __post_init__(self):
    if any(self.contexts) and not any(CONTEXT in text for text in self.templates):
      raise ValueError(
        f"contexts is {self.contexts}, but no template has {CONTEXT} in it; add it to one."
      )


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
  """What is said of every class.

  Attributes:
    texts: P_c prompts of each of C classes.
    vectors: [P_c, D] of each class, what the denoiser is told.
  """

  texts: Sequence[Sequence[str]]
  vectors: Sequence[np.ndarray]

  def of(self, labels: np.ndarray, turns: np.ndarray) -> tuple[list[str], np.ndarray]:
    """(n texts, vectors [n, D]) of images; the first image of a class gets its first prompt, ...

    Args:
      labels: [n] classes.
      turns: [n] how many images of its class come before each.
    """
    chosen = [(c, turn % len(self.texts[c])) for c, turn in zip(labels, turns, strict=True)]
    return [self.texts[c][i] for c, i in chosen], np.stack([self.vectors[c][i] for c, i in chosen])


def words_of(class_name: str) -> str:
  """The name of a class as it stands in a sentence.

  Raises:
    ConfigError: if there is no letter in it.
  """
  words = " ".join(class_name.replace("_", " ").replace("-", " ").split())
  if not any(letter.isalpha() for letter in words):
    raise ConfigError(
      f"The class {class_name!r} has no name in words, which prompts need; rename its folder, or"
      " give every image of it a caption."
    )
  return words


def from_name(config: PromptConfig, class_name: str) -> list[str]:
  """Every template with every context, each once; the first ones differ in both."""
  words = words_of(class_name)
  templates, contexts = config.templates, config.contexts
  found = []
  for turn, number in itertools.product(range(len(contexts)), range(len(templates))):
    context = contexts[(turn + number) % len(contexts)]
    prompt = templates[number].replace(CLASS, words).replace(CONTEXT, context)
    found.append(" ".join(prompt.split()))
  return list(dict.fromkeys(found))[: config.per_class]


def by_typicality(features: np.ndarray) -> np.ndarray:
  """Rows of one class [n, D], those nearest to their mean first. [n] indices."""
  distances = np.linalg.norm(features - features.mean(axis=0, keepdims=True), axis=1)
  return np.argsort(distances, kind="stable")


def typical_captions(features: np.ndarray, captions: Sequence[str], number: int) -> list[str]:
  """Captions of the images nearest to the mean of their class, each once.

  Args:
    features: [n, D] of the images of a class.
    captions: n of them, "" for images that have none.
    number: at most.
  """
  ordered = [captions[i] for i in by_typicality(features)]
  return list(dict.fromkeys(caption for caption in ordered if caption))[:number]
