"""The encoder: a backbone with its head, how it sees pixels, and weights to start from."""

import dataclasses
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from input_pipeline import identity
from input_pipeline.dataset import LongTailDataset
from memdiff.classifier import backbones, losses, pretrained
from memdiff.classifier.backbones import BackboneConfig
from memdiff.config import each_if_any, one_of, path_setting, setting
from memdiff.errors import ConfigError, DataError
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.train_state import TrainState

CHANNEL_ORDERS = ("rgb", "bgr")
_EVAL_CHUNK = 500  # images at a time while scoring inside jit


@dataclasses.dataclass(frozen=True)
class InputConfig:
  """How pixels become the encoder's input."""

  mean: tuple[float, ...] = setting(
    (),
    "of pixels in [0, 1], in the order of `channels`; (): of the training images",
    each_if_any(lambda m: 0 <= m <= 1, "numbers from 0 to 1"),
  )
  std: tuple[float, ...] = setting(
    (), "as `mean`", each_if_any(lambda s: 0 < s <= 1, "numbers above 0, up to 1")
  )
  channels: str = setting("rgb", "the order that the encoder expects", one_of(CHANNEL_ORDERS))

  def __post_init__(self):
    if len(self.mean) != len(self.std):
      raise ValueError(
        f"mean has {len(self.mean)} channels and std {len(self.std)}; they must agree."
      )


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  backbone: BackboneConfig = setting(BackboneConfig(), "the network")
  input: InputConfig = setting(InputConfig(), "how pixels become the encoder's input")
  init_from: str = path_setting(
    'weights to start from, a PyTorch state dict as .npz or .safetensors; "": random ones'
  )
  init_head: bool = setting(True, "whether the head of `init_from` is read too; False: drawn anew")

  @property
  def feature_dim(self) -> int:
    return backbones.feature_dim(self.backbone)


def check(config: EncoderConfig, dataset: LongTailDataset) -> None:
  """Raises ConfigError if the settings do not fit the data."""
  channels = dataset.train_images.shape[-1]
  if config.input.mean and len(config.input.mean) != channels:
    raise ConfigError(
      f"config.encoder.input.mean has {len(config.input.mean)} channels, but the images have"
      f" {channels}."
    )
  if dataset.streamed and not config.input.mean:
    raise ConfigError(
      "config.encoder.input.mean and std are empty, which asks for the statistics of the training"
      f" images; {dataset.name} is too large for that, give them (ImageNet's are (0.485, 0.456,"
      " 0.406) and (0.229, 0.224, 0.225))."
    )
  if config.input.channels == "bgr" and channels != 3:
    raise ConfigError(
      f"config.encoder.input.channels is bgr, but the images have {channels} channels."
    )
  for text in config.backbone.taps:
    side = stage_side(config, dataset.train_images.shape[1], backbones.parse_tap(text).stage)
    if side % backbones.parse_tap(text).grid:
      raise ConfigError(
        f"config.encoder.backbone.taps has {text}, but that stage gives {side} x {side} pixels,"
        " which do not divide so."
      )
  if config.init_from and not pathlib.Path(config.init_from).is_file():
    raise DataError(f"config.encoder.init_from: there is no file {config.init_from}.")


def stage_side(config: EncoderConfig, side: int, stage: int) -> int:
  """Height of what a stage gives for images of height `side`, pixels."""
  halvings = stage - 1 + (0 if backbones.BACKBONES[config.backbone.name].for_small_images else 2)
  for _ in range(halvings):
    side = -(-side // 2)
  return side


def weights_sha256(config: EncoderConfig) -> str | None:
  """SHA-256 of the file the encoder starts from, for manifests; None if there is none."""
  if not config.init_from:
    return None
  return identity.of_file(config.init_from)


def has_cosine_head(config: BackboneConfig, loss: str) -> bool:
  """Whether the head that `loss` trains compares directions; `auto` does as the loss asks."""
  return losses.LOSSES[loss].cosine_head if config.head == "auto" else config.head == "cosine"


def make_model(config: EncoderConfig, loss: str, num_classes: int) -> nn.Module:
  """The network that `loss` (a name out of losses.LOSSES) trains."""
  return backbones.make_backbone(
    config.backbone, num_classes, cosine=has_cosine_head(config.backbone, loss)
  )


def initial_variables(
  config: EncoderConfig, model: nn.Module, image_shape: tuple[int, ...], key: jax.Array
) -> dict[str, Any]:
  """{"params", "batch_stats"}: drawn, or read from `init_from`."""
  images = jnp.zeros((1, *image_shape))
  variables = model.init(key, images, train=False)
  if config.init_from:
    variables = pretrained.load(config.init_from, variables, head=config.init_head)
  return variables


def pixel_statistics(config: InputConfig, images: np.ndarray) -> dict[str, np.ndarray]:
  """Mean and deviation per channel, in 0..255 and the encoder's order: configured, or measured."""
  if config.mean:
    mean, std = 255 * np.array(config.mean), 255 * np.array(config.std)
  else:
    counts = [np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])]
    values, counts = np.arange(256.0)[None], np.stack(counts)
    mean = (counts * values).sum(axis=1) / counts.sum(axis=1)
    variance = (counts * np.square(values - mean[:, None])).sum(axis=1) / counts.sum(axis=1)
    std = np.maximum(np.sqrt(variance), 1.0)
    if config.channels == "bgr":
      mean, std = mean[::-1], std[::-1]
  return {"pixel_mean": mean.astype(np.float32), "pixel_std": std.astype(np.float32)}


def device_data(config: InputConfig, dataset: LongTailDataset, mesh: Mesh) -> dict[str, jax.Array]:
  """Pixel statistics, class counts and, of sets that fit, the images as uint8, on every device."""
  arrays = pixel_statistics(config, dataset.train_images)
  arrays["train_counts"] = dataset.train_counts
  if not dataset.streamed:
    arrays |= {
      "images": dataset.train_images,
      "labels": dataset.train_labels,
      "test_images": dataset.test_images,
      "test_labels": dataset.test_labels,
      "holdout_images": dataset.holdout_images,
      "holdout_labels": dataset.holdout_labels,
    }
  return mesh_lib.replicate(mesh, arrays)


def normalize(config: InputConfig, images: jax.Array, shared: dict[str, jax.Array]) -> jax.Array:
  """uint8 RGB [B, H, W, ch] -> float32, mean 0 and deviation 1, in the encoder's channel order."""
  mean, std = (shared[n].reshape(1, 1, 1, -1) for n in ("pixel_mean", "pixel_std"))
  images = images[..., ::-1] if config.channels == "bgr" else images
  return (images.astype(jnp.float32) - mean) / std


def apply_eval(model: nn.Module, state: TrainState, images: jax.Array):
  """(logits, features) of normalised images in evaluation mode."""
  variables = {"params": state.params, "batch_stats": state.model_state}
  return model.apply(variables, images, train=False)


def score(predict, images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
  """Cross-entropy and accuracy on uint8 `images` [T, ...], inside jit, a chunk at a time.

  Args:
    predict: uint8 images [chunk, ...] -> logits [chunk, C].
    images, labels: T of them, T at least 1.
  """
  num_chunks = -(-len(labels) // _EVAL_CHUNK)
  size = -(-len(labels) // num_chunks)
  index = jnp.arange(num_chunks * size).reshape(num_chunks, size)

  def of_chunk(index):
    inside = jnp.minimum(index, len(labels) - 1)
    logits, targets = predict(images[inside]), labels[inside]
    valid = (index < len(labels)).astype(jnp.float32)
    hits = (logits.argmax(axis=-1) == targets).astype(jnp.float32)
    return (valid * losses.cross_entropy(logits, targets)).sum(), (valid * hits).sum()

  loss, hits = jax.lax.map(of_chunk, index)
  return {"loss": loss.sum() / len(labels), "accuracy": hits.sum() / len(labels)}
