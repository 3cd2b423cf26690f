"""Speed of pixel diffusion: training, sampling, what every method costs, PyTorch beside it.

  python -m benchmarks.pixel_diffusion [--json FILE] [--config NAME ...] [--rounds N] [--compile]
  python -m benchmarks.pixel_diffusion --smoke        a tiny network: shows that it runs

Configs: `digits` and `fashion`, the U-Nets of configs/images/digits_lt.py and fashion_mnist_lt.py;
`cifar`, the published one of 35.7 million parameters in bfloat16, for accelerators, where it is the
default. Images are random, in the numbers of the long-tailed sets. Measured, round by round against
one another:

1. images per second of the training step, under the training loop's own dispatch with the drawing
   of batches, for every method; a method's cost is its time over that of plain diffusion (ddpm);
2. the same network and plain diffusion in eager PyTorch (benchmarks/torch_unet.py), where it is
   installed, on CPUs with one thread and with one per core; ours is held against the faster.
   Outputs of the two networks on the same weights are compared first. --compile adds
   `torch.compile`, where that works;
3. the share of the machine's rate on a matrix product that the step reaches, and of the device's
   peak (MFU) where that is known; a step counts as a forward and a backward pass of the U-Net,
   whose operations XLA counts with plain convolutions;
4. images per second of 20 steps of DPM-Solver++, without and with guidance.

A ratio is of medians, followed by the range of the ratios within single rounds and the ratio of the
fastest rounds.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.timing import Row, Timing, interleave, rounded, speedup
from benchmarks.training import Training
from configs.images import cifar10_lt, digits_lt, fashion_mnist_lt
from input_pipeline import long_tail
from memdiff import config as config_lib
from memdiff import convolution
from memdiff.diffusion import unet
from memdiff.experiments.image_settings import ImagesConfig
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime import meter
from memdiff.synthesis import image_methods, pixel_data, pixel_diffusion, pixel_sampling
from memdiff.synthesis.pixel_settings import PixelDiffusionConfig, SamplingConfig

DDPM = "ddpm"
_CLASSES = 10
# Dense bfloat16 peaks from the data sheets that memdiff's meter leaves out, see there.
_GPU_PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
_MOST = {"coral": 1.03, "cbdm": 1.45, "t2h": 1.05}  # times the step of ddpm


@dataclasses.dataclass(frozen=True)
class Workload:
  """What is trained, on images of which shape, and how much of it per call."""

  config: PixelDiffusionConfig
  side: int
  channels: int
  largest: int  # images of the largest class
  imbalance: float
  steps: int  # per call
  sampled: int  # images
  methods: tuple[str, ...] = tuple(image_methods.METHODS)

  @functools.cached_property
  def counts(self) -> np.ndarray:
    return long_tail.class_counts(self.largest, _CLASSES, self.imbalance, "exponential")

  @functools.cached_property
  def labels(self) -> np.ndarray:
    return np.repeat(np.arange(_CLASSES), self.counts).astype(np.int32)

  @functools.cached_property
  def images(self) -> np.ndarray:
    shape = len(self.labels), self.side, self.side, self.channels
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def workload(name: str) -> Workload:
  module, *sizes = {
    "digits": (digits_lt, 8, 1, 122, 50.0, 10, 200),
    "fashion": (fashion_mnist_lt, 28, 1, 6000, 100.0, 2, 50),
    "cifar": (cifar10_lt, 32, 3, 5000, 100.0, 20, 500),
  }[name]
  config = config_lib.build(ImagesConfig, module.get_config().to_dict())
  return Workload(config.diffusion, *sizes)


def smallest() -> Workload:
  """What shows that everything runs."""
  work = workload("digits")
  small = dataclasses.replace(work.config.unet, channels=4, multipliers=(1,), attention=())
  config = dataclasses.replace(work.config, unet=small, batch_size=4)
  return dataclasses.replace(work, config=config, steps=1, sampled=4, methods=(DDPM, "cbdm"))


# --- operations ------------------------------------------------------------------------------


def step_flops(work: Workload) -> float:
  """Operations of a forward and a backward pass of the U-Net per image, as XLA counts them."""
  network = dataclasses.replace(work.config.unet, dtype="float32")  # conversions do not count
  config = dataclasses.replace(work.config, unet=network)
  model = pixel_diffusion.make_denoiser(config, _CLASSES, work.channels)
  shapes = ((1, work.side, work.side, work.channels), jnp.float32), ((1,), float), ((1,), int)
  given = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

  def loss(params, *given):
    return jnp.square(model.apply({"params": params}, *given, ())[0]).mean()

  with mock.patch.object(unet, "conv2d", convolution._conv):
    params = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x, ()), *given)["params"]
    return float(jax.jit(jax.grad(loss)).lower(params, *given).cost_analysis()["flops"])


def peak_flops() -> float | None:
  kind = jax.devices()[0].device_kind
  return meter.peak_flops(kind) or _GPU_PEAKS.get(kind)


def matrix_product(dtype: str) -> tuple[Callable[[], Any], float]:
  """A variant for `interleave`."""
  size = 2048 if jax.default_backend() == "cpu" else 8192
  matrix = jnp.ones((size, size), dtype)
  product = jax.jit(jnp.matmul)
  return lambda: product(matrix, matrix), 2.0 * size**3


# --- PyTorch ---------------------------------------------------------------------------------


def torch_variants(
  work: Workload, params: Any, *, compiles: bool
) -> tuple[dict[str, Any], dict[str, float]]:
  """Variants for `interleave`; and what differs between the two networks, which should be 0."""
  import torch

  from benchmarks import torch_unet

  device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"

  def trainer(compiled):
    network = torch_unet.UNet(_CLASSES, work.channels, work.side, work.config.unet)
    torch_unet.load_parameters(network, params)
    return torch_unet.Trainer(
      network, work.config, work.images, work.labels, device=device, compiled=compiled
    )

  def run(made, threads):
    torch.set_num_threads(threads)
    return made.run(work.steps)

  eager = trainer(compiled=False)
  found = {
    "parameters": sum(p.numel() for p in eager.parameters)
    - sum(x.size for x in jax.tree.leaves(params)),
    "output": disagreement(work, params),
  }
  cores = os.cpu_count() or 1
  threads = (1, cores) if device == "cpu" and cores > 1 else (cores,)
  variants = {
    "PyTorch" + (f", {n} thread{'s' * (n > 1)}" if device == "cpu" else ""): (
      functools.partial(run, eager, n),
      float(work.steps),
    )
    for n in threads
  }
  if compiles:
    made = trainer(compiled=True)
    try:
      made.run(1)
      variants["PyTorch, compiled"] = (functools.partial(run, made, cores), float(work.steps))
    except Exception as error:  # a compiler is missing, or not supported
      print(f"torch.compile does not work here: {type(error).__name__}", flush=True)
  return variants, found


def disagreement(work: Workload, params: Any) -> float:
  """The largest difference of outputs, in float32, of the two networks with moved weights.

  They are moved because some begin as nothing, so that branches would not count.
  """
  from benchmarks import torch_unet

  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), params
  )
  network = dataclasses.replace(work.config.unet, dtype="float32")
  theirs = torch_unet.UNet(_CLASSES, work.channels, work.side, network)
  torch_unet.load_parameters(theirs, params)
  x_t = rng.standard_normal((4, work.side, work.side, work.channels)).astype(np.float32)
  t, label = np.array([0, 10, 500, 999], np.float32), np.array([0, 3, 9, _CLASSES], np.int32)
  config = dataclasses.replace(work.config, unet=network)
  ours = pixel_diffusion.make_denoiser(config, _CLASSES, work.channels)
  with jax.default_matmul_precision("highest"):
    expected = jax.jit(ours.apply)({"params": params}, x_t, t, label, ())[0]
  return float(np.abs(torch_unet.output(theirs, x_t, t, label) - expected).max())


# --- training and sampling -------------------------------------------------------------------


def make_trainings(work: Workload, compile_seconds: dict[str, float]) -> dict[str, Training]:
  """One seed by every method; notes the seconds that compiling took."""
  mesh = mesh_lib.make_mesh()
  data = pixel_data.make_data(work.images, work.labels, _CLASSES, mesh)
  made = {}
  for name in work.methods:
    print(f"compiling {name}", flush=True)
    start = time.perf_counter()
    config = image_methods.apply(name, work.config)
    stage = pixel_diffusion.make_stage(config, data, work.counts, mesh)
    made[name] = Training(stage, (0,), mesh, work.steps)
    compile_seconds[name] = time.perf_counter() - start
  return made


def make_sampler(work: Workload, params: Any, scale: float) -> Callable[[], jax.Array]:
  """Every call samples with the next seed."""
  mesh, shape = mesh_lib.make_mesh(), (work.side, work.side, work.channels)
  program = pixel_sampling.sampling_program(
    work.config, SamplingConfig(), shape, _CLASSES, scale != 1, mesh
  )
  labels, seeds = jnp.arange(work.sampled) % _CLASSES, itertools.count()
  wanted = pixel_sampling.Wanted(labels)
  return lambda: program(params, wanted, next(seeds), 0, scale)


def measure(work: Workload, rounds: int, compiles: bool) -> tuple[list[Row], dict[str, Any]]:
  """The table's rows and what goes into the JSON file."""
  result: dict[str, Any] = {"compile_seconds": {}, "load_average": list(os.getloadavg())}
  trainings = make_trainings(work, result["compile_seconds"])
  params = jax.tree.map(lambda x: x[0], jax.device_get(trainings[DDPM].state.ema_params))
  variants: dict[str, Any] = {"matmul": matrix_product(work.config.unet.dtype)}
  variants |= {name: (run, float(run.work)) for name, run in trainings.items()}
  if importlib.util.find_spec("torch") is not None:
    more, result["torch_disagreement"] = torch_variants(work, params, compiles=compiles)
    variants |= more
    print(f"differences of the two networks: {result['torch_disagreement']}", flush=True)
  else:
    print("PyTorch is not installed; its rows are left out", flush=True)
  print(f"timing {len(variants)} variants, {rounds} rounds", flush=True)
  times = interleave(variants, rounds)
  samplers = {name: make_sampler(work, params, s) for name, s in (("plain", 1.0), ("guided", 2.0))}
  print(f"timing the sampling of {work.sampled} images", flush=True)
  sampling = interleave(
    {name: (call, float(work.sampled)) for name, call in samplers.items()}, rounds
  )
  result["step_flops_per_image"] = step_flops(work)
  result["batch_size"] = work.config.batch_size
  result["parameters"] = sum(x.size for x in jax.tree.leaves(params))
  result["training"] = {name: clock.as_dict() for name, clock in times.items()}
  result["sampling"] = {name: clock.as_dict() for name, clock in sampling.items()}
  flops = work.config.batch_size * result["step_flops_per_image"]
  return training_rows(times, work, flops) + sampling_rows(sampling), result


# --- the report ------------------------------------------------------------------------------


def training_rows(times: dict[str, Timing], work: Workload, flops: float) -> list[Row]:
  """The table of training, from seconds per step; `flops` are those of a step of ddpm."""
  rate, peak = 1 / times["matmul"].median, peak_flops()
  of_torch = [name for name in times if name.startswith("PyTorch")]
  rival = min(of_torch, key=lambda name: times[name].median) if of_torch else None
  rows = [Row("matrix product", f"{rounded(rate / 1e9)} GFLOP/s")]

  def images(clock):
    return f"{rounded(work.config.batch_size / clock.median)} images/s"

  def value(clock):
    text = f"{images(clock)}, {flops / clock.median / rate:.0%} of it"
    return text + (f", MFU {flops / clock.median / peak:.1%}" if peak else "")

  plain = times[DDPM]
  if rival:
    ratio = speedup(times[rival], plain)
    target, met = f">= 1x {rival}", ratio.of_medians >= 1.0
    rows.append(Row("training, ddpm", value(plain), str(ratio), target, met))
  else:
    rows.append(Row("training, ddpm", value(plain)))
  rows += [Row(f"training, {name}", value(times[name])) for name in of_torch]
  for name in work.methods:
    if name != DDPM:
      cost = speedup(times[name], plain)
      most = _MOST.get(name)
      target, met = (f"<= {most}x ddpm", cost.of_medians <= most) if most else ("", None)
      row = Row(f"time over ddpm’s, {name}", images(times[name]), str(cost), target, met)
      rows.append(row)
  return rows


def sampling_rows(times: dict[str, Timing]) -> list[Row]:
  """From seconds per image; guidance has the time over that without."""
  plain, guided = times["plain"], times["guided"]
  return [
    Row("sampling, 20 steps", f"{rounded(1 / plain.median)} images/s"),
    Row(
      "time over that without guidance, guided",
      f"{rounded(1 / guided.median)} images/s",
      str(speedup(guided, plain)),
    ),
  ]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  names = ("digits", "fashion", "cifar")
  default = ["digits"] if jax.default_backend() == "cpu" else ["cifar"]
  parser.add_argument("--json", type=pathlib.Path, help="write versions, hardware and all rounds")
  parser.add_argument("--config", nargs="+", choices=names, default=default)
  parser.add_argument("--rounds", type=int, default=20, help="repeats of every measurement")
  parser.add_argument("--compile", action="store_true", help="torch.compile as well")
  parser.add_argument("--smoke", action="store_true", help="show that everything runs")
  arguments = parser.parse_args()
  result = timing.environment() | {"configs": {}}
  works = {name: functools.partial(workload, name) for name in arguments.config}
  rounds = arguments.rounds
  if arguments.smoke:
    works, rounds = {"smoke": smallest}, 1
  for name, make in works.items():
    rows, found = measure(make(), rounds, arguments.compile)
    found["load_average_after"] = list(os.getloadavg())
    found["table"] = [dataclasses.asdict(row) for row in rows]
    result["configs"][name] = found
    print(f"\n{name}, {rounds} rounds\n\n" + timing.table(rows) + "\n", flush=True)
    if arguments.json:
      arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
