"""The guard over numbers: steps that leave them non-finite do not change the state.

`stop` gives a seed the state back with which its dispatch began, so that the bad batch can be drawn
again and kept. `skip` leaves the step out and counts it, which costs a choice between two states at
every step.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memdiff.errors import NonFiniteError
from memdiff.runtime.workdir import write_arrays

ON_NON_FINITE = ("stop", "skip")
FINITE = "finite"  # the metric that the guard adds
_GRADIENTS = "the gradients"


def is_finite(metrics: dict[str, jax.Array], params: Any) -> jax.Array:
  """Whether all metrics of a step are numbers, and the parameters it leads to. bool []."""
  # A gradient that is no number makes its parameter one, whatever the optimiser.
  leaves = [*metrics.values(), *(x.sum() for x in jax.tree.leaves(params))]
  return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def choose(keep: jax.Array, new: Any, old: Any) -> Any:
  """The new state of a seed where `keep`, else the old one.

  The bank is left to its own guard, which lets no non-finite feature in: choosing between two banks
  would copy them.
  """
  chosen = jax.tree.map(
    lambda a, b: jax.lax.select(jnp.broadcast_to(keep, a.shape), a, b),
    new.replace(bank=None, key=None),
    old.replace(bank=None, key=None),
  )
  return chosen.replace(bank=new.bank, key=new.key)


def guarded(step: Callable, on_non_finite: str) -> Callable:
  """Wraps the step of one seed.

  Args:
    step: (state, *rest) -> (state, metrics).
    on_non_finite: out of ON_NON_FINITE.

  Returns:
    (state, alive, *rest) -> (state, alive, metrics with FINITE). With `stop` a seed is alive until
    its first bad step; what becomes of its state after that is for `choose`.
  """

  def stopping_step(state, alive, *rest):
    new, metrics = step(state, *rest)
    finite = is_finite(metrics, new.params)
    return new, alive & finite, metrics | {FINITE: finite | ~alive}

  def skipping_step(state, alive, *rest):
    new, metrics = step(state, *rest)
    finite = is_finite(metrics, new.params)
    return choose(finite, new, state).replace(step=new.step), alive, metrics | {FINITE: finite}

  return skipping_step if on_non_finite == "skip" else stopping_step


def first_bad(finite: np.ndarray) -> tuple[int, int] | None:
  """(seed, offset) of the earliest step that was not finite, of [S, steps]; None: there is none."""
  bad = np.argwhere(~finite)
  return tuple(bad[bad[:, 1].argmin()].tolist()) if len(bad) else None


def mean_where(finite: np.ndarray, values: np.ndarray) -> np.ndarray:
  """Mean of [S, steps] over the finite steps, NaN if a seed has none. [S]."""
  number = finite.sum(axis=1)
  total = np.where(finite, values, 0).sum(axis=1)
  return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def blame(metrics: dict[str, np.ndarray], seed: int, offset: int) -> str:
  """Words for what was not finite at a step."""
  for name, values in metrics.items():
    if not np.isfinite(values[seed, offset]):
      return f"{name} became {values[seed, offset]}"
  return f"{_GRADIENTS} became non-finite"


def dump(batch: Any, folder: pathlib.Path, stage: str, step: int, seed: int) -> pathlib.Path:
  """Writes the batch that a bad step met as a .npz file; names are places in the batch's tree."""
  path = folder / f"non_finite_step_{step}_seed_{seed}.npz"
  leaves, _ = jax.tree.flatten_with_path(batch)
  arrays = {
    jax.tree_util.keystr(place, simple=True, separator="/") or "batch": leaf
    for place, leaf in leaves
  }
  write_arrays(path, arrays | {"stage": stage, "step": step, "seed": seed})
  return path


def stop(stage: str, words: str, step: int, seed: int, kept: pathlib.Path | None) -> None:
  """Raises NonFiniteError."""
  where = f" the batch is in {kept}," if kept else ""
  raise NonFiniteError(
    f"Stage {stage}: {words} at step {step} (seed {seed});{where} the last checkpoint is intact,"
    " try a lower learning rate or a clip_norm in a new --workdir."
  )
