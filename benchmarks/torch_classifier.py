"""The CIFAR ResNets and their training loop in eager PyTorch.

The yardstick of benchmarks/classifier.py, which checks that this is the same function as
`memdiff.classifier.backbones.ResNet`. Batches are drawn from uint8 images in memory, padded,
cropped, mirrored and normalised for the whole batch at once. It is written as one would write it in
PyTorch: channels last, fused SGD.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from memdiff.classifier.backbones import Architecture


class Block(nn.Module):
  def __init__(self, channels: int, features: int, stride: int):
    super().__init__()
    self.stride, self.added = stride, features - channels
    self.conv1 = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(features)
    self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
    self.bn2 = nn.BatchNorm2d(features)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
    if self.stride > 1 or self.added:
      x = x[:, :, :: self.stride, :: self.stride]
      x = functional.pad(x, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
    return functional.relu(y + x)


class ResNet(nn.Module):
  def __init__(self, architecture: Architecture, channels: int, num_classes: int):
    super().__init__()
    width = architecture.widths[0]
    self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(width)
    sizes = zip(architecture.stage_sizes, architecture.widths, strict=True)
    for stage, (size, features) in enumerate(sizes):
      blocks = []
      for number in range(size):
        blocks.append(Block(width, features, 2 if stage > 0 and number == 0 else 1))
        width = features
      setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
    self.num_stages = len(architecture.widths)
    self.fc = nn.Linear(width, num_classes)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = functional.relu(self.bn1(self.conv1(x)))
    for stage in range(self.num_stages):
      x = getattr(self, f"layer{stage + 1}")(x)
    return self.fc(x.mean(dim=(2, 3)))


def state_dict(model: nn.Module) -> Mapping[str, np.ndarray]:
  """The weights as arrays, as `memdiff.classifier.pretrained` reads them."""
  return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


class Trainer:
  """Momentum SGD on batches of uint8 images; a call of `run` does some steps."""

  def __init__(
    self, model: nn.Module, images: np.ndarray, labels: np.ndarray, batch_size: int, padding: int
  ):
    self.model = model.to(memory_format=torch.channels_last).train()
    self.images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    self.labels = torch.from_numpy(labels).long()
    self.batch_size, self.padding = batch_size, padding
    self.optimizer = torch.optim.SGD(
      self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4, fused=True
    )

  def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
    """Cropped, mirrored and normalised images, and labels."""
    index = torch.randint(len(self.labels), (self.batch_size,))
    images, pad = self.images[index], self.padding
    size = images.shape[-1]
    if pad:
      padded = functional.pad(images, (pad, pad, pad, pad))
      corner = torch.randint(2 * pad + 1, (2, self.batch_size, 1))
      rows, columns = corner + torch.arange(size)
      item = torch.arange(self.batch_size)[:, None, None]
      columns = torch.where(torch.rand(self.batch_size, 1) < 0.5, columns, columns.flip(1))
      images = padded.permute(0, 2, 3, 1)[item, rows[:, :, None], columns[:, None]]
      images = images.permute(0, 3, 1, 2)  # channels last in memory
    return (images.float() - 127.0) / 64.0, self.labels[index]

  def run(self, steps: int) -> Any:
    for _ in range(steps):
      images, labels = self.batch()
      loss = functional.cross_entropy(self.model(images), labels)
      self.optimizer.zero_grad(set_to_none=True)
      loss.backward()
      self.optimizer.step()
    return loss.item()
