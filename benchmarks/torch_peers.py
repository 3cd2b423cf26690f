"""The peers' denoisers in PyTorch, at their own sizes, with the loops they are used in.

LDMLR (Han et al. 2024): a 1-D U-Net of 7.8 million parameters on 64 numbers, batch 256, predicting
x0. CSL-P3: an MLP of 2.5 million parameters on 512 numbers, batch 64, predicting the noise. Both
sample by 1000 ancestral steps, and embed time and class anew for every sample in every step.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np
import torch
from torch import nn
from torch.nn import functional

NUM_STEPS = 1000


def time_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
  """Sinusoidal. t [B] in [0, 1000) -> [B, dim]."""
  frequencies = torch.exp(-math.log(10_000.0) * torch.arange(dim // 2) / (dim // 2))
  angles = t.float()[:, None] * frequencies[None]
  return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNet1D(nn.Module):
  """LDMLR's network, from the parameters of memdiff.synthesis.unet1d."""

  def __init__(self, params: Mapping[str, Any], width: int, num_levels: int):
    super().__init__()
    self.width, self.num_levels = width, num_levels
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    self._names = {name: name.replace("/", "__") for name in flat}
    for name, value in flat.items():
      self.register_parameter(self._names[name], nn.Parameter(torch.tensor(np.asarray(value))))

  def _get(self, name: str) -> torch.Tensor | None:
    return getattr(self, self._names[name]) if name in self._names else None

  def _linear(self, name, x):
    return functional.linear(x, self._get(f"{name}/kernel").T, self._get(f"{name}/bias"))

  def _conv(self, name, x, stride=1):
    kernel = self._get(f"{name}/kernel").T[:, :, None]
    return functional.conv1d(x, kernel, self._get(f"{name}/bias"), stride=stride)

  def _norm(self, name, x):
    return functional.group_norm(x, 8, self._get(f"{name}/scale"), self._get(f"{name}/bias"))

  def _rms(self, name, x):
    return (
      functional.normalize(x, dim=1)
      * self._get(f"{name}/gain")[None, :, None]
      * math.sqrt(x.shape[1])
    )

  def _block(self, name, x, conditioning):
    modulation = self._linear(f"{name}/Dense_0", functional.silu(conditioning))[:, :, None]
    scale, shift = modulation.chunk(2, dim=1)
    h = self._norm(f"{name}/GroupNorm_0", self._conv(f"{name}/Dense_1", x)) * (scale + 1) + shift
    h = self._norm(f"{name}/GroupNorm_1", self._conv(f"{name}/Dense_2", functional.silu(h)))
    shortcut = self._conv(f"{name}/Dense_3", x) if x.shape[1] != h.shape[1] else x
    return functional.silu(h) + shortcut

  def _attention(self, name, x, *, linear):
    batch, _, length = x.shape
    joint = self._conv(f"{name}/Dense_0", self._rms(f"{name}/RMSNorm_0", x))
    q, k, v = (part.reshape(batch, 4, 32, length) for part in joint.chunk(3, dim=1))
    if linear:
      q, k = q.softmax(dim=2) / 32**0.5, k.softmax(dim=3)
      out = (k @ v.transpose(2, 3)).transpose(2, 3) @ q
    else:
      out = v @ (q.transpose(2, 3) @ k / 32**0.5).softmax(dim=3).transpose(2, 3)
    out = self._conv(f"{name}/Dense_1", out.reshape(batch, 128, length))
    return x + (self._rms(f"{name}/RMSNorm_1", out) if linear else out)

  def _level(self, name, x, skips, conditioning):
    """Residual blocks, each with the next skip if there are any, and attention."""
    outputs = []
    for i in range(2):
      x = torch.cat([x, skips.pop()], dim=1) if skips else x
      x = self._block(f"{name}/ResidualBlock_{i}", x, conditioning)
      outputs.append(x)
    outputs[1] = self._attention(f"{name}/ResidualAttention_0", x, linear=True)
    return outputs

  def forward(self, x, t, label):
    """x [B, D], t [B] in [0, 1000), label [B] -> (output [B, D], bottleneck [B, E])."""
    time = functional.gelu(self._linear("time_in", time_embedding(t, self.width)))
    conditioning = self._linear("time_out", time) + self._get("class_embedding/embedding")[label]
    x = entry = self._conv("entry", x[:, None])
    stack, last = [], self.num_levels - 1
    for i in range(self.num_levels):
      outputs = self._level(f"down_{i}", x, [], conditioning)
      stack += outputs
      x = self._conv(f"down_{i}/Dense_0", outputs[1], stride=2 if i < last else 1)
    x = self._attention("attend", self._block("middle_0", x, conditioning), linear=False)
    x = self._block("middle_1", x, conditioning)
    bottleneck = x.mean(dim=2)
    for i in range(self.num_levels):
      skips = [stack.pop(-2), stack.pop()]  # the level takes from the end
      x = self._level(f"up_{i}", x, skips, conditioning)[1]
      if i < last:
        x = functional.interpolate(x, scale_factor=2, mode="nearest")
      x = self._conv(f"up_{i}/Dense_0", x)
    x = self._block("last", torch.cat([x, entry], dim=1), conditioning)
    return self._conv("exit", x)[:, 0], bottleneck


class MLP(nn.Module):
  """CSL-P3's network: features, time and class in a row, four layers."""

  def __init__(self, num_classes: int, feature_dim: int = 512, width: int = 1024):
    super().__init__()
    self.classes = nn.Embedding(num_classes, 128)
    self.time = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 128))
    layers: list[nn.Module] = []
    sizes = (feature_dim + 256, width, width, width)
    for before, after in itertools.pairwise(sizes):
      layers += [nn.Linear(before, after), nn.GELU(), nn.LayerNorm(after), nn.Dropout(0.1)]
    self.layers = nn.Sequential(*layers[:-1], nn.Linear(width, feature_dim))

  def forward(self, x, t, label):
    time = self.time(time_embedding(t, 256))
    return (self.layers(torch.cat([x, time, self.classes(label)], dim=1)),)


class Trainer:
  """Eager training on a fixed set of features, one optimiser step after the other."""

  def __init__(
    self,
    model: nn.Module,
    features: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    predicts_noise: bool,
  ):
    self.model, self.batch_size, self.predicts_noise = model, batch_size, predicts_noise
    self.features, self.labels = torch.tensor(features), torch.tensor(labels).long()
    self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    angle = (torch.arange(NUM_STEPS) + 1) / NUM_STEPS
    signal = torch.cos((angle + 0.008) / 1.008 * math.pi / 2)
    self.signal, self.noise = signal, torch.sqrt(1 - signal**2)

  def run(self, num_steps: int) -> float:
    loss = torch.zeros(())
    for _ in range(num_steps):
      index = torch.randint(len(self.labels), (self.batch_size,))
      x0, label = self.features[index], self.labels[index]
      t = torch.randint(NUM_STEPS, label.shape)
      eps = torch.randn(x0.shape)
      x_t = self.signal[t][:, None] * x0 + self.noise[t][:, None] * eps
      predicted = self.model(x_t, t, label)[0]
      loss = functional.mse_loss(predicted, eps if self.predicts_noise else x0)
      self.optimizer.zero_grad()
      loss.backward()
      self.optimizer.step()
    return loss.item()

  @torch.inference_mode()
  def denoise(self, label: torch.Tensor, num_steps: int) -> np.ndarray:
    """The work of `num_steps` of the 1000 ancestral steps, one feature per label."""
    self.model.eval()
    x = torch.randn(len(label), self.features.shape[1])
    for step in range(num_steps):
      t = torch.full(label.shape, NUM_STEPS - 1 - step)
      x = 0.99 * self.model(x, t, label)[0].clamp(-1, 1) + 0.01 * x + 0.01 * torch.randn(x.shape)
    self.model.train()
    return x.numpy()
