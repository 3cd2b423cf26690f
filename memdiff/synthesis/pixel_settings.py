"""Settings of pixel diffusion: how a U-Net is trained on images of classes, and run backwards."""

import dataclasses

from memdiff.config import at_least, between, each, one_of, setting
from memdiff.diffusion import objectives, terms
from memdiff.diffusion.denoiser_training import TrainingConfig
from memdiff.diffusion.guidance import GuidanceConfig
from memdiff.diffusion.sampler import SAMPLERS
from memdiff.diffusion.schedules import ScheduleConfig
from memdiff.diffusion.seed_select import SeedSelectConfig
from memdiff.diffusion.unet import UNetConfig
from memdiff.runtime.train_state import OptimizerConfig
from memdiff.synthesis.pixel_augmentation import AugmentationConfig
from memdiff.synthesis.pixel_memory import PixelMemoryConfig
from memdiff.synthesis.pixel_text import PixelTextConfig
from memdiff.synthesis.pixel_tuning import PixelTuningConfig
from memdiff.synthesis.text_to_image.prompts import PromptConfig

DROPS = ("image", "batch")


@dataclasses.dataclass(frozen=True)
class PixelDiffusionConfig(TrainingConfig):
  """DDPM as long-tailed image generation trains it; the defaults are CORAL's and CBDM's."""

  schedule: ScheduleConfig = setting(
    ScheduleConfig(name="linear"), "how noise grows over the steps"
  )
  prediction: str = setting("eps", "what the denoiser predicts", one_of(objectives.PREDICTIONS))
  ema_decay: float = setting(0.9999, "of the averaged weights, which sample", between(0, 0.999999))
  num_steps: int = setting(150_000, "training steps", at_least(1))
  optimizer: OptimizerConfig = setting(
    OptimizerConfig(
      name="adamw", learning_rate=2e-4, schedule="constant", milestones=(), factors=(),
      weight_decay=0.0, warmup=0.033, clip_norm=1.0,
    ),
    "of the denoiser; Adam, since nothing decays",
  )  # fmt: skip
  unet: UNetConfig = setting(UNetConfig(), "the network")
  class_exponent: float = setting(
    1.0, "classes are drawn by count^this: 1 as they are, 0 balanced", between(0, 1)
  )
  balanced_last: float = setting(
    0.0, "share of the steps, the last ones, that draw every class equally often", between(0, 1)
  )
  label_dropout: float = setting(0.1, "share of the images without label", between(0, 1))
  dropped_by: str = setting(
    "image", "whose labels are dropped together; batch: as CBDM's and CORAL's code", one_of(DROPS)
  )
  mirror: bool = setting(True, "whether half of the images are flipped left to right")
  augmentation: AugmentationConfig = setting(
    AugmentationConfig(), "ADA: images are changed, and the U-Net is told how"
  )
  memory: PixelMemoryConfig = setting(PixelMemoryConfig(), "memdiff: exemplars as a condition")
  text: PixelTextConfig = setting(PixelTextConfig(), "prompted: captions as a condition")
  tuning: PixelTuningConfig = setting(PixelTuningConfig(), "how it is tuned after it is trained")
  batch_size: int = setting(128, "images", at_least(1))

  def __post_init__(self):
    if terms.uses_reserve(self.objective) and not self.unet.reserve.rank_ratio:
      raise ValueError(
        "objective.capacity is on, but the U-Net has no reserve; set unet.reserve.rank_ratio."
      )


@dataclasses.dataclass(frozen=True)
class SolverConfig:
  """How a trained denoiser is run backwards."""

  sampler: str = setting("dpm++", "the solver of the reverse process", one_of(SAMPLERS))
  num_steps: int = setting(20, "visited steps", at_least(2))
  chunk_size: int = setting(500, "images at a time, and in a file", at_least(1))
  start: float = setting(
    1.0,
    "how far training images of the class are noised to begin with, as a share of the steps; 1:"
    " noise alone (SDEdit)",
    between(0.01, 1),
  )
  guide: GuidanceConfig = setting(GuidanceConfig(), "what guidance leads away from")
  seeds: SeedSelectConfig = setting(SeedSelectConfig(), "noise that is chosen, not only drawn")
  prompts: PromptConfig = setting(PromptConfig(), "prompted: what is said of the classes")

  @property
  def from_images(self) -> bool:
    return self.start < 1


@dataclasses.dataclass(frozen=True)
class SamplingConfig(SolverConfig):
  """How many images are drawn, and how they are guided."""

  guidance: tuple[float, ...] = setting(
    (1.0,),
    "scales of the guidance, 1 + omega; the first is the one of the tables, 1: none",
    each(lambda s: s >= 0, "numbers from 0"),
  )
  per_class: int = setting(1000, "images of every class", at_least(1))
  png: bool = setting(False, "whether every image is written as a .png file too")
