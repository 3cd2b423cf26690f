"""Image encoders with a linear head.

`ResNet` is the CIFAR family of He et al., "Deep residual learning for image recognition", 2015,
section 4.2: 3x3 convolutions, batch norm, option-A shortcuts without parameters, global average
pooling. Stage sizes (5, 5, 5) with widths (16, 32, 64) make ResNet-32.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from memdiff.config import each


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
  stage_sizes: tuple[int, ...] = each(lambda n: n >= 1, "whole numbers from 1")
  widths: tuple[int, ...] = each(lambda n: n >= 1, "whole numbers from 1")

  def __post_init__(self):
    if len(self.stage_sizes) != len(self.widths):
      raise ValueError(
        f"stage_sizes has {len(self.stage_sizes)} stages and widths {len(self.widths)}; they must"
        " agree."
      )
    if sorted(self.widths) != list(self.widths):
      raise ValueError(f"widths are {self.widths}, but must not fall: shortcuts only add channels.")


class Conv3x3(nn.Module):
  """A 3x3 convolution, padded to keep the size, without bias. [B, H, W, in] -> [B, H', W', out].

  On CPU it is computed as patches times matrix: XLA's CPU convolution is 8 to 26 times slower
  inside `lax.scan` at these sizes (python -m benchmarks.convolution, docs/results).
  """

  features: int
  stride: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    _, height, width, channels = x.shape
    shape = (3, 3, channels, self.features)
    fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    kernel = self.param("kernel", fan_out, shape)
    s = self.stride
    if jax.default_backend() != "cpu":
      return jax.lax.conv_general_dilated(
        x, kernel, (s, s), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
      )
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [padded[:, i : i + height : s, j : j + width : s] for i in range(3) for j in range(3)]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, self.features)


def batch_norm(train: bool) -> nn.BatchNorm:
  """Batch norm whose variance is computed around the mean.

  Flax's default, E[x^2] - E[x]^2, cancels where a channel's mean is large, and then turns the last
  bits, which differ between numbers of devices, into visible differences of the loss.
  """
  return nn.BatchNorm(use_running_average=not train, momentum=0.9, use_fast_variance=False)


class ResidualBlock(nn.Module):
  """Two 3x3 convolutions and an identity; where the shape changes, strided and zero-padded."""

  features: int
  stride: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    y = Conv3x3(self.features, self.stride)(x)
    y = nn.relu(batch_norm(train)(y))
    y = batch_norm(train)(Conv3x3(self.features)(y))
    shortcut = x[:, :: self.stride, :: self.stride]
    added = self.features - x.shape[-1]
    shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (added // 2, added - added // 2)))
    return nn.relu(y + shortcut)


class ResNet(nn.Module):
  """Encoder and linear head; the features are those the head sees, after the last ReLU."""

  num_classes: int
  stage_sizes: tuple[int, ...]
  widths: tuple[int, ...]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
    """Normalised images [B, H, W, ch] -> (logits [B, C], features [B, D]), both float32."""
    x = Conv3x3(self.widths[0])(x)
    x = nn.relu(batch_norm(train)(x))
    for stage, (size, width) in enumerate(zip(self.stage_sizes, self.widths, strict=True)):
      for block in range(size):
        x = ResidualBlock(width, 2 if stage > 0 and block == 0 else 1)(x, train)
    features = x.mean(axis=(1, 2))
    return nn.Dense(self.num_classes, name="head")(features), features
