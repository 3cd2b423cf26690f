"""Programs of later phases are compiled beside the first one, and never in its way."""

import contextlib
import threading
import time

import jax
import numpy as np

from memdiff.runtime import ahead, programs

PATIENCE = 60  # seconds


def test_it_begins_once_the_first_program_is_traced(mesh):
  order, begun = [], threading.Event()

  def double(x, *, at_most):
    time.sleep(0.1)  # time enough for a task that does not wait
    order.append("traced")
    return at_most * x

  def task():
    order.append("ahead")
    begun.set()

  dispatch = programs.Dispatch(jax.jit(double, static_argnames="at_most"))
  with ahead.compiling_ahead([task], mesh):
    executable = dispatch.compile((np.float32(3),), 2, contextlib.nullcontext())
    assert begun.wait(PATIENCE)
  assert order == ["traced", "ahead"] and executable(np.float32(3)) == 6


def test_where_nothing_is_compiled_nothing_is_compiled_ahead(mesh):
  called = []
  with ahead.compiling_ahead([lambda: called.append(1)], mesh):
    pass
  assert called == []


def test_what_fails_is_left_to_its_phase(mesh):
  done = threading.Event()

  def fail():
    raise ValueError("no such shape")

  with ahead.compiling_ahead([fail, done.set], mesh):
    ahead.python_is_free()
    assert done.wait(PATIENCE)


def test_it_stops_with_the_run(mesh):
  """The task at hand is finished, the next one is not begun."""
  begun, stopped, called = threading.Event(), threading.Event(), []

  def first():
    begun.set()
    stopped.wait(PATIENCE)

  with ahead.compiling_ahead([first, lambda: called.append("second")], mesh):
    ahead.python_is_free()
    assert begun.wait(PATIENCE)
    threading.Timer(0.2, stopped.set).start()
  assert stopped.is_set() and called == []
