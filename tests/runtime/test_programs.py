"""Compiled programs: stages of the same functions share them, for any number of steps."""

import contextlib
import dataclasses
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.errors import NonFiniteError
from memdiff.runtime import loop, programs
from memdiff.runtime.progress import Progress
from memdiff.runtime.writers import read_history
from tests import support
from tests.runtime import test_loop, test_loop_batches
from tests.runtime.test_loop import SEEDS, make_stage


def make_fed_stage():
  """A stage whose batches come from the host, of a function that no other stage has."""
  stage = test_loop_batches.make_stage()
  return dataclasses.replace(stage, step=lambda *arguments: test_loop_batches.step(*arguments))


FEEDS = {"on devices": make_stage, "from the host": make_fed_stage}


def train(mesh, folder, stage, per_dispatch, **changes):
  """(final state, how many programs it says it compiled)."""
  progress = Progress(1, stream=io.StringIO())
  run = support.make_run(mesh, SEEDS, per_dispatch, progress=progress, **changes)
  state = loop.train(stage, run, folder)
  return state, len(re.findall(r"^compiling ", progress._stream.getvalue(), re.M))


@contextlib.contextmanager
def counted_compiles():
  """A list that grows with every program that XLA is asked for."""
  found, counting = [], [True]

  def record(event, _, **__):
    if counting[0] and event == "/jax/core/compile/backend_compile_duration":
      found.append(event)

  jax.monitoring.register_event_duration_secs_listener(record)
  try:
    yield found
  finally:
    counting[0] = False


def other(stage):
  """A stage of the same functions with other data and another name."""
  shared, per_seed = jax.tree.map(lambda x: x + 1, (stage.shared, stage.per_seed))
  return dataclasses.replace(stage, name="other", shared=shared, per_seed=per_seed)


def check_close(one, another):
  for a, b in zip(test_loop.numbers(one), test_loop.numbers(another), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --- shared ----------------------------------------------------------------------------------


@pytest.mark.parametrize("feed", FEEDS)
def test_stages_of_the_same_functions_compile_once(mesh, tmp_path, feed):
  stage = FEEDS[feed]()
  its_like = other(stage)
  with counted_compiles() as found:
    first, compiled = train(mesh, tmp_path / "first", stage, 5)
    assert compiled == 1 and found
    found.clear()
    second, compiled = train(mesh, tmp_path / "second", its_like, 5)
    assert compiled == 0 and found == []
  assert not np.allclose(first.params["w"], second.params["w"])  # it is no other's result


def test_another_step_guard_or_dispatch_is_another_program(mesh, tmp_path):
  stage = make_stage()
  assert train(mesh, tmp_path / "first", stage, 5)[1] == 1
  assert train(mesh, tmp_path / "another", make_stage(), 5)[1] == 1  # alike, but another function
  assert train(mesh, tmp_path / "skip", stage, 5, on_non_finite="skip")[1] == 1
  assert train(mesh, tmp_path / "four", stage, 4)[1] == 1
  assert train(mesh, tmp_path / "again", stage, 5)[1] == 0


def test_data_of_another_shape_are_another_program(mesh, tmp_path):
  stage = make_fed_stage()

  class Longer(test_loop_batches.Batches):
    def __next__(self):
      return jax.tree.map(lambda x: np.concatenate([x, x]), super().__next__())

  assert train(mesh, tmp_path / "first", stage, 5)[1] == 1
  longer = dataclasses.replace(stage, batches=Longer)
  assert train(mesh, tmp_path / "longer", longer, 5)[1] == 1
  assert train(mesh, tmp_path / "again", stage, 5)[1] == 0


def test_a_shared_program_still_names_the_stage_that_went_wrong(mesh, tmp_path):
  stage = make_stage()
  train(mesh, tmp_path / "first", stage, 5)
  bad = dataclasses.replace(
    other(stage), per_seed=stage.per_seed | {"y": stage.per_seed["y"].at[1].set(jnp.nan)}
  )
  with pytest.raises(NonFiniteError, match=r"Stage other: loss became nan at step 0 \(seed 7\)"):
    train(mesh, tmp_path / "bad", bad, 5)


# --- any number of steps ---------------------------------------------------------------------


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("per_dispatch", [4, pytest.param(12, marks=pytest.mark.slow), 100])
def test_a_last_dispatch_of_fewer_steps_is_the_same_program(mesh, tmp_path, feed, per_dispatch):
  stage = FEEDS[feed]()
  assert stage.num_steps % per_dispatch
  one, _ = train(mesh, tmp_path / "one", stage, 1)
  state, compiled = train(mesh, tmp_path / "several", stage, per_dispatch)
  assert compiled == 1
  check_close(state, one)
  assert state.step.tolist() == [stage.num_steps] * 2
  losses = [r["metrics"]["loss"] for r in of_training(tmp_path / "one")]
  records = of_training(tmp_path / "several")
  ends = [*range(per_dispatch, stage.num_steps, per_dispatch), stage.num_steps]
  assert [r["step"] for r in records] == ends
  for first, record in zip([0, *ends], records, strict=False):  # of steps that were taken alone
    expected = np.mean(losses[first : record["step"]], axis=0)
    np.testing.assert_allclose(record["metrics"]["loss"], expected, rtol=1e-4)


def of_training(folder):
  return [r for r in read_history(folder / "metrics.jsonl") if r["kind"] == "train"]


def test_the_host_gives_no_batch_that_is_not_trained_on(mesh, tmp_path):
  test_loop_batches.Batches.opened.clear()
  train(mesh, tmp_path, test_loop_batches.make_stage(), 8)
  taken = [iterator.step for iterator in test_loop_batches.Batches.opened]
  assert taken == [test_loop_batches.STEPS] * 2


def test_room_behind_the_last_batch_is_filled_with_it(mesh):
  stage = test_loop_batches.make_stage()
  run = support.make_run(mesh, test_loop_batches.SEEDS, 4)
  feed = loop._Feed(stage, run, 12, 4)
  batches = feed.take(1)["x"]
  feed.close()
  assert batches.shape == (2, 4, test_loop_batches.BATCH, 3)
  for number, seed in enumerate(test_loop_batches.SEEDS):
    expected = test_loop_batches.batch_of(seed, 12)["x"]
    np.testing.assert_array_equal(batches[number], np.stack([expected] * 4))


# --- one seed after the other ----------------------------------------------------------------


@pytest.mark.parametrize("feed", FEEDS)
def test_seeds_one_by_one_end_as_seeds_in_a_batch(mesh, tmp_path, feed):
  stage = FEEDS[feed]()
  alone = dataclasses.replace(stage, one_by_one=True)
  together, _ = train(mesh, tmp_path / "together", stage, 5)
  one_by_one, compiled = train(mesh, tmp_path / "alone", alone, 5)
  assert compiled == 1
  check_close(one_by_one, together)
  records = [read_history(tmp_path / name / "metrics.jsonl") for name in ("together", "alone")]
  assert len(records[0]) == len(records[1]) > 0
  for one, another in zip(*records, strict=True):
    assert (one["step"], one["kind"]) == (another["step"], another["kind"])
    assert one["metrics"].keys() == another["metrics"].keys()
    for name, values in one["metrics"].items():
      np.testing.assert_allclose(another["metrics"][name], values, rtol=1e-4)


def test_a_bad_step_of_one_seed_is_found_one_by_one_too(mesh, tmp_path):
  stage = dataclasses.replace(make_stage(poison=(13, 7)), one_by_one=True)
  with pytest.raises(NonFiniteError, match=r"loss became nan at step 13 \(seed 7\)") as caught:
    train(mesh, tmp_path, stage, 5)
  assert json.dumps(str(tmp_path))[1:-1] in str(caught.value)  # where the batch is kept


def test_a_program_of_seeds_one_by_one_is_that_of_one_seed(mesh):
  """XLA counts the body of the loop over seeds once."""
  stage, flops = make_stage(), []
  for one_by_one in (False, True):
    stage = dataclasses.replace(stage, one_by_one=one_by_one)
    run = support.make_run(mesh, SEEDS, 2)
    arguments = (
      programs.make_init(stage, run)(),
      np.ones(2, bool),
      stage.shared,
      stage.per_seed,
      None,
      np.int32(2),
    )  # fmt: skip
    lowered = programs.make_dispatch(stage, run).lower(*arguments, at_most=2)
    flops.append(lowered.compile().cost_analysis()["flops"])
  assert flops[1] < 0.6 * flops[0]
