"""Personalisation: how a text-to-image model is tuned on the real images of a data set."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from memdiff.config import at_least, setting
from memdiff.runtime.train_state import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TuningConfig:
  """LoRA (Hu et al. 2022) with the prior preservation of DreamBooth (Ruiz et al. 2023)."""

  rank: int = setting(
    0, "of the matrices added to the attention of the diffuser; 0: it stays as it is", at_least(0)
  )
  num_steps: int = setting(500, "training steps", at_least(1))
  batch_size: int = setting(2, "real images in a step, each class as often as any", at_least(1))
  optimizer: OptimizerConfig = setting(
    OptimizerConfig(
      name="adamw", learning_rate=1e-4, schedule="constant", milestones=(), factors=(),
      weight_decay=1e-2, warmup=0.05, clip_norm=1.0,
    ),
    "of these matrices",
  )  # fmt: skip
  prior_weight: float = setting(
    1.0, "of images that the model drew before; it keeps what it knows. 0: none", at_least(0)
  )
  prior_images: int = setting(8, "of each class that are drawn for that", at_least(1))


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
  """Images and what is said of them.

  Attributes:
    images: uint8 [N, S, S, 3] of any size; the model resizes them to its own.
    labels: [N] classes.
    prompts: N texts.
  """

  images: np.ndarray
  labels: np.ndarray
  prompts: Sequence[str]
