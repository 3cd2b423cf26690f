"""Speed against the peers, each at its own size: LDMLR's 1-D U-Net and CSL-P3's MLP in PyTorch.

  python -m benchmarks.peers [--json FILE] [--rounds N]

Features are random numbers of the peer's size (speed does not depend on them): 100 classes at
imbalance 100, 64 numbers each for LDMLR, 512 for CSL-P3. Ours is the denoiser of
configs/digits_lt.py:full on the same features, one seed and five at once, and its default sampler;
that its features are as good as those of 1000 steps is shown by benchmarks.feature_diffusion.
PyTorch runs eagerly, as the peers do, with one thread or all, whichever is faster. Its 1000
sampling steps are timed by twenty of them.

A profile follows: floating-point operations per example, as XLA and PyTorch count them, and the
rate at which they are done, beside the rate of a large matrix product on the same machine.
"""

import argparse
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import speed_tables, timing, torch_peers
from benchmarks.timing import Row, interleave, rounded, speedup
from benchmarks.training import Training, step_flops
from configs.digits_lt import get_config
from memdiff import config as config_lib
from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.experiments.feature_settings import MemdiffConfig
from memdiff.memory import feature_space, memory_bank
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.random import base_keys
from memdiff.synthesis import feature_diffusion, hallucination
from memdiff.synthesis.hallucination import TrainedDenoiser
from memdiff.synthesis.unet1d import UNet1D

_CLASSES, _SEEDS, _TIMED_STEPS = 100, (0, 1, 2, 3, 4), 20
_SAMPLERS = (("ddim", 50), ("dpm++", 20))
_SQUARE = 1024
_WHOLE_TARGET = 20.0  # seconds for 100 classes x 500 features of 64 numbers


@dataclasses.dataclass(frozen=True)
class Peer:
  """A peer with its sizes and what ours should be, times its speed."""

  name: str
  dim: int
  batch_size: int
  predicts_noise: bool
  sampled_at_once: int
  training_target: float
  sampling_target: float

  def model(self) -> torch.nn.Module:
    if self.name == "CSL-P3":
      return torch_peers.MLP(_CLASSES, self.dim)
    net = UNet1D(_CLASSES, self.dim, 64, (1, 2, 4, 8), False)
    rows = jnp.zeros((1, self.dim)), jnp.zeros(1), jnp.zeros(1, jnp.int32), ()
    params = jax.jit(net.init)(jax.random.key(0), *rows)["params"]
    return torch_peers.UNet1D(jax.device_get(params), 64, 4)


PEERS = (
  Peer("LDMLR", 64, 256, False, 64, 25.0, 1000.0),
  Peer("CSL-P3", 512, 64, True, 256, 1.2, 50.0),
)


def features_of(dim: int) -> tuple[np.ndarray, np.ndarray]:
  """Long-tailed random features [N, D] and labels [N]."""
  counts = (500 * 100 ** (-np.arange(_CLASSES) / (_CLASSES - 1))).astype(int)
  labels = np.repeat(np.arange(_CLASSES), counts).astype(np.int32)
  random = np.random.RandomState(0)
  means = random.standard_normal((_CLASSES, dim))
  return (means[labels] + random.standard_normal((len(labels), dim))).astype(np.float32), labels


class Setting:
  """A peer and ours, on features of the peer's size."""

  def __init__(self, peer: Peer, config: MemdiffConfig):
    self.peer, self.mesh = peer, mesh_lib.make_mesh()
    features, labels = features_of(peer.dim)
    self.diffusion = dataclasses.replace(config.diffusion, batch_size=peer.batch_size)
    self.hallucination = config.hallucination
    bank = feature_space.fill_bank(
      features[None], labels[None], _CLASSES, base_keys((0,), "bank"), config.memory_bank, self.mesh
    )
    runs = feature_space.make_runs(features[None], labels[None], bank, None, _CLASSES, self.mesh)
    self.bank = jax.tree.map(lambda x: x[0], runs.bank)
    self.per_seed = feature_diffusion.make_data(
      runs.exemplars.features, labels, runs.bank, _CLASSES, self.diffusion.class_exponent, self.mesh
    )
    self.trainer = torch_peers.Trainer(
      peer.model(), features, labels, peer.batch_size, peer.predicts_noise
    )
    self.threads = sorted({1, os.cpu_count() or 1})

  def training(self, seeds: tuple[int, ...]) -> Training:
    per_seed = jax.tree.map(lambda x: jnp.repeat(x, len(seeds), axis=0), self.per_seed)
    per_seed = jax.device_put(per_seed, mesh_lib.replicated(self.mesh))
    stage = feature_diffusion.make_stage(self.diffusion, per_seed, _CLASSES, self.mesh)
    return Training(stage, seeds, self.mesh, 10)

  def with_threads(self, work: Callable[[], Any], units: float) -> dict[str, Any]:
    """The peer's variants for `interleave`, one for each number of threads."""
    return {
      f"{self.peer.name}, {number} threads": (_with_threads(number, work), units)
      for number in self.threads
    }

  def sampler(self, method: str, steps: int, params: Any, labels: np.ndarray):
    """Samples of these labels per call."""
    settings = dataclasses.replace(self.hallucination, sampler=method, num_steps=steps)
    schedule = NoiseSchedule(self.diffusion.schedule)

    @jax.jit
    def sample(params, bank):
      denoiser = TrainedDenoiser(self.denoiser(), params, schedule, self.diffusion.prediction)
      key = jax.random.key(0)
      return hallucination.sample_features(denoiser, bank, labels, key, settings, self.mesh)

    return lambda: sample(params, self.bank)

  def denoiser(self) -> nn.Module:
    return feature_diffusion.make_denoiser(self.diffusion, _CLASSES, self.peer.dim)


def measure(peer: Peer, config: MemdiffConfig, rounds: int) -> tuple[list[Row], dict[str, Any]]:
  """Examples per second of training, features per second of sampling, and the profile of both."""
  setting, batch = Setting(peer, config), float(peer.batch_size)
  one, many = setting.training((0,)), setting.training(_SEEDS)
  trained = interleave(
    {
      "ours, one seed": (one, one.work * batch),
      "ours, five seeds": (many, many.work * batch),
      **setting.with_threads(lambda: setting.trainer.run(2), 2 * batch),
    },
    rounds,
  )
  profile = [
    _profiled(
      "training",
      peer.name,
      _torch_operations(lambda: setting.trainer.run(1)) / batch,
      1 / _fastest(peer, trained).median,
    ),
    _profiled(
      "training", "ours", step_flops(one.stage) / batch, 1 / trained["ours, one seed"].median
    ),
  ]
  params = jax.tree.map(lambda x: x[0], one.state.ema_params)
  sampled, found = measure_sampling(setting, params, rounds)
  whole, of_whole = measure_whole(setting, params) if peer.dim == 64 else ([], [])
  rows = _rows(peer, "training", "examples/s", trained, peer.training_target)
  rows += _rows(peer, "sampling", "features/s", sampled, peer.sampling_target) + whole
  times = {"training": trained, "sampling": sampled}
  return rows, {
    kind: {name: clock.as_dict() for name, clock in clocks.items()}
    for kind, clocks in times.items()
  } | {"profile": profile + found + of_whole}


def measure_sampling(
  setting: Setting, params: Any, rounds: int
) -> tuple[dict[str, timing.Timing], list[dict[str, Any]]]:
  """Ten features per class by each of our samplers against the peer's thousand steps."""
  peer, trainer = setting.peer, setting.trainer
  labels, label = np.repeat(np.arange(_CLASSES), 10), torch.arange(peer.sampled_at_once) % _CLASSES
  variants = {
    f"ours, {method}-{steps}": (setting.sampler(method, steps, params, labels), float(len(labels)))
    for method, steps in _SAMPLERS
  }
  share = _TIMED_STEPS / torch_peers.NUM_STEPS
  variants |= setting.with_threads(lambda: trainer.denoise(label, _TIMED_STEPS), share * len(label))
  sampled = interleave(variants, rounds)
  theirs = _torch_operations(lambda: trainer.denoise(label, 1)) / len(label)
  profile = [
    _profiled(
      "sampling, 1000 steps",
      peer.name,
      torch_peers.NUM_STEPS * theirs,
      1 / _fastest(peer, sampled).median,
    )
  ]
  for method, steps in _SAMPLERS:
    operations = steps * denoising_flops(setting, params, labels)
    rate = 1 / sampled[f"ours, {method}-{steps}"].median
    profile.append(_profiled(f"sampling, {method}-{steps}", "ours", operations, rate))
  return sampled, profile


def measure_whole(setting: Setting, params: Any) -> tuple[list[Row], list[dict[str, Any]]]:
  """500 features of each class."""
  rows, profile, labels = [], [], np.repeat(np.arange(_CLASSES), 500)
  variants = {
    method: (setting.sampler(method, steps, params, labels), 1.0) for method, steps in _SAMPLERS
  }
  for (method, clock), (_, steps) in zip(interleave(variants, 1).items(), _SAMPLERS, strict=True):
    what = f"100 classes x 500 features, {method}-{steps}"
    seconds, met = f"{clock.median:.1f} s", clock.median < _WHOLE_TARGET
    rows.append(
      Row(f"{what}, {setting.peer.dim} numbers", seconds, "", f"< {_WHOLE_TARGET:g} s", met)
    )
    operations = steps * denoising_flops(setting, params, labels)
    profile.append(_profiled(what, "ours", operations, len(labels) / clock.median))
  return rows, profile


def denoising_flops(setting: Setting, params: Any, labels: np.ndarray) -> float:
  """Operations per wanted feature of one call of the denoiser, whose context is there already."""
  groups, _, size = hallucination.group(labels, setting.hallucination.chunk_size)
  denoiser, variables = setting.denoiser(), {"params": params}
  memory = memory_bank.read(setting.bank, jnp.asarray(groups), mesh=setting.mesh)
  context = denoiser.apply(variables, jnp.asarray(groups), memory, method="condition")
  rows = jnp.zeros((len(groups) * size, denoiser.feature_dim))

  def denoise(x, context):
    return denoiser.apply(variables, x, jnp.ones(1), context, method="denoise")

  return float(jax.jit(denoise).lower(rows, context).cost_analysis()["flops"]) / len(labels)


def _torch_operations(work: Callable[[], Any]) -> float:
  with FlopCounterMode(display=False) as counter:
    work()
  return float(counter.get_total_flops())


def _profiled(what: str, who: str, operations: float, rate: float) -> dict[str, Any]:
  """A row of the profile, of operations per example and examples per second."""
  return {
    "what": what,
    "who": who,
    "operations": operations,
    "operations_per_second": operations * rate,
  }


def matmul_rate(rounds: int) -> float:
  """Operations per second of the product of two square matrices, the faster library's."""
  square = np.random.RandomState(0).standard_normal((_SQUARE, _SQUARE)).astype(np.float32)
  ours, theirs = jnp.asarray(square), torch.tensor(square)
  product = jax.jit(jnp.matmul)
  variants = {
    "JAX": (lambda: product(ours, ours), 1.0),
    "PyTorch": (_with_threads(os.cpu_count() or 1, lambda: theirs @ theirs), 1.0),
  }
  fastest = min(clock.median for clock in interleave(variants, rounds).values())
  return 2 * _SQUARE**3 / fastest


def _with_threads(number: int, work):
  def call():
    torch.set_num_threads(number)
    return work()

  return call


def _fastest(peer: Peer, times: Mapping[str, timing.Timing]) -> timing.Timing:
  return min((t for n, t in times.items() if n.startswith(peer.name)), key=lambda t: t.median)


def _rows(peer: Peer, what: str, unit: str, times, target: float) -> list[Row]:
  theirs = min((n for n in times if n.startswith(peer.name)), key=lambda n: times[n].median)
  rows = [Row(f"{what}, {theirs}", f"{rounded(1 / times[theirs].median)} {unit}")]
  for name, clock in times.items():
    if name.startswith("ours"):
      ratio = speedup(times[theirs], clock)
      rows.append(
        Row(
          f"{what}, {name}, {peer.dim} numbers", f"{rounded(1 / clock.median)} {unit}", str(ratio),
          f">= {target:g}x", ratio.of_medians >= target,
        )
      )  # fmt: skip
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", type=pathlib.Path, help="write versions, hardware and all rounds")
  parser.add_argument("--rounds", type=int, default=5, help="repeats of every measurement")
  arguments = parser.parse_args()
  config = config_lib.build(MemdiffConfig, get_config("full").to_dict())
  result = {**timing.environment(), "matmul_rate": matmul_rate(arguments.rounds)}
  for peer in PEERS:
    print(f"timing against {peer.name}", flush=True)
    found, result[peer.name] = measure(peer, config, arguments.rounds)
    print(timing.table(found) + "\n", flush=True)
    print(speed_tables.profile(result, peer.name), flush=True)
    result[peer.name]["table"] = [dataclasses.asdict(row) for row in found]
  if arguments.json:
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
