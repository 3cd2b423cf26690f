"""The training loop: nothing is lost by a kill, and what goes wrong is said and contained."""

import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from memdiff.errors import NonFiniteError, WorkdirError
from memdiff.runtime import checkpoint as checkpoints
from memdiff.runtime import loop, results, train_state
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.checkpoint import Checkpointer
from memdiff.runtime.loop import LoopConfig, Stage
from memdiff.runtime.progress import Progress
from memdiff.runtime.random import base_keys, stream
from memdiff.runtime.train_state import OptimizerConfig
from memdiff.runtime.writers import History, read_history
from tests import support

SEEDS = (3, 7)
STEPS = 23
OPTIMIZER = train_state.make_optimizer(
  OptimizerConfig("adamw", 0.05, "cosine", (), (), 0.9, False, 0.0, 0.1, 1.0, 1), STEPS
)


class Killed(BaseException):
  """Stands for the end of the process."""


class KilledAt(Progress):
  """A progress display during whose line for a step the process dies."""

  def __init__(self, at):
    super().__init__(1, stream=io.StringIO())
    self.at = at

  def step(self, stage, step, num_steps, metrics):
    if step >= self.at:
      raise Killed


def make_stage(poison=None, num_steps=STEPS):
  """Noisy linear regression with shared and own data; `poison` is (step, seed) of a NaN loss."""
  rng = np.random.default_rng(0)
  shared = {"x": jnp.asarray(rng.normal(size=(32, 3)), jnp.float32)}
  per_seed = {
    "y": jnp.asarray(rng.normal(size=(2, 32)), jnp.float32),
    "seed": jnp.asarray(SEEDS, jnp.int32),
  }

  def init(key, per_seed):
    del per_seed
    return train_state.create(key, {"w": jax.random.normal(stream(key, "w"), (3,))}, OPTIMIZER)

  def batch(state, shared, per_seed):
    noise = jax.random.normal(stream(state.key, "noise", state.step), (32,))
    return {"x": shared["x"], "y": per_seed["y"], "noise": noise}

  def step(state, shared, per_seed):
    noise = batch(state, shared, per_seed)["noise"]

    def loss_of(params):
      return jnp.mean((shared["x"] @ params["w"] - per_seed["y"] - 0.1 * noise) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    if poison is not None:
      bad = (state.step == poison[0]) & (per_seed["seed"] == poison[1])
      loss = jnp.where(bad, jnp.nan, loss)
    return train_state.apply_gradients(state, gradients, OPTIMIZER), {"loss": loss}

  def evaluate(state, shared, per_seed):
    return {"error": jnp.mean(jnp.abs(shared["x"] @ state.params["w"] - per_seed["y"]))}

  return Stage("toy", num_steps, init, batch, step, evaluate, shared, per_seed, batch_size=32)


def make_run(mesh, progress=None, per_dispatch=5, keep=2, **changes):
  changes |= {} if progress is None else {"progress": progress}
  return support.make_run(
    mesh, SEEDS, per_dispatch, eval_every=5, checkpoint_every=10, keep_checkpoints=keep, **changes
  )


def numbers(state):
  """The state as plain arrays, keys included."""
  return jax.tree.leaves(jax.device_get(state.replace(key=jax.random.key_data(state.key))))


def check_same(one, other):
  for a, b in zip(numbers(one), numbers(other), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def uninterrupted(mesh, tmp_path_factory):
  folder = tmp_path_factory.mktemp("uninterrupted")
  state = loop.train(make_stage(), make_run(mesh), folder)
  return state, (folder / "metrics.jsonl").read_text()


def steps_on_disk(folder):
  return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


# --- an undisturbed run ----------------------------------------------------------------------


def test_the_loop_equals_plain_steps(mesh, uninterrupted):
  """Same state and same losses as a Python loop over one seed at a time."""
  state, text = uninterrupted
  stage = make_stage()
  step, evaluate = jax.jit(stage.step), jax.jit(stage.evaluate)
  trained, losses, errors = [], [], []
  for number, key in enumerate(base_keys(SEEDS, "toy")):
    per_seed = jax.tree.map(lambda x, number=number: x[number], stage.per_seed)
    one = stage.init(key, per_seed)
    history, errors_of_seed = [], []
    for i in range(STEPS):
      if i % 5 == 0:
        errors_of_seed.append(float(evaluate(one, stage.shared, per_seed)["error"]))
      one, metrics = step(one, stage.shared, per_seed)
      history.append(float(metrics["loss"]))
    errors_of_seed.append(float(evaluate(one, stage.shared, per_seed)["error"]))
    trained.append(one.params["w"])
    losses.append(history)
    errors.append(errors_of_seed)
  np.testing.assert_allclose(state.params["w"], np.stack(trained), rtol=1e-5)
  assert state.step.tolist() == [STEPS, STEPS]
  records = [json.loads(line) for line in text.splitlines()]
  train = {r["step"]: r["metrics"]["loss"] for r in records if r["kind"] == "train"}
  evals = {r["step"]: r["metrics"]["error"] for r in records if r["kind"] == "eval"}
  assert list(train) == [5, 10, 15, 20, 23] and list(evals) == [0, 5, 10, 15, 20, 23]
  for first, last in ((0, 5), (5, 10), (10, 15), (15, 20), (20, 23)):
    expected = np.array(losses)[:, first:last].mean(axis=1)
    np.testing.assert_allclose(train[last], expected, rtol=1e-5)
  np.testing.assert_allclose(np.array(list(evals.values())), np.array(errors).T, rtol=1e-5)


def test_steps_per_dispatch_do_not_change_the_result(mesh, tmp_path, uninterrupted):
  state, text = uninterrupted
  other = loop.train(make_stage(), make_run(mesh, per_dispatch=1), tmp_path)
  for a, b in zip(numbers(state), numbers(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  evals = [r for r in map(json.loads, text.splitlines()) if r["kind"] == "eval"]
  other_evals = [r for r in read_history(tmp_path / "metrics.jsonl") if r["kind"] == "eval"]
  for one, another in zip(evals, other_evals, strict=True):
    assert one["step"] == another["step"]
    np.testing.assert_allclose(one["metrics"]["error"], another["metrics"]["error"], rtol=1e-5)


def test_a_finished_stage_is_not_trained_again(mesh, tmp_path, uninterrupted):
  run = make_run(mesh)
  loop.train(make_stage(), run, tmp_path)
  again = loop.train(make_stage(poison=(0, 3)), run, tmp_path)  # a step would fail
  check_same(again, uninterrupted[0])
  assert (tmp_path / "metrics.jsonl").read_text() == uninterrupted[1]


def test_only_the_newest_checkpoints_are_kept(mesh, tmp_path):
  loop.train(make_stage(), make_run(mesh, keep=1), tmp_path)
  assert steps_on_disk(tmp_path) == [23]


# --- killed and resumed ----------------------------------------------------------------------


def kill_at(mesh, folder, at):
  with pytest.raises(Killed):
    loop.train(make_stage(), make_run(mesh, KilledAt(at)), folder)


@pytest.mark.parametrize("at", [5, 10, 15, 20, 23])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(
  mesh, tmp_path, uninterrupted, at
):
  kill_at(mesh, tmp_path, at)
  state = loop.train(make_stage(), make_run(mesh), tmp_path)
  check_same(state, uninterrupted[0])
  assert (tmp_path / "metrics.jsonl").read_text() == uninterrupted[1]


@pytest.mark.parametrize("at", [15, 23])
def test_so_it_does_if_saving_runs_beside_training(mesh, tmp_path, uninterrupted, monkeypatch, at):
  """As on accelerators."""
  assert not checkpoints.in_background()
  monkeypatch.setattr(checkpoints, "in_background", lambda: True)
  kill_at(mesh, tmp_path, at)
  state = loop.train(make_stage(), make_run(mesh), tmp_path)
  check_same(state, uninterrupted[0])


def test_a_resumed_run_goes_on_at_its_checkpoint_and_says_so(mesh, tmp_path):
  kill_at(mesh, tmp_path, 20)
  assert steps_on_disk(tmp_path) == [10]
  progress = Progress(1, stream=io.StringIO())
  poisoned = make_stage(poison=(9, 3))  # steps before the checkpoint are not taken again
  loop.train(poisoned, make_run(mesh, progress), tmp_path)
  assert "toy resumes at step 10/23" in progress._stream.getvalue()


def test_a_run_killed_many_times_has_no_record_twice(mesh, tmp_path, uninterrupted):
  for at in (15, 20, 15, 23):
    kill_at(mesh, tmp_path, at)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 23, "kind": "tra')  # killed while writing
  state = loop.train(make_stage(), make_run(mesh), tmp_path)
  check_same(state, uninterrupted[0])
  assert (tmp_path / "metrics.jsonl").read_text() == uninterrupted[1]


def test_history_keeps_what_led_to_the_checkpoint_and_drops_the_rest(tmp_path):
  history = History(tmp_path / "metrics.jsonl")
  for step, kind in ((0, "eval"), (5, "train"), (5, "eval"), (10, "train"), (10, "eval")):
    history.write(step, kind, {"m": np.array([step, 1.0])})
  history.rewind(5)
  kept = [(r["step"], r["kind"]) for r in read_history(tmp_path / "metrics.jsonl")]
  assert kept == [(0, "eval"), (5, "train"), (5, "eval")]
  history.rewind(-1)
  assert read_history(tmp_path / "metrics.jsonl") == []
  assert read_history(tmp_path / "none.jsonl") == []


# --- torn checkpoints ------------------------------------------------------------------------


def tear(folder, step):
  """Empties every file of a checkpoint, as a crash of the machine can leave them."""
  files = [p for p in (folder / "checkpoints" / str(step)).rglob("*") if p.is_file()]
  assert files
  for path in files:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", ["empty", "half", "missing"])
def test_a_torn_newest_checkpoint_falls_back_to_the_older(mesh, tmp_path, uninterrupted, damage):
  loop.train(make_stage(), make_run(mesh), tmp_path)
  assert steps_on_disk(tmp_path) == [20, 23]
  files = [p for p in (tmp_path / "checkpoints" / "23").rglob("*") if p.is_file()]
  for path in files:
    if damage == "missing":
      path.unlink()
    else:
      data = path.read_bytes()
      path.write_bytes(data[: len(data) // 2] if damage == "half" else b"")
  progress = Progress(1, stream=io.StringIO())
  state = loop.train(make_stage(), make_run(mesh, progress), tmp_path)
  assert "toy resumes at step 20/23" in progress._stream.getvalue()
  check_same(state, uninterrupted[0])
  assert (tmp_path / "metrics.jsonl").read_text() == uninterrupted[1]
  assert steps_on_disk(tmp_path) == [20, 23]
  check_same(loop.train(make_stage(), make_run(mesh), tmp_path), uninterrupted[0])


def spoil_metadata(folder, step):
  """One changed letter in the name of an entry."""
  path = folder / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
  path.write_text(path.read_text().replace("init_timestamp", "init_dimestamp"))


def test_a_checkpoint_with_spoiled_metadata_falls_back_to_the_older(mesh, tmp_path, uninterrupted):
  loop.train(make_stage(), make_run(mesh), tmp_path)
  spoil_metadata(tmp_path, 23)
  progress = Progress(1, stream=io.StringIO())
  state = loop.train(make_stage(), make_run(mesh, progress), tmp_path)
  assert "toy resumes at step 20/23" in progress._stream.getvalue()
  check_same(state, uninterrupted[0])
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["20", "23"]


def test_where_all_metadata_are_spoiled_the_folder_is_named_every_time(mesh, tmp_path):
  loop.train(make_stage(), make_run(mesh), tmp_path)
  for step in (20, 23):
    spoil_metadata(tmp_path, step)
  for _ in range(2):
    with pytest.raises(WorkdirError, match=r"step 20: its metadata cannot be read.*step 23: its"):
      loop.train(make_stage(), make_run(mesh), tmp_path)


def test_a_checkpoint_with_one_changed_bit_falls_back_to_the_older(mesh, tmp_path):
  place = functools.partial(mesh_lib.replicate, mesh)
  states = {step: {"w": np.random.RandomState(step).rand(64, 64)} for step in (1, 2)}
  checkpointer = Checkpointer(tmp_path / "c", keep=2)
  for step, state in states.items():
    checkpointer.save(step, place(state) | {"key": jax.random.key(step)})
  checkpointer.close()
  files = [path for path in (tmp_path / "c" / "2").rglob("*") if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 16
  largest.write_bytes(data)
  tree = {"w": place(states[1]["w"]), "key": jax.random.key(0)}
  shapes = checkpoints.abstract(tree, jax.tree.map(lambda x: mesh_lib.replicated(mesh), tree))
  checkpointer = Checkpointer(tmp_path / "c", keep=2)
  step, state = checkpointer.restore(shapes)
  checkpointer.close()
  assert step == 1 and jax.random.key_data(state["key"]).tolist() == [0, 1]
  np.testing.assert_array_equal(state["w"], states[1]["w"].astype(np.float32))


def cut(path, lines, characters=0):
  """Takes the last lines away, and the end of the one before."""
  text = "".join(path.read_text().splitlines(keepends=True)[: -lines or None])
  path.write_text(text[: -characters or None])


@pytest.mark.parametrize(("lines", "characters"), [(0, 5), (1, 0), (1, 5)])
def test_records_that_got_lost_are_made_anew_from_the_checkpoint_before(
  mesh, tmp_path, uninterrupted, lines, characters
):
  loop.train(make_stage(), make_run(mesh), tmp_path)
  cut(tmp_path / "metrics.jsonl", lines, characters)
  progress = Progress(1, stream=io.StringIO())
  state = loop.train(make_stage(), make_run(mesh, progress), tmp_path)
  assert "toy resumes at step 20/23" in progress._stream.getvalue()
  check_same(state, uninterrupted[0])
  assert (tmp_path / "metrics.jsonl").read_text() == uninterrupted[1]


def test_where_the_records_of_all_checkpoints_are_lost_it_is_said(mesh, tmp_path):
  loop.train(make_stage(), make_run(mesh), tmp_path)
  (tmp_path / "metrics.jsonl").unlink()
  with pytest.raises(WorkdirError, match=r"step 20: metrics.jsonl beside it has lost records"):
    loop.train(make_stage(), make_run(mesh), tmp_path)
  assert steps_on_disk(tmp_path) == [20, 23]


def test_where_no_checkpoint_can_be_read_the_folder_is_named(mesh, tmp_path):
  loop.train(make_stage(), make_run(mesh), tmp_path)
  for step in (20, 23):
    tear(tmp_path, step)
  with pytest.raises(WorkdirError, match=r"No checkpoint in .*checkpoints can be read") as caught:
    loop.train(make_stage(), make_run(mesh), tmp_path)
  message = str(caught.value)
  assert "step 23" in message and "step 20" in message and "remove that folder" in message
  assert "\n" not in message


def test_an_unfinished_stage_has_no_result(mesh, tmp_path):
  kill_at(mesh, tmp_path, 20)
  with pytest.raises(WorkdirError, match=r"Cannot read .*; remove .*result\.npz and run"):
    results.load(tmp_path, mesh)


def test_the_result_of_a_stage_is_what_it_names_of_its_final_state(mesh, tmp_path):
  stage = dataclasses.replace(make_stage(), result=("params", "step"))
  state = loop.train(stage, make_run(mesh), tmp_path)
  found = results.load(tmp_path, mesh)
  jax.tree.map(
    np.testing.assert_array_equal, (found.params, found.step), (state.params, state.step)
  )
  assert found.key is None and found.opt_state is None
  with np.load(tmp_path / "result.npz") as arrays:
    assert "step" in arrays.files and all(n.startswith(("params", "step")) for n in arrays.files)


def test_a_stage_whose_state_nobody_reads_leaves_no_result(mesh, tmp_path):
  loop.train(dataclasses.replace(make_stage(), result=()), make_run(mesh), tmp_path)
  assert not (tmp_path / "result.npz").exists()


def test_a_result_that_was_lost_between_checkpoint_and_end_is_made_up_for(mesh, tmp_path):
  loop.train(make_stage(), make_run(mesh), tmp_path)
  before = (tmp_path / "result.npz").read_bytes()
  (tmp_path / "result.npz").unlink()
  loop.train(make_stage(), make_run(mesh), tmp_path)
  assert (tmp_path / "result.npz").read_bytes() == before


# --- non-finite numbers ----------------------------------------------------------------------


@pytest.mark.parametrize(("step", "seed", "survivor"), [(13, 7, 10), (20, 3, 20), (2, 3, None)])
def test_a_loss_that_is_no_number_stops_the_run(mesh, tmp_path, step, seed, survivor):
  with pytest.raises(NonFiniteError) as caught:
    loop.train(make_stage(poison=(step, seed)), make_run(mesh), tmp_path)
  message = str(caught.value)
  assert f"Stage toy: loss became nan at step {step} (seed {seed})" in message
  assert "\n" not in message and caught.value.exit_code == 1
  on_disk = steps_on_disk(tmp_path)
  assert (on_disk[-1] if on_disk else None) == survivor
  assert all(np.isfinite(r["metrics"].get("loss", [0])).all()
             for r in read_history(tmp_path / "metrics.jsonl"))  # fmt: skip


def test_the_checkpoint_before_a_bad_loss_is_intact(mesh, tmp_path, uninterrupted):
  with pytest.raises(NonFiniteError):
    loop.train(make_stage(poison=(13, 7)), make_run(mesh), tmp_path)
  state = loop.train(make_stage(), make_run(mesh), tmp_path)  # goes on from step 10
  check_same(state, uninterrupted[0])
  assert (tmp_path / "metrics.jsonl").read_text() == uninterrupted[1]


def test_the_first_bad_step_is_named(mesh, tmp_path):
  healthy = make_stage().step

  def step(state, shared, per_seed):
    state, metrics = healthy(state, shared, per_seed)
    first = jnp.where(per_seed["seed"] == 3, 14, 12)  # the later seed turns bad first
    return state, {"loss": jnp.where(state.step > first, jnp.inf, metrics["loss"])}

  stage = dataclasses.replace(make_stage(), step=step)
  with pytest.raises(NonFiniteError, match=r"loss became inf at step 12 \(seed 7\)"):
    loop.train(stage, make_run(mesh), tmp_path)


# --- a full disk -----------------------------------------------------------------------------


def test_a_full_disk_is_said_before_the_save_and_earlier_checkpoints_stay(
  mesh, tmp_path, uninterrupted, monkeypatch
):
  kill_at(mesh, tmp_path, 20)
  usage = checkpoints.shutil.disk_usage(tmp_path)
  monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage._replace(free=1000))
  with pytest.raises(
    WorkdirError, match=r"Cannot write a checkpoint to .*make room there"
  ) as caught:
    loop.train(make_stage(), make_run(mesh), tmp_path)
  assert "\n" not in str(caught.value) and steps_on_disk(tmp_path) == [10]
  monkeypatch.undo()
  state = loop.train(make_stage(), make_run(mesh), tmp_path)
  check_same(state, uninterrupted[0])
  assert (tmp_path / "metrics.jsonl").read_text() == uninterrupted[1]


class Wordless(Exception):
  """An error without a message, as assertions in libraries raise them."""


def test_errors_without_words_still_end_in_a_sentence(mesh, tmp_path, monkeypatch):
  def fail(*_, **__):
    raise Wordless

  kill_at(mesh, tmp_path, 20)
  monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
  with pytest.raises(WorkdirError, match="No checkpoint in"):
    loop.train(make_stage(), make_run(mesh), tmp_path)
  monkeypatch.undo()
  monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
  with pytest.raises(WorkdirError, match="Cannot write a checkpoint"):
    loop.train(make_stage(), make_run(mesh), tmp_path)


# --- checkpoints and streams -----------------------------------------------------------------


def test_a_checkpointer_without_checkpoints_restores_nothing(tmp_path):
  checkpointer = Checkpointer(tmp_path / "c", keep=1)
  assert checkpointer.latest_step() is None and checkpointer.restore({}) is None
  checkpointer.close()


def test_streams_are_pure_and_differ_by_name_and_step():
  key = jax.random.key(0)

  def bits(*arguments):
    return tuple(jax.random.key_data(stream(key, *arguments)).tolist())

  keys = [bits("a"), bits("b"), bits("a", 0), bits("a", 1), bits("b", 0)]
  assert len(set(keys)) == 5 and bits("a", 1) == keys[3]
  traced = jax.jit(lambda step: stream(key, "a", step))(jnp.array(1))
  assert tuple(jax.random.key_data(traced).tolist()) == keys[3]
  seeds = jax.random.key_data(base_keys((0, 1, 2), "toy"))
  assert len({tuple(row) for row in seeds.tolist()}) == 3


def test_settings_of_the_loop_must_divide():
  with pytest.raises(ValueError, match=r"eval_every is 7, but must be a multiple of .*, 5"):
    LoopConfig(5, 7, 10, 1, 0, "stop", 0)
