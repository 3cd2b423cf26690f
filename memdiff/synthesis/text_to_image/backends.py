"""Text-to-image models of other libraries: prompts -> images, each decided by its own seed."""

import dataclasses
import pathlib
from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

import numpy as np

from memdiff.config import Allowed, at_least, one_of, path_setting, setting
from memdiff.errors import DataError
from memdiff.runtime.stage import Run
from memdiff.synthesis.text_to_image.prompts import PromptConfig
from memdiff.synthesis.text_to_image.tuning import Examples, TuningConfig

DTYPES = ("float32", "bfloat16")
FEWER = (
  "The text-to-image model needs more memory than there is for {} images at a time; lower"
  " config.text_to_image.batch_size or side."
)


class Backend(Protocol):
  """A model in memory."""

  def generate(
    self, prompts: Sequence[str], negative: str, seeds: Sequence[int], guidance: float
  ) -> np.ndarray:
    """Images of `prompts`, one each; what an image is does not depend on the others.

    Args:
      prompts: n of them.
      negative: what no image is to show; "": nothing.
      seeds: n whole numbers from 0, of the noise.
      guidance: scale of the guidance; 1: none.

    Returns:
      [n, S, S, 3] uint8.
    """

  def too_long(self, prompts: Sequence[str]) -> list[str]:
    """Prompts of which only the beginning is read."""


class TunableBackend(Backend, Protocol):
  """One that can be tuned on real images."""

  def tune(
    self,
    config: TuningConfig,
    real: Examples,
    prior: Examples | None,
    run: Run,
    folder: pathlib.Path,
  ) -> None:
    """Trains what `config` adds to the model, or reads what was trained in `folder` before."""

  def words(self, number: int, avoid: Sequence[str]) -> list[str]:
    """Rare words, each a token of its own, that no text in `avoid` has.

    Raises:
      ConfigError: if there are fewer than `number`.
    """


@dataclasses.dataclass(frozen=True)
class TextToImageConfig:
  """A model that was trained elsewhere, and what it is asked for."""

  model: str = path_setting('its folder, as KerasHub or diffusers saves it; "": none')
  side: int = setting(
    0,
    "pixels that it draws, before images are resized to those of the data set; 0: its own",
    Allowed(lambda side: side >= 0 and side % 8 == 0, lambda: "0 or a multiple of 8"),
  )
  dtype: str = setting("bfloat16", "of its weights and computation", one_of(DTYPES))
  prompts: PromptConfig = setting(PromptConfig(source="names"), "what is said of the classes")
  tuning: TuningConfig = setting(TuningConfig(), "how it is tuned on the real images, if at all")
  negative: str = setting("", "what no image is to show; a sentence")
  num_steps: int = setting(28, "steps of its sampler", at_least(1))
  guidance: float = setting(7.0, "scale of its guidance; 1: none", at_least(1))
  batch_size: int = setting(4, "images at a time; fewer need less memory", at_least(1))
  seed: int = setting(0, "of the noise", at_least(0))

  @property
  def knows_no_image(self) -> bool:
    """Whether nothing of the training images is in what it draws."""
    return self.prompts.source == "names" and not self.tuning.is_on


def check(config: TextToImageConfig) -> None:
  """Whether a model can be loaded, as far as that is seen without reading it.

  Raises:
    ConfigError: if its library is not installed, or cannot tune it here.
    DataError: if there is no model.
  """
  _library(config).check(config)


def load(config: TextToImageConfig) -> Backend:
  """The model of a config, by the library that its folder is of; a tunable one if it is tuned.

  Raises:
    ConfigError: as `check`.
    DataError: as `check`, or if the model cannot be read.
  """
  check(config)
  return _library(config).load(config)


def _library(config: TextToImageConfig) -> ModuleType:
  """The module of the library that a model is of."""
  from memdiff.synthesis.text_to_image import diffusers_backend, keras_hub_backend

  folder = pathlib.Path(config.model)
  for module in (keras_hub_backend, diffusers_backend):
    if (folder / module.MARK).is_file():
      return module
  raise DataError(
    f"config.text_to_image.model is {config.model}, which holds no {keras_hub_backend.MARK} of"
    f" KerasHub and no {diffusers_backend.MARK} of diffusers; save a model into a folder by either,"
    " and give that. Models under a licence have to be accepted where they are published first."
  )
