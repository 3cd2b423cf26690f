"""Random streams: one base key per seed; a stream by name, then by step.

`stream(key, "augment", step)` can be replayed in isolation, needs no carried key, and does not
move when another stream is added.
"""

import zlib

import jax
import jax.numpy as jnp


def stream(key: jax.Array, name: str, step: jax.Array | int | None = None) -> jax.Array:
  """The key of the stream `name`, at `step` where one is given."""
  key = jax.random.fold_in(key, zlib.crc32(name.encode()))
  return key if step is None else jax.random.fold_in(key, step)


def base_keys(seeds: tuple[int, ...], name: str) -> jax.Array:
  """One key per seed for the stage `name`. [S] keys."""
  return jnp.stack([stream(jax.random.key(seed), name) for seed in seeds])
