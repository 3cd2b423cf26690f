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
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks import timing
from benchmarks.timing import Row, Timing, interleave, speedup
from benchmarks.training import Training
from configs.digits_lt import get_config
from input_pipeline import dataset as dataset_lib
from memdiff import config as config_lib
from memdiff.classifier import encoder, encoder_training
from memdiff.diffusion import objectives
from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.evaluation import feature_metrics
from memdiff.experiments.feature_settings import MemdiffConfig
from memdiff.memory import feature_space, memory_bank
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime import train_state
from memdiff.runtime.loop import Stage
from memdiff.runtime.random import base_keys
from memdiff.synthesis import feature_diffusion, generators, hallucination
from memdiff.synthesis.feature_diffusion import FeatureData
from memdiff.synthesis.hallucination import TrainedDenoiser

_SEEDS = (0, 1, 2, 3, 4)
_MATMUL = 2048
_TORCH_STEPS = 10  # per call; an eager loop has nothing to amortise
_REFERENCE = ("ddpm", 1000)
_SOLVERS = (("ddim", 50), ("dpm++", 20), ("dpm++", 25))


@dataclasses.dataclass(frozen=True)
class Workload:
  """The digits experiment, trained as far as this benchmark needs it."""

  config: MemdiffConfig
  data: dataset_lib.LongTailDataset
  mesh: Mesh
  per_seed: FeatureData  # standardised, leading axis of one seed
  left_out: np.ndarray  # [n, D] held-out real features, standardised
  labels: np.ndarray  # [M] what to sample: the tail classes filled up as the config has it

  @property
  def num_classes(self) -> int:
    return self.data.num_classes

  def one_run(self) -> FeatureData:
    return jax.tree.map(lambda x: x[0], self.per_seed)

  def bank(self) -> memory_bank.MemoryBank:
    return self.one_run().bank

  def denoiser_stage(self, num_seeds: int) -> Stage:
    """The diffusion stage of that many seeds, all on the same features."""
    per_seed = jax.tree.map(lambda x: jnp.repeat(x, num_seeds, axis=0), self.per_seed)
    per_seed = jax.device_put(per_seed, mesh_lib.replicated(self.mesh))
    return feature_diffusion.make_stage(
      self.config.diffusion, per_seed, self.num_classes, self.mesh
    )

  def encoder_stage(self) -> Stage:
    return make_encoder_stage(self.config, self.data, self.mesh)

  def denoiser(self):
    dim = self.per_seed.exemplars.features.shape[-1]
    return feature_diffusion.make_denoiser(self.config.diffusion, self.num_classes, dim)


def make_encoder_stage(config, data, mesh: Mesh) -> Stage:
  shared = encoder.device_data(config.encoder.input, data, mesh)
  recipe = encoder_training.Recipe(
    config.classifier, config.encoder, config.classifier.loss, config.memory_bank
  )
  return encoder_training.make_stage(recipe, data, shared, mesh)


def prepare(encoder_steps: int) -> tuple[Workload, Training]:
  """Loads digits, trains the encoder and fills the bank, as the pipeline does.

  Returns:
    The workload, and the training of the encoder, for more of it.
  """
  config = config_lib.build(MemdiffConfig, get_config("full").to_dict())
  data, mesh = dataset_lib.load(config.dataset), mesh_lib.make_mesh()
  stage = make_encoder_stage(config, data, mesh)
  training = Training(stage, (0,), mesh, steps=25)
  training.train_until(encoder_steps)
  model = encoder.make_model(config.encoder, config.classifier.loss, data.num_classes)

  @jax.jit
  def encode_chunk(images):
    images = encoder.normalize(config.encoder.input, images, stage.shared)
    return jax.vmap(lambda s: encoder.apply_eval(model, s, images)[1])(training.state)

  train = feature_space.encode(encode_chunk, data.train_images, mesh)
  left_out = feature_space.encode(encode_chunk, data.left_out_images, mesh)
  labels = np.asarray(data.train_labels)[None]
  keys = base_keys((0,), "memory_bank")
  bank = feature_space.fill_bank(train, labels, data.num_classes, keys, config.memory_bank, mesh)
  runs = feature_space.make_runs(train, labels, bank, None, data.num_classes, mesh)
  standardize = jax.vmap(lambda s, x: s.forward(x))
  numbers = generators.plan(data.train_counts, config.generators)
  work = Workload(
    config=config,
    data=data,
    mesh=mesh,
    per_seed=feature_diffusion.make_data(
      runs.exemplars.features,
      labels,
      runs.bank,
      data.num_classes,
      config.diffusion.class_exponent,
      mesh,
    ),
    left_out=np.asarray(standardize(runs.standardizer, left_out))[0],
    labels=np.repeat(np.arange(data.num_classes), numbers).astype(np.int32),
  )
  return work, training


# --- the PyTorch side ------------------------------------------------------------------------


def make_torch_trainer(work: Workload, params: Any):
  """A torch_denoiser.Trainer that starts from `params`."""
  from benchmarks import torch_denoiser

  config, per_seed = work.config.diffusion, work.one_run()
  dim = per_seed.exemplars.features.shape[-1]
  model = torch_denoiser.Denoiser(work.num_classes, dim, config.denoiser)
  torch_denoiser.load_parameters(model, params)
  return torch_denoiser.Trainer(model, config, per_seed, work.num_classes, seed=0)


def disagreement(work: Workload, updates: int = 3) -> dict[str, float]:
  """The largest differences between the two implementations, on the same inputs.

  Outputs are compared at parameters moved away from their zeros; weights and EMA after a few
  optimiser steps at a learning rate far along the schedule's warm-up.
  """
  from benchmarks import torch_denoiser

  config, denoiser, random = work.config.diffusion, work.denoiser(), np.random.RandomState(0)
  config = dataclasses.replace(
    config, num_steps=40, optimizer=dataclasses.replace(config.optimizer, warmup=0.05)
  )
  work = dataclasses.replace(work, config=dataclasses.replace(work.config, diffusion=config))
  batch = feature_diffusion.draw_batch(
    jax.random.key(1), work.one_run(), config, work.num_classes, work.mesh
  )
  x_t = random.standard_normal(batch.x0.shape).astype(np.float32)
  t = random.uniform(0, 1000, len(x_t)).astype(np.float32)
  wanted = random.standard_normal(x_t.shape).astype(np.float32)
  variables = denoiser.init(jax.random.key(0), x_t, t, batch.label, batch.memory)
  params = jax.tree.map(
    lambda p: p + 0.05 * random.standard_normal(p.shape).astype(np.float32), variables["params"]
  )
  torch_params = jax.device_get(params)

  @jax.jit
  def predict(params):
    return denoiser.apply({"params": params}, x_t, t, batch.label, batch.memory)[0]

  optimizer = train_state.make_optimizer(config.optimizer, config.num_steps)
  state = train_state.create(jax.random.key(0), params, optimizer, ema_params=params)

  @jax.jit
  def update(state):
    gradients = jax.grad(lambda p: objectives.mean_squared_error(predict(p), wanted).mean())(
      state.params
    )
    state = train_state.apply_gradients(state, gradients, optimizer)
    ema = train_state.update_ema(state.ema_params, state.params, state.step, config.ema_decay)
    return state.replace(ema_params=ema)

  for _ in range(updates):
    state = update(state)

  trainer = make_torch_trainer(work, torch_params)
  as_tensor = torch_denoiser.as_tensor
  memory, label = torch_denoiser.as_memory(batch.memory), as_tensor(batch.label).long()
  inputs = as_tensor(x_t), as_tensor(t)
  output = trainer.model(*inputs, label, memory).detach().numpy()
  for _ in range(updates):
    trainer.update(*inputs, as_tensor(wanted), label, memory)
  names = [name for name, _ in trainer.model.named_parameters()]

  def largest(tensors, tree) -> float:
    ours = torch_denoiser.flat_parameters(jax.device_get(tree))
    pairs = zip(names, tensors, strict=True)
    return max(float(np.abs(x.detach().numpy() - ours[name]).max()) for name, x in pairs)

  return {
    "output": float(np.abs(output - predict(params)).max()),
    "weights": largest(trainer.parameters, state.params),
    "ema": largest(trainer.ema, state.ema_params),
    "weights_moved_by": largest(trainer.parameters, params),
  }


# --- 1 and 3: training -----------------------------------------------------------------------


def step_flops(stage: Stage) -> float:
  """Operations of one optimiser step of one seed, as XLA counts them in a program without loop."""
  per_seed = jax.tree.map(lambda x: x[0], stage.per_seed)
  state = jax.eval_shape(stage.init, jax.random.key(0), per_seed)
  return float(jax.jit(stage.step).lower(state, stage.shared, per_seed).cost_analysis()["flops"])


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
    trainer = make_torch_trainer(work, params)

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


# --- 2: sampling -----------------------------------------------------------------------------


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

  model, config = make_torch_trainer(work, params).model, work.config.hallucination
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


# --- 4: the memory bank ----------------------------------------------------------------------


@contextlib.contextmanager
def no_bank_update() -> Iterator[None]:
  """Stages compiled inside leave the bank as it is."""
  update = memory_bank.update
  memory_bank.update = lambda bank, *_, **__: bank
  try:
    yield
  finally:
    memory_bank.update = update


def time_encoder(
  work: Workload, one: Training, rounds: int, seeds: tuple[tuple[int, ...], ...]
) -> dict[str, Timing]:
  """Seconds per step of one seed, with and without the bank's update.

  Args:
    work: the data.
    one: the encoder's training of one seed.
    rounds: repeats.
    seeds: what is trained at once; the first is one seed.
  """
  variants = {}
  for group in seeds:
    with no_bank_update():
      bare = Training(work.encoder_stage(), group, work.mesh, one.steps)
    full = one if len(group) == 1 else Training(work.encoder_stage(), group, work.mesh, one.steps)
    variants[f"seeds: {len(group)}, no update"] = (bare, bare.work)
    variants[f"seeds: {len(group)}"] = (full, full.work)
    variants[f"seeds: {len(group)}, update alone"] = (
      make_bank_updates(work, len(group), one.steps),
      full.work,
    )
  return interleave(variants, rounds)


def make_bank_updates(work: Workload, num_seeds: int, steps: int) -> Callable[[], Any]:
  """Every call does `steps` updates of that many banks and nothing else, as one program."""
  features, labels = work.per_seed.exemplars.features[0], work.per_seed.exemplars.labels[0]
  config, batch = work.config.memory_bank, work.config.classifier.batch_size

  def updates(bank, key, features, labels):
    def step(bank, number):
      start = number * batch % (len(labels) - batch)
      rows = [jax.lax.dynamic_slice_in_dim(x, start, batch) for x in (features, labels)]
      bank = memory_bank.update(
        bank,
        *rows,
        jnp.ones(batch, bool),
        jax.random.fold_in(key, number),
        horizon=config.horizon,
        mesh=work.mesh,
      )
      return bank, None

    return jax.lax.scan(step, bank, jnp.arange(steps))[0]

  banks = jax.tree.map(lambda x: jnp.repeat(x[None], num_seeds, axis=0), work.bank())
  keys = jax.random.split(jax.random.key(0), num_seeds)
  run = jax.jit(jax.vmap(updates, in_axes=(0, 0, None, None)))
  return functools.partial(run, banks, keys, features, labels)


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


def bank_rows(times: dict[str, Timing]) -> list[Row]:
  rows = []
  for name, full in times.items():
    if f"{name}, no update" not in times:
      continue
    bare = times[f"{name}, no update"]
    share = 1 - bare.median / full.median
    per_round = 1 - np.divide(bare.seconds, full.seconds)
    ratio = f"{share:.1%} ({per_round.min():.1%} to {per_round.max():.1%})"
    value = f"{1 / full.median:.0f} steps/s"
    what = "bank update in an encoder step"
    rows.append(Row(f"{what}, {name}", value, ratio, "< 5%", share < 0.05))
    alone = times[f"{name}, update alone"]
    share = alone.median / full.median
    per_round = np.divide(alone.seconds, full.seconds)
    ratio = f"{share:.1%} ({per_round.min():.1%} to {per_round.max():.1%})"
    value = f"{alone.median * 1e6:.0f} us"
    rows.append(Row(f"{what}, {name}, alone", value, ratio, "< 5%", share < 0.05))
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
  work, encoder_run = prepare(encoder_steps=200 if quick else 1000)
  if with_torch:
    differences = result["torch_disagreement"] = disagreement(work)
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
  times = time_encoder(work, encoder_run, 4 * rounds, seeds)  # short calls, small difference
  rows += bank_rows(times)
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
