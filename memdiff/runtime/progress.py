"""What the user sees while a run works, and the account of where the time went."""

import contextlib
import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable

import jax

from memdiff.runtime import distributed

_COMPILE_EVENTS = (
  "/jax/core/compile/jaxpr_trace_duration",
  "/jax/core/compile/jaxpr_to_mlir_module_duration",
  "/jax/core/compile/backend_compile_duration",
)


class CompileClock:
  """Seconds that the main thread waited for JAX to trace, lower and compile, as JAX tells."""

  def __init__(self):
    self.seconds = 0.0
    jax.monitoring.register_event_duration_secs_listener(self._record)

  def _record(self, event: str, duration: float, **_) -> None:
    in_the_way = threading.current_thread() is threading.main_thread()
    if event in _COMPILE_EVENTS and in_the_way:
      self.seconds += duration

  def start(self) -> Callable[[], float]:
    """A function that tells the seconds from now on that were not spent compiling."""
    start = time.perf_counter() - self.seconds
    return lambda: round(time.perf_counter() - self.seconds - start, 3)


_WORTH_COLLECTING = 2**28  # bytes of live arrays; a collection takes 0.3 s


def release_memory() -> None:
  """Gives memory back to the system: finished stages hold their arrays in cycles of references."""
  if sum(array.nbytes for array in jax.live_arrays()) > _WORTH_COLLECTING:
    gc.collect()
  _trim()


def _trim() -> None:
  """Gives back what the compiler has freed, of which glibc keeps hundreds of MB; in no time."""
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
  if trim is not None:
    trim(0)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
  """Prints one line per event, in the main process; steps at most every `every` seconds."""

  def __init__(self, num_phases: int, every: float = 2.0, stream=None):
    self._num_phases = num_phases
    self._every = every
    self._stream = stream or sys.stderr
    self._prefix = ""
    self._stage_start = (0.0, 0)
    self._last_line = 0.0

  def _print(self, text: str) -> None:
    if distributed.is_main():
      print(text, file=self._stream, flush=True)

  def phase(self, number: int, name: str) -> None:
    """All further lines belong to this phase."""
    release_memory()
    self._prefix = f"[{number}/{self._num_phases} {name}]"

  def say(self, text: str) -> None:
    self._print(f"{self._prefix} {text}".strip())

  @contextlib.contextmanager
  def compiling(self, what: str):
    """Says what is being compiled before the silence, and how long it took."""
    self.say(f"compiling {what} ...")
    start = time.perf_counter()
    yield
    _trim()
    self.say(f"compiled {what} in {time.perf_counter() - start:.1f} s")

  def start_stage(self, step: int) -> None:
    """The clock of the time left starts at `step`."""
    self._stage_start = (time.perf_counter(), step)
    self._last_line = 0.0

  def step(self, stage: str, step: int, num_steps: int, metrics: dict[str, float]) -> None:
    now = time.perf_counter()
    if now - self._last_line < self._every and step < num_steps:
      return
    self._last_line = now
    start, first = self._stage_start
    left = (now - start) / max(step - first, 1) * (num_steps - step)
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    share = f"{step / num_steps:4.0%}"
    self.say(f"{stage}  step {step}/{num_steps} {share}  {_clock(left)} left  {numbers}")
