"""Speed of feature diffusion: training, sampling, and what the memory bank costs the encoder.

  python -m benchmarks.feature_diffusion [--json FILE] [--rounds N] [--quick]

All sizes are those of configs/digits_lt.py:full and all data are its real features: an encoder is
trained first, then a denoiser on what it sees. Our side is the real stages under the training
loop's own dispatch. Measured, each round by round against its rival:

1. training steps per second of the denoiser, one seed and five at once, against the same network
   and loop in eager PyTorch (benchmarks/torch_denoiser.py), which is first shown to be the same
   function with the same updates;
2. features per second of the sampler, against PyTorch at equal work (1000 ancestral steps), and
   with the faster solvers; quality is the squared MMD to held-out real features of the same class,
   averaged over the tail classes, over several sampling seeds. A solver counts as equally good
   where its mean MMD exceeds that of 1000 ancestral steps by no more than the deviation of the
   difference of two runs, sqrt(std^2 + std^2);
3. floating-point operations per second of a training step, against those of a 2048^3 matrix
   product on the same machine. XLA counts every operation of the step, once;
4. the bank update's share of an encoder step: (with - without) / with; and, since that is a small
   difference of large numbers, the update on its own over the step.

A ratio is of medians, followed by the range of the ratios within single rounds and the ratio of the
fastest rounds. PyTorch runs with one thread and with one per core, and ours is held against the
faster: on a busy machine PyTorch's threads wait for one another. Without PyTorch its rows are
missing. The full run takes about five minutes on two cores, --quick one to two, both longer where
the machine is busy; the quick run trains so little that its MMD means nothing.
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
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import bank_update, digits_workload, timing, torch_agreement
from benchmarks.digits_workload import Workload
from benchmarks.timing import Row, Timing, interleave, speedup
from benchmarks.training import Training, step_flops
from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.evaluation import feature_metrics
from memdiff.memory import memory_bank
from memdiff.synthesis import hallucination
from memdiff.synthesis.hallucination import TrainedDenoiser

_SEEDS = (0, 1, 2, 3, 4)
_MATMUL = 2048
_TORCH_STEPS = 10  # per call; an eager loop has nothing to amortise
_REFERENCE = ("ddpm", 1000)
_SOLVERS = (("ddim", 50), ("dpm++", 20), ("dpm++", 25))


# --- training and the matrix product ---------------------------------------------------------


def time_training(
  work: Workload, one: Training, rounds: int, threads: tuple[int, ...]
) -> dict[str, Timing]:
  """Seconds per optimiser step of one seed; of the matrix product, seconds per operation.

  Args:
    work: the data.
    one: the denoiser's training of one seed.
    rounds: repeats.
    threads: PyTorch is timed with each of these numbers of threads; () leaves it out.
  """
  many = Training(work.denoiser_stage(len(_SEEDS)), _SEEDS, work.mesh, one.steps)
  matrix = jnp.ones((_MATMUL, _MATMUL))
  product = jax.jit(jnp.matmul)
  variants = {
    "one seed": (one, one.work),
    "five seeds": (many, many.work),
    "matmul": (lambda: product(matrix, matrix), 2.0 * _MATMUL**3),
  }
  if threads:
    import torch

    params = jax.tree.map(lambda x: np.asarray(x[0]), one.state.params)
    trainer = torch_agreement.make_trainer(work, params)

    def run_torch(number):
      torch.set_num_threads(number)
      return trainer.run(_TORCH_STEPS)

    for number in threads:
      variants[_torch_name(number)] = (functools.partial(run_torch, number), float(_TORCH_STEPS))
  return interleave(variants, rounds)


def _torch_name(threads: int) -> str:
  return f"torch, {threads} thread" + ("s" if threads > 1 else "")


def fastest_torch(times: Mapping[str, Timing]) -> str | None:
  """The number of threads that PyTorch is fastest with, as a name; None without PyTorch."""
  names = [name for name in times if name.startswith("torch")]
  return min(names, key=lambda name: times[name].median) if names else None


# --- sampling --------------------------------------------------------------------------------


def quality(work: Workload, samples: np.ndarray) -> float:
  """MMD to the held-out real features, class by class, averaged over the tail classes."""
  unseen = work.data.left_out_labels
  values = [
    mmd(work.left_out[unseen == c], samples[work.labels == c]) for c in np.unique(work.labels)
  ]
  return float(np.mean(values))


def mmd(real: np.ndarray, samples: np.ndarray) -> float:
  """Squared MMD to real features of a class, by the median bandwidth of those."""
  within = feature_metrics.squared_distances(real, real)
  between = feature_metrics.squared_distances(real, samples)
  return feature_metrics.mmd(
    within,
    feature_metrics.squared_distances(samples, samples),
    between,
    feature_metrics.median_bandwidth(within),
  )


def quality_of_training_set(work: Workload) -> float:
  """The same of the training features, over the classes that have two or more."""
  train, labels = np.asarray(work.per_seed.exemplars.features[0]), work.data.train_labels
  values = [
    mmd(work.left_out[work.data.left_out_labels == c], train[labels == c])
    for c in np.unique(work.labels)
  ]
  return float(np.nanmean(values))


def make_sampler(work: Workload, params: Any, method: str, steps: int) -> Callable[[], jax.Array]:
  """Every call samples with the next seed."""
  config = dataclasses.replace(work.config.hallucination, sampler=method, num_steps=steps)
  schedule = NoiseSchedule(work.config.diffusion.schedule)

  @jax.jit
  def sample(params, bank, key):
    denoiser = TrainedDenoiser(work.denoiser(), params, schedule, work.config.diffusion.prediction)
    return hallucination.sample_features(denoiser, bank, work.labels, key, config, work.mesh)

  seeds, bank = itertools.count(), work.bank()
  return lambda: sample(params, bank, jax.random.key(next(seeds)))


def make_torch_sampler(
  work: Workload, params: Any, steps: int, threads: tuple[int, ...]
) -> tuple[Callable[[], np.ndarray], Callable[[], None]]:
  """The same in PyTorch.

  Returns:
    The sampler; and a function that sets the number of threads to what a short trial finds to be
    the fastest at the moment.
  """
  import torch

  from benchmarks import torch_denoiser

  model, config = torch_agreement.make_trainer(work, params).model, work.config.hallucination
  labels = jnp.asarray(work.labels)
  memory = memory_bank.read(work.bank(), labels, mesh=work.mesh)
  if config.condition == "class":
    memory = memory_bank.forget(memory, jnp.ones(labels.shape, bool))
  if config.condition == "memory":
    labels = jnp.full_like(labels, work.num_classes)
  inputs = torch_denoiser.as_tensor(labels).long(), torch_denoiser.as_memory(memory)
  schedule = NoiseSchedule(work.config.diffusion.schedule)
  prediction = work.config.diffusion.prediction

  def sample(num_steps, seed):
    return torch_denoiser.sample_ancestral(
      model, *inputs, schedule, num_steps, prediction, config.x0_limit, seed
    )

  def trial(number):
    torch.set_num_threads(number)
    return sample(20, 0)

  def set_threads():
    trials = interleave({str(n): (functools.partial(trial, n), 1.0) for n in threads}, rounds=3)
    torch.set_num_threads(min(threads, key=lambda n: trials[str(n)].median))

  seeds = itertools.count()
  return lambda: sample(steps, next(seeds)), set_threads


def time_sampling(
  work: Workload, params: Any, rounds: int, reference_steps: int, threads: tuple[int, ...]
) -> tuple[dict[str, Timing], dict[str, list[float]]]:
  """Seconds per feature, and the MMD of every call, by `method-steps`."""
  samplers: dict[str, Callable[[], Any]] = {}
  for method, steps in ((_REFERENCE[0], reference_steps), *_SOLVERS):
    samplers[f"{method}-{steps}"] = make_sampler(work, params, method, steps)

  def before_round() -> None:
    pass

  if threads:
    host = jax.device_get(params)
    samplers["torch"], before_round = make_torch_sampler(work, host, reference_steps, threads)
  drawn: dict[str, list[Any]] = {name: [] for name in samplers}

  def recorded(name):
    def call():
      drawn[name].append(samplers[name]())
      return drawn[name][-1]

    return call

  variants = {name: (recorded(name), float(len(work.labels))) for name in samplers}
  times = interleave(variants, rounds, before_round)
  return times, {n: [quality(work, np.asarray(x)) for x in xs] for n, xs in drawn.items()}


# --- the report ------------------------------------------------------------------------------


def training_rows(times: dict[str, Timing], flops: float) -> list[Row]:
  rate = 1 / times["matmul"].median
  torch_name = fastest_torch(times)
  rows = []
  for name, clock in times.items():
    if name == "matmul":
      continue
    value = f"{1 / clock.median:.0f} steps/s"
    if name.startswith("torch") or torch_name is None:
      rows.append(Row(f"training, {name}", value))
    else:
      ratio = speedup(times[torch_name], clock)
      met = ratio.of_medians >= 1.2
      rows.append(Row(f"training, {name}", value, str(ratio), f">= 1.2x {torch_name}", met))
  rows.append(Row(f"matmul {_MATMUL}^3", f"{rate / 1e9:.0f} GFLOP/s"))
  for name in ("one seed", "five seeds"):
    achieved = flops / times[name].median
    value = f"{achieved / 1e9:.0f} GFLOP/s"
    rows.append(Row(f"training, {name}", value, f"{achieved / rate:.0%} of the matmul rate"))
  return rows


def sampling_rows(times: dict[str, Timing], mmds: dict[str, list[float]], steps: int) -> list[Row]:
  """Rows of speed and of quality; targets hold for the full number of reference steps."""
  reference = f"{_REFERENCE[0]}-{steps}"
  slow = "torch" if "torch" in times else reference
  full = steps == _REFERENCE[1]
  rows = []
  for name, clock in times.items():
    value = f"{1 / clock.median:.0f} features/s"
    if name == slow:
      rows.append(Row(f"sampling, {name} (ancestral, {steps} steps)", value))
      continue
    ratio = speedup(times[slow], clock)
    least = 1.0 if name == reference else 20.0
    target, met = "", None
    if name == reference:
      target, met = "same steps, >= 1.0x torch", ratio.of_medians >= least
    elif full:
      target, met = f">= 20x {slow}, {steps} steps", ratio.of_medians >= least
    rows.append(Row(f"sampling, {name}", value, str(ratio), target, met))
  base = np.array(mmds[reference])
  for name, values in mmds.items():
    values = np.array(values)
    value = f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"
    if name == reference:
      rows.append(Row(f"MMD, {name}", value))
      continue
    difference = values.mean() - base.mean()
    noise = float(np.hypot(values.std(ddof=1), base.std(ddof=1)))
    target, met = f"<= {noise:+.4f}, the noise", bool(difference <= noise)
    if name == "torch" or not full:
      target, met = "", None
    rows.append(Row(f"MMD, {name}", value, f"{difference:+.4f}", target, met))
  return rows


def run(rounds: int, quick: bool) -> tuple[list[Row], dict[str, Any]]:
  """Measures everything. Returns the table's rows and what goes into the JSON file."""
  with_torch = importlib.util.find_spec("torch") is not None
  threads = tuple(sorted({1, os.cpu_count() or 1})) if with_torch else ()
  result: dict[str, Any] = {"quick": quick, **timing.environment()}
  rows: list[Row] = []
  began = time.perf_counter()

  def say(text: str) -> None:
    print(f"[{time.perf_counter() - began:4.0f} s] {text}", flush=True)

  say("training an encoder on digits")
  work, encoder_run = digits_workload.prepare(encoder_steps=200 if quick else 1000)
  if with_torch:
    differences = result["torch_disagreement"] = torch_agreement.disagreement(work)
    say("largest differences: " + ", ".join(f"{n} {x:.1e}" for n, x in differences.items()))
    if differences["output"] > 1e-3 or differences["weights"] > 1e-3:
      say("WARNING: the two networks differ; their ratios mean nothing")
  else:
    say("PyTorch is not installed; its rows are left out")

  say("timing the training of the denoiser")
  stage = work.denoiser_stage(1)
  one = Training(stage, (0,), work.mesh, steps=10 if quick else 25)
  times = time_training(work, one, rounds, threads)
  result["training_step_flops"] = step_flops(stage)
  rows += training_rows(times, result["training_step_flops"])
  result["training"] = {name: clock.as_dict() for name, clock in times.items()}

  last = one.done if quick else work.config.diffusion.num_steps
  say(f"training the denoiser to step {last}")
  one.train_until(last)
  params = jax.tree.map(lambda x: x[0], one.state.ema_params)

  say(f"timing the samplers on {len(work.labels)} features")
  steps = 100 if quick else _REFERENCE[1]
  times, mmds = time_sampling(work, params, min(rounds, 2 if quick else 3), steps, threads)
  rows += sampling_rows(times, mmds, steps)
  training_mmd = quality_of_training_set(work)
  rows.append(Row("MMD, training features in their place", f"{training_mmd:.4f}"))
  result["sampling"] = {name: clock.as_dict() for name, clock in times.items()}
  result["sampling_mmd"] = mmds | {"training_features": training_mmd}
  result["sampled_features"] = len(work.labels)

  say("timing the encoder with and without the bank's update")
  seeds = (_SEEDS[:1],) if quick else (_SEEDS[:1], _SEEDS)
  rounds *= 4  # the calls are short and the difference is small
  times = bank_update.time_encoder(work, encoder_run, rounds, seeds)
  rows += bank_update.rows(times)
  result["encoder"] = {name: clock.as_dict() for name, clock in times.items()}
  result["seconds"] = time.perf_counter() - began
  result["load_average_after"] = list(os.getloadavg())
  result["table"] = [dataclasses.asdict(row) for row in rows]
  say("done")
  return rows, result


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", type=pathlib.Path, help="write versions, hardware and all rounds")
  parser.add_argument("--rounds", type=int, help="repeats of every measurement (10; quick: 3)")
  parser.add_argument("--quick", action="store_true", help="a look in under a minute")
  arguments = parser.parse_args()
  rounds = arguments.rounds or (3 if arguments.quick else 10)
  rows, result = run(rounds, arguments.quick)
  print("\n" + timing.table(rows))
  if arguments.json:
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
