"""The guard over numbers: the batch that a bad step met is kept, or the step is left out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.errors import NonFiniteError
from memdiff.runtime import loop, train_state
from memdiff.runtime.loop import Stage
from memdiff.runtime.random import base_keys, stream
from memdiff.runtime.train_state import OptimizerConfig
from memdiff.runtime.workdir import read_arrays
from memdiff.runtime.writers import read_history
from tests import support

SEEDS, STEPS = (3, 7), 12
OPTIMIZER = train_state.make_optimizer(
  OptimizerConfig("sgd", 0.1, "constant", (), (), 0.9, False, 0.0, 0.0, 0.0, 1), STEPS
)


def make_stage(bad=(), *, gradient=False):
  """Regression on noise; at the (step, seed)s of `bad` an input is NaN.

  With `gradient` the loss stays a number and its gradient alone is none.
  """
  per_seed = {"seed": jnp.asarray(SEEDS, jnp.int32)}

  def init(key, _):
    return train_state.create(key, {"w": jnp.ones((3,))}, OPTIMIZER)

  def batch(state, shared, per_seed):
    del shared
    x = jax.random.normal(stream(state.key, "x", state.step), (4, 3))
    hit = jnp.array(False)
    for step, seed in bad:
      hit |= (state.step == step) & (per_seed["seed"] == seed)
    return {"x": x, "hit": hit, "parts": (jnp.where(hit, jnp.nan, 1.0), state.step)}

  def step(state, shared, per_seed):
    drawn = batch(state, shared, per_seed)
    scale = drawn["parts"][0]

    def loss_of(params):
      loss = jnp.mean(jnp.square(drawn["x"] @ params["w"]))
      # The root is 0 with an infinite slope where hit, and 1 with none elsewhere.
      root = jnp.sqrt(jnp.where(drawn["hit"], 0.0 * params["w"].sum(), 1.0))
      return loss + root - ~drawn["hit"] if gradient else loss * scale

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    return train_state.apply_gradients(state, gradients, OPTIMIZER), {"loss": loss}

  return Stage("noise", STEPS, init, batch, step, None, (), per_seed, batch_size=4)


def by_hand(stage, seed, skipped=()):
  """Plain steps of one seed, without those that are skipped."""
  number = SEEDS.index(seed)
  per_seed = jax.tree.map(lambda x: x[number], stage.per_seed)
  state = stage.init(base_keys(SEEDS, stage.name)[number], per_seed)
  step = jax.jit(stage.step)
  for i in range(STEPS):
    state = state.replace(step=state.step + 1) if i in skipped else step(state, (), per_seed)[0]
  return state


@pytest.mark.parametrize("per_dispatch", [1, 3, 4])
def test_the_batch_that_a_bad_step_met_is_kept(mesh, tmp_path, per_dispatch):
  stage = make_stage(bad=((5, 7),))
  with pytest.raises(
    NonFiniteError, match=r"loss became nan at step 5 \(seed 7\); the batch is in"
  ):
    loop.train(stage, support.make_run(mesh, SEEDS, per_dispatch), tmp_path)
  kept = read_arrays(tmp_path / "non_finite_step_5_seed_7.npz")
  key = base_keys(SEEDS, "noise")[1]
  np.testing.assert_array_equal(kept["x"], jax.random.normal(stream(key, "x", 5), (4, 3)))
  assert np.isnan(kept["parts/0"]) and kept["parts/1"] == 5
  assert (kept["step"], kept["seed"], str(kept["stage"])) == (5, 7, "noise")


def test_a_gradient_that_is_no_number_stops_the_run_while_the_loss_is_one(mesh, tmp_path):
  stage = make_stage(bad=((4, 3),), gradient=True)
  with pytest.raises(NonFiniteError, match=r"the gradients became non-finite at step 4 \(seed 3\)"):
    loop.train(stage, support.make_run(mesh, SEEDS, 2), tmp_path)
  assert (tmp_path / "non_finite_step_4_seed_3.npz").exists()


@pytest.mark.parametrize("gradient", [False, True])
def test_skipped_steps_leave_the_state_alone_and_are_counted(mesh, tmp_path, gradient):
  bad = ((2, 3), (5, 3), (5, 7))
  stage = make_stage(bad, gradient=gradient)
  run = support.make_run(mesh, SEEDS, 3, on_non_finite="skip", max_skipped=2)
  state = loop.train(stage, run, tmp_path)
  clean = make_stage()
  for number, (seed, skipped) in enumerate(((3, (2, 5)), (7, (5,)))):
    expected = by_hand(clean, seed, skipped)
    np.testing.assert_allclose(state.params["w"][number], expected.params["w"], rtol=1e-5)
  assert state.step.tolist() == [STEPS, STEPS]
  counted = {
    r["step"]: r["metrics"].get("skipped") for r in read_history(tmp_path / "metrics.jsonl")
  }
  assert counted == {3: [1, 0], 6: [1, 1], 9: None, 12: None}
  assert all(
    np.isfinite(r["metrics"]["loss"]).all() for r in read_history(tmp_path / "metrics.jsonl")
  )


def test_one_bad_step_too_many_stops_the_run_also_after_a_resume(mesh, tmp_path):
  run = support.make_run(mesh, SEEDS, 2, on_non_finite="skip", max_skipped=1)
  stage = make_stage(((1, 3), (9, 3)))
  with pytest.raises(
    NonFiniteError, match=r"2 bad steps are more than 1; loss became nan at step 9"
  ):
    loop.train(stage, run, tmp_path)
  with pytest.raises(NonFiniteError, match="2 bad steps are more than 1"):  # counted from records
    loop.train(stage, run, tmp_path)
  two = dataclasses.replace(run, config=dataclasses.replace(run.config, max_skipped=2))
  assert loop.train(stage, two, tmp_path).step.tolist() == [STEPS, STEPS]


def test_the_guard_changes_no_healthy_step(mesh, tmp_path):
  state = loop.train(make_stage(), support.make_run(mesh, SEEDS, 4), tmp_path)
  for number, seed in enumerate(SEEDS):
    expected = by_hand(make_stage(), seed)
    np.testing.assert_allclose(state.params["w"][number], expected.params["w"], rtol=1e-5)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_accumulated_batches_are_one_update_of_their_mean_gradient(clip):
  fields = ("sgd", 0.3, "constant", (), (), 0.9, False, 0.01, 0.0, clip)
  one = train_state.make_optimizer(OptimizerConfig(*fields, 1), 2)
  four = train_state.make_optimizer(OptimizerConfig(*fields, 4), 8)
  gradients = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
  start = train_state.create(jax.random.key(0), {"w": jnp.ones(3)}, one)
  other = train_state.create(jax.random.key(0), {"w": jnp.ones(3)}, four)
  for first in (0, 4):
    start = train_state.apply_gradients(start, {"w": gradients[first : first + 4].mean(0)}, one)
    for g in gradients[first : first + 4]:
      other = train_state.apply_gradients(other, {"w": jnp.asarray(g)}, four)
    np.testing.assert_allclose(other.params["w"], start.params["w"], rtol=1e-5)
