"""Random streams: one base key per seed; a stream by name, then by step.

`stream(key, "augment", step)` can be replayed in isolation, needs no carried key, and does not
move when another stream is added.

Draws of several dimensions are made flat: the numbers are the same, and XLA's CPU backend compiles
JAX's generator several times faster for one dimension than for two, twenty times than for five.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def stream(key: jax.Array, name: str, step: jax.Array | int | None = None) -> jax.Array:
  """The key of the stream `name`, at `step` if one is given."""
  key = jax.random.fold_in(key, zlib.crc32(name.encode()))
  return key if step is None else jax.random.fold_in(key, step)


def base_keys(seeds: tuple[int, ...], name: str) -> jax.Array:
  """One key per seed for the stage `name`. [S] keys."""
  return jnp.stack([stream(jax.random.key(seed), name) for seed in seeds])


def _flat(draw: Callable, key: jax.Array, shape: tuple[int, ...], *arguments: Any) -> jax.Array:
  return draw(key, (math.prod(shape),), *arguments).reshape(shape)


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """`jax.random.normal`, number for number."""
  return _flat(jax.random.normal, key, shape)


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """`jax.random.uniform` from 0 to 1, number for number."""
  return _flat(jax.random.uniform, key, shape)


def kernel_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  """`lecun_normal` of a kernel [..., in, out], number for number."""
  variance = jnp.array(1 / math.prod(shape[:-1]), dtype)
  deviation = jnp.sqrt(variance) / jnp.array(0.87962566103423978, dtype)  # of what is truncated
  draw = jax.random.truncated_normal(key, -2, 2, (math.prod(shape),), dtype)
  return draw.reshape(shape) * deviation
