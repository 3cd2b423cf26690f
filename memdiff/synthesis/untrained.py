"""The generators that need no training, by name."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from memdiff.memory.exemplars import Exemplars
from memdiff.synthesis import gaussian, resampling


@dataclasses.dataclass(frozen=True)
class Generator:
  """A way to make features of given classes out of exemplars.

  Attributes:
    description: for reports.
    sample: (key, exemplars, fitted, labels [M] int32, strength []) -> [M, D] in the exemplars'
      units; pure. Labels name classes with at least one exemplar.
    strengths: candidates for `strength`, which cross-validation chooses from; one where it changes
      nothing. What it means is in the docstring of `sample`.
    fit: exemplars -> `fitted`, once for all labels and strengths; pure.
  """

  description: str
  sample: Callable[[jax.Array, Exemplars, Any, jax.Array, Any], jax.Array]
  strengths: tuple[float, ...]
  fit: Callable[[Exemplars], Any] = lambda exemplars: ()


_SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)  # times the deviation within classes

GENERATORS = {
  "duplicate": Generator(
    "copies of the class's exemplars",
    resampling.duplicate,
    (0.0,),
  ),
  "kernel_jitter": Generator(
    "exemplars with noise of the shared within-class covariance",
    resampling.kernel_jitter,
    _SCALES,
    gaussian.within_factor,
  ),
  "feature_mixup": Generator(
    "exemplars mixed with a share of any other exemplar",
    resampling.feature_mixup,
    (0.1, 0.2, 0.35, 0.5),
  ),
  "gaussian_diagonal": Generator(
    "normal distribution, class mean and class variances",
    gaussian.gaussian_diagonal,
    _SCALES,
  ),
  "gaussian_shared": Generator(
    "normal distribution, class mean and shared within-class covariance",
    gaussian.gaussian_shared,
    _SCALES,
    gaussian.within_factor,
  ),
  "gaussian_shrunk": Generator(
    "normal distribution, class mean and class covariance shrunk towards the shared one",
    gaussian.gaussian_shrunk,
    (3.0, 10.0, 30.0, 100.0, 300.0),
    gaussian.within_factor,
  ),
  "gaussian_shrunk_means": Generator(
    "normal distribution, class mean shrunk towards the mean of all and shared covariance",
    gaussian.gaussian_shrunk_means,
    (1.0, 3.0, 10.0, 30.0),
    gaussian.within_factor,
  ),
  "distribution_calibration": Generator(
    "normal distribution with statistics of the nearest head classes (Yang et al. 2021)",
    gaussian.distribution_calibration,
    (0.0, 0.05, 0.2, 0.5),
  ),
}
