"""Several processes as one run: joining them, who writes, and noticing when one is gone.

Joining happens on request only, and never falls back to separate runs: if processes do not find
each other, each of them ends with a sentence.
"""

import atexit
import contextlib
import dataclasses
import hashlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Mapping

import jax
import numpy as np
from jax._src.distributed import global_state  # the key-value store has no public name
from jax.experimental import multihost_utils

from memdiff.errors import ConfigError, LostProcessError, MemdiffError, OutOfMemoryError
from memdiff.runtime import devices

_BEAT = 2.0  # seconds between signs of life
_SILENCE = 60.0  # seconds without one, after which a process counts as gone
_AGAIN = "start the same command on all hosts again to resume from the last checkpoint."
_SHUTDOWN = 30  # seconds that processes wait for each other when all is done


@dataclasses.dataclass(frozen=True)
class Cluster:
  """How a process finds the others; what is None is asked of TPU, Slurm, Open MPI or Kubernetes.

  Attributes:
    coordinator: HOST:PORT of process 0.
    num_processes: of the run.
    process_id: of this one, from 0.
    timeout: seconds to wait for all to join; also caps how long a silent process is tolerated.
  """

  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  timeout: int = 300

  def __post_init__(self):
    number, process_id = self.num_processes, self.process_id
    if number is not None and number < 1:
      raise ConfigError(f"--num_processes is {number}, but must be at least 1.")
    if process_id is not None and not 0 <= process_id < (number or process_id + 1):
      raise ConfigError(f"--process_id is {process_id}, but must be from 0 to {number} - 1.")
    if self.timeout < 10:
      raise ConfigError(f"--cluster_timeout is {self.timeout}, but must be at least 10 seconds.")


def from_environment(cluster: Cluster, environment: Mapping[str, str]) -> Cluster:
  """Fills what is None from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."""

  def number(name: str) -> int | None:
    text = environment.get(name)
    if text is None:
      return None
    if not text.isdigit():
      raise ConfigError(f"The environment's {name} is {text!r}, but must be a whole number.")
    return int(text)

  def first(*values):
    return next((v for v in values if v is not None), None)

  return dataclasses.replace(
    cluster,
    coordinator=first(cluster.coordinator, environment.get("JAX_COORDINATOR_ADDRESS")),
    num_processes=first(cluster.num_processes, number("JAX_NUM_PROCESSES")),
    process_id=first(cluster.process_id, number("JAX_PROCESS_ID")),
  )


def join(cluster: Cluster) -> None:
  """Joins the run; must be the first use of JAX in the process.

  Raises:
    ConfigError: if no cluster is known, not all processes joined in time, or JAX cannot use the
      devices that it was told to use.
  """
  # SIGTERM is ours to note (memdiff.runtime.preemption): JAX's service numbers steps once for all,
  # while the stages of a run count anew.
  jax.config.update("jax_enable_preemption_service", False)
  # JAX would abort the process with a stack trace; this speaks a little earlier.
  alone = ConfigError(
    f"Not all processes joined within {cluster.timeout} s; start the same command on every host,"
    " and see that all reach the coordinator's port."
  )
  waiting = threading.Timer(cluster.timeout, abandon, [alone])
  waiting.daemon = True
  waiting.start()
  try:
    jax.distributed.initialize(
      cluster.coordinator,
      cluster.num_processes,
      cluster.process_id,
      initialization_timeout=2 * cluster.timeout,
      heartbeat_timeout_seconds=int(2 * _SILENCE),  # the watch below speaks first
      shutdown_timeout_seconds=_SHUTDOWN,
    )
  except (ValueError, TypeError) as error:
    raise ConfigError(
      f"A run of several processes was asked for, but no cluster was found ({_first_line(error)});"
      " give --coordinator=HOST:PORT --num_processes=N --process_id=K."
    ) from error
  except RuntimeError as error:  # jax.errors.JaxRuntimeError is one
    raise ConfigError(
      f"The processes could not join ({_first_line(error)}); see that all reach the coordinator's"
      " port, and that nobody else uses it."
    ) from error
  finally:
    waiting.cancel()
  devices.find()
  expected = cluster.num_processes or global_state.num_processes
  if jax.process_count() != expected:
    raise ConfigError(
      f"{expected} processes were expected, but {jax.process_count()} take part; the devices do not"
      " span the processes: see that every host has JAX for the same accelerator."
    )
  print(
    f"memdiff: process {jax.process_index()} of {jax.process_count()}, with"
    f" {jax.local_device_count()} of {jax.device_count()} devices ({jax.devices()[0].device_kind})",
    file=sys.stderr,
    flush=True,
  )
  watch = _Watch(min(_SILENCE, cluster.timeout))
  watch.start()
  atexit.register(watch.stop)


def _first_line(error: Exception) -> str:
  return (str(error).strip() or repr(error)).splitlines()[0][:200]


class _Watch(threading.Thread):
  """Ends this process with a sentence when another has given no sign of life for `timeout` s.

  A process that waits for a dead one inside a collective cannot look up; this thread can. Signs of
  life are counters in the coordinator's key-value store.
  """

  def __init__(self, timeout: float):
    super().__init__(daemon=True, name="watch over the other processes")
    self._timeout = timeout
    self._client = global_state.client
    self._last: dict[str, tuple[str, float]] = {}
    self._over = threading.Event()

  def stop(self) -> None:
    """Ends the thread.

    Python kills daemon threads when it exits. If that happens inside JAX's client, the whole
    process aborts.
    """
    self._over.set()
    self.join()

  def run(self) -> None:
    answered = time.monotonic()
    for beat in itertools.count():
      try:
        self._client.key_value_set(f"memdiff/alive/{jax.process_index()}", str(beat), True)
        signs = self._client.key_value_dir_get("memdiff/alive/")
        answered = time.monotonic()
      except Exception:
        if time.monotonic() - answered > self._timeout:
          return  # the coordinator is gone, and JAX itself ends the process
        signs = []
      now = time.monotonic()
      for name, sign in signs:
        if self._last.get(name, ("", 0.0))[0] != sign:
          self._last[name] = sign, now
        elif now - self._last[name][1] > self._timeout:
          abandon(
            LostProcessError(
              f"Process {name.rsplit('/', 1)[-1]} of {jax.process_count()} has given no sign of"
              f" life for {self._timeout:.0f} s; {_AGAIN}"
            )
          )
      if self._over.wait(_BEAT):
        return


def abandon(error: MemdiffError) -> None:
  """Says `error` and ends this process at once, without waiting for the others."""
  print(f"memdiff: {error}", file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(error.exit_code)


@contextlib.contextmanager
def noticing():
  """Turns two failures of XLA into sentences: no memory, and a collective without its partner."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if str(error).startswith("RESOURCE_EXHAUSTED"):
      raise OutOfMemoryError(
        f"A device has too little memory ({_first_line(error)}); lower the batch_size or chunk_size"
        " of the phase that was running, or split parameters with"
        " --config.execution.parameters=fsdp, and run the same command again."
      ) from error
    if jax.process_count() == 1:
      raise
    raise LostProcessError(
      f"Process {jax.process_index()} of {jax.process_count()} lost touch with another one"
      f" ({_first_line(error)}); {_AGAIN}"
    ) from error


def is_main() -> bool:
  """Whether this process writes reports, logs and manifests."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until all processes are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def has_main(text: str) -> bool:
  """Whether the main process has the same text."""
  if jax.process_count() == 1:
    return True
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int32)
  return bool((multihost_utils.broadcast_one_to_all(digest) == digest).all())


def everywhere(is_true: bool) -> bool:
  """Whether something is true in all processes."""
  if jax.process_count() == 1:
    return is_true
  return bool(multihost_utils.process_allgather(np.array(is_true)).all())


def from_main(number: int) -> int:
  """What the main process says the number is."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
