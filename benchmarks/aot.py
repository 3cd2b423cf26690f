"""Will it fit? Every phase compiled ahead of time for a TPU slice, on a machine without a TPU.

  make aot ARGS="--topology=v5e:16x16 --config=configs/imagenet_lt.py:memdiff [--json=FILE]"
  python -m benchmarks.aot --config=configs/digits_lt.py             (for the devices that are here)

Compiles the programs that a run of the config would dispatch (the classifiers' steps with their
memory bank, the denoiser's, the heads' and the sampler) and tells of each, per device: its memory
against what the chip has, its operations per step, and what it sends per step. Nothing runs.
Options of the config are given as to main.py, --config.classifier.batch_size=4096.

- memory: XLA's own assignment. Total = arguments + outputs + temporaries - aliased + code.
- operations and collectives: of one step; a loop's body counts once, so that the sampler's are of
  one chunk and one call of the denoiser. Bytes of a collective are those of its result.
- ms at peak: operations over the chip's bfloat16 peak, no step is faster; traffic to memory and
  between chips comes on top.

Large data sets are not read: ImageNet-LT and iNaturalist 2018 are stood for by their numbers (of
images, classes, the largest and the smallest class), the classes between them on a power law.
Data of other configs must be at hand.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import app, flags
from PIL import Image

from memdiff import config_flag
from memdiff.errors import ConfigError, MemdiffError

_CONFIG = config_flag.define()
_TOPOLOGY = flags.DEFINE_string("topology", "", "TPU slice, v5e:16x16; none: the devices here.")
_PARAMETERS = flags.DEFINE_enum(
  "parameters", None, ("replicated", "fsdp"), "In place of config.execution.parameters."
)
_PHASES = flags.DEFINE_list("phases", [], "Which phases, by how their names begin; none: all.")
_JSON = flags.DEFINE_string("json", None, "Write versions and all figures to this file.")

_GIB, _MIB = 2**30, 2**20
_HBM = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5e": 16, "TPU v5": 95, "TPU v6": 32}  # GiB


# --- what a compiled program says of itself --------------------------------------------------

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_PAIRS = ("all-gather", "collective-permute")  # whose -start gives (operands, results, ...)
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64} | {
  f"{sign}{bits}": bits for sign in "su" for bits in (4, 8, 16, 32, 64)
}


def _arrays(words: str) -> list[tuple[str, tuple[int, ...]]]:
  """(dtype, shape) of every array in the words of an HLO type; numbers without axes left out."""
  found = re.findall(r"\b([a-z]+\d+|pred)\[([\d,]+)\]", words)
  return [(dtype, tuple(map(int, shape.split(",")))) for dtype, shape in found]


def collectives(program: str) -> list[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
  """(kind, result arrays) of every collective of an HLO text, asynchronous pairs once."""
  found = []
  for kind in COLLECTIVES:
    for words, start in re.findall(rf"= (.*?) {kind}(-start)?\(", program):
      arrays = _arrays(words)
      if start and kind in _PAIRS:
        arrays = arrays[len(arrays) // 2 :]
      found.append((kind, arrays))
  return found


def num_bytes(arrays: list[tuple[str, tuple[int, ...]]]) -> int:
  return sum(math.prod(shape) * _BITS[dtype] // 8 for dtype, shape in arrays)


def gathers_bank(program: str, slots: Any) -> bool:
  """Whether a device gets all of a bank's `slots` [..., C, N, D] at once, apart or with more."""
  *_, num_slots, dim = slots.shape
  return any(
    shape[-1] == dim and shape[-2:-1] >= (num_slots,) and math.prod(shape) >= slots.size
    for kind, arrays in collectives(program)
    if kind != "all-reduce"
    for _, shape in arrays
  )


def host_transfers(program: str) -> list[str]:
  """Whatever in an HLO text waits for the host: names of operations and of custom calls."""
  operations = re.findall(r"= .*? (infeed|outfeed|send|recv)\(", program)
  calls = re.findall(r'custom_call_target="([^"]*(?:callback|[Hh]ost)[^"]*)"', program)
  return operations + calls


def memory(program: Any) -> dict[str, int]:
  """Bytes per device of a compiled program."""
  per_seed = program.memory_analysis()
  parts = {
    "arguments": per_seed.argument_size_in_bytes,
    "outputs": per_seed.output_size_in_bytes,
    "temporaries": per_seed.temp_size_in_bytes,
    "aliased": per_seed.alias_size_in_bytes,
    "code": per_seed.generated_code_size_in_bytes,
  }
  return parts | {"total": sum(parts.values()) - 2 * parts["aliased"]}


def hbm_bytes(device_kind: str) -> int | None:
  """Memory of one device; None where it is not known."""
  kinds = sorted((k for k in _HBM if device_kind.startswith(k)), key=len)
  return _HBM[kinds[-1]] * _GIB if kinds else None


# --- data sets that are not at hand ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Numbers:
  """What is known of a data set's long tail without reading it."""

  images: int
  classes: int
  largest: int
  smallest: int
  test: int


LARGE = {  # (config.dataset.name, profile)
  ("imagenet2012", "list"): Numbers(115_846, 1000, 1280, 5, 50_000),
  ("i_naturalist2018", "natural"): Numbers(437_513, 8142, 1000, 2, 24_426),
}


def class_counts(numbers: Numbers) -> np.ndarray:
  """Images per class, [C]: smallest + (largest - smallest) (1 - c / (C - 1))^a, with the right sum.

  `a` is the smallest with which the sum does not exceed the number of images, to rounding; the few
  that are missing go one each to the classes after the first.
  """
  rest = 1 - np.arange(numbers.classes) / (numbers.classes - 1)

  def of(power):
    return (numbers.smallest + (numbers.largest - numbers.smallest) * rest**power).astype(np.int64)

  low, high = 0.0, 1000.0
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if of(middle).sum() > numbers.images else (low, middle)
  counts = of(high)
  counts[1 : 1 + numbers.images - counts.sum()] += 1
  return counts


class _Blank:
  """So many images, all of them black."""

  def __init__(self, number: int, size: int):
    self._number, self._image = number, Image.new("RGB", (size, size))

  def __len__(self) -> int:
    return self._number

  def __getitem__(self, index: int) -> Image.Image:
    return self._image


def _large_dataset(config: Any, numbers: Numbers):
  from input_pipeline.dataset import LongTailDataset
  from input_pipeline.lazy_images import LazyImages

  def images(number):
    return LazyImages(_Blank(number, config.image_size), config.image_size)

  labels = np.repeat(np.arange(numbers.classes, dtype=np.int32), class_counts(numbers))
  return LongTailDataset(
    name=config.name, class_names=tuple(map(str, range(numbers.classes))), profile=config.profile,
    imbalance=numbers.largest / numbers.smallest, split_sha256="",
    train_images=images(numbers.images), train_labels=labels,
    test_images=images(numbers.test), test_labels=np.resize(labels, numbers.test),
    holdout_images=images(0), holdout_labels=labels[:0],
    left_out_images=images(0), left_out_labels=labels[:0],
  )  # fmt: skip


def load(values: Mapping[str, Any]) -> tuple[Any, Any]:
  """(settings, data set) of a config's values, checked as a run checks them."""
  from memdiff import config as config_lib
  from memdiff import pipeline

  kind = pipeline.kind_of(values)
  settings = config_lib.build(kind.settings, values)
  if not hasattr(settings, "encoder"):
    raise ConfigError("Only experiments on images are compiled ahead of time, not embeddings.")
  numbers = LARGE.get((settings.dataset.name, settings.dataset.profile))
  data = _large_dataset(settings.dataset, numbers) if numbers else kind.load(settings.dataset)
  kind.check(settings, data)
  return settings, data


# --- the programs ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
  """What a phase dispatches, and the bank that it works on."""

  name: str
  lower: Callable[[], Any]  # () -> what can be compiled
  bank: Any  # shapes with shardings, or None


def _described(tree: Any, mesh: Any, sharding: Any = None) -> Any:
  """Shapes and dtypes with `sharding`, by default replicated."""
  import jax

  from memdiff.runtime import checkpoint
  from memdiff.runtime import mesh as mesh_lib

  sharding = sharding or mesh_lib.replicated(mesh)
  return checkpoint.abstract(tree, jax.tree.map(lambda _: sharding, tree))


def _stage_program(stage: Any, run: Any, bank: Any = None) -> Program:
  """A training stage's dispatch; its bank is the one in its state where `bank` is None."""
  import jax

  from memdiff.runtime import mesh as mesh_lib
  from memdiff.runtime import programs as stage_programs

  steps, seeds = run.config.steps_per_dispatch, len(run.seeds)
  state = stage_programs.abstract_state(stage, run)

  def stacked(x):
    """The batches of a dispatch, from one of them."""
    return mesh_lib.place_batches(run.mesh, np.broadcast_to(x, (seeds, steps, *x.shape)))

  def lower():
    alive, batches = mesh_lib.replicate(run.mesh, np.ones(seeds, bool)), None
    if stage.batches is not None:
      iterator = stage.batches(run.seeds[0], 0)
      batches = jax.tree.map(stacked, next(iterator))
      iterator.close()
    dispatch = stage_programs.make_dispatch(stage, run)
    count = mesh_lib.replicate(run.mesh, np.int32(steps))
    return dispatch.lower(state, alive, stage.shared, stage.per_seed, batches, count, at_most=steps)

  return Program(stage.name, lower, state.bank if bank is None else bank)


def _feature_runs(settings: Any, data: Any, mesh: Any) -> Any:
  """Shapes of the standardised training features of all seeds, their bank and the encoder's head.

  As `feature_space.make_runs` leaves them: everything on every device, the bank split by class.
  """
  import jax
  import jax.numpy as jnp

  from input_pipeline.batches import ByClass
  from memdiff.memory import feature_space, memory_bank
  from memdiff.memory.exemplars import Exemplars

  runs, classes, rows = len(settings.seeds), data.num_classes, len(data.train_labels)
  dim, slots = settings.encoder.feature_dim, settings.memory_bank.num_slots

  def make():
    whole, real = jnp.int32, jnp.float32
    by_class = ByClass(*(jnp.zeros((runs, n), whole) for n in (rows, classes, classes)))
    bank = memory_bank.create(classes, slots, dim)
    return feature_space.FeatureRuns(
      exemplars=Exemplars(
        jnp.zeros((runs, rows, dim), real), jnp.zeros((runs, rows), whole), by_class
      ),
      bank=jax.tree.map(lambda x: jnp.broadcast_to(x, (runs, *x.shape)), bank),
      standardizer=feature_space.Standardizer(*(jnp.zeros((runs, dim), real) for _ in range(3))),
      head={
        "kernel": jnp.zeros((runs, dim, classes), real), "bias": jnp.zeros((runs, classes), real)
      },
    )  # fmt: skip

  shapes = jax.eval_shape(make)
  by_class = feature_space.bank_sharding(classes, mesh)
  return _described(shapes, mesh).replace(bank=_described(shapes.bank, mesh, by_class))


def _classifiers(settings: Any, data: Any, run: Any) -> Iterator[Program]:
  from memdiff.classifier import encoder, encoder_training, losses

  shared = encoder.device_data(settings.encoder.input, data, run.mesh)
  for loss in encoder_training.trained_losses(settings.classifier):
    bank = settings.memory_bank if losses.LOSSES[loss].needs_bank else None
    recipe = encoder_training.Recipe(settings.classifier, settings.encoder, loss, bank)
    stage = encoder_training.make_stage(recipe, data, shared, run.mesh)
    yield _stage_program(stage, run)


def _on_features(settings: Any, data: Any, run: Any) -> Iterator[Program]:
  """The denoiser's training, the sampler, and the heads on what it makes."""
  import jax
  import jax.numpy as jnp

  from memdiff.classifier import heads
  from memdiff.runtime import programs as stage_programs
  from memdiff.runtime.random import base_keys
  from memdiff.synthesis import feature_diffusion, generators
  from memdiff.synthesis.memory_diffusion import MemoryDiffusion

  mesh, runs = run.mesh, _feature_runs(settings, data, run.mesh)
  per_seed = feature_diffusion.make_data(
    runs.exemplars.features, data.train_labels, runs.bank, data.num_classes,
    settings.diffusion.class_exponent, mesh,
  )  # fmt: skip
  diffusion = feature_diffusion.make_stage(settings.diffusion, per_seed, data.num_classes, mesh)
  yield _stage_program(diffusion, run, runs.bank)

  generator = MemoryDiffusion(settings.diffusion, settings.hallucination, data.num_classes)
  made = generators.plan(data.train_counts, settings.generators)
  strengths = generator.strengths

  def sample():
    dim = settings.encoder.feature_dim
    program = generators.sampling_program(
      generator, settings.generators.confidence, dim, tuple(made.tolist()), mesh
    )
    arguments = jax.eval_shape(lambda: (base_keys(run.seeds, "sample"), jnp.zeros(len(strengths))))
    learned = stage_programs.abstract_state(diffusion, run).ema_params
    return program.lower(*_described(arguments, mesh), runs, learned)

  yield Program("hallucination", sample, runs.bank)

  number, test = len(run.seeds), len(data.test_labels)
  dim, added = runs.exemplars.features.shape[-1], (number, len(strengths), int(made.sum()))
  shapes = _described(
    jax.eval_shape(
      lambda: {
        "added": heads.Added(
          jnp.zeros((*added, dim)), jnp.zeros(added), jnp.zeros(len(made), jnp.int32)
        ),
        "test_features": jnp.zeros((number, test, dim)),
        "test_labels": jnp.zeros((number, test), jnp.int32),
      }
    ),
    mesh,
  )
  learned_from = heads.HeadData(exemplars=runs.exemplars, start=runs.head, **shapes)
  # A stage is made of numbers; features stay shapes.
  small = (runs.exemplars.by_class, runs.head, learned_from.added.replace(features=()))
  by_class, start, trusted = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), small)
  begun_with = learned_from.replace(
    exemplars=runs.exemplars.replace(by_class=by_class), start=start, added=trusted
  )

  every = [
    heads.Setting(run=seed, seed=seed, stream=loss, loss=heads.trained_loss(loss))
    for loss in settings.head.losses
    for seed in range(len(run.seeds))
  ]
  stage = heads.make_stage("heads", settings.head.training, begun_with, every, mesh)
  stage = dataclasses.replace(stage, shared=learned_from)
  yield _stage_program(stage, dataclasses.replace(run, seeds=tuple(range(len(every)))))


def programs(settings: Any, data: Any, mesh: Any, parameters: str) -> Iterator[Program]:
  """Everything that a run of the settings dispatches more than a few times."""
  from benchmarks.training import make_run

  run = make_run(settings.seeds, mesh, settings.loop.steps_per_dispatch, parameters)
  run = dataclasses.replace(run, config=settings.loop)
  yield from _classifiers(settings, data, run)
  if settings.experiment == "memdiff":
    yield from _on_features(settings, data, run)


# --- the answer ------------------------------------------------------------------------------


def bank_bytes(bank: Any) -> dict[str, int] | None:
  """Bytes of a bank's arrays, on all devices together and on each."""
  import jax

  if bank is None:
    return None
  leaves = jax.tree.leaves(bank)
  return {
    "whole": sum(x.size * x.dtype.itemsize for x in leaves),
    "per_device": sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves
    ),
  }


def measure(program: Program, device_kind: str) -> dict[str, Any]:
  """Compiles a program and tells what it needs per device.

  Raises:
    RuntimeError: where a device gathers the whole bank, or a step waits for the host.
  """
  import jax

  from memdiff.runtime.meter import peak_flops

  start, bank = time.perf_counter(), bank_bytes(program.bank)
  row = {"phase": program.name, "bank": bank}
  try:
    compiled = program.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return row | {"fits": False, "refused": str(error).splitlines()[0]}
  row["compile_seconds"] = round(time.perf_counter() - start, 1)
  text, cost = compiled.as_text(), compiled.cost_analysis() or {}
  sent = collectives(text)
  if bank and bank["per_device"] < bank["whole"] and gathers_bank(text, program.bank.slots):
    raise RuntimeError(f"{program.name} gathers the whole bank")
  if host_transfers(text):
    raise RuntimeError(f"{program.name} waits for the host: {host_transfers(text)}")
  row["memory"], row["hbm_bytes"] = memory(compiled), hbm_bytes(device_kind)
  row["fits"] = row["hbm_bytes"] and row["memory"]["total"] <= row["hbm_bytes"]
  row["flops"], peak = cost.get("flops"), peak_flops(device_kind)
  row["milliseconds_at_peak"] = 1e3 * row["flops"] / peak if row["flops"] and peak else None
  row["largest_collective_bytes"] = max((num_bytes(arrays) for _, arrays in sent), default=0)
  row["collectives"] = {
    kind: {
      "count": sum(k == kind for k, _ in sent),
      "bytes": sum(num_bytes(arrays) for k, arrays in sent if k == kind),
    }
    for kind in COLLECTIVES
    if any(k == kind for k, _ in sent)
  }
  return row


_HEADER = (
  "phase", "arguments", "outputs", "temporaries", "aliased", "total", "of", "fits", "bank whole",
  "bank here", "GFLOP", "ms at peak", "collectives",
)  # fmt: skip


def line(row: Mapping[str, Any]) -> str:
  """A row of the printed Markdown table; sizes in MiB."""

  def mib(number):
    return "–" if number is None else f"{number / _MIB:,.1f}"

  bank = row["bank"] or {"whole": None, "per_device": None}
  if "refused" in row:
    cells = [row["phase"], *["–"] * 6, "no", mib(bank["whole"]), mib(bank["per_device"])]
    return "| " + " | ".join([*cells, "–", "–", row["refused"]]) + " |"
  names = ("arguments", "outputs", "temporaries", "aliased", "total")
  sent = [f"{c['count']} {kind} {mib(c['bytes'])}" for kind, c in row["collectives"].items()]
  cells = [
    row["phase"],
    *(mib(row["memory"][name]) for name in names),
    mib(row["hbm_bytes"]),
    {True: "yes", False: "no", None: "?"}[row["fits"]],
    mib(bank["whole"]),
    mib(bank["per_device"]),
    "–" if row["flops"] is None else f"{row['flops'] / 1e9:,.2f}",
    "–" if row["milliseconds_at_peak"] is None else f"{row['milliseconds_at_peak']:.3f}",
    ", ".join(sent) or "none",
  ]
  return "| " + " | ".join(cells) + " |"


def _header() -> str:
  return "| " + " | ".join(_HEADER) + " |\n" + "|---" * len(_HEADER) + "|"


def table(result: Mapping[str, Any]) -> str:
  """All rows of one JSON file as Markdown."""
  return "\n".join([_header(), *map(line, result["rows"])])


def bank_table(results: Mapping[str, Mapping[str, Any]]) -> str:
  """The bank and the total of the first program of every result; MiB per device."""
  lines = ["| config | devices | bank here | step's total |", "|---|---|---|---|"]
  for result in sorted(results.values(), key=lambda r: (_config_name(r), r["devices"])):
    row = result["rows"][0]
    sizes = (row["bank"]["per_device"], row["memory"]["total"])
    cells = [_config_name(result), str(result["devices"]), *(f"{n / _MIB:,.1f}" for n in sizes)]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _config_name(result: Mapping[str, Any]) -> str:
  """`imagenet_lt` of the command's --config=configs/imagenet_lt.py:memdiff."""
  return re.search(r"--config=\S*?(\w+)\.py", result["command"])[1]


def make_mesh(topology: str):
  """A mesh over a described TPU slice, or over the devices that are here."""
  from jax.experimental import topologies

  from memdiff.runtime import mesh as mesh_lib

  if not topology:
    return mesh_lib.make_mesh()
  try:
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  except Exception as error:  # libtpu is missing or does not know the name; types differ
    words = str(error).splitlines()[0]
    raise ConfigError(
      f"--topology={topology} cannot be described ({words}); see make aot."
    ) from None
  return mesh_lib.make_mesh(described.devices)


def main(argv: list[str]) -> None:
  topology = _TOPOLOGY.value
  if topology:  # before jax is imported: libtpu must ask no machine for its TPUs
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ["JAX_PLATFORMS"] = "cpu"
  from benchmarks import timing

  try:
    if argv[1:] or _CONFIG.value is None:
      raise ConfigError("Give --config=configs/NAME.py, and options that start with --.")
    settings, data = load(_CONFIG.value.to_dict())
    mesh = make_mesh(topology)
  except MemdiffError as error:
    print(f"memdiff: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
  parameters = _PARAMETERS.value or settings.execution.parameters
  kind = mesh.devices.flat[0].device_kind
  print(f"{mesh.size} x {kind}, parameters {parameters}; MiB per device, per step\n")
  print(_header(), flush=True)
  rows = []
  for program in programs(settings, data, mesh, parameters):
    if not _PHASES.value or program.name.startswith(tuple(_PHASES.value)):
      rows.append(measure(program, kind))
      print(line(rows[-1]), flush=True)
  if _JSON.value:
    result = timing.environment() | {
      "command": " ".join(["python -m benchmarks.aot", *sys.argv[1:]]),
      "device_kind": kind,
      "devices": mesh.size,
      "parameters": parameters,
      "rows": rows,
    }
    pathlib.Path(_JSON.value).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  app.run(main)
