"""The generators that need no training, by name."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from memdiff.memory.exemplars import Exemplars
from memdiff.memory.feature_space import FeatureRuns
from memdiff.synthesis import gaussian, resampling
from memdiff.synthesis.generator import Generator, Sampler


@dataclasses.dataclass(frozen=True)
class Untrained(Generator):
  """Draws from exemplars, or from statistics of them.

  Attributes:
    sample: (key, exemplars, fitted, labels [M] int32, strength []) -> [M, D] in the exemplars'
      units; pure. Labels name classes with at least one exemplar.
    strengths: one if it changes nothing. What it means is in the docstring of `sample`.
    fit: exemplars -> `fitted`, once for all labels and strengths; pure.
  """

  sample: Callable[[jax.Array, Exemplars, Any, jax.Array, Any], jax.Array]
  strengths: tuple[float, ...] = (1.0,)
  fit: Callable[[Exemplars], Any] = lambda exemplars: ()

  def prepare(self, runs: FeatureRuns, params: Any) -> Any:
    """Fits every run, or one of them if all have the same exemplars."""
    del params
    exemplars, num_runs = runs.exemplars, runs.exemplars.labels.shape[0]
    if runs.alike:
      exemplars = jax.tree.map(lambda x: x[:1], exemplars)
    fitted = jax.jit(lambda exemplars: jax.lax.map(self.fit, exemplars))(exemplars)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_runs, *x.shape[1:])), fitted)

  def sampler(self, labels: np.ndarray, feature_dim: int, mesh: Mesh) -> Sampler:
    """A run at a time, which bounds the memory."""
    del feature_dim, mesh

    def of_runs(keys, strength, runs, fitted):
      def of_run(run):
        key, exemplars, fitted_to_run = jax.tree.map(
          lambda x: x[run], (keys, runs.exemplars, fitted)
        )
        return self.sample(key, exemplars, fitted_to_run, labels, strength), jnp.ones(labels.shape)

      return of_run

    return of_runs


_SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)  # times the deviation within classes

# Name -> (description for reports, generator).
UNTRAINED = {
  "duplicate": (
    "copies of the class's exemplars",
    Untrained(resampling.duplicate, (0.0,)),
  ),
  "kernel_jitter": (
    "exemplars with noise of the shared within-class covariance",
    Untrained(resampling.kernel_jitter, _SCALES, gaussian.within_factor),
  ),
  "feature_mixup": (
    "exemplars mixed with a share of any other exemplar",
    Untrained(resampling.feature_mixup, (0.1, 0.2, 0.35, 0.5)),
  ),
  "gaussian_diagonal": (
    "normal distribution, class mean and class variances",
    Untrained(gaussian.gaussian_diagonal, _SCALES),
  ),
  "gaussian_shared": (
    "normal distribution, class mean and shared within-class covariance",
    Untrained(gaussian.gaussian_shared, _SCALES, gaussian.within_factor),
  ),
  "gaussian_shrunk": (
    "normal distribution, class mean and class covariance shrunk towards the shared one",
    Untrained(gaussian.gaussian_shrunk, (3.0, 10.0, 30.0, 100.0, 300.0), gaussian.within_factor),
  ),
  "gaussian_shrunk_means": (
    "normal distribution, class mean shrunk towards the mean of all and shared covariance",
    Untrained(gaussian.gaussian_shrunk_means, (1.0, 3.0, 10.0, 30.0), gaussian.within_factor),
  ),
  "distribution_calibration": (
    "normal distribution with statistics of the nearest head classes (Yang et al. 2021)",
    Untrained(gaussian.distribution_calibration, (0.0, 0.05, 0.2, 0.5)),
  ),
}
