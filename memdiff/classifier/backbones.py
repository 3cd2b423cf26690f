"""Image encoders with a head, by name.

resnet8, 20, 32, 44, 56: the CIFAR family of He et al., "Deep residual learning for image
recognition", 2015, section 4.2: widths 16, 32, 64, shortcuts without parameters (option A).
ResNet-32 has 0.46 million parameters; networks of width 64 that go by that name do not compare.

resnet10, 18, 50: the ImageNet family of the same paper, for 224 px: 7x7 stem and pooling,
projection shortcuts (option B), the stride of a bottleneck in its 3x3 convolution.

To add one: write a module with the same call and a row in BACKBONES.
"""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from memdiff.config import above, each_if_any, one_of, setting
from memdiff.contrastive import unit_length
from memdiff.convolution import Conv


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What tells one ResNet from another."""

  stage_sizes: tuple[int, ...]  # residual blocks per stage
  widths: tuple[int, ...]  # channels of the 3x3 convolutions per stage
  for_small_images: bool  # 3x3 stem and option-A shortcuts; else 7x7 stem, pooling, projections
  bottleneck: bool = False  # blocks of 1x1, 3x3, 1x1 convolutions, four times as wide at the end

  def stage_dim(self, stage: int) -> int:
    """Channels that come out of a stage, from 1."""
    return self.widths[stage - 1] * (4 if self.bottleneck else 1)

  @property
  def feature_dim(self) -> int:
    return self.stage_dim(len(self.widths))


_CIFAR, _IMAGENET = (16, 32, 64), (64, 128, 256, 512)

BACKBONES = {
  "resnet8": Architecture((1, 1, 1), _CIFAR, True),
  "resnet20": Architecture((3, 3, 3), _CIFAR, True),
  "resnet32": Architecture((5, 5, 5), _CIFAR, True),
  "resnet44": Architecture((7, 7, 7), _CIFAR, True),
  "resnet56": Architecture((9, 9, 9), _CIFAR, True),
  "resnet10": Architecture((1, 1, 1, 1), _IMAGENET, False),
  "resnet18": Architecture((2, 2, 2, 2), _IMAGENET, False),
  "resnet50": Architecture((3, 4, 6, 3), _IMAGENET, False, bottleneck=True),
}

HEADS = ("auto", "linear", "cosine")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Tap:
  """A stage whose output becomes part of the features, averaged over a grid x grid of squares."""

  stage: int  # from 1
  grid: int


def parse_tap(text: str) -> Tap | None:
  """`2:4` -> Tap(stage=2, grid=4); None if it is not of this form."""
  match = re.fullmatch(r"([1-9]):([1-9]\d?)", text)
  return Tap(int(match[1]), int(match[2])) if match else None


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
  name: str = setting(
    "resnet32", "8, 20, 32, 44, 56 are for small images; 10, 18, 50 for 224 px", one_of(BACKBONES)
  )
  head: str = setting("auto", "the last layer; auto: as the loss asks", one_of(HEADS))
  scale: float = setting(30.0, "of cosine logits", above(0))
  dtype: str = setting("float32", "of the computation; weights are float32", one_of(DTYPES))
  taps: tuple[str, ...] = setting(
    (),
    'features from inner stages, "2:2" is stage 2 averaged to a 2 x 2 grid; (): the last layer\'s',
    each_if_any(lambda t: parse_tap(t) is not None, "texts like 3:1"),
  )

  def __post_init__(self):
    stages = len(BACKBONES[self.name].widths)
    for text in self.taps:
      if parse_tap(text).stage > stages:
        raise ValueError(f"taps names stage {text[0]}, but {self.name} has {stages}.")


def feature_dim(config: BackboneConfig) -> int:
  """Length of the features of a backbone."""
  architecture, taps = BACKBONES[config.name], [parse_tap(text) for text in config.taps]
  if not taps:
    return architecture.feature_dim
  return sum(architecture.stage_dim(tap.stage) * tap.grid**2 for tap in taps)


def make_backbone(config: BackboneConfig, num_classes: int, *, cosine: bool) -> "ResNet":
  """The network that `config` names; `cosine` settles its head, `auto` included."""
  return ResNet(
    num_classes,
    BACKBONES[config.name],
    cosine_scale=config.scale if cosine else None,
    dtype=DTYPES[config.dtype],
    taps=tuple(parse_tap(text) for text in config.taps),
  )


def batch_norm(train: bool, dtype: Any, name: str) -> nn.BatchNorm:
  """Batch norm whose variance is computed around the mean; statistics in float32.

  Flax's default, E[x^2] - E[x]^2, cancels where a channel's mean is large, and then turns the last
  bits, which differ between numbers of devices, into visible differences of the loss. The running
  variance is the biased one, where PyTorch keeps the unbiased: a factor of (n - 1) / n, with n the
  batch size times the pixels.
  """
  return nn.BatchNorm(
    use_running_average=not train, momentum=0.9, use_fast_variance=False, dtype=dtype, name=name
  )


class Shortcut(nn.Module):
  """The input of a block in the shape of its output."""

  features: int
  stride: int
  projected: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    if self.stride == 1 and x.shape[-1] == self.features:
      return x
    if self.projected:
      x = Conv(self.features, 1, self.stride, self.dtype, name="conv")(x)
      return batch_norm(train, self.dtype, "bn")(x)
    added = self.features - x.shape[-1]
    x = x[:, :: self.stride, :: self.stride]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (added // 2, added - added // 2)))


class BasicBlock(nn.Module):
  """Two 3x3 convolutions beside a shortcut."""

  features: int
  stride: int
  projected: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    y = Conv(self.features, 3, self.stride, self.dtype, name="conv1")(x)
    y = nn.relu(batch_norm(train, self.dtype, "bn1")(y))
    y = Conv(self.features, 3, 1, self.dtype, name="conv2")(y)
    y = batch_norm(train, self.dtype, "bn2")(y)
    shortcut = Shortcut(self.features, self.stride, self.projected, self.dtype, name="downsample")
    return nn.relu(y + shortcut(x, train))


class BottleneckBlock(nn.Module):
  """1x1, 3x3 and 1x1 convolutions beside a shortcut; 4 x `features` channels come out."""

  features: int
  stride: int
  projected: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    y = Conv(self.features, 1, 1, self.dtype, name="conv1")(x)
    y = nn.relu(batch_norm(train, self.dtype, "bn1")(y))
    y = Conv(self.features, 3, self.stride, self.dtype, name="conv2")(y)
    y = nn.relu(batch_norm(train, self.dtype, "bn2")(y))
    y = Conv(4 * self.features, 1, 1, self.dtype, name="conv3")(y)
    y = batch_norm(train, self.dtype, "bn3")(y)
    shortcut = Shortcut(
      4 * self.features, self.stride, self.projected, self.dtype, name="downsample"
    )
    return nn.relu(y + shortcut(x, train))


def _unit_columns(key, shape, dtype=jnp.float32):
  kernel = jax.random.normal(key, shape, dtype)
  return kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True)


class CosineHead(nn.Module):
  """`scale` times the cosine between feature and class weight (NormedLinear of Cao et al. 2019)."""

  num_classes: int
  scale: float

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """[B, D] -> [B, C]."""
    kernel = self.param("kernel", _unit_columns, (features.shape[-1], self.num_classes))
    return self.scale * (unit_length(features, 1) @ unit_length(kernel, 0))


def pool(x: jax.Array, grid: int) -> jax.Array:
  """Averages over a grid x grid of equal squares. [B, H, W, ch] -> [B, grid^2 ch] float32."""
  batch, height, width, channels = x.shape
  squares = x.astype(jnp.float32).reshape(
    batch, grid, height // grid, grid, width // grid, channels
  )
  return squares.mean(axis=(2, 4)).reshape(batch, -1)


class ResNet(nn.Module):
  """Encoder and head; the features are those the head sees, or those of `taps`.

  Computes in `dtype`; parameters, batch statistics, features and head are float32.
  """

  num_classes: int
  architecture: Architecture
  cosine_scale: float | None = None  # of a cosine head; None: a linear head
  dtype: Any = jnp.float32
  taps: tuple[Tap, ...] = ()  # stages that give the features in place of what the head sees

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
    """Normalised images [B, H, W, ch] -> (logits [B, C], features [B, D]), both float32."""
    shape = self.architecture
    if shape.for_small_images:
      x = Conv(shape.widths[0], 3, 1, self.dtype, name="conv1")(x)
      x = nn.relu(batch_norm(train, self.dtype, "bn1")(x))
    else:
      x = Conv(shape.widths[0], 7, 2, self.dtype, name="conv1")(x)
      x = nn.relu(batch_norm(train, self.dtype, "bn1")(x))
      x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    block = BottleneckBlock if shape.bottleneck else BasicBlock
    stages = []
    for stage, (size, width) in enumerate(zip(shape.stage_sizes, shape.widths, strict=True)):
      for number in range(size):
        stride = 2 if stage > 0 and number == 0 else 1
        x = block(
          width,
          stride,
          not shape.for_small_images,
          self.dtype,
          name=f"layer{stage + 1}_{number}",
        )(x, train)
      stages.append(x)
    features = x.astype(jnp.float32).mean(axis=(1, 2))
    if self.cosine_scale is None:
      head = nn.Dense(self.num_classes, name="head")
    else:
      head = CosineHead(self.num_classes, self.cosine_scale, name="head")
    logits = head(features)
    if self.taps:
      features = jnp.concatenate([pool(stages[t.stage - 1], t.grid) for t in self.taps], axis=1)
    return logits, features
