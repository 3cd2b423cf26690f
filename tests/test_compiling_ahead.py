"""Which phases' programs are compiled ahead: those of phases that have not begun."""

import time
from types import SimpleNamespace

import pytest

from memdiff import pipeline
from memdiff.experiments.base import Phase
from memdiff.runtime import ahead
from memdiff.runtime.progress import CompileClock
from memdiff.runtime.stage import ExecutionConfig
from tests import support


@pytest.fixture
def experiment(mesh, tmp_path, monkeypatch):
  """One of which no phase was begun, and whose report is left out."""
  monkeypatch.setattr(pipeline, "phase_config", lambda *_: {})
  monkeypatch.setattr(pipeline.record, "write_report", lambda *_: {})
  return SimpleNamespace(
    config=None,
    mesh=mesh,
    workdir=SimpleNamespace(
      path=tmp_path,
      manifest=lambda _: None,
      begin=lambda *_: False,
      add=lambda *_: None,
      finish=lambda *_: None,
    ),
    run=SimpleNamespace(
      progress=SimpleNamespace(phase=lambda *_: None, say=lambda _: None),
      preemption=SimpleNamespace(check=lambda _: None),
      execution=ExecutionConfig(),
    ),
  )


def test_a_phase_that_has_begun_compiles_its_programs_itself(experiment):
  """The first phase compiles nothing, so that the second has begun when compiling ahead begins."""
  compiled = []

  def train(_):
    ahead.python_is_free()
    deadline = time.monotonic() + support.HANG
    while not compiled and time.monotonic() < deadline:
      time.sleep(0.01)

  def phase(name, work):
    return Phase(name, name, work, (), compile_ahead=lambda _: compiled.append(name))

  phases = phase("bank", lambda _: {}), phase("train", train), phase("select", lambda _: {})
  kind = SimpleNamespace(
    phases_of=lambda _: phases, render=None, summarise=lambda _: "", predicts=False
  )
  pipeline._run_phases(experiment, kind)
  assert compiled == ["select"]


def test_the_time_of_a_process_that_fails_counts(experiment):
  def fail(_):
    raise ValueError("failed")

  added = []
  experiment.workdir.add = lambda name, numbers: added.append((name, numbers))
  phase = Phase("bank", "bank", fail, ())
  with pytest.raises(ValueError, match="failed"):
    pipeline._work(experiment, (phase,), CompileClock(), set())
  assert added[0] == ("bank", {"killed": 1})
  assert added[1][1]["killed"] == -1 and added[1][1]["seconds"] >= 0
