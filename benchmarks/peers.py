"""Speed against the peers, each at its own size: LDMLR's 1-D U-Net and CSL-P3's MLP in PyTorch.

  python -m benchmarks.peers [--json FILE] [--rounds N]

Features are random numbers of the peer's size (speed does not depend on them): 100 classes at
imbalance 100, 64 numbers each for LDMLR, 512 for CSL-P3. Ours is the denoiser of
configs/digits_lt.py:full on the same features, one seed and five at once, and its default sampler;
that its features are as good as those of 1000 steps is shown by benchmarks.feature_diffusion.
PyTorch runs eagerly, as the peers do, with one thread or all, whichever is faster. Its 1000
sampling steps are timed by twenty of them.
"""

import argparse
import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import timing, torch_peers
from benchmarks.timing import Row, interleave, speedup
from benchmarks.training import Training
from configs.digits_lt import get_config
from memdiff import config as config_lib
from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.experiments.feature_settings import MemdiffConfig
from memdiff.memory import feature_space
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.random import base_keys
from memdiff.synthesis import feature_diffusion, hallucination
from memdiff.synthesis.hallucination import TrainedDenoiser
from memdiff.synthesis.unet1d import UNet1D

_CLASSES, _SEEDS, _TIMED_STEPS = 100, (0, 1, 2, 3, 4), 20
_SAMPLERS = (("ddim", 50), ("dpm++", 20))
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


def measure(peer: Peer, config: MemdiffConfig, rounds: int) -> tuple[list[Row], dict[str, Any]]:
  """Examples per second of training and features per second of sampling, round by round."""
  mesh, (features, labels) = mesh_lib.make_mesh(), features_of(peer.dim)
  diffusion = dataclasses.replace(config.diffusion, batch_size=peer.batch_size)
  bank = feature_space.fill_bank(
    features[None], labels[None], _CLASSES, base_keys((0,), "bank"), config.memory_bank, mesh
  )
  runs = feature_space.make_runs(features[None], labels[None], bank, None, _CLASSES, mesh)
  own = feature_diffusion.make_data(
    runs.exemplars.features, labels, runs.bank, _CLASSES, diffusion.class_exponent, mesh
  )
  several = jax.tree.map(lambda x: jnp.repeat(x, len(_SEEDS), axis=0), own)
  several = jax.device_put(several, mesh_lib.replicated(mesh))
  stage = feature_diffusion.make_stage(diffusion, own, _CLASSES, mesh)
  one = Training(stage, (0,), mesh, 10)
  many = Training(
    feature_diffusion.make_stage(diffusion, several, _CLASSES, mesh), _SEEDS, mesh, 10
  )
  trainer = torch_peers.Trainer(
    peer.model(), features, labels, peer.batch_size, peer.predicts_noise
  )
  variants = {
    "ours, one seed": (one, one.work * peer.batch_size),
    "ours, five seeds": (many, many.work * peer.batch_size),
  }
  threads = sorted({1, os.cpu_count() or 1})
  for number in threads:
    variants[f"{peer.name}, {number} threads"] = (
      _with_threads(number, lambda: trainer.run(2)),
      2.0 * peer.batch_size,
    )
  trained = interleave(variants, rounds)

  params = jax.tree.map(lambda x: x[0], one.state.ema_params)
  denoiser = feature_diffusion.make_denoiser(diffusion, _CLASSES, peer.dim)
  wanted, many_wanted = (jnp.repeat(jnp.arange(_CLASSES), n) for n in (10, 500))
  schedule = NoiseSchedule(diffusion.schedule)
  one_bank = jax.tree.map(lambda x: x[0], runs.bank)

  def sampler(method, steps, wanted=wanted):
    settings = dataclasses.replace(config.hallucination, sampler=method, num_steps=steps)
    sample = jax.jit(
      lambda params, bank: hallucination.sample_features(
        TrainedDenoiser(denoiser, params, schedule, diffusion.prediction),
        bank,
        wanted,
        jax.random.key(0),
        settings,
        mesh,
      )
    )
    return lambda: sample(params, one_bank)

  label = torch.arange(peer.sampled_at_once) % _CLASSES
  share = _TIMED_STEPS / torch_peers.NUM_STEPS
  variants = {
    f"ours, {method}-{steps}": (sampler(method, steps), float(len(wanted)))
    for method, steps in _SAMPLERS
  }
  for number in threads:
    variants[f"{peer.name}, {number} threads"] = (
      _with_threads(number, lambda: trainer.denoise(label, _TIMED_STEPS)),
      share * len(label),
    )
  sampled = interleave(variants, rounds)
  whole = {}
  if peer.dim == 64:
    whole = interleave({m: (sampler(m, n, many_wanted), 1.0) for m, n in _SAMPLERS}, 1)
  rows = _rows(peer, "training", "examples/s", trained, peer.training_target)
  rows += _rows(peer, "sampling", "features/s", sampled, peer.sampling_target)
  for name, clock in whole.items():
    what = f"100 classes x 500 features, {name}, {peer.dim} numbers"
    met = clock.median < _WHOLE_TARGET
    rows.append(Row(what, f"{clock.median:.1f} s", "", f"< {_WHOLE_TARGET:g} s", met))
  return rows, {
    kind: {name: clock.as_dict() for name, clock in times.items()}
    for kind, times in (("training", trained), ("sampling", sampled))
  }


def _with_threads(number: int, work):
  def call():
    torch.set_num_threads(number)
    return work()

  return call


def _rows(peer: Peer, what: str, unit: str, times, target: float) -> list[Row]:
  theirs = min((n for n in times if n.startswith(peer.name)), key=lambda n: times[n].median)
  rows = [Row(f"{what}, {theirs}", f"{1 / times[theirs].median:.3g} {unit}")]
  for name, clock in times.items():
    if name.startswith("ours"):
      ratio = speedup(times[theirs], clock)
      rows.append(
        Row(
          f"{what}, {name}, {peer.dim} numbers", f"{1 / clock.median:.3g} {unit}", str(ratio),
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
  rows, result = [], {**timing.environment()}
  for peer in PEERS:
    print(f"timing against {peer.name}", flush=True)
    found, result[peer.name] = measure(peer, config, arguments.rounds)
    print(timing.table(found) + "\n", flush=True)
    rows += found
  if arguments.json:
    result["table"] = [dataclasses.asdict(row) for row in rows]
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
