"""Stages whose batches come from a host iterator: as from the devices, and exact after a kill."""

import dataclasses
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.runtime import loop, results, train_state
from memdiff.runtime.loop import Stage
from memdiff.runtime.train_state import OptimizerConfig
from tests import support

SEEDS = (2, 5)
STEPS, BATCH = 13, 16
OPTIMIZER = train_state.make_optimizer(
  OptimizerConfig("sgd", 0.1, "constant", (), (), 0.9, False, 0.0, 0.0, 0.0, 1), STEPS
)


def batch_of(seed, step):
  return {"x": np.random.default_rng((seed, step)).normal(size=(BATCH, 3)).astype(np.float32)}


class Batches:
  """An iterator that remembers whether it was closed."""

  opened: ClassVar[list] = []

  def __init__(self, seed, first_step):
    self.seed, self.step, self.closed = seed, first_step, False
    self.opened.append(self)

  def __next__(self):
    assert not self.closed
    self.step += 1
    return batch_of(self.seed, self.step - 1)

  def close(self):
    self.closed = True


def init(key, own):
  del own
  return train_state.create(key, {"w": jnp.zeros((3,))}, OPTIMIZER)


def update(state, x):
  loss, gradients = jax.value_and_grad(lambda p: jnp.mean(jnp.square(x @ p["w"] - x.sum(axis=1))))(
    state.params
  )
  return train_state.apply_gradients(state, gradients, OPTIMIZER), {"loss": loss}


def batch(state, shared, own):
  del state, shared
  return own[1]


def step(state, shared, own):
  own, batch = own
  state, metrics = update(state, batch["x"] + shared["shift"])
  return state, metrics | {"own": own["number"]}


def make_stage():
  shared, own = {"shift": jnp.float32(0.5)}, {"number": jnp.asarray(SEEDS, jnp.float32)}
  return Stage("fed", STEPS, init, batch, step, None, shared, own, batch_size=4, batches=Batches)


def run_of(mesh):
  return support.make_run(mesh, SEEDS, 4, keep_checkpoints=2)


@pytest.fixture(scope="module")
def trained(mesh, tmp_path_factory):
  folder = tmp_path_factory.mktemp("fed")
  return loop.train(make_stage(), run_of(mesh), folder)


def test_the_steps_are_those_of_a_plain_loop_over_the_batches(trained):
  for number, seed in enumerate(SEEDS):
    state = init(jax.random.key(0), None)
    for i in range(STEPS):
      state, _ = update(state, jnp.asarray(batch_of(seed, i)["x"] + 0.5))
    np.testing.assert_allclose(trained.params["w"][number], state.params["w"], rtol=1e-5)


def test_the_constant_part_of_own_reaches_every_step(mesh, tmp_path):
  loop.train(make_stage(), run_of(mesh), tmp_path)
  records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert records and all(record["metrics"]["own"] == [2.0, 5.0] for record in records)


def test_a_resumed_run_asks_for_the_batches_it_has_not_seen(mesh, tmp_path, trained, monkeypatch):
  taken = loop._Feed.take

  def killed(feed, num_steps):
    if feed._iterators[0].step >= 8:
      raise KeyboardInterrupt
    return taken(feed, num_steps)

  with monkeypatch.context() as context:
    context.setattr(loop._Feed, "take", killed)
    with pytest.raises(KeyboardInterrupt):
      loop.train(make_stage(), run_of(mesh), tmp_path)
  Batches.opened.clear()
  state = loop.train(make_stage(), run_of(mesh), tmp_path)
  assert [iterator.seed for iterator in Batches.opened] == list(SEEDS)
  assert all(iterator.step == STEPS and iterator.closed for iterator in Batches.opened)
  np.testing.assert_array_equal(state.params["w"], trained.params["w"])


def test_iterators_are_closed_when_a_stage_fails(mesh, tmp_path, monkeypatch):
  Batches.opened.clear()
  monkeypatch.setattr(loop._Feed, "take", lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    loop.train(make_stage(), run_of(mesh), tmp_path)
  assert len(Batches.opened) == 2 and all(iterator.closed for iterator in Batches.opened)


def test_a_stage_of_no_steps_leaves_its_initial_state(mesh, tmp_path):
  stage = dataclasses.replace(make_stage(), num_steps=0)
  state = loop.train(stage, run_of(mesh), tmp_path)
  again = results.load(tmp_path, mesh)
  np.testing.assert_array_equal(state.params["w"], np.zeros((2, 3)))
  np.testing.assert_array_equal(again.params["w"], np.zeros((2, 3)))
