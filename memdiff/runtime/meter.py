"""How fast a stage trains and what it waits for: speed.json in its folder, TensorBoard, the report.

Figures are of one call of the program; a stage that was resumed tells of its last call. The share
of time that the device waited for data is an upper bound: a wait counts whole if the device was
idle at its end.
"""

import contextlib
import json
import pathlib
import time
from typing import Any

import jax

from memdiff.runtime.workdir import write_json

# Dense bfloat16 peak per chip, FLOP/s, from the data sheets. No GPUs: what cuDNN computes for XLA
# is missing from the count of operations.
_PEAKS = {
  "TPU v3": 123e12 / 2,  # a JAX device is a core, two to a chip
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v6": 918e12,
}
_TIMES = ("train", "data_wait", "checkpoint", "compile", "evaluate")


def peak_flops(device_kind: str) -> float | None:
  """FLOP/s of one device in bfloat16; None if it is not known."""
  kinds = sorted((k for k in _PEAKS if device_kind.startswith(k)), key=len)
  return _PEAKS[kinds[-1]] if kinds else None


class Meter:
  """The clocks of one stage."""

  def __init__(self, folder: pathlib.Path, batch_size: int, num_seeds: int):
    """`batch_size` examples per step and seed."""
    self._path = folder / "speed.json"
    self._examples_per_step = batch_size * num_seeds
    self._flops_per_step: float | None = None
    self._program_bytes: int | None = None
    self._steps, self._seconds = 0, dict.fromkeys(_TIMES, 0.0)
    self._since: float | None = None

  @contextlib.contextmanager
  def apart(self, name: str):
    """Time for `name` (checkpoint, compile, evaluate) that is no time of training."""
    start = time.perf_counter()
    try:
      yield
    finally:
      elapsed = time.perf_counter() - start
      self._seconds[name] += elapsed
      if self._since is not None:
        self._since += elapsed

  def waited(self, seconds: float) -> None:
    """The device had nothing to do for up to `seconds`, which are part of its training time."""
    self._seconds["data_wait"] += seconds

  def compiled(self, program: Any) -> None:
    """Notes what a program of the stage needs. `program` is compiled; XLA counts one step of it."""
    cost = program.cost_analysis() or {}
    memory = program.memory_analysis()
    self._flops_per_step = cost.get("flops")
    if memory is not None:
      self._program_bytes = int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
      )

  def start(self) -> None:
    """Training starts now, unless it has already."""
    if self._since is None:
      self._since = time.perf_counter()

  def trained(self, steps: int) -> None:
    """`steps` have finished since the last call."""
    now = time.perf_counter()
    self._seconds["train"] += now - self._since
    self._since = now
    self._steps += steps

  def summary(self) -> dict[str, float]:
    """Rates of this call so far; empty before the first step."""
    seconds = self._seconds["train"]
    if not self._steps or seconds <= 0:
      return {}
    devices = jax.device_count()
    rate = self._steps / seconds
    found = {
      "steps_per_second": rate,
      "examples_per_second": rate * self._examples_per_step,
      "examples_per_second_per_device": rate * self._examples_per_step / devices,
      "data_wait_share": min(self._seconds["data_wait"] / seconds, 1.0),
      "checkpoint_seconds": self._seconds["checkpoint"],
      "compile_seconds": self._seconds["compile"],
    }
    peak = peak_flops(jax.devices()[0].device_kind)
    if self._flops_per_step and peak:
      found["mfu"] = rate * self._flops_per_step / peak
    memory = jax.local_devices()[0].memory_stats()
    if memory and "peak_bytes_in_use" in memory:
      found["peak_device_bytes"] = memory["peak_bytes_in_use"]
    if self._program_bytes is not None:
      found["program_device_bytes"] = self._program_bytes
    return found

  def save(self) -> None:
    """Writes speed.json if this call trained at all."""
    if self.summary():
      write_json(self._path, self.summary() | {"steps": self._steps})


def read_all(workdir: pathlib.Path) -> dict[str, dict[str, float]]:
  """stage -> its speed, of all stages below a workdir."""
  paths = sorted(workdir.rglob("speed.json"))
  return {
    path.parent.relative_to(workdir).as_posix(): json.loads(path.read_text(encoding="utf-8"))
    for path in paths
  }
