"""Methods of long-tailed image generation by name: what each changes in the training of DDPM.

A name may join several with +, as in `t2h+balanced`; changes are made from left to right. To add a
method: a function of the config, and a row in METHODS. Methods that change only how images are
drawn share the U-Net of the rest of their name.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from memdiff.diffusion import guidance
from memdiff.diffusion.unet import ReserveConfig
from memdiff.synthesis import pixel_tuning
from memdiff.synthesis.pixel_augmentation import AugmentationConfig
from memdiff.synthesis.pixel_settings import PixelDiffusionConfig, SolverConfig
from memdiff.synthesis.pixel_text import PixelTextConfig
from memdiff.synthesis.text_to_image.prompts import SOURCES

JOINED, PLAIN = "+", "ddpm"
T = TypeVar("T", bound=SolverConfig)


@dataclasses.dataclass(frozen=True)
class ImageMethod:
  """What is changed in the config of DDPM, and what that is in words.

  Attributes:
    change: of the training.
    description: for reports.
    drawn: how images are drawn; None: as configured.
    needs: another method without which it would change nothing; "": none.
    tunes: how the U-Net that the rest of the name trains is tuned, of `pixel_tuning.KINDS`; "": it
      is not.
  """

  change: Callable[[PixelDiffusionConfig], PixelDiffusionConfig]
  description: str
  drawn: Callable[[SolverConfig], SolverConfig] | None = None
  needs: str = ""
  tunes: str = ""


def _objective(config: PixelDiffusionConfig, **groups: Any) -> PixelDiffusionConfig:
  """With changed terms: a dictionary changes fields of a group, other values replace one."""
  changed = {
    name: dataclasses.replace(getattr(config.objective, name), **value)
    if isinstance(value, dict)
    else value
    for name, value in groups.items()
  }
  return dataclasses.replace(config, objective=dataclasses.replace(config.objective, **changed))


def _coral(config: PixelDiffusionConfig) -> PixelDiffusionConfig:
  """CIFAR-100-LT's settings in the paper's table 3."""
  return _objective(config, supcon={"weight": 0.01, "decay": 1.0, "temperature": 0.09})


def _coral_code(config: PixelDiffusionConfig) -> PixelDiffusionConfig:
  config = dataclasses.replace(config, dropped_by="batch")
  term = {"weight": 0.5, "decay": 0.3, "temperature": 0.1, "reading": "code"}
  return _objective(config, supcon=term)


def _cm(config: PixelDiffusionConfig, scale: float = 0.5) -> PixelDiffusionConfig:
  reserve = ReserveConfig(rank_ratio=0.1, scale=scale)
  config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, reserve=reserve))
  return _objective(config, capacity={"consistency": 1.0, "diversity": 0.2})


def _cm_code(config: PixelDiffusionConfig) -> PixelDiffusionConfig:
  """Its scale is configured as 0.5, but never applied, and it trains on targets of T2H."""
  config = dataclasses.replace(_cm(config, scale=1.0), dropped_by="batch")
  return _objective(config, transfer={"rule": "t2h"})


def _prompted(config: PixelDiffusionConfig) -> PixelDiffusionConfig:
  return dataclasses.replace(config, text=dataclasses.replace(config.text, is_read=True))


def _by(source: str) -> ImageMethod:
  """Prompts from another source."""

  def drawn(sampling: T) -> T:
    return dataclasses.replace(
      sampling, prompts=dataclasses.replace(sampling.prompts, source=source)
    )

  return ImageMethod(
    lambda config: config, f"prompts are {SOURCES[source]}", drawn, needs="prompted"
  )


def _guided(description: str, **changes: Any) -> ImageMethod:
  """Images drawn under another guidance."""

  def drawn(sampling: T) -> T:
    return dataclasses.replace(sampling, guide=dataclasses.replace(sampling.guide, **changes))

  return ImageMethod(lambda config: config, description, drawn)


def _memdiff(config: PixelDiffusionConfig) -> PixelDiffusionConfig:
  return dataclasses.replace(config, memory=dataclasses.replace(config.memory, is_shown=True))


METHODS = {
  PLAIN: ImageMethod(lambda config: config, "plain conditional diffusion"),
  "balanced": ImageMethod(
    lambda config: dataclasses.replace(config, class_exponent=0.0),
    "batches that draw every class equally often",
  ),
  "ada": ImageMethod(
    lambda config: dataclasses.replace(config, augmentation=AugmentationConfig(0.12)),
    "images are scaled, turned and moved, and the U-Net is told how",
  ),
  "finetuned": ImageMethod(
    lambda config: dataclasses.replace(config, balanced_last=1 / 3),
    "the last third of the training draws every class equally often",
  ),
  "cbdm": ImageMethod(
    lambda config: _objective(config, cbdm={"weight": 1.0}, other_labels="uniform"),
    "predictions for different classes are pulled together",
  ),
  "cbdm_code": ImageMethod(
    lambda config: _objective(
      dataclasses.replace(config, dropped_by="batch"),
      cbdm={"weight": 1.0},
      other_labels="empirical",
    ),
    "CBDM as its released code: other classes by their counts, labels dropped by batch",
  ),
  "coral": ImageMethod(_coral, "bottlenecks of different classes are pushed apart"),
  "coral_code": ImageMethod(_coral_code, "CORAL as its released code"),
  "coral_image": ImageMethod(
    lambda config: _objective(_coral(config), supcon={"place": "image"}),
    "CORAL’s ablation: predicted images, not bottlenecks, are pushed apart",
  ),
  "t2h": ImageMethod(
    lambda config: _objective(config, transfer={"rule": "t2h"}),
    "noised images of rare classes may stand for images of commoner ones",
  ),
  "diffrop": ImageMethod(
    lambda config: _objective(config, separation={"weight": 1.0}, other_labels="uniform"),
    "predictions for different classes are pushed apart; DiffROP written anew from its formula",
  ),
  "cm": ImageMethod(_cm, "a low-rank part of the kernels is kept for rare classes"),
  "cm_code": ImageMethod(
    _cm_code, "CM as its released code: on T2H, its scale left out, labels dropped by batch"
  ),
  "memdiff": ImageMethod(
    _memdiff, "the U-Net looks at exemplars of the class, and learns classes that are made up too"
  ),
  # SDEdit (Meng et al. 2022) as DA-Fusion (Trabucco et al. 2024) uses it for rare classes.
  "varied": ImageMethod(
    lambda config: config,
    "images are drawn from training images of the class, half noised",
    lambda sampling: dataclasses.replace(sampling, start=0.5),
  ),
  "prompted": ImageMethod(_prompted, "the U-Net reads captions, and is told prompts"),
  # Koh et al. 2025 lead away from the class that is most alike, and fade conditions in.
  "negative": _guided(
    "guidance leads away from the class that is most alike", kind=guidance.NEGATIVE
  ),
  "contrastive": _guided(
    "guidance leads away from the class that is most alike, while it is near",
    kind=guidance.CONTRASTIVE,
  ),
  "annealed": _guided(
    "conditions fade in, so that images of a class differ more",
    annealing=guidance.AnnealingConfig(noise=0.25),
  ),
  "seed_select": ImageMethod(
    lambda config: config,
    "noise is chosen so that images resemble the class's real ones",
    lambda sampling: dataclasses.replace(
      sampling,
      seeds=dataclasses.replace(sampling.seeds, iterations=sampling.seeds.iterations or 20),
    ),
  ),
  # Personalisation; DreamBooth, which tunes all weights, is `finetuned`.
  "lora": ImageMethod(
    lambda config: config,
    "then low-rank parts of the attention are tuned, every class equally often",
    tunes=pixel_tuning.LORA,
  ),
  "custom": ImageMethod(
    lambda config: config,
    "then the layers that take conditions are tuned, every class equally often",
    tunes=pixel_tuning.CONDITIONS,
  ),
  "inverted": ImageMethod(
    lambda config: config,
    "then a sentence is learned for every class, which stands for prompts",
    needs="prompted",
    tunes=pixel_tuning.SENTENCES,
  ),
  "by_name": _by("names"),
  "by_caption": _by("captions"),
  "by_map": _by("mapped"),
}


def is_known(name: str) -> bool:
  parts = name.split(JOINED)
  return (
    all(part in METHODS for part in parts)
    and len(set(parts)) == len(parts)
    and all(METHODS[part].needs in ("", *parts) for part in parts)
    and sum(bool(METHODS[part].tunes) for part in parts) <= 1
    and not ("inverted" in parts and any(part.startswith("by_") for part in parts))
  )


def apply(name: str, config: PixelDiffusionConfig) -> PixelDiffusionConfig:
  """The config of a method."""
  for part in name.split(JOINED):
    config = METHODS[part].change(config)
  return config


def apply_drawing(name: str, sampling: T) -> T:
  """How a method's images are drawn."""
  for part in name.split(JOINED):
    if drawn := METHODS[part].drawn:
      sampling = drawn(sampling)
  return sampling


def trained(name: str) -> str:
  """The method whose training this one shares: itself, if it changes the training."""
  return JOINED.join(part for part in name.split(JOINED) if not METHODS[part].drawn) or PLAIN


def base(name: str) -> str:
  """The method whose U-Net this one tunes: the one that is trained, if it tunes none."""
  parts = trained(name).split(JOINED)
  return JOINED.join(part for part in parts if not METHODS[part].tunes) or PLAIN


def tuning(name: str) -> str:
  """How a method tunes the U-Net of its base, of `pixel_tuning.KINDS`; "": it does not."""
  return next((kind for part in name.split(JOINED) if (kind := METHODS[part].tunes)), "")


def trainings(names: Sequence[str]) -> list[str]:
  """The methods that are trained for these, each once; one that is tuned follows its base."""
  return list(dict.fromkeys(which(name) for name in names for which in (base, trained)))


def bases(names: Sequence[str]) -> list[str]:
  """Those of the trainings that begin from nothing."""
  return list(dict.fromkeys(map(base, names)))


def text_of(names: Sequence[str], config: PixelDiffusionConfig) -> PixelTextConfig | None:
  """How the methods that read captions do it; None if none does."""
  found = (apply(name, config).text for name in names)
  return next((text for text in found if text.is_read), None)


def describe(name: str) -> str:
  return "; ".join(METHODS[part].description for part in name.split(JOINED))
