"""Random numbers that are drawn flat are those of JAX and Flax, number for number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from memdiff.runtime import random
from tests import support

SHAPES = [(), (7,), (4, 5), (2, 3, 4)]  # more axes take long to compile the way JAX draws
KEY = jax.random.key(11)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["normal", "uniform"])
def test_draws_are_those_of_jax(name, shape):
  ours, theirs = getattr(random, name), getattr(jax.random, name)
  drawn = ours(KEY, shape)
  assert drawn.shape == shape and drawn.dtype == jnp.float32
  np.testing.assert_array_equal(drawn, theirs(KEY, shape))
  np.testing.assert_array_equal(jax.jit(lambda key: ours(key, shape))(KEY), drawn)


@pytest.mark.parametrize("name", ["normal", "uniform"])
def test_seeds_in_a_batch_draw_as_they_do_alone(name):
  draw, keys = getattr(random, name), random.base_keys((0, 3, 4), "x")
  together = jax.vmap(lambda key: draw(key, (2, 5)))(keys)
  np.testing.assert_array_equal(together, jnp.stack([draw(key, (2, 5)) for key in keys]))
  assert len(np.unique(together)) == together.size


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 4, 5)])
def test_kernels_start_as_flax_starts_them(shape, dtype):
  ours = random.kernel_normal(KEY, shape, dtype)
  theirs = nn.initializers.lecun_normal()(KEY, shape, dtype)
  assert ours.shape == shape and ours.dtype == dtype
  np.testing.assert_array_equal(ours, theirs)


def test_kernels_have_the_deviation_that_their_inputs_ask_for():
  for shape in ((64, 4096), (3, 3, 16, 2048)):
    kernel = np.asarray(random.kernel_normal(KEY, shape))
    assert kernel.std() == pytest.approx(np.prod(shape[:-1]) ** -0.5, rel=0.02)


def test_streams_of_another_run_are_others(mesh):
  plain, folds = (support.make_run(mesh, (0, 1), 1, streams=s) for s in ("", "folds/"))
  keys = [jax.random.key_data(run.keys("heads")).tolist() for run in (plain, folds)]
  assert keys[0] == jax.random.key_data(random.base_keys((0, 1), "heads")).tolist()
  assert keys[1] == jax.random.key_data(random.base_keys((0, 1), "folds/heads")).tolist()
  assert len({tuple(key) for of_run in keys for key in of_run}) == 4
