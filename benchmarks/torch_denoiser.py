"""The feature denoiser, its training loop and its ancestral sampler in eager PyTorch.

The yardstick of benchmarks/feature_diffusion.py, which checks that this is the same function as
`memdiff.synthesis.denoisers.MLPDenoiser` with the same updates: AdamW with clipping, warm-up and
cosine decay, EMA of the weights. Batches are drawn on the device as memdiff.feature_diffusion draws
them: the feature left out of its own memory, the memory thinned out, moved with the feature, or
forgotten. It is written as one would write it in PyTorch: fused AdamW, foreach operations for the
EMA, and `scaled_dot_product_attention`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.torch_optimizer import adamw, learning_rate
from memdiff.diffusion.objectives import target
from memdiff.diffusion.sampler import coefficients
from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.synthesis.feature_diffusion import DiffusionConfig, FeatureData

_SAME_FEATURE = 1e-3  # as in memdiff.memory_bank


@dataclasses.dataclass(frozen=True)
class Memory:
  """What the bank holds of a batch's classes, see memdiff.memory_bank.Memory."""

  prototype: torch.Tensor  # [B, D]
  slots: torch.Tensor  # [B, K, D]
  mask: torch.Tensor  # [B, K] bool
  count: torch.Tensor  # [B]


class Block(nn.Module):
  def __init__(self, width: int, conditioning: int):
    super().__init__()
    self.modulation = nn.Linear(conditioning, 2 * width)
    self.inner = nn.Linear(width, width)
    self.outer = nn.Linear(width, width)

  def forward(self, h: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
    scale, shift = self.modulation(conditioning).chunk(2, dim=-1)
    y = functional.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift
    return h + self.outer(functional.silu(self.inner(y)))


class Denoiser(nn.Module):
  def __init__(self, num_classes: int, feature_dim: int, config: Any):
    super().__init__()
    embedding, width, heads = config.embedding_dim, config.width, config.num_heads
    self.num_heads = heads
    joint = feature_dim + (embedding + feature_dim + 2) + embedding
    attended = heads * feature_dim
    self.class_embedding = nn.Embedding(num_classes + 1, embedding)
    self.nothing = nn.Parameter(torch.randn(2, feature_dim))
    self.time_mlp = nn.Sequential(
      nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
    )
    self.to_query = nn.Linear(joint, attended)
    self.to_width = nn.Linear(joint + attended, width)
    self.to_conditioning = nn.Linear(joint + attended, embedding)
    self.blocks = nn.ModuleList([Block(width, embedding) for _ in range(config.num_blocks)])
    self.norm = nn.LayerNorm(width, eps=1e-6)
    self.to_output = nn.Linear(width, feature_dim)
    half = torch.arange(embedding // 2) / (embedding // 2)
    self.register_buffer("frequencies", torch.exp(-math.log(10_000.0) * half), persistent=False)

  def condition(self, label: torch.Tensor, memory: Memory) -> tuple[torch.Tensor, ...]:
    """All that depends on neither x_t nor t: (summary, keys, values, mask)."""
    parts = [self.class_embedding(label), memory.prototype]
    parts += [torch.log1p(memory.count)[:, None], (memory.count > 0).float()[:, None]]
    nothing = self.nothing[:, None, None].expand(-1, len(label), -1, -1)
    keys = torch.cat([nothing[0], memory.slots], dim=1)
    values = torch.cat([nothing[1], memory.slots], dim=1)
    mask = functional.pad(memory.mask, (1, 0), value=True)
    return torch.cat(parts, dim=-1), keys, values, mask[:, None]

  def denoise(self, x_t: torch.Tensor, t: torch.Tensor, context) -> torch.Tensor:
    summary, keys, values, mask = context
    angles = t[:, None] * self.frequencies
    time = self.time_mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))
    joint = torch.cat([x_t, summary, time], dim=-1)
    queries = self.to_query(joint).unflatten(-1, (self.num_heads, -1))  # [B, heads, D]
    attended = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    joint = torch.cat([joint, attended.flatten(1)], dim=-1)
    conditioning = functional.silu(self.to_conditioning(joint))
    h = self.to_width(joint)
    for block in self.blocks:
      h = block(h, conditioning)
    return self.to_output(self.norm(h))

  def forward(self, x_t, t, label, memory: Memory) -> torch.Tensor:
    return self.denoise(x_t, t, self.condition(label, memory))


def as_tensor(x: Any) -> torch.Tensor:
  return torch.from_numpy(np.array(x))


def as_memory(memory: Any) -> Memory:
  """From a memdiff.memory_bank.Memory."""
  fields = (memory.prototype, memory.slots, memory.mask, memory.count)
  return Memory(*(as_tensor(x) for x in fields))


def flat_parameters(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """MLPDenoiser's parameters under this module's names and in its layout."""
  flat = {
    "class_embedding.weight": params["class_embedding"]["embedding"],
    "nothing": params["nothing"],
    "norm.weight": params["norm"]["scale"],
    "norm.bias": params["norm"]["bias"],
  }
  layers = {n: params[n] for n in ("to_query", "to_width", "to_conditioning", "to_output")}
  layers["time_mlp.0"] = params["time_mlp"]["layers_0"]
  layers["time_mlp.2"] = params["time_mlp"]["layers_2"]
  number = 0
  while f"blocks_{number}" in params:
    for i, name in enumerate(("modulation", "outer", "inner")):  # in the order Flax made them
      layers[f"blocks.{number}.{name}"] = params[f"blocks_{number}"][f"Dense_{i}"]
    number += 1
  for name, layer in layers.items():
    kernel = np.asarray(layer["kernel"])
    flat[f"{name}.weight"] = kernel.reshape(kernel.shape[0], -1).T
    flat[f"{name}.bias"] = np.reshape(layer["bias"], -1)
  return {name: np.ascontiguousarray(value) for name, value in flat.items()}


def load_parameters(model: Denoiser, params: Mapping[str, Any]) -> None:
  """Copies MLPDenoiser's parameters; every parameter of either side must have its partner."""
  model.load_state_dict({n: as_tensor(x) for n, x in flat_parameters(params).items()})


class Trainer:
  """The training loop; `run` does steps of it, `update` one step on a given batch."""

  def __init__(
    self,
    model: Denoiser,
    config: DiffusionConfig,
    own: FeatureData,
    num_classes: int,
    seed: int,
  ):
    self.model, self.config, self.num_classes = model, config, num_classes
    by_class, bank = own.exemplars.by_class, own.bank
    self.features = as_tensor(own.exemplars.features)
    self.order = as_tensor(by_class.order).long()
    self.first, self.counts = as_tensor(by_class.starts).long(), as_tensor(by_class.counts).long()
    self.cumulative = as_tensor(own.cumulative)
    self.slots, self.prototype = as_tensor(bank.slots), as_tensor(bank.prototype)
    self.seen = as_tensor(bank.seen).float()
    alphas_bar = NoiseSchedule(config.schedule).alphas_bar
    self.signal = as_tensor(np.sqrt(alphas_bar).astype(np.float32))
    self.noise = as_tensor(np.sqrt(1 - alphas_bar).astype(np.float32))
    self.generator = torch.Generator().manual_seed(seed)
    self.parameters = list(model.parameters())
    self.ema = [p.detach().clone() for p in self.parameters]
    self.optimizer = adamw(config.optimizer, self.parameters)
    self.step = 0

  def _uniform(self, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=self.generator)

  def _thin_out(self, memory: Memory) -> Memory:
    available = memory.mask.sum(dim=1)
    log_size = torch.log(memory.count.clamp(min=1) + 1)
    wanted = torch.floor(torch.exp(self._uniform(len(available)) * log_size))
    lottery = torch.where(memory.mask, self._uniform(*memory.mask.shape), 2.0)
    rank = lottery.argsort(dim=1).argsort(dim=1)
    kept = memory.mask & (rank < wanted[:, None])
    number = kept.sum(dim=1).float()
    slots = memory.slots * kept[:, :, None]
    mean = slots.sum(dim=1) / number.clamp(min=1)[:, None]
    whole = wanted >= available
    return Memory(
      prototype=torch.where(whole[:, None], memory.prototype, mean),
      slots=torch.where(whole[:, None, None], memory.slots, slots),
      mask=torch.where(whole[:, None], memory.mask, kept),
      count=torch.where(whole, memory.count, number),
    )

  def _displace(self, x0: torch.Tensor, memory: Memory, chosen: torch.Tensor):
    a, b = (memory.prototype[torch.randperm(len(x0), generator=self.generator)] for _ in range(2))
    amount = self.config.displacement * torch.randn(len(x0), generator=self.generator) * chosen
    shift = amount[:, None] * (a - b)
    return x0 + shift, dataclasses.replace(
      memory,
      prototype=memory.prototype + shift,
      slots=memory.slots + shift[:, None] * memory.mask[:, :, None],
    )

  @torch.no_grad()
  def draw(self) -> tuple[torch.Tensor, torch.Tensor, Memory]:
    """A batch (x0, label, memory) as memdiff.feature_diffusion.draw_batch draws it."""
    batch = self.config.batch_size
    label = torch.searchsorted(
      self.cumulative, self._uniform(batch) * self.cumulative[-1], right=True
    )
    member = (self._uniform(batch) * self.counts[label]).long()
    x0 = self.features[self.order[self.first[label] + member]]
    slots, count = self.slots[label], self.seen[label]
    mask = torch.arange(slots.shape[1]) < count[:, None]
    # The feature itself is left out.
    mask &= (slots - x0[:, None]).square().mean(dim=-1) > _SAME_FEATURE**2
    others = (count - 1).clamp(min=0)
    prototype = (count[:, None] * self.prototype[label] - x0) / others.clamp(min=1)[:, None]
    prototype = prototype * (others > 0)[:, None]
    memory = self._thin_out(Memory(prototype, slots * mask[:, :, None], mask, others))
    kept = self._uniform(batch) >= self.config.label_dropout
    hidden = (self._uniform(batch) < self.config.anonymous) & kept
    if self.config.displacement > 0:
      x0, memory = self._displace(x0, memory, hidden & (memory.count > 0))
    memory = Memory(
      prototype=memory.prototype * kept[:, None],
      slots=memory.slots * kept[:, None, None],
      mask=memory.mask & kept[:, None],
      count=memory.count * kept,
    )
    return x0, torch.where(kept & ~hidden, label, self.num_classes), memory

  def update(self, x_t, t, wanted, label, memory: Memory) -> torch.Tensor:
    """One optimiser step on noised features x_t at model times t. Returns the loss."""
    self.optimizer.param_groups[0]["lr"] = learning_rate(
      self.config.optimizer, self.step, self.config.num_steps
    )
    self.optimizer.zero_grad()
    loss = functional.mse_loss(self.model(x_t, t, label, memory), wanted)
    loss.backward()
    if self.config.optimizer.clip_norm > 0:
      nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.clip_norm)
    self.optimizer.step()
    self.step += 1
    rate = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
    with torch.no_grad():
      torch._foreach_lerp_(self.ema, self.parameters, 1 - rate)
    return loss.detach()

  def run(self, num_steps: int) -> float:
    """`num_steps` steps; the losses are fetched once at the end."""
    losses = []
    for _ in range(num_steps):
      x0, label, memory = self.draw()
      t = torch.randint(len(self.signal), label.shape, generator=self.generator)
      eps = torch.randn(x0.shape, generator=self.generator)
      signal, noise = self.signal[t][:, None], self.noise[t][:, None]
      x_t = signal * x0 + noise * eps
      wanted = target(self.config.prediction, x0, eps, signal, noise)
      losses.append(self.update(x_t, t * (1000.0 / len(self.signal)), wanted, label, memory))
    return torch.stack(losses).mean().item()


@torch.inference_mode()
def sample_ancestral(
  model: Denoiser,
  label: torch.Tensor,
  memory: Memory,
  schedule: NoiseSchedule,
  num_steps: int,
  prediction: str,
  x0_limit: float,
  seed: int,
) -> np.ndarray:
  """Ancestral sampling with the posterior variance, one feature per label, as an eager loop."""
  generator = torch.Generator().manual_seed(seed)
  table = coefficients(schedule, "ddpm", num_steps, prediction)
  context = model.condition(label, memory)
  shape = (len(label), memory.prototype.shape[-1])
  x = torch.randn(shape, generator=generator)
  for i in range(num_steps):
    row = {name: float(column[i]) for name, column in table.items()}
    t = torch.full((len(label),), row["t"] * (1000.0 / schedule.num_steps))
    x0 = row["from_x"] * x + row["from_output"] * model.denoise(x, t, context)
    if x0_limit:
      x0 = x0.clamp(-x0_limit, x0_limit)
    x = row["keep"] * x + row["pull"] * x0
    if row["sigma"] > 0:
      x = x + row["sigma"] * torch.randn(shape, generator=generator)
  return x.numpy()
