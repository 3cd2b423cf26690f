"""What a compiled program says of itself: memory, collectives, transfers to the host."""

import math
import re
from typing import Any

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_PAIRS = ("all-gather", "collective-permute")  # whose -start gives (operands, results, ...)
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64} | {
  f"{sign}{bits}": bits for sign in "su" for bits in (4, 8, 16, 32, 64)
}

_GIB = 2**30
_HBM = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5e": 16, "TPU v5": 95, "TPU v6": 32}  # GiB


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
