"""Being asked to stop: SIGTERM is noted, and the run ends where nothing is lost.

Processes may receive the signal at different steps, or only one may receive it. At each check, a
reduction over the mesh combines what they have received. All act on its result at the next check,
so that none waits for it.
"""

import contextlib
import signal
import threading

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memdiff.errors import Preempted
from memdiff.runtime import mesh as mesh_lib


class Preemption:
  """Whether the run was asked to stop."""

  def __init__(self, mesh: Mesh):
    self._heard = threading.Event()
    self._shared = None  # what all processes had heard at the last question
    self._split = NamedSharding(mesh, PartitionSpec(mesh_lib.DATA_AXIS))
    self._any = jax.jit(lambda heard: heard.any(), out_shardings=mesh_lib.replicated(mesh))

  @contextlib.contextmanager
  def listening(self):
    """Notes SIGTERM; to be entered in the main thread."""
    before = signal.signal(signal.SIGTERM, lambda *_: self._heard.set())
    try:
      yield
    finally:
      signal.signal(signal.SIGTERM, before)

  def asked(self) -> bool:
    """Whether to stop here. All processes must ask equally often, and get the same answers."""
    if jax.process_count() == 1:
      return self._heard.is_set()
    before, heard = self._shared, np.full(jax.local_device_count(), self._heard.is_set())
    self._shared = self._any(jax.make_array_from_process_local_data(self._split, heard))
    return before is not None and bool(jax.device_get(before))

  def check(self, where: str) -> None:
    """Raises Preempted if the run was asked to stop; `where` says what is safe."""
    if self.asked():
      self.stop(where)

  def stop(self, where: str) -> None:
    raise Preempted(f"Stopped by SIGTERM {where}; the same command resumes the run.")
