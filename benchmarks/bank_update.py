"""What the update of the memory bank costs in a step of the encoder."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.digits_workload import Workload
from benchmarks.timing import Row, Timing, interleave
from benchmarks.training import Training
from memdiff.memory import memory_bank


@contextlib.contextmanager
def no_bank_update() -> Iterator[None]:
  """Stages compiled inside leave the bank as it is."""
  update = memory_bank.update
  memory_bank.update = lambda bank, *_, **__: bank
  try:
    yield
  finally:
    memory_bank.update = update


def time_encoder(
  work: Workload, one: Training, rounds: int, seeds: tuple[tuple[int, ...], ...]
) -> dict[str, Timing]:
  """Seconds per step of one seed, with and without the bank's update.

  Args:
    work: the data.
    one: the encoder's training of one seed.
    rounds: repeats.
    seeds: what is trained at once; the first is one seed.
  """
  variants = {}
  for group in seeds:
    with no_bank_update():
      bare = Training(work.encoder_stage(), group, work.mesh, one.steps)
    full = one if len(group) == 1 else Training(work.encoder_stage(), group, work.mesh, one.steps)
    variants[f"seeds: {len(group)}, no update"] = (bare, bare.work)
    variants[f"seeds: {len(group)}"] = (full, full.work)
    variants[f"seeds: {len(group)}, update alone"] = (
      make_bank_updates(work, len(group), one.steps),
      full.work,
    )
  return interleave(variants, rounds)


def make_bank_updates(work: Workload, num_seeds: int, steps: int) -> Callable[[], Any]:
  """Every call does `steps` updates of that many banks and nothing else, as one program."""
  features, labels = work.per_seed.exemplars.features[0], work.per_seed.exemplars.labels[0]
  config, batch = work.config.memory_bank, work.config.classifier.batch_size

  def updates(bank, key, features, labels):
    def step(bank, number):
      start = number * batch % (len(labels) - batch)
      rows = [jax.lax.dynamic_slice_in_dim(x, start, batch) for x in (features, labels)]
      bank = memory_bank.update(
        bank,
        *rows,
        jnp.ones(batch, bool),
        jax.random.fold_in(key, number),
        horizon=config.horizon,
        mesh=work.mesh,
      )
      return bank, None

    return jax.lax.scan(step, bank, jnp.arange(steps))[0]

  banks = jax.tree.map(lambda x: jnp.repeat(x[None], num_seeds, axis=0), work.bank())
  keys = jax.random.split(jax.random.key(0), num_seeds)
  run = jax.jit(jax.vmap(updates, in_axes=(0, 0, None, None)))
  return functools.partial(run, banks, keys, features, labels)


def rows(times: dict[str, Timing]) -> list[Row]:
  found = []
  for name, full in times.items():
    if f"{name}, no update" not in times:
      continue
    bare = times[f"{name}, no update"]
    share = 1 - bare.median / full.median
    per_round = 1 - np.divide(bare.seconds, full.seconds)
    ratio = f"{share:.1%} ({per_round.min():.1%} to {per_round.max():.1%})"
    value = f"{1 / full.median:.0f} steps/s"
    what = "bank update in an encoder step"
    found.append(Row(f"{what}, {name}", value, ratio, "< 5%", share < 0.05))
    alone = times[f"{name}, update alone"]
    share = alone.median / full.median
    per_round = np.divide(alone.seconds, full.seconds)
    ratio = f"{share:.1%} ({per_round.min():.1%} to {per_round.max():.1%})"
    value = f"{alone.median * 1e6:.0f} us"
    found.append(Row(f"{what}, {name}, alone", value, ratio, "< 5%", share < 0.05))
  return found
