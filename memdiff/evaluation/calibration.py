"""How far the probabilities of a classifier can be believed: temperature and calibration error.

Guo et al., "On calibration of modern neural networks", 2017. Examples count as the criterion counts
them: under balanced accuracy all classes weigh alike, and probabilities are those of a world in
which they are equally frequent.
"""

import math
from typing import Any

import numpy as np

from memdiff.evaluation import criteria
from memdiff.evaluation.scores import mean_std

BINS = 15  # of confidence, as in the paper
_COOLEST, _HOTTEST = 0.02, 50.0
_NUMBERS = 2**25  # logits that are looked at; more tell nothing new about one number


def enough(num_examples: int, num_classes: int) -> np.ndarray:
  """Numbers of the examples whose logits fit a temperature: all, or some that are spread evenly."""
  number = max(min(num_examples, _NUMBERS // num_classes), 1)
  return np.linspace(0, num_examples - 1, number).astype(int)


def fit_temperature(logits: np.ndarray, labels: np.ndarray, criterion: str) -> float:
  """What logits are divided by, from 0.02 to 50, so that cross-entropy is least (section 4.2).

  It is 1 unless another is better with 95 % confidence. If rare classes have one or two examples to
  judge by, the best temperature is often the best by luck. The standard error is that of a
  stratified sample.

  Args:
    logits: [E, C], of examples that the classifier has not seen.
    labels: [E] int.
    criterion: out of criteria.CRITERIA.
  """
  from scipy.optimize import minimize_scalar  # takes a second to import

  weights = criteria.example_weights(labels, criteria.linear(criterion))
  relative = logits - np.take_along_axis(logits, labels[:, None], axis=1)

  def cross_entropy(temperature: float) -> np.ndarray:
    others = relative / temperature
    largest = others.max(axis=1)
    return weights * (largest + np.log(np.exp(others - largest[:, None]).sum(axis=1)))

  bounds = math.log(_COOLEST), math.log(_HOTTEST)
  found = minimize_scalar(
    lambda log: cross_entropy(math.exp(log)).sum(), bounds=bounds, method="bounded"
  )
  temperature = math.exp(found.x)
  gain = cross_entropy(1.0) - cross_entropy(temperature)
  error = criteria.stratified_error(gain, weights, labels)
  return temperature if criteria.Estimate(gain.sum(), *error).interval()[0] > 0 else 1.0


def calibration_error(logits: np.ndarray, labels: np.ndarray, criterion: str) -> float:
  """Expected calibration error of the softmax of logits, from 0 to 1 (section 2, eq. 3).

  The mean, over bins of equal width, of the distance between confidence and accuracy.

  Args and shapes: of `fit_temperature`.
  """
  weights = criteria.example_weights(labels, criteria.linear(criterion))
  shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
  confidence = 1 / shifted.sum(axis=1)  # the largest exponent is 1
  hits = logits.argmax(axis=1) == labels
  inside = np.minimum((confidence * BINS).astype(int), BINS - 1)
  return float(np.abs(np.bincount(inside, weights * (hits - confidence), BINS)).sum())


def measure(
  logits: np.ndarray, labels: np.ndarray, criterion: str, temperature: float | None
) -> dict[str, Any]:
  """What a temperature is worth on other examples, for a report.

  Args:
    logits: [S, E, C] of S models.
    labels: [E] int.
    criterion: out of criteria.CRITERIA.
    temperature: None if nothing was held out to fit one.

  Returns:
    {"temperature", "error", "error_before"}: mean and deviation over models of the calibration
    error with the temperature, and without.
  """

  def error(divisor: float) -> dict[str, float]:
    of_models = [calibration_error(z / divisor, labels, criterion) for z in logits]
    return mean_std(np.array(of_models))

  before = error(1.0)
  after = before if temperature is None else error(temperature)
  return {"temperature": temperature, "error": after, "error_before": before}
