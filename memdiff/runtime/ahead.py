"""Compiling ahead: programs of later phases are compiled while earlier ones compile and train.

XLA compiles on one core, and small networks train on little more than one, so that on a CPU the
time of a short run falls by what is compiled beside it.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.sharding import Mesh

_python_is_free = threading.Event()


def python_is_free() -> None:
  """Says that this thread now waits for XLA, so that another may trace its programs."""
  _python_is_free.set()


@contextlib.contextmanager
def compiling_ahead(tasks: Sequence[Callable[[], None]], mesh: Mesh) -> Iterator[None]:
  """Runs the tasks in a thread, one after the other, while the context is open.

  They begin once the first program of the main thread is traced: two threads that trace take
  turns, since Python has one lock, and the first program would come late.

  Errors are ignored here: the phase that needs the program compiles it again and reports them.
  Several devices or processes compile nothing ahead, since they must launch programs in one order.
  """
  stopped = threading.Event()

  def work():
    _python_is_free.wait()
    for task in tasks:
      if stopped.is_set():
        return
      with contextlib.suppress(Exception):
        task()

  if not tasks or mesh.size > 1 or jax.process_count() > 1:
    yield
    return
  _python_is_free.clear()
  thread = threading.Thread(target=work, name="compiling ahead")
  thread.start()
  try:
    yield
  finally:
    stopped.set()
    python_is_free()
    thread.join()
