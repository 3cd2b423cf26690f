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

import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

from absl import app, flags

from benchmarks import aot_programs, compiled_program
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


def measure(program: aot_programs.Program, device_kind: str) -> dict[str, Any]:
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
  sent = compiled_program.collectives(text)
  if (
    bank
    and bank["per_device"] < bank["whole"]
    and compiled_program.gathers_bank(text, program.bank.slots)
  ):
    raise RuntimeError(f"{program.name} gathers the whole bank")
  if compiled_program.host_transfers(text):
    raise RuntimeError(
      f"{program.name} waits for the host: {compiled_program.host_transfers(text)}"
    )
  row["memory"], row["hbm_bytes"] = (
    compiled_program.memory(compiled),
    compiled_program.hbm_bytes(device_kind),
  )
  row["fits"] = row["hbm_bytes"] and row["memory"]["total"] <= row["hbm_bytes"]
  row["flops"], peak = cost.get("flops"), peak_flops(device_kind)
  row["milliseconds_at_peak"] = 1e3 * row["flops"] / peak if row["flops"] and peak else None
  row["largest_collective_bytes"] = max(
    (compiled_program.num_bytes(arrays) for _, arrays in sent), default=0
  )
  row["collectives"] = {
    kind: {
      "count": sum(k == kind for k, _ in sent),
      "bytes": sum(compiled_program.num_bytes(arrays) for k, arrays in sent if k == kind),
    }
    for kind in compiled_program.COLLECTIVES
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
    settings, data = aot_programs.load(_CONFIG.value.to_dict())
    mesh = make_mesh(topology)
  except MemdiffError as error:
    print(f"memdiff: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
  parameters = _PARAMETERS.value or settings.execution.parameters
  kind = mesh.devices.flat[0].device_kind
  print(f"{mesh.size} x {kind}, parameters {parameters}; MiB per device, per step\n")
  print(_header(), flush=True)
  rows = []
  for program in aot_programs.programs(settings, data, mesh, parameters):
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
