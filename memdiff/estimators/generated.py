"""Families of heads that also learn from made features of rare classes."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from memdiff.estimators.hallucinator import FeatureHallucinator
from memdiff.fitting.heads import FAMILIES, Family, Head, Training, balanced_regressions
from memdiff.synthesis.generators import GENERATORS

AUTO = ("gaussian_shared", "kernel_jitter", "memdiff")  # of methods="auto"
_LEFT_OUT = ("ldmlr_published", "memdiff_described")  # its own numbers; not told
NAMES = tuple(name for name in GENERATORS if name not in _LEFT_OUT)


class Generated:
  """Balanced logistic regression on real features and on those that a generator makes.

  Classes below the mean size are filled up to it, on what each fold trains on alone.
  """

  def __init__(self, generator: str, seed: int):
    self._generator, self._seed = generator, seed
    self._filled: tuple[Training, Training] | None = None  # (real, with made features)

  def family(self) -> Family:
    like = FAMILIES["balanced_logistic"]
    description = f"{like.description}, on real features and on those of {self._generator}"
    return Family(description, like.setting, like.settings, self.fit)

  def prepare(self, training: Training) -> float:
    """Makes the features for all rows, which are kept; returns the seconds that it took."""
    begun = time.perf_counter()
    self._filled = training, self._fill(training)
    return time.perf_counter() - begun

  def fit(self, training: Training, settings: Sequence[float]) -> list[Head]:
    if self._filled is not None and self._filled[0] is training:
      return balanced_regressions(self._filled[1], settings)
    return balanced_regressions(self._fill(training), settings)

  def _fill(self, training: Training) -> Training:
    sampler = FeatureHallucinator(self._generator, random_state=self._seed)
    features, labels = sampler.fit_resample(training.features, training.labels)
    return Training(features.astype(np.float32), labels, training.shares)


def prepare(
  generated: Sequence[Generated], training: Training, folds: int, say: Callable[[str], None]
) -> None:
  """Makes the features for all rows, and says beforehand what those of the folds will cost."""
  if not generated:
    return
  say(
    f"{len(generated)} generators make features for all rows, and then for {folds} folds; the first"
    " tells how long the others take"
  )
  seconds = sum(one.prepare(training) for one in generated)
  say(f"{seconds:.0f} seconds for all rows; about {seconds * folds:.0f} seconds for the folds")
