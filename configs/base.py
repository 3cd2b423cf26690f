"""What the files here start from: every field at its default, and changes that several share.

The fields stand with their defaults, meanings and ranges beside the code that reads them, and
`python main.py --config=FILE --describe` prints them all. The defaults are the field's standard
recipe for CIFAR-sized images (Cao et al. 2019, LDAM-DRW) and memdiff's own.
"""

import dataclasses

from ml_collections import ConfigDict

from memdiff.experiments.augmented_settings import AugmentedConfig
from memdiff.experiments.classification import ClassificationConfig
from memdiff.experiments.feature_settings import FeatureConfig, MemdiffConfig
from memdiff.experiments.image_settings import ImagesConfig
from memdiff.runtime import train_state
from memdiff.synthesis import image_methods


def classification(name: str) -> ConfigDict:
  """Image classifiers, one row of the field's tables or several."""
  return ConfigDict(dataclasses.asdict(ClassificationConfig(name=name)))


def memdiff(name: str) -> ConfigDict:
  """Image classifiers, then hallucinated features for the tail and what they are worth."""
  return ConfigDict(dataclasses.asdict(MemdiffConfig(name=name)))


def features(name: str) -> ConfigDict:
  """Hallucinated features for embeddings that another model made."""
  return ConfigDict(dataclasses.asdict(FeatureConfig(name=name)))


def images(name: str) -> ConfigDict:
  """Generated images, by one method or several."""
  return ConfigDict(dataclasses.asdict(ImagesConfig(name=name)))


def augmented(name: str) -> ConfigDict:
  """Classifiers that are trained on real and generated images."""
  return ConfigDict(dataclasses.asdict(AugmentedConfig(name=name)))


def small_images(config: ConfigDict) -> None:
  """Grey images of few pixels on CPUs: a budget of minutes, whose EMA and warm-up fit it."""
  config.diffusion.schedule.name = "cosine"
  config.diffusion.mirror = False
  config.diffusion.batch_size = 64
  config.diffusion.ema_decay = 0.995
  config.diffusion.optimizer.update(learning_rate=2e-3, schedule="cosine", warmup=0.05)
  config.classifier.augment.flip = False
  config.classifier.batch_size = 64
  config.classifier.optimizer = nesterov_cosine(0.05, 5e-4)
  config.loop.eval_every = 500
  config.loop.checkpoint_every = 250


def small_folder_images(config: ConfigDict) -> None:
  """Images of a folder, 32 pixels, on CPUs."""
  small_images(config)
  config.diffusion.mirror = True
  config.diffusion.unet.update(
    channels=24, multipliers=(1, 2, 2), num_blocks=1, attention=(8,), dtype="float32"
  )
  config.diffusion.num_steps = 3000
  config.classifier.batch_size = 32


def few_steps(config: ConfigDict) -> None:
  """Classifiers on real and generated images in seconds, for tests; they learn little."""
  config.seeds = (0,)
  config.selection.folds = 2
  config.dataset.image_size = 8
  config.losses = ("balanced_softmax",)
  config.controls = ("real", "oversampling")
  config.added.counts = ("real",)
  config.encoder.backbone.name = "resnet8"
  config.classifier.optimizer = nesterov_cosine(0.05, 5e-4)
  config.classifier.num_epochs = 4.0
  config.loop.update(steps_per_dispatch=5, eval_every=10, checkpoint_every=10)


def all_methods(config: ConfigDict) -> None:
  """Every method, both readings of those whose paper and code differ, and combinations."""
  config.methods = (
    "ddpm", "balanced", "finetuned", "cbdm", "cbdm_code", "coral", "coral_code", "coral_image",
    "t2h", "t2h+balanced", "diffrop", "cm", "cm_code", "memdiff", "memdiff+balanced",
  )  # fmt: skip


def cifar_images(name: str, dataset: str, variant: str) -> ConfigDict:
  """CIFAR as long-tailed image generation trains it, by the method that `variant` names."""
  config = images(name)
  config.seeds = (0,)
  config.dataset.name = dataset
  config.diffusion.unet.dtype = "bfloat16"
  config.sampling.per_class = 500
  config.encoder.backbone.name = "resnet32"
  config.loop.eval_every = 5000
  config.loop.checkpoint_every = 5000
  if variant == "all":
    all_methods(config)
  elif variant != "default":
    if not image_methods.is_known(variant):
      alone = [name for name, method in image_methods.METHODS.items() if not method.needs]
      names = ", ".join(["default", "all", *alone])
      raise ValueError(f"unknown variant {variant!r}; the variants are {names}, or joined by +.")
    config.methods = (variant,)
  return config


def nesterov_cosine(learning_rate: float, weight_decay: float) -> ConfigDict:
  """An optimiser: SGD with Nesterov momentum and cosine decay."""
  return ConfigDict(dataclasses.asdict(train_state.nesterov_cosine(learning_rate, weight_decay)))


def proco_recipe(config: ConfigDict) -> None:
  """The recipe of ProCo (Du et al. 2024): stronger augmentation, longer, larger batches."""
  config.classifier.augment.policy = "autoaugment"
  config.classifier.augment.cutout = 16
  config.classifier.batch_size = 256
  config.classifier.num_epochs = 400.0
  config.classifier.optimizer.learning_rate = 0.3
  config.classifier.optimizer.milestones = (0.9, 0.95)  # epochs 360 and 380 of 400
  config.classifier.optimizer.factors = (0.1, 0.01)


def imagenet_recipe(config: ConfigDict) -> None:
  """224 px with a ResNet-50: cosine decay over 90 epochs, as BCL and ProCo train ImageNet-LT."""
  config.seeds = (0,)
  config.dataset.image_size = 224
  config.encoder.backbone.name = "resnet50"
  config.encoder.backbone.dtype = "bfloat16"
  config.encoder.input.mean = (0.485, 0.456, 0.406)
  config.encoder.input.std = (0.229, 0.224, 0.225)
  config.classifier.augment.padding = 0  # random resized crops are cut while decoding
  config.classifier.batch_size = 256
  config.classifier.num_epochs = 90.0
  config.classifier.optimizer = nesterov_cosine(0.1, 5e-4)
  config.classifier.optimizer.nesterov = False
  if "decoupled" in config:
    config.decoupled.optimizer.learning_rate = 0.2
  config.loop.steps_per_dispatch = 5
  config.loop.checkpoint_every = 500
  config.loop.eval_every = 500


def large_memdiff(config: ConfigDict) -> None:
  """memdiff on 2,048 features of a set of a thousand classes and more. Nothing here is tuned."""
  config.classifier.references = ()
  config.memory_bank.num_slots = 256
  config.diffusion.denoiser.update(
    name="transformer", width=1024, num_blocks=4, embedding_dim=128, num_heads=8
  )
  config.diffusion.batch_size = 256
  config.diffusion.num_steps = 50_000
  config.hallucination.chunk_size = 4096  # 256 groups of 16, one for each device of a large slice
  config.generators.names = ("duplicate", "kernel_jitter", "class_only", "memdiff")
  config.head.training.num_steps = 20_000
  config.head.fitted = ("plda", "lda", "centroid")  # regressions of a thousand classes take hours
  config.selection.encoder = "frozen"  # images that are streamed allow nothing else
  config.selection.folds = 0  # every fold would hold the training features once more


def choose(variant: str, variants: dict) -> None:
  """Applies the function that `variant` names; "default" is none."""
  if variant == "default":
    return
  if variant not in variants:
    names = ", ".join(["default", *variants])
    raise ValueError(f"unknown variant {variant!r}; the variants are {names}.")
  variants[variant]()
