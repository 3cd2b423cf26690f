"""The settings of an experiment on features, and whether they fit each other and the data."""

import dataclasses

import numpy as np

from input_pipeline import dataset as dataset_lib
from input_pipeline import embeddings
from input_pipeline.dataset import DatasetConfig
from input_pipeline.embeddings import EmbeddingsConfig
from input_pipeline.long_tail import LongTailLabels
from memdiff.classifier import encoder, encoder_training, heads
from memdiff.classifier.encoder import EncoderConfig
from memdiff.classifier.encoder_training import ClassifierConfig
from memdiff.classifier.heads import HeadConfig
from memdiff.config import at_least, each, one_of, path_setting, setting, some_of
from memdiff.errors import ConfigError
from memdiff.evaluation.cross_validation import SelectionConfig
from memdiff.experiments import joint
from memdiff.experiments.base import (
  check_seeds,
  seeds_field,
)
from memdiff.experiments.joint import JointConfig
from memdiff.fitting.heads import FAMILIES
from memdiff.memory.memory_bank import BankConfig
from memdiff.runtime.stage import ExecutionConfig, LoopConfig
from memdiff.synthesis import class_embeddings, generators
from memdiff.synthesis import confidence as confidence_lib
from memdiff.synthesis.feature_diffusion import DiffusionConfig
from memdiff.synthesis.generators import GeneratorsConfig
from memdiff.synthesis.hallucination import SamplerConfig, check_conditions


@dataclasses.dataclass(frozen=True)
class MethodsConfig:
  """How heads are trained on what the generators make."""

  losses: tuple[str, ...] = setting(
    ("cross_entropy", "logit_adjustment", "balanced_softmax", "csl"),
    "rows of every generator",
    some_of(heads.LOSSES),
  )
  exponents: tuple[float, ...] = setting(
    (1.0,),
    "candidates; classes are drawn by (real + synthetic)^exponent",
    each(lambda e: 0 <= e <= 1, "numbers from 0 to 1"),
  )
  l2: tuple[float, ...] = setting(
    (5e-4, 5e-3, 5e-2),
    "candidates; l2 / 2 times the squared length of the kernel",
    each(lambda strength: strength >= 0, "numbers from 0"),
  )
  taus: tuple[float, ...] = setting(
    (1.0, 0.5, 1.5),
    "candidates; logit_adjustment: times the log of the class prior",
    each(lambda tau: tau >= 0, "numbers from 0"),
  )
  fitted: tuple[str, ...] = setting(
    tuple(FAMILIES),
    "heads that are fitted to real features in seconds, and blended",
    some_of(FAMILIES),
  )
  training: HeadConfig = setting(HeadConfig(), "of every head")

  def __post_init__(self):
    if not self.losses:
      raise ValueError("losses is empty, but heads must be trained by one.")
    if self.training.optimizer.weight_decay:
      raise ValueError(
        f"training.optimizer.weight_decay is {self.training.optimizer.weight_decay:g}, but heads"
        " are regularised by l2; set it to 0.0 and give l2 the candidates."
      )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  map_per_class: int = setting(60, "points per class and kind in the t-SNE picture", at_least(2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureConfig:
  """Everything that decides the results of an experiment on embeddings."""

  experiment: str = setting("features", "the kind of experiment", one_of(("features",)))
  name: str = setting("features", "of the run, for its report")
  seeds: tuple[int, ...] = seeds_field()
  dataset: EmbeddingsConfig = setting(EmbeddingsConfig(), "features that another model made")
  memory_bank: BankConfig = setting(
    BankConfig(), "features of each class, which the denoiser is told"
  )
  class_embeddings: str = path_setting(
    "what is known of the classes beside features: a .npz with names and embeddings, or names: a"
    ' sentence encoder reads them; "": nothing'
  )
  diffusion: DiffusionConfig = setting(DiffusionConfig(), "how the denoiser is trained")
  hallucination: SamplerConfig = setting(SamplerConfig(), "how features are sampled")
  generators: GeneratorsConfig = setting(GeneratorsConfig(), "what makes features, and how many")
  head: MethodsConfig = setting(MethodsConfig(), "heads on real and synthetic features")
  selection: SelectionConfig = setting(SelectionConfig(), "how the best candidates are chosen")
  evaluation: EvaluationConfig = setting(EvaluationConfig(), "what the report shows")
  loop: LoopConfig = setting(LoopConfig(), "records and checkpoints")
  execution: ExecutionConfig = setting(
    ExecutionConfig(), "how the run is executed; may change when it is resumed"
  )

  def __post_init__(self):
    check_seeds(self.seeds)
    check_conditions(self.diffusion, self.hallucination)
    if self.hallucination.num_steps > self.diffusion.schedule.num_steps:
      raise ValueError(
        f"hallucination.num_steps is {self.hallucination.num_steps}, but the diffusion has only"
        f" {self.diffusion.schedule.num_steps} steps."
      )

  @property
  def input_files(self) -> dict[str, str]:
    """Files that the run reads beside its data: what they are, and where."""
    known = self.class_embeddings
    return {"class embeddings": known} if known not in ("", class_embeddings.NAMES) else {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemdiffConfig(FeatureConfig):
  """Everything that decides the results of an experiment on images."""

  experiment: str = setting("memdiff", "the kind of experiment", one_of(("memdiff",)))
  name: str = setting("memdiff", "of the run, for its report")
  dataset: DatasetConfig = setting(DatasetConfig(), "images, and how they are cut to a long tail")
  encoder: EncoderConfig = setting(EncoderConfig(), "from pixels to features and logits")
  classifier: ClassifierConfig = setting(
    ClassifierConfig(loss="csl", references=("cross_entropy",)),
    "how encoder and head are trained on images",
  )
  selection: SelectionConfig = setting(
    SelectionConfig(encoder="retrained"), "how the best candidates are chosen"
  )
  joint: JointConfig = setting(
    JointConfig(), "encoder and head on images and synthetic features together"
  )

  @property
  def input_files(self) -> dict[str, str]:
    files = {"generated images": self.joint.images} if self.joint.images else {}
    return super().input_files | files


def has_own_head(config: FeatureConfig) -> bool:
  """Whether the features come with a linear head that was trained on them."""
  if not isinstance(config, MemdiffConfig) or config.encoder.backbone.taps:
    return False
  return config.classifier.num_epochs > 0 or config.encoder.init_head


def check(config: FeatureConfig, data: LongTailLabels) -> None:
  """Raises ConfigError if the settings do not fit each other or the data."""
  generators.plan(data.train_counts, config.generators)
  _check_class_embeddings(config, data)
  if not has_own_head(config):
    if config.head.training.start == "encoder":
      raise ConfigError(
        "config.head.training.start is encoder, but these features come without a head; set it to"
        " zeros."
      )
    confidence = config.generators.confidence.name
    if confidence in confidence_lib.NEED_A_HEAD:
      raise ConfigError(
        f"config.generators.confidence.name is {confidence}, which asks the encoder's own head, but"
        " these features come without one; use cosine or none."
      )
  if config.selection.folds and data.train_counts.max() < 2:
    raise ConfigError(
      "config.selection.folds asks for cross-validation, but no class has two examples; set it to"
      " 0."
    )
  if (
    config.selection.folds
    and config.selection.encoder == "frozen"
    and config.head.training.start == "encoder"
  ):
    raise ConfigError(
      "config.head.training.start is encoder and config.selection.encoder is frozen, so that heads"
      " of the folds would begin with one that was trained on what they are judged on; set start to"
      " zeros, or config.selection.folds to 0."
    )


def _check_class_embeddings(config: FeatureConfig, data: LongTailLabels) -> None:
  settings = generators.SynthesisSettings(
    config.generators, config.diffusion, config.hallucination, len(data.train_counts)
  )
  jointly = config.joint.generators if isinstance(config, MemdiffConfig) else ()
  readers = []
  for name in dict.fromkeys((*config.generators.names, *jointly)):
    if name not in generators.GENERATORS:  # the control of joint training
      continue
    generator = settings.generator(name)
    if not generator.needs_class_embeddings:
      continue
    readers.append(name)
    try:
      check_conditions(generator.diffusion, generator.hallucination)
    except ValueError as error:
      raise ConfigError(f"The generator {name} cannot be used: {error}") from error
  if not config.class_embeddings:
    if readers:
      raise ConfigError(
        f"The generator {readers[0]} is told embeddings of the classes, but config.class_embeddings"
        " is empty; give it a file or names."
      )
    return
  if not readers and not config.head.fitted:
    raise ConfigError(
      "config.class_embeddings is given, but nothing reads it; name the generator"
      " memdiff_described, or heads in config.head.fitted."
    )
  try:
    class_embeddings.check(config.class_embeddings, np.array(data.class_names))
  except ValueError as error:
    raise ConfigError(f"config.{error}") from error


def check_memdiff(config: MemdiffConfig, data: dataset_lib.LongTailDataset) -> None:
  """Of an experiment that trains or reads an image encoder."""
  check(config, data)
  joint.check(config, data)
  for loss in encoder_training.trained_losses(config.classifier):
    if encoder.has_cosine_head(config.encoder.backbone, loss):
      raise ConfigError(
        f"memdiff trains linear heads on features, but the loss {loss} has a cosine head; choose"
        " another config.classifier.loss, or set config.encoder.backbone.head to linear."
      )
  retrains = config.selection.folds and config.selection.encoder == "retrained"
  if retrains and config.classifier.num_epochs == 0:
    raise ConfigError(
      "config.selection.encoder is retrained, but config.classifier.num_epochs is 0; set it to"
      " frozen."
    )
  if retrains and data.streamed:
    raise ConfigError(
      f"config.selection.encoder is retrained, but {data.name} is streamed from disk; set it to"
      " frozen, or config.selection.folds to 0."
    )


def check_features(config: FeatureConfig, data: embeddings.LongTailEmbeddings) -> None:
  """Of an experiment on embeddings."""
  check(config, data)
  if config.selection.encoder == "retrained":
    raise ConfigError(
      "config.selection.encoder is retrained, but embeddings have no encoder to train; set it to"
      " frozen."
    )
