"""Text-to-image models of other libraries: prompts -> images, each decided by its own seed."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from memdiff.config import Allowed, at_least, one_of, path_setting, setting
from memdiff.runtime.stage import Run
from memdiff.synthesis.text_to_image.prompts import PromptConfig
from memdiff.synthesis.text_to_image.tuning import Examples, TuningConfig

DTYPES = ("float32", "bfloat16")


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

  def too_long(self, prompts: Sequence[str]) -> list[str]:
    """Prompts of which only the beginning is read."""


@dataclasses.dataclass(frozen=True)
class TextToImageConfig:
  """A model that was trained elsewhere, and what it is asked for."""

  model: str = path_setting('its folder, as KerasHub saves Stable Diffusion 3; "": none')
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


def load(config: TextToImageConfig) -> Backend:
  """The model of a config, by KerasHub.

  Raises:
    ConfigError: if its library is not installed.
    DataError: if the model cannot be read.
  """
  from memdiff.synthesis.text_to_image import keras_hub_backend  # its library takes seconds

  return keras_hub_backend.load(config)
