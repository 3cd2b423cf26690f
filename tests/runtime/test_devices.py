"""Training on 1, 2 and 8 fake devices: split parameters, and moving a run to another number."""

import itertools
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.errors import Preempted
from memdiff.runtime import loop, train_state
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.loop import ExecutionConfig, Stage
from memdiff.runtime.random import stream
from memdiff.runtime.train_state import OptimizerConfig
from tests import support

STEPS, WIDTH, SEEDS = 12, 160, (0, 1)
OPTIMIZER = train_state.make_optimizer(
  OptimizerConfig("adamw", 0.01, "cosine", (), (), 0.9, False, 0.1, 0.1, 1.0, 1), STEPS
)


def make_stage(mesh):
  """A layer of WIDTH x WIDTH that learns to turn noise around; its batch is split."""
  target = np.random.default_rng(0).normal(size=(WIDTH,)).astype(np.float32)
  shared = mesh_lib.replicate(mesh, {"target": target})

  def init(key, _):
    params = {"w": 0.1 * jax.random.normal(stream(key, "w"), (WIDTH, WIDTH)), "b": jnp.zeros(WIDTH)}
    return train_state.create(key, params, OPTIMIZER, ema_params=jax.tree.map(jnp.copy, params))

  def batch(state, shared, own):
    del shared, own
    x = jax.random.normal(stream(state.key, "x", state.step), (16, WIDTH))
    return mesh_lib.shard_batch(x, mesh)

  def step(state, shared, own):
    x = batch(state, shared, own)

    def loss_of(params):
      y = x @ params["w"] + params["b"][None]
      return jnp.mean(jnp.square(y + x * shared["target"][None]))

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    state = train_state.apply_gradients(state, gradients, OPTIMIZER)
    average = train_state.update_ema(state.ema_params, state.params, state.step, 0.9)
    return state.replace(ema_params=average), {"loss": loss}

  return Stage("wide", STEPS, init, batch, step, None, shared, (), batch_size=16)


def train(folder, devices, parameters, dispatches=None):
  """The final state, or None where the run was told to stop after some dispatches."""
  mesh = mesh_lib.make_mesh(jax.devices()[:devices])
  run = support.make_run(
    mesh, SEEDS, 2, every=4, execution=ExecutionConfig(parameters, False, "", ())
  )
  if dispatches is not None:
    asked = itertools.count()
    run.preemption.asked = lambda: next(asked) == dispatches
  try:
    return loop.train(make_stage(mesh), run, folder)
  except Preempted:
    return None


def child() -> None:
  """Runs where eight fake devices are; prints what the tests look at."""

  def numbers(state):
    return [np.asarray(x).tolist() for x in jax.tree.leaves((state.params, state.ema_params))]

  found = {}
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    found["one"] = numbers(train(folder / "one", 1, "replicated"))
    found["eight"] = numbers(train(folder / "eight", 8, "replicated"))
    split = train(folder / "split", 8, "fsdp")
    found["split"] = numbers(split)
    found["shares"] = {
      jax.tree_util.keystr(path): [x.size, x.addressable_shards[0].data.size]
      for path, x in jax.tree_util.tree_flatten_with_path(split.replace(key=None))[0]
    }
    for devices, parameters, stop in ((8, "fsdp", 2), (2, "fsdp", 3), (1, "replicated", None)):
      moved = train(folder / "moved", devices, parameters, stop)
      assert (moved is None) == (stop is not None)
    found["moved"] = numbers(moved)
  print(json.dumps(found))


@pytest.fixture(scope="module")
def found():
  return json.loads(support.on_fake_devices(__file__).splitlines()[-1])


@pytest.mark.parametrize("name", ["eight", "split", "moved"])
def test_devices_and_split_parameters_do_not_change_the_result(found, name):
  for ours, one in zip(found[name], found["one"], strict=True):
    np.testing.assert_allclose(ours, one, rtol=1e-4, atol=1e-6)


def test_large_parameters_their_average_and_their_moments_are_split(found):
  large = [shares for shares in found["shares"].values() if shares[0] == 2 * WIDTH * WIDTH]
  assert len(large) == 4  # parameter, average, both moments
  assert all(own * 8 == whole for whole, own in large)
  small = [shares for shares in found["shares"].values() if shares[0] < 2 * WIDTH * WIDTH]
  assert small and all(own == whole for whole, own in small)


@pytest.mark.parametrize("make", [np.arange, jnp.arange], ids=["host", "device"])
def test_whatever_is_placed_has_one_sharding_and_is_not_placed_again(mesh, make):
  placed = mesh_lib.replicate(mesh, {"a": make(3)})["a"]
  assert placed.sharding == mesh_lib.replicated(mesh)  # or programs would be compiled again
  again = mesh_lib.replicate(mesh, placed)
  assert again.unsafe_buffer_pointer() == placed.unsafe_buffer_pointer()


def test_the_largest_axis_that_divides_is_split(mesh):
  spec = mesh_lib.parameter_spec((128, 256), mesh)
  assert spec == jax.sharding.PartitionSpec(None, "data")
  assert mesh_lib.parameter_spec((10, 10), mesh) == jax.sharding.PartitionSpec()


if __name__ == "__main__":
  child()
