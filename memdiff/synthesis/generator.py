"""What a generator is: a way to make features of given classes out of exemplars."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from memdiff.memory.feature_space import FeatureRuns
from memdiff.runtime.stage import Stage

# (number of a run) -> its features [M, D] and trust [M], which multiplies the confidence.
Drawn = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
# (keys [R], strength [], runs, what `prepare` returned) -> Drawn; pure.
Sampler = Callable[[jax.Array, jax.Array, FeatureRuns, Any], Drawn]


class Generator:
  """Makes features of R runs (seeds, or folds of cross-validation) at a time.

  A subclass is a frozen dataclass of its settings: generators that are equal share their programs.
  Everything but `sampler` has a default, which is that of a generator without training.

  Attributes:
    strengths: candidates for `strength`, from which cross-validation chooses.
    trains: whether there is a `stage`.
    needs_class_embeddings: whether it reads `known` of the bank.
  """

  strengths: tuple[float, ...] = (1.0,)
  trains = False
  needs_class_embeddings = False

  def numbers(self, train_counts: np.ndarray) -> np.ndarray | None:
    """Features that it makes per class [C], or None: as many as fill the tail."""
    del train_counts

  def stage(self, runs: FeatureRuns, mesh: Mesh) -> Stage:
    """The training that comes first."""
    raise NotImplementedError

  def prepare(self, runs: FeatureRuns, params: Any) -> Any:
    """What `sampler` takes beside the exemplars, leading with R; once for all strengths.

    Args:
      runs: what it learns from.
      params: the average of the parameters that `stage` trained, or None.
    """
    del runs
    return params

  def sampler(self, labels: np.ndarray, feature_dim: int, mesh: Mesh) -> Sampler:
    """The function that makes features of the classes `labels` [M]."""
    raise NotImplementedError
