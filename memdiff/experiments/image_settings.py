"""Settings of experiments that generate images, and whether settings and data fit each other."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from input_pipeline.dataset import DatasetConfig, LongTailDataset, uncut
from memdiff.classifier.encoder import EncoderConfig
from memdiff.classifier.encoder_training import ClassifierConfig
from memdiff.config import Allowed, at_least, one_of, path_setting, setting
from memdiff.diffusion import guidance, unet
from memdiff.errors import ConfigError
from memdiff.evaluation import clip_score, networks
from memdiff.experiments.base import check_classifier, check_seeds, seeds_field
from memdiff.runtime.stage import ExecutionConfig, LoopConfig
from memdiff.synthesis import image_methods
from memdiff.synthesis.pixel_settings import PixelDiffusionConfig, SamplingConfig
from memdiff.synthesis.text_to_image import prompts

CLASSIFIER = "classifier"
NETWORKS = (CLASSIFIER, *networks.NETWORKS)
REFERENCES = ("train", "test")
_WIDE = 5  # neighbours of density and coverage


def methods_field(*, needed: bool = True) -> Any:
  return setting(
    ("ddpm",),
    "trained and compared; several joined by + are one method",
    Allowed(
      lambda names: (
        (len(names) > 0 or not needed)
        and len(set(names)) == len(names)
        and all(map(image_methods.is_known, names))
      ),
      lambda: "distinct names out of " + ", ".join(image_methods.METHODS) + ", or such joined by +",
    ),
  )


@dataclasses.dataclass(frozen=True)
class ImageEvaluationConfig:
  network: str = setting(
    CLASSIFIER,
    "whose features judge; classifier: one trained here on all real images",
    one_of(NETWORKS),
  )
  weights: str = path_setting('a network from elsewhere: its file, "": of its installed package')
  side: int = setting(
    0,
    "a network from elsewhere: pixels that images are resized to, 0: its own",
    Allowed(lambda side: side == 0 or side >= 32, lambda: "0 or at least 32"),
  )
  clip: str = path_setting('a CLIP as KerasHub saves it, whose score is added; "": none')
  reference: str = setting(
    "train", "real images: of the training set with what was left out, or the test set",
    one_of(REFERENCES),
  )  # fmt: skip
  kid_size: int = setting(1000, "images of a subset of the kernel distance", at_least(2))
  neighbours: int = setting(3, "of precision and recall", at_least(1))


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
  """Everything that decides a run's results."""

  experiment: str = setting("images", "the kind of experiment", one_of(("images",)))
  name: str = setting("images", "of the run, for its report")
  seeds: tuple[int, ...] = seeds_field()
  dataset: DatasetConfig = setting(DatasetConfig(), "images, and how they are cut to a long tail")
  methods: tuple[str, ...] = methods_field()
  diffusion: PixelDiffusionConfig = setting(PixelDiffusionConfig(), "the training of DDPM")
  sampling: SamplingConfig = setting(SamplingConfig(), "how images are drawn")
  encoder: EncoderConfig = setting(EncoderConfig(), "the classifier that judges, its network")
  classifier: ClassifierConfig = setting(ClassifierConfig(), "how the classifier is trained")
  evaluation: ImageEvaluationConfig = setting(ImageEvaluationConfig(), "how images are judged")
  loop: LoopConfig = setting(LoopConfig(), "records and checkpoints")
  execution: ExecutionConfig = setting(
    ExecutionConfig(), "how the run is executed; may change when it is resumed"
  )

  def __post_init__(self):
    check_seeds(self.seeds)

  @property
  def input_files(self) -> dict[str, str]:
    """Files that the run reads beside its data: what they are, and where."""
    text = image_methods.text_of(self.methods, self.diffusion)
    files = {"clip": self.evaluation.clip} if self.evaluation.clip else {}
    return files | (text.input_files if text else {})


def check(settings: ImagesConfig, data: LongTailDataset) -> None:
  """Raises MemdiffError if settings do not fit each other or the data."""
  check_unet(settings, data)
  check_guidance(settings, settings.sampling.guidance, "sampling.guidance")
  _check_evaluation(settings, data)


def check_unet(settings: Any, data: LongTailDataset) -> None:
  """Raises ConfigError if the U-Net or its sampler does not fit the images or each other."""
  height, width = data.train_images.shape[1:3]
  if height != width:
    raise ConfigError(f"The images are {height} x {width} pixels, but the U-Net takes squares.")
  try:
    unet.check_side(settings.diffusion.unet, height)
  except ValueError as error:
    raise ConfigError(f"config.diffusion.unet: {error}") from None
  if settings.sampling.num_steps > settings.diffusion.schedule.num_steps:
    raise ConfigError(
      f"config.sampling.num_steps is {settings.sampling.num_steps}, but the diffusion has only"
      f" {settings.diffusion.schedule.num_steps} steps."
    )


def check_guidance(settings: Any, scales: Sequence[float], name: str) -> None:
  """Raises ConfigError if a method would only change the guidance, but there is none."""
  for method in settings.methods:
    guide = image_methods.apply_drawing(method, settings.sampling).guide
    if guide.kind == guidance.NEGATIVE and all(scale == 1 for scale in scales):
      raise ConfigError(
        f"{method} changes what guidance leads away from, but config.{name} is 1, which is none;"
        " raise it, for example to 2."
      )


def _check_evaluation(settings: ImagesConfig, data: LongTailDataset) -> None:
  config, generated = settings.evaluation, settings.sampling.per_class * data.num_classes
  if config.network == CLASSIFIER:
    check_classifier(settings, uncut(data))
  else:
    networks.checked_side(config.network, config.side, "config.evaluation.side")
    networks.NETWORKS[config.network].weights_path(config.weights)
  if config.clip:
    clip_score.check(config.clip)
    for name in data.class_names:
      prompts.words_of(name)
  if data.train_images.shape[-1] not in (1, 3):
    raise ConfigError(
      f"The images have {data.train_images.shape[-1]} channels, but only grey and colour can be"
      " judged."
    )
  real = len(data.test_labels)
  if config.reference == "train":
    real = len(data.train_labels) + len(data.holdout_labels) + len(data.left_out_labels)
  smaller, most = min(generated, real), max(config.neighbours, _WIDE)
  words = f"there are {generated} generated and {real} real images"
  if config.kid_size > smaller:
    raise ConfigError(
      f"config.evaluation.kid_size is {config.kid_size}, but {words}; lower it, or raise"
      " config.sampling.per_class."
    )
  if most >= smaller:
    raise ConfigError(
      f"Precision and coverage look at {most} neighbours, but {words}; raise"
      " config.sampling.per_class or lower config.evaluation.neighbours."
    )
  if smaller < 20:
    raise ConfigError(
      f"F_8 needs 20 images on a side, but {words}; raise config.sampling.per_class."
    )
