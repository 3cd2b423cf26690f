"""SIGTERM: the run saves where it is, says so, and goes on to the same numbers."""

import os
import signal

import numpy as np
import pytest

from memdiff.errors import Preempted
from memdiff.runtime import loop
from memdiff.runtime.preemption import Preemption
from tests import support
from tests.runtime.test_loop import KilledAt, check_same, make_stage

SEEDS = (3, 7)


class SignalledAt(KilledAt):
  """A progress display during whose line for a step the process gets SIGTERM."""

  def step(self, stage, step, num_steps, metrics):
    if step == self.at:
      os.kill(os.getpid(), signal.SIGTERM)


def run_of(mesh, **changes):
  return support.make_run(mesh, SEEDS, 5, eval_every=5, checkpoint_every=10, **changes)


@pytest.mark.parametrize("at", [5, 15])
def test_a_run_that_is_told_to_stop_saves_and_ends_as_an_undisturbed_one(mesh, tmp_path, at):
  whole = loop.train(make_stage(), run_of(mesh), tmp_path / "whole")
  run = run_of(mesh, progress=SignalledAt(at))
  with run.preemption.listening(), pytest.raises(Preempted) as caught:
    loop.train(make_stage(), run, tmp_path / "stopped")
  # The line of a step is printed while the next dispatch works, which is finished and saved.
  assert f"Stopped by SIGTERM after step {at + 5}/23 of toy was saved" in str(caught.value)
  assert caught.value.exit_code == 143
  state = loop.train(make_stage(), run_of(mesh), tmp_path / "stopped")
  check_same(state, whole)
  curves = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "stopped")]
  assert curves[0] == curves[1]


def test_the_signal_is_given_back(mesh):
  before = signal.getsignal(signal.SIGTERM)
  with Preemption(mesh).listening():
    assert signal.getsignal(signal.SIGTERM) != before
  assert signal.getsignal(signal.SIGTERM) == before


def test_between_phases_the_next_one_is_not_begun(mesh):
  preemption = Preemption(mesh)
  preemption.check("before the phase heads")
  with preemption.listening():
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted, match="before the phase heads; the same"):
      preemption.check("before the phase heads")


def test_checkpoints_of_every_so_many_steps_stay(mesh, tmp_path):
  run = support.make_run(mesh, SEEDS, 5, keep_every=10, keep_checkpoints=1)
  loop.train(make_stage(), run, tmp_path)
  kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
  np.testing.assert_array_equal(kept, [10, 20, 23])
