"""Checkpoints under folders with names that other programs read as patterns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.runtime import checkpoint
from memdiff.runtime.checkpoint import Checkpointer


def save(folder, number):
  folder.mkdir(parents=True)
  checkpointer = Checkpointer(folder, keep=2)
  for step in (1, 2):
    checkpointer.save(step, {"a": jnp.arange(4.0) + number, "b": jnp.full((2, 3), step)})
  checkpointer.close()


def restore(folder):
  """(step, state) as a run that goes on reads it."""
  zeros = {"a": jnp.zeros(4), "b": jnp.zeros((2, 3), int)}
  shardings = jax.tree.map(lambda x: x.sharding, zeros)
  checkpointer = Checkpointer(folder, keep=2)
  found = checkpointer.restore(checkpoint.abstract(zeros, shardings))
  checkpointer.close()
  return found


@pytest.mark.parametrize("name", ["[lr=0.1]", "[!a]", "who?", "a*", "{a,b} [数]", "a [b", "~"])
def test_a_checkpoint_comes_back_whatever_its_folder_is_called(name, tmp_path):
  folder = tmp_path / name / "checkpoints"
  save(folder, 7)
  step, state = restore(folder)
  assert step == 2
  np.testing.assert_array_equal(state["a"], np.arange(4) + 7)
  np.testing.assert_array_equal(state["b"], np.full((2, 3), 2))


@pytest.mark.parametrize(("name", "like_it"), [("a*", "ab"), ("who?", "whom"), ("r[12]", "r1")])
def test_folders_that_a_name_matches_as_a_pattern_stay_apart(name, like_it, tmp_path):
  save(tmp_path / like_it, 100)
  save(tmp_path / name, 7)
  np.testing.assert_array_equal(restore(tmp_path / name)[1]["a"], np.arange(4) + 7)
  np.testing.assert_array_equal(restore(tmp_path / like_it)[1]["a"], np.arange(4) + 100)
