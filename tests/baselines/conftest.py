"""These tests compile much and compute little."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def compile_fast():
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
