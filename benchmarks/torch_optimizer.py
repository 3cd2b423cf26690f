"""AdamW with memdiff's warm-up and schedules, in PyTorch, for the yardsticks of both denoisers."""

import math
from collections.abc import Iterable

import torch

from memdiff.runtime.train_state import OptimizerConfig


def adamw(rule: OptimizerConfig, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.AdamW:
  return torch.optim.AdamW(
    parameters,
    lr=rule.learning_rate,
    betas=(rule.momentum, 0.999),
    eps=1e-8,
    weight_decay=rule.weight_decay,
    fused=True,
  )


def learning_rate(rule: OptimizerConfig, step: int, num_steps: int) -> float:
  """Of step `step`: linear warm-up, then constant or half a cosine, as `train_state` has it."""
  warmup = max(round(rule.warmup * num_steps), 1)
  if step < warmup or rule.schedule == "constant":
    return rule.learning_rate * min(step / warmup, 1.0)
  done = min((step - warmup) / (num_steps - warmup), 1.0)
  return rule.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
