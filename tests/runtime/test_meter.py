"""How fast a stage trains: rates, waiting for data, FLOPs, and a profile of chosen steps."""

import json
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from memdiff import pipeline
from memdiff.runtime import loop, meter, programs
from memdiff.runtime.loop import ExecutionConfig
from memdiff.runtime.meter import Meter
from tests import support
from tests.runtime import test_loop_batches
from tests.runtime.test_loop import SEEDS, make_stage


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("NVIDIA H100 80GB HBM3", None),
    ("TPU v5 lite", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v4", 275e12),
    ("cpu", None),
  ],
)
def test_peaks_are_found_by_the_longest_name(kind, peak):
  assert meter.peak_flops(kind) == peak


def test_rates_are_of_training_alone(tmp_path, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
  monkeypatch.setattr(meter, "peak_flops", lambda _: 1e3)

  class Program:
    def cost_analysis(self):
      return {"flops": 50.0}

    def memory_analysis(self):
      return None

  clock = Meter(tmp_path, batch_size=8, num_seeds=2)
  assert clock.summary() == {}
  clock.compiled(Program())
  clock.start()
  now[0] += 4
  clock.trained(20)
  with clock.apart("checkpoint"):
    now[0] += 7
  clock.waited(1.0)
  now[0] += 4
  clock.trained(20)
  found = clock.summary()
  assert found["steps_per_second"] == 5 and found["examples_per_second"] == 80
  assert found["examples_per_second_per_device"] == 80 / jax.device_count()
  assert found["checkpoint_seconds"] == 7 and found["data_wait_share"] == 1 / 8
  assert found["mfu"] == pytest.approx(5 * 50 / 1e3)
  clock.save()
  assert json.loads((tmp_path / "speed.json").read_text()) == found | {"steps": 40}


def test_one_step_is_counted_whatever_a_dispatch_holds(mesh):
  """XLA counts the body of a scan once, which is what turns FLOPs per program into per step."""
  stage = make_stage()
  flops = []
  for number in (2, 8):
    run = support.make_run(mesh, SEEDS, number)
    alive, count = np.ones(2, bool), np.int32(number)
    lowered = programs.make_dispatch(stage, run).lower(
      programs.make_init(stage, run)(),
      alive,
      stage.shared,
      stage.per_seed,
      None,
      count,
      at_most=number,
    )
    flops.append(lowered.compile().cost_analysis()["flops"])
  assert flops[0] == pytest.approx(flops[1], rel=0.01) and flops[0] > 0


class Slow(test_loop_batches.Batches):
  """Batches that take longer to come than to train on."""

  def __next__(self):
    time.sleep(0.02)
    return super().__next__()


def test_waiting_for_data_is_told(mesh, tmp_path):
  slow = loop.dataclasses.replace(test_loop_batches.make_stage(), batches=Slow)
  waits = {}
  for name, stage, at_most in (("slow", slow, 4), ("on_device", make_stage(), 1)):
    loop.train(stage, support.make_run(mesh, SEEDS, at_most, every=100), tmp_path / name)
    speed = json.loads((tmp_path / name / "speed.json").read_text())
    assert speed["steps"] == stage.num_steps and speed["compile_seconds"] > 0
    assert speed["program_device_bytes"] > 0
    waits[name] = speed["data_wait_share"]
  assert 0 <= waits["on_device"] < waits["slow"] <= 1


def test_the_chosen_steps_of_the_chosen_stage_are_traced(mesh, tmp_path):
  execution = ExecutionConfig("replicated", False, "toy", (5, 15))
  run = support.make_run(mesh, SEEDS, 5, execution=execution)
  loop.train(make_stage(), run, tmp_path / "traced")
  assert list((tmp_path / "traced" / "profile").rglob("*.xplane.pb"))
  other = ExecutionConfig("replicated", False, "another", (5, 15))
  loop.train(make_stage(), support.make_run(mesh, SEEDS, 5, execution=other), tmp_path / "plain")
  assert not (tmp_path / "plain" / "profile").exists()
  for name in ("traced", "plain"):
    assert json.loads((tmp_path / name / "speed.json").read_text())["steps"] == 23


def test_a_stage_to_profile_that_is_not_there_is_said(tmp_path):
  said = []
  experiment = SimpleNamespace(
    run=SimpleNamespace(
      execution=ExecutionConfig(profile_stage="classifer/csl", profile_steps=(2, 4)),
      progress=SimpleNamespace(say=said.append),
    ),
    workdir=SimpleNamespace(path=tmp_path),
  )
  pipeline._say_if_nothing_was_profiled(experiment)
  assert len(said) == 1 and "no stage classifer/csl trained steps 2 to 4" in said[0]
  (tmp_path / "classifier" / "profile").mkdir(parents=True)
  pipeline._say_if_nothing_was_profiled(experiment)
  assert len(said) == 1
