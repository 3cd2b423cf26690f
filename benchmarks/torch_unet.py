"""DDPM's U-Net and its training loop in eager PyTorch.

The yardstick of benchmarks/pixel_diffusion.py; a test holds it to be the same function as
`memdiff.diffusion.unet.UNet` without exemplars. Training is that of plain diffusion: a batch of
uint8 images in memory, labels dropped, mirrored if the config says so, noised; clipped Adam with
warm-up, and EMA of the weights. It is written as one would write it in PyTorch: channels last,
fused Adam, foreach operations for the EMA, `scaled_dot_product_attention`, autocast for bfloat16.
"""

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.torch_optimizer import adamw, learning_rate
from memdiff.diffusion.objectives import target
from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.diffusion.unet import UNetConfig
from memdiff.synthesis.pixel_settings import PixelDiffusionConfig

# The names of Flax's layers -> those here.
_NAMES = {
  "GroupNorm_0": "norm1", "GroupNorm_1": "norm2", "_Conv_0": "conv1", "_Conv_1": "conv2",
  "Dense_0": "told", "layers_0": "0", "layers_2": "2",
}  # fmt: skip
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def _norm(width: int) -> nn.GroupNorm:
  most = max(min(32, width // 4), 1)
  groups = next(n for n in range(most, 0, -1) if width % n == 0)
  return nn.GroupNorm(groups, width, eps=1e-6)


def _conv(channels: int, width: int, stride: int = 1) -> nn.Conv2d:
  return nn.Conv2d(channels, width, 3, stride, 1)


class Block(nn.Module):
  def __init__(self, channels: int, width: int, told: int, dropout: float):
    super().__init__()
    self.norm1, self.conv1 = _norm(channels), _conv(channels, width)
    self.told = nn.Linear(told, width)
    self.norm2, self.conv2 = _norm(width), _conv(width, width)
    self.dropout = nn.Dropout(dropout)
    self.shortcut = nn.Conv2d(channels, width, 1) if channels != width else nn.Identity()

  def forward(self, x: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    h = self.conv1(functional.silu(self.norm1(x))) + self.told(told)[:, :, None, None]
    h = self.conv2(self.dropout(functional.silu(self.norm2(h))))
    return self.shortcut(x) + h


class Attention(nn.Module):
  def __init__(self, width: int):
    super().__init__()
    self.norm1 = _norm(width)
    self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
    self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    rows = self.norm1(x).flatten(2).transpose(1, 2)  # [B, H W, width]
    query, key, value = (layer(rows)[:, None] for layer in (self.query, self.key, self.value))
    found = functional.scaled_dot_product_attention(query, key, value)[:, 0]
    return x + self.out(found).transpose(1, 2).unflatten(2, x.shape[2:])


class UNet(nn.Module):
  """Denoises images [B, ch, side, side]."""

  def __init__(self, num_classes: int, image_channels: int, side: int, config: UNetConfig):
    super().__init__()
    c = config.channels
    widths = [c * m for m in config.multipliers]
    sides = [side // 2**level for level in range(len(widths))]
    self.label_embedding = nn.Embedding(num_classes + 1, 4 * c)
    self.time_mlp = nn.Sequential(nn.Linear(c, 4 * c), nn.SiLU(), nn.Linear(4 * c, 4 * c))
    self.first = _conv(image_channels, c)
    self.down, self.attend_down = nn.ModuleList(), nn.ModuleList()
    self.up, self.attend_up = nn.ModuleList(), nn.ModuleList()

    def attention(width, side):
      return Attention(width) if side in config.attention else nn.Identity()

    now, skips = c, [c]
    for level, (width, pixels) in enumerate(zip(widths, sides, strict=True)):
      blocks = []
      for _ in range(config.num_blocks):
        blocks.append(Block(now, width, 4 * c, config.dropout))
        now = width
      self.down.append(nn.ModuleList(blocks))
      self.attend_down.append(nn.ModuleList(attention(width, pixels) for _ in blocks))
      skips += [width] * (config.num_blocks + (level < len(widths) - 1))
    self.shrink = nn.ModuleList(_conv(width, width, 2) for width in widths[:-1])
    self.middle = nn.ModuleList(Block(now, now, 4 * c, config.dropout) for _ in range(2))
    self.attend_middle = Attention(now)
    for width, pixels in zip(reversed(widths), reversed(sides), strict=True):
      blocks = []
      for _ in range(config.num_blocks + 1):
        blocks.append(Block(now + skips.pop(), width, 4 * c, config.dropout))
        now = width
      self.up.append(nn.ModuleList(blocks))
      self.attend_up.append(nn.ModuleList(attention(width, pixels) for _ in blocks))
    self.grow = nn.ModuleList(_conv(width, width) for width in reversed(widths[1:]))
    self.norm, self.last = _norm(now), _conv(now, image_channels)
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(c // 2) / (c // 2))
    self.register_buffer("frequencies", frequencies, persistent=False)

  def forward(self, x_t: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """x_t [B, ch, side, side], t [B] in [0, 1000), label [B] -> like x_t."""
    angles = t[:, None] * self.frequencies
    time = self.time_mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))
    told = functional.silu(time + self.label_embedding(label))
    h = self.first(x_t)
    skips = [h]
    for level, blocks in enumerate(self.down):
      for block, attend in zip(blocks, self.attend_down[level], strict=True):
        h = attend(block(h, told))
        skips.append(h)
      if level < len(self.shrink):
        h = self.shrink[level](h)
        skips.append(h)
    h = self.middle[1](self.attend_middle(self.middle[0](h, told)), told)
    for level, blocks in enumerate(self.up):
      for block, attend in zip(blocks, self.attend_up[level], strict=True):
        h = attend(block(torch.cat([h, skips.pop()], dim=1), told))
      if level < len(self.grow):
        h = self.grow[level](functional.interpolate(h, scale_factor=2, mode="nearest"))
    return self.last(functional.silu(self.norm(h)))


def flat_parameters(params: Mapping[str, Any], path: str = "") -> dict[str, np.ndarray]:
  """The parameters of memdiff's U-Net under this module's names and in its layout.

  Kernels [3, 3, in, out] become [out, in, 3, 3], and [in, out] become [out, in].
  """
  flat = {}
  for name, value in params.items():
    if isinstance(value, Mapping):
      renamed = _NAMES.get(name) or _numbered(name)
      flat |= flat_parameters(value, f"{path}{renamed}.")
      continue
    value = np.asarray(value)
    if name == "kernel":
      value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    flat[path + _LEAVES[name]] = np.ascontiguousarray(value)
  return flat


def _numbered(name: str) -> str:
  """down_0_1 -> down.0.1, attend_down_0_1 -> attend_down.0.1."""
  words = name.split("_")
  return "".join(f".{w}" if w.isdigit() else f"_{w}" for w in words).removeprefix("_")


def load_parameters(model: UNet, params: Mapping[str, Any]) -> None:
  """Copies the U-Net's parameters; every parameter of either side must have its partner."""
  shapes = {name: value.shape for name, value in model.state_dict().items()}
  given = flat_parameters(params)
  tensors = {n: torch.from_numpy(x.copy()) for n, x in given.items()}
  for name, tensor in tensors.items():
    if tensor.ndim == 2 and len(shapes.get(name, ())) == 4:  # a shortcut, here a convolution
      tensors[name] = tensor[:, :, None, None]
  model.load_state_dict(tensors)


@torch.no_grad()
def output(model: UNet, x_t: np.ndarray, t: np.ndarray, label: np.ndarray) -> np.ndarray:
  """What the network makes of [B, side, side, ch] without dropout, in float32 and this layout."""
  device, training = model.frequencies.device, model.training
  x_t = torch.from_numpy(x_t.transpose(0, 3, 1, 2).copy())
  given = x_t, torch.from_numpy(t), torch.from_numpy(label).long()
  found = model.eval()(*(x.to(device) for x in given))
  model.train(training)
  return found.cpu().numpy().transpose(0, 2, 3, 1)


class Trainer:
  """Plain diffusion on uint8 images [N, H, W, ch]; a call of `run` does some steps."""

  def __init__(
    self, model: UNet, config: PixelDiffusionConfig, images: np.ndarray, labels: np.ndarray,
    *, device: str = "cpu", compiled: bool = False,
  ):  # fmt: skip
    self.model = model.to(device, memory_format=torch.channels_last).train()
    self.forward = torch.compile(self.model) if compiled else self.model
    self.config, self.device = config, device
    self.images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device)
    self.labels = torch.from_numpy(labels).long().to(device)
    self.num_classes = model.label_embedding.num_embeddings - 1
    alphas_bar = NoiseSchedule(config.schedule).alphas_bar
    self.signal, self.noise = (
      torch.from_numpy(np.sqrt(x).astype(np.float32)).to(device)
      for x in (alphas_bar, 1 - alphas_bar)
    )
    self.parameters = list(self.model.parameters())
    self.ema = [p.detach().clone() for p in self.parameters]
    self.optimizer = adamw(config.optimizer, self.parameters)
    self.step = 0

  @torch.no_grad()
  def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch (x0, label): images drawn as they are, from -1 to 1, some labels dropped."""
    size = self.config.batch_size
    index = torch.randint(len(self.labels), (size,), device=self.device)
    x0 = self.images[index].to(memory_format=torch.channels_last).float() / 127.5 - 1
    if self.config.mirror:
      flip = torch.rand(size, 1, 1, 1, device=self.device) < 0.5
      x0 = torch.where(flip, x0.flip(-1), x0)
    dropped = torch.rand(size, device=self.device) < self.config.label_dropout
    return x0, torch.where(dropped, self.num_classes, self.labels[index])

  def update(self, x_t, t, wanted, label) -> torch.Tensor:
    """One optimiser step on noised images x_t at model times t. Returns the loss."""
    self.optimizer.param_groups[0]["lr"] = learning_rate(
      self.config.optimizer, self.step, self.config.num_steps
    )
    self.optimizer.zero_grad(set_to_none=True)
    with self._precision():
      output = self.forward(x_t, t, label)
    loss = functional.mse_loss(output.float(), wanted)
    loss.backward()
    if self.config.optimizer.clip_norm > 0:
      nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.clip_norm)
    self.optimizer.step()
    self.step += 1
    rate = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
    with torch.no_grad():
      torch._foreach_lerp_(self.ema, self.parameters, 1 - rate)
    return loss.detach()

  def _precision(self):
    if self.config.unet.dtype == "float32":
      return contextlib.nullcontext()
    return torch.autocast(torch.device(self.device).type, torch.bfloat16)

  def run(self, num_steps: int) -> float:
    """`num_steps` steps; the losses are fetched once at the end."""
    losses = []
    for _ in range(num_steps):
      x0, label = self.draw()
      t = torch.randint(len(self.signal), label.shape, device=self.device)
      eps = torch.randn_like(x0)
      signal, noise = (x[t][:, None, None, None] for x in (self.signal, self.noise))
      wanted = target(self.config.prediction, x0, eps, signal, noise)
      time = t * (1000.0 / len(self.signal))
      losses.append(self.update(signal * x0 + noise * eps, time, wanted, label))
    return torch.stack(losses).mean().item()
