"""Settings of experiments that train classifiers on generated images, and whether they fit."""

import dataclasses
import pathlib

import numpy as np

from input_pipeline.augment import AugmentConfig
from input_pipeline.dataset import DatasetConfig, LongTailDataset
from memdiff.classifier import encoder, heads, losses
from memdiff.classifier.added_images import AddedImagesConfig
from memdiff.classifier.encoder import EncoderConfig
from memdiff.classifier.encoder_training import ClassifierConfig
from memdiff.config import Allowed, at_least, between, each, one_of, path_setting, setting, some_of
from memdiff.errors import ConfigError
from memdiff.evaluation import cross_validation
from memdiff.evaluation.cross_validation import SelectionConfig
from memdiff.experiments.base import check_classifier, check_seeds, seeds_field
from memdiff.experiments.image_settings import check_guidance, check_unet, methods_field
from memdiff.runtime.stage import ExecutionConfig, LoopConfig
from memdiff.synthesis import image_filters, image_methods, image_pool
from memdiff.synthesis.pixel_settings import PixelDiffusionConfig, SolverConfig
from memdiff.synthesis.text_to_image.backends import TextToImageConfig

REAL, TEXT_TO_IMAGE = "real", "text_to_image"
AFFINE, ELASTIC = "affine", "elastic"
OVERSAMPLING, STRONG, MIXUP = "oversampling", "strong", "mixup"
CONTROLS = {
  REAL: "real images only",
  OVERSAMPLING: "real images, rare ones repeated",
  AFFINE: "real images and copies that are scaled, turned and moved as far as generated ones lie",
  ELASTIC: "real images and copies that are bent as far as generated ones lie",
  STRONG: "real images only, under RandAugment (if they have colours) and Cutout",
  MIXUP: "real images only, under mixup",
}
UNSEEN, ORACLE = "unseen", "oracle"
REFERENCES = {
  UNSEEN: "real images and others that the long tail left out, as many as are generated",
  ORACLE: "real images and those that the long tail left out, up to the largest class; the most"
  " that generated ones can reach",
}


_HEAD = "head"  # ends the name of a row that trains only a head


@dataclasses.dataclass(frozen=True)
class Row:
  """What classifiers are trained on: a control, a reference, or a generator and a filter."""

  source: str
  filter: str = ""
  head_only: bool = False  # whether the encoder stays that of real images

  @property
  def name(self) -> str:
    parts = (self.source, self.filter, _HEAD if self.head_only else "")
    return ":".join(part for part in parts if part)

  @classmethod
  def named(cls, name: str) -> "Row":
    """The row of a name."""
    source, *parts = name.split(":")
    head_only = parts[-1:] == [_HEAD]
    return cls(source, *parts[: len(parts) - head_only], head_only=head_only)

  @property
  def weight(self) -> float:
    """Of its images in the loss, times `added.weight`."""
    return image_filters.weight_of(self.filter)

  @property
  def has_pool(self) -> bool:
    """Whether there are images beside the real ones that all rows have."""
    return self.source not in (REAL, STRONG, MIXUP)

  @property
  def reference(self) -> bool:
    return self.source in REFERENCES

  @property
  def control(self) -> bool:
    return self.source in CONTROLS

  def describe(self) -> str:
    words = (CONTROLS | REFERENCES).get(self.source)
    if words is None:
      made = f"of the file {self.source}"
      if image_methods.is_known(self.source):
        made = image_methods.describe(self.source)
      elif self.source == TEXT_TO_IMAGE:
        made = "of a text-to-image model that was trained elsewhere"
      words = (
        f"real images and generated ones ({made}; used: {image_filters.describe(self.filter)})"
      )
    return f"{words}; a new head on the encoder of real images" if self.head_only else words


CRITIC_LOSS = "balanced_softmax"  # logit adjustment with tau 1, in training


@dataclasses.dataclass(frozen=True)
class PoolConfig:
  """How many images are generated, and which of them are used."""

  fill_to: int = setting(
    0,
    "images of a class, generated ones included; 0: as many as the largest class has",
    at_least(0),
  )
  surplus: float = setting(
    2.0, "images drawn for each that is needed, so that filters have a choice", at_least(1)
  )
  guidance: float = setting(1.0, "scale of the guidance, 1 + omega; 1: none", at_least(0))
  filters: tuple[str, ...] = setting(
    ("none", "confident"),
    "rows of every generator; several joined by & are one filter, and @0.3 at its end is what its"
    " images weigh",
    Allowed(
      lambda names: (
        len(names) > 0 and len(set(names)) == len(names) and all(map(image_filters.is_known, names))
      ),
      lambda: (
        "distinct names out of " + ", ".join(image_filters.FILTERS) + ", or such joined by &, with"
        " @ and a weight behind them or not"
      ),
    ),
  )
  rejected: float = setting(
    0.1, "share of held-out real images beyond each limit of the filters", between(0.001, 0.499)
  )
  files: tuple[str, ...] = path_setting(
    "images made elsewhere or by another run, written by memdiff.synthesis.image_pool; rows too,"
    " under the names of the files",
    (),
  )

  def __post_init__(self):
    names = [pathlib.Path(path).stem for path in self.files]
    taken = {*CONTROLS, *REFERENCES, TEXT_TO_IMAGE}
    for name in names:
      if not name.replace("-", "_").isidentifier() or image_methods.is_known(name) or name in taken:
        raise ValueError(
          f"files names {name}, which is no good name of a row; rename the file to letters, digits,"
          " - and _, and to no method or control."
        )
    if len(set(names)) < len(names):
      raise ValueError(f"files are {self.files}, but each needs a name of its own.")

  @property
  def path_of(self) -> dict[str, str]:
    """Name of a row -> its file."""
    return {pathlib.Path(path).stem: path for path in self.files}

  @property
  def needs_limits(self) -> bool:
    return any(part.needs_limits for name in self.filters for part in image_filters.parts_of(name))

  @property
  def needs_second(self) -> bool:
    return any(part.needs_second for name in self.filters for part in image_filters.parts_of(name))


@dataclasses.dataclass(frozen=True)
class AugmentedConfig:
  """Everything that decides a run's results."""

  experiment: str = setting("augmented", "the kind of experiment", one_of(("augmented",)))
  name: str = setting("augmented", "of the run, for its report")
  seeds: tuple[int, ...] = seeds_field()
  dataset: DatasetConfig = setting(DatasetConfig(), "images, and how they are cut to a long tail")
  methods: tuple[str, ...] = methods_field(needed=False)
  diffusion: PixelDiffusionConfig = setting(PixelDiffusionConfig(), "the training of DDPM")
  sampling: SolverConfig = setting(SolverConfig(), "how images are drawn")
  text_to_image: TextToImageConfig = setting(
    TextToImageConfig(), "a model trained elsewhere that is asked for images too"
  )
  pool: PoolConfig = setting(PoolConfig(), "how many images, and which are used")
  controls: tuple[str, ...] = setting(
    (REAL, OVERSAMPLING, AFFINE, STRONG),
    "what generated images are held against; real has to be among them",
    some_of(CONTROLS),
  )
  head_only: bool = setting(
    True, "whether new heads on the encoders of real images are rows too; the first filter's images"
  )
  encoder: EncoderConfig = setting(EncoderConfig(), "the classifier's network")
  classifier: ClassifierConfig = setting(ClassifierConfig(), "how classifiers are trained")
  added: AddedImagesConfig = setting(AddedImagesConfig(), "how generated images enter the training")
  losses: tuple[str, ...] = setting(
    ("cross_entropy", "balanced_softmax", "logit_adjustment"), "rows of every source of images",
    some_of(heads.LOSSES),
  )  # fmt: skip
  taus: tuple[float, ...] = setting(
    (1.0, 0.5, 1.5),
    "candidates; logit_adjustment: times the log of the class prior",
    each(lambda tau: tau >= 0, "numbers from 0"),
  )
  selection: SelectionConfig = setting(
    SelectionConfig(encoder="retrained"), "how the best method is chosen"
  )
  loop: LoopConfig = setting(LoopConfig(), "records and checkpoints")
  execution: ExecutionConfig = setting(
    ExecutionConfig(), "how the run is executed; may change when it is resumed"
  )

  def __post_init__(self):
    check_seeds(self.seeds)
    if REAL not in self.controls:
      raise ValueError(f"controls is {self.controls}, but has to have real in it.")
    if not self.losses:
      raise ValueError("losses is empty, but classifiers must be trained by one.")
    if self.pool.needs_limits and not self.selection.folds:
      raise ValueError(
        f"pool.filters is {self.pool.filters}, some of which compare with real images that a fold"
        " holds out, but selection.folds is 0; set it to 2 or more, or the filters to none."
      )
    if self.selection.encoder != "retrained":
      raise ValueError(
        "selection.encoder is frozen, but here classifiers are trained from the images; set it to"
        " retrained."
      )

  @property
  def sources(self) -> tuple[str, ...]:
    """What generated images come from: methods that are trained here, files, another's model."""
    asked = [TEXT_TO_IMAGE] if self.text_to_image.model else []
    return (*self.methods, *self.pool.path_of, *asked)

  @property
  def input_files(self) -> dict[str, str]:
    """Files that the run reads beside its data: what they are, and where."""
    text = image_methods.text_of(self.methods, self.diffusion)
    files = {f"images of {name}": path for name, path in self.pool.path_of.items()}
    if self.text_to_image.model:
      files["text_to_image_model"] = self.text_to_image.model
    return files | (text.input_files if text else {})


@dataclasses.dataclass(frozen=True)
class Training:
  """How a row's classifiers are trained."""

  loss: str
  counts: str = "real"  # what the loss takes for the counts of the classes

  @property
  def name(self) -> str:
    return self.loss if self.counts == "real" else f"{self.loss}_{self.counts}"


@dataclasses.dataclass(frozen=True)
class Choice:
  """How a method is set: what cross-validation chooses."""

  counts: str = "real"
  tau: float = 0.0

  def training(self, loss: str) -> Training:
    """Cross-entropy knows no counts; those of logit adjustment come afterwards."""
    trained = heads.trained_loss(loss)
    return Training(trained, "real" if trained == "cross_entropy" else self.counts)


def candidates(config: AugmentedConfig, row: Row, loss: str) -> list[Choice]:
  """The settings of a method, the one to take without cross-validation first."""
  counts = config.added.counts if row.has_pool and loss != "cross_entropy" else ("real",)
  taus = config.taus if loss == "logit_adjustment" else (0.0,)
  return [Choice(name, tau) for name in counts for tau in taus]


def trainings(config: AugmentedConfig, row: Row) -> list[Training]:
  """All that a row's settings need, each once."""
  found = [c.training(loss) for loss in config.losses for c in candidates(config, row, loss)]
  return list(dict.fromkeys(found))


def rows_of(config: AugmentedConfig, data: LongTailDataset) -> tuple[Row, ...]:
  """The rows of the table, for each loss: controls, generators with every filter, references."""
  others = [name for name in config.controls if name != REAL]
  controls = [Row(REAL), *map(Row, others)]
  generated = [Row(source, name) for source in config.sources for name in config.pool.filters]
  if config.head_only:  # on the encoders of the first row
    controls.append(Row(REAL, head_only=True))
    first = config.pool.filters[0]
    generated += [Row(source, first, head_only=True) for source in config.sources]
  return (*controls, *generated, *_references(config, data))


def _references(config: AugmentedConfig, data: LongTailDataset) -> list[Row]:
  """If classes are filled up to the largest, both are the same."""
  if not len(data.left_out_labels):
    return []
  partly = 0 < config.pool.fill_to < data.train_counts.max()
  return [Row(UNSEEN), Row(ORACLE)] if partly else [Row(ORACLE)]


def in_folds(config: AugmentedConfig, row: Row) -> bool:
  """Whether cross-validation can judge a row: its images know nothing of what a fold holds out."""
  path = config.pool.path_of.get(row.source)
  if row.source == TEXT_TO_IMAGE:
    return config.text_to_image.knows_no_image
  return not row.reference and (path is None or image_pool.never_saw_the_data(path))


def added_of(config: AugmentedConfig, row: Row) -> AddedImagesConfig:
  """How a row's images take part in the training."""
  return dataclasses.replace(config.added, weight=config.added.weight * row.weight)


def augmentation_of(config: AugmentedConfig, control: str, shape: tuple[int, ...]) -> AugmentConfig:
  """How images [H, W, ch] are changed in the training of a control, or of anything else."""
  side, _, channels = shape
  usual = config.classifier.augment
  if control == STRONG:
    policy = "randaugment" if channels == 3 else usual.policy
    return dataclasses.replace(usual, policy=policy, cutout=side // 2)
  if control == MIXUP:
    return dataclasses.replace(usual, mixup=usual.mixup or 0.2)
  return usual


def lacking(counts: np.ndarray, fill: int, num_train: int) -> np.ndarray:
  """How many images each class of each run lacks to reach `fill`. [R, C].

  Args:
    counts: [R, C] training images.
    fill: images per class, scaled down in runs that see a part of the training images.
    num_train: all training images.
  """
  of_run = np.round(fill * counts.sum(axis=1) / num_train).astype(int)
  return np.maximum(of_run[:, None] - counts, 0)


def check(settings: AugmentedConfig, data: LongTailDataset) -> None:
  """Raises ConfigError if settings do not fit each other or the data."""
  if not settings.sources:
    raise ConfigError(
      "Images must come from somewhere: give config.methods, config.pool.files, or the folder of a"
      " text-to-image model as config.text_to_image.model."
    )
  check_classifier(settings, data)
  check_unet(settings, data)
  check_guidance(settings, (settings.pool.guidance,), "pool.guidance")
  if data.train_images.shape[-1] not in (1, 3):
    raise ConfigError(
      f"The images have {data.train_images.shape[-1]} channels, but only grey and colour can be"
      " generated."
    )
  if not settings.classifier.num_epochs:
    raise ConfigError(
      "config.classifier.num_epochs is 0, but generated images help only an encoder that is trained"
      " on them."
    )
  if settings.classifier.loss != "cross_entropy" or settings.classifier.references:
    raise ConfigError(
      "config.classifier.loss and references are not read here; name the losses in config.losses."
    )
  for path in settings.pool.files:
    image_pool.read(path, data)
  for loss in settings.losses:
    trained = heads.trained_loss(loss)
    losses.check(trained, mixup=settings.classifier.augment.mixup > 0 or MIXUP in settings.controls)
  if encoder.has_cosine_head(settings.encoder.backbone, CRITIC_LOSS):
    raise ConfigError(
      "config.encoder.backbone.head is cosine, but the class prior is added to the logits of a"
      " linear head; set it to linear or auto."
    )
  if settings.selection.folds and data.train_counts.max() < 2:
    raise ConfigError(
      "config.selection.folds asks for cross-validation, but no class has two images; set it to 0,"
      " and config.pool.filters to none."
    )
  fill = settings.pool.fill_to or int(data.train_counts.max())
  if (data.train_counts >= fill).all():
    raise ConfigError(
      f"Every class has {fill} images or more, so that none would be generated; raise"
      " config.pool.fill_to."
    )
  if settings.selection.folds:
    train, _ = cross_validation.fold_rows(data.train_labels, settings.selection)
    seen = [data.train_labels[rows[rows >= 0]] for rows in train]
    counts = np.stack([np.bincount(labels, minlength=data.num_classes) for labels in seen])
    if not lacking(counts, fill, len(data.train_labels)).any(axis=1).all():
      raise ConfigError(
        f"config.pool.fill_to is {fill}, but a fold of cross-validation would lack no image; raise"
        " it."
      )
