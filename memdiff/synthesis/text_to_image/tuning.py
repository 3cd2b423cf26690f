"""Personalisation: how a text-to-image model is tuned on the real images of a data set."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from memdiff.config import at_least, one_of, setting
from memdiff.runtime.train_state import OptimizerConfig

NONE, INVERSION = "none", "textual_inversion"
NAMED = ("dreambooth", "custom_diffusion", INVERSION)  # prompts name each class by a rare word
METHODS = (NONE, "lora", *NAMED)


@dataclasses.dataclass(frozen=True)
class TuningConfig:
  """What of the model is trained, and how.

  lora (Hu et al. 2022): low-rank matrices beside the attention of the diffuser.
  dreambooth (Ruiz et al. 2023): the whole diffuser; each class is named by a rare word.
  custom_diffusion (Kumari et al. 2023): keys and values of the text in the diffuser, and the words.
  textual_inversion (Gal et al. 2023): the words alone, which begin as the names of the classes.

  All but the last can draw, beside the real images, on ones that the model drew before, so that it
  keeps what it knows (the prior preservation of DreamBooth).
  """

  method: str = setting(NONE, "of tuning", one_of(METHODS))
  rank: int = setting(4, "lora: of the matrices", at_least(1))
  num_steps: int = setting(500, "training steps", at_least(1))
  batch_size: int = setting(2, "real images in a step, each class as often as any", at_least(1))
  optimizer: OptimizerConfig = setting(
    OptimizerConfig(
      name="adamw", learning_rate=1e-4, schedule="constant", milestones=(), factors=(),
      weight_decay=1e-2, warmup=0.05, clip_norm=1.0,
    ),
    "of what is trained",
  )  # fmt: skip
  prior_weight: float = setting(
    1.0, "of images that the model drew before, but for textual_inversion; 0: none", at_least(0)
  )
  prior_images: int = setting(8, "of each class that are drawn for that", at_least(1))

  @property
  def is_on(self) -> bool:
    return self.method != NONE

  @property
  def needs_words(self) -> bool:
    return self.method in NAMED

  @property
  def needs_prior(self) -> bool:
    return self.method not in (NONE, INVERSION) and self.prior_weight > 0


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
  """Images and what is said of them.

  Attributes:
    images: uint8 [N, S, S, 3] of any size; the model resizes them to its own.
    labels: [N] classes.
    prompts: N texts.
    words: {word: name of its class} of rare words in prompts.
  """

  images: np.ndarray
  labels: np.ndarray
  prompts: Sequence[str]
  words: Mapping[str, str] = dataclasses.field(default_factory=dict)
