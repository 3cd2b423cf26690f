"""Synthetic features for rare classes, in the manner of imbalanced-learn's samplers."""

import dataclasses
import io
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import jax
import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from memdiff.estimators.scale import Scale
from memdiff.evaluation import image_quality
from memdiff.memory import feature_space
from memdiff.memory.feature_space import FeatureRuns
from memdiff.memory.memory_bank import BankConfig
from memdiff.runtime import loop
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.preemption import Preemption
from memdiff.runtime.progress import Progress
from memdiff.runtime.stage import LoopConfig
from memdiff.runtime.writers import TensorBoard
from memdiff.synthesis import class_embeddings, confidence, generators
from memdiff.synthesis.confidence import ConfidenceConfig
from memdiff.synthesis.feature_diffusion import DiffusionConfig
from memdiff.synthesis.generator import Generator
from memdiff.synthesis.generators import GENERATORS, GeneratorsConfig, SynthesisSettings
from memdiff.synthesis.hallucination import SamplerConfig

_GUIDED = ("memdiff", "memdiff_described")  # whose strength is the scale of their guidance
_DESCRIBED = "memdiff_described"
_STEPS = 50  # of a training between two lines of progress


class FeatureHallucinator(BaseEstimator):
  """Makes features of classes that have few, by any generator of memdiff.

  It works from one example per class on. Whether the features help is another question:
  `LongTailClassifier` says what is reached without them.

  Parameters:
    generator: by name, of `memdiff.synthesis.generators`; "memdiff": diffusion conditioned on the
      memory of the class.
    sampling_strategy: which classes are filled up, and how far. "tail": those with fewer examples
      than the mean, up to it. As in imbalanced-learn: "auto" or "not majority": all up to the
      largest; "minority": the smallest alone; "not minority"; "all"; a number (two classes only):
      the ratio of the smaller class to the larger afterwards; {label: number afterwards}; or a
      function y -> such a dictionary.
    num_steps: training steps of a generator that trains; None: as configured by default.
    strength: of the generator: the spread of Gaussians and jitter in deviations of a class, the
      mixing of mixtures, the guidance of memdiff. None: 1, or the first candidate.
    class_embeddings: what the generator memdiff_described is told of the classes: embeddings of
      names or descriptions, as of `LongTailClassifier`.
    random_state: an int makes results reproducible.
    verbose: 1 prints the progress of the training.

  Attributes:
    sampling_strategy_: {label: number of features made}.
    confidence_: [M] how far each made feature is trusted, from 0 to 1.
    nearest_index_: [M] row of X of the same class that is nearest to each, in standardised units.
    nearest_distance_: [M] the distance.
    memorization_: share of the made features that nearly repeat one training feature: less than a
      third as far from it as from any other of the class; of classes with one, none is counted.
  """

  def __init__(
    self,
    generator: str = "memdiff",
    *,
    sampling_strategy: Any = "tail",
    num_steps: int | None = None,
    strength: float | None = None,
    class_embeddings: Any = None,
    random_state: Any = None,
    verbose: int = 0,
  ):
    self.generator = generator
    self.sampling_strategy = sampling_strategy
    self.num_steps = num_steps
    self.strength = strength
    self.class_embeddings = class_embeddings
    self.random_state = random_state
    self.verbose = verbose

  def fit_resample(self, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    """X [N, D] and y [N], and behind them the made features [M, D] and their labels [M].

    Raises:
      ValueError: if a parameter is none of those that are allowed.
    """
    self._check()
    X, y = validate_data(self, X, y, dtype=(np.float64, np.float32))
    check_classification_targets(y)
    classes, labels = np.unique(y, return_inverse=True)
    numbers, known = _numbers(self.sampling_strategy, classes, y), self._known(classes)
    self.sampling_strategy_ = dict(zip(classes.tolist(), numbers.tolist(), strict=True))
    if not numbers.any():
      self.confidence_, self.nearest_distance_ = np.zeros(0, np.float32), np.zeros(0, np.float32)
      self.nearest_index_, self.memorization_ = np.zeros(0, np.int32), 0.0
      return X, y
    made, made_labels = self._make(X, labels, numbers, known)
    return np.concatenate([X, made.astype(X.dtype)]), np.concatenate([y, classes[made_labels]])

  def _check(self) -> None:
    if not isinstance(self.generator, str) or self.generator not in GENERATORS:
      raise ValueError(
        f"generator is {self.generator!r}, but must be one of {', '.join(GENERATORS)}."
      )
    steps = self.num_steps
    if steps is not None and (not isinstance(steps, Integral) or steps < 1):
      raise ValueError(f"num_steps is {steps!r}, but must be a whole number from 1, or None.")
    strength = self.strength
    if strength is not None and (not isinstance(strength, Real) or not strength >= 0):
      raise ValueError(f"strength is {strength!r}, but must be a number from 0, or None.")

  def _known(self, classes: np.ndarray) -> np.ndarray | None:
    """What the generator is told of the classes [C] beside features: [C, E], or None."""
    needs = self.generator == _DESCRIBED
    if needs != (self.class_embeddings is not None):
      raise ValueError(
        f"class_embeddings are for the generator {_DESCRIBED!r}, which needs them; generator is"
        f" {self.generator!r}."
      )
    if not needs:
      return None
    found = class_embeddings.of_classes(self.class_embeddings, classes)
    return class_embeddings.components(found)

  def _make(
    self, features: np.ndarray, labels: np.ndarray, numbers: np.ndarray, known: np.ndarray | None
  ) -> tuple[np.ndarray, np.ndarray]:
    """(features [M, D] in the units of X, classes [M])."""
    diffusion = DiffusionConfig()
    if self.num_steps is not None:
      diffusion = dataclasses.replace(diffusion, num_steps=int(self.num_steps))
    is_guided = self.generator in _GUIDED
    sampler = SamplerConfig()
    if is_guided and self.strength is not None:
      sampler = SamplerConfig(guidance=(float(self.strength),))
    trusted = ConfidenceConfig(normalize=False)
    settings = SynthesisSettings(
      GeneratorsConfig(names=(self.generator,), confidence=trusted),
      diffusion,
      sampler,
      len(numbers),
    )
    generator = settings.generator(self.generator)
    strength = _strength(generator, None if is_guided else self.strength)
    scale = Scale.of(features)
    if generator.numbers(np.bincount(labels)) is not None:
      raise ValueError(
        f"generator is {self.generator!r}, which makes as many features of each class as its paper"
        " says; take another for a sampling_strategy."
      )
    seed = int(check_random_state(self.random_state).randint(2**31))
    stream = sys.stderr if self.verbose else io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
      place = pathlib.Path(folder)
      run = _run(seed, Progress(1, stream=stream), place, diffusion.num_steps)
      runs = _runs(scale.forward(features), labels, len(numbers), run)
      if known is not None:
        runs = feature_space.with_class_embeddings(runs, known, run.mesh)
      generators.train(
        self.generator, settings, runs, run, place / "denoiser", f"diffusion/{self.generator}"
      )
      made = generators.make(
        self.generator, settings, runs, run, place / "denoiser", numbers, (strength,)
      )
    exemplars = mesh_lib.fetch(runs.exemplars.features)[0]
    standardised, trust = mesh_lib.fetch((made.features, made.confidence))
    self._look(standardised[0, 0], made.labels, exemplars, labels)
    self.confidence_ = trust[0, 0]
    backward = jax.jit(jax.vmap(lambda s, x: s.backward(x)))
    made_scaled = mesh_lib.fetch(backward(runs.standardizer, made.features[:, 0]))[0]
    return scale.backward(made_scaled), made.labels

  def _look(
    self, made: np.ndarray, made_labels: np.ndarray, known: np.ndarray, labels: np.ndarray
  ) -> None:
    """Sets what is known of features [M, D] beside those of training [N, D]."""
    self.nearest_index_, self.nearest_distance_ = confidence.nearest_of_class(
      made, made_labels, known, labels
    )
    copied = [
      image_quality.nearest(made[made_labels == c], known[labels == c]).copied
      for c in np.unique(made_labels)
      if (labels == c).sum() > 1
    ]
    self.memorization_ = float(np.concatenate(copied).mean()) if copied else 0.0


def _strength(generator: Generator, wanted: float | None) -> float:
  """A generator's strength; if none is wanted, 1, which changes no spread, or its first."""
  if wanted is None:
    return 1.0 if 1.0 in generator.strengths else generator.strengths[0]
  if len(generator.strengths) == 1:
    raise ValueError("strength is given, but this generator has none; leave it out.")
  return float(wanted)


def _run(seed: int, progress: Progress, folder: pathlib.Path, num_steps: int) -> loop.Run:
  """One seed, without TensorBoard and without checkpoints before the end."""
  mesh = mesh_lib.make_mesh()
  steps = min(_STEPS, num_steps)
  every = steps * -(-num_steps // steps)
  return loop.Run(
    seeds=(seed,),
    mesh=mesh,
    config=LoopConfig(steps_per_dispatch=steps, eval_every=every, checkpoint_every=every),
    progress=progress,
    tensorboard=TensorBoard(folder / "tensorboard", enabled=False),
    preemption=Preemption(mesh),
  )


def _runs(features: np.ndarray, labels: np.ndarray, num_classes: int, run: loop.Run) -> FeatureRuns:
  """What the generator learns from: features, and a bank that holds them."""
  rows, of_run = features[None], labels[None].astype(np.int32)
  keys = run.keys("memory_bank")
  bank = feature_space.fill_bank(rows, of_run, num_classes, keys, BankConfig(), run.mesh)
  return feature_space.make_runs(rows, of_run, bank, None, num_classes, run.mesh)


# --- how many --------------------------------------------------------------------------------

_NAMED: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
  "tail": lambda counts: np.maximum(counts, round(counts.mean())),
  "auto": lambda counts: np.full(len(counts), counts.max()),
  "not majority": lambda counts: np.full(len(counts), counts.max()),
  "all": lambda counts: np.full(len(counts), counts.max()),
  "minority": lambda counts: np.where(counts == counts.min(), counts.max(), counts),
  "not minority": lambda counts: np.where(counts == counts.min(), counts, counts.max()),
}


def _numbers(strategy: Any, classes: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Features to make of each class. [C] int32."""
  counts = np.array([(y == label).sum() for label in classes])
  if callable(strategy):
    strategy = strategy(y)
  if isinstance(strategy, str) and strategy in _NAMED:
    wanted = _NAMED[strategy](counts)
  elif isinstance(strategy, Mapping):
    wanted = _from_mapping(strategy, classes, counts)
  elif isinstance(strategy, Real) and not isinstance(strategy, bool):
    wanted = _from_ratio(float(strategy), counts)
  else:
    raise ValueError(
      f"sampling_strategy is {strategy!r}, but must be one of {', '.join(_NAMED)}, a ratio, a"
      " dictionary of labels, or a function that returns one."
    )
  return (wanted - counts).astype(np.int32)


def _from_mapping(strategy: Mapping, classes: np.ndarray, counts: np.ndarray) -> np.ndarray:
  wanted, place = counts.copy(), {label: i for i, label in enumerate(classes.tolist())}
  for label, number in strategy.items():
    if label not in place:
      raise ValueError(f"sampling_strategy names the class {label!r}, which is not in y.")
    if not isinstance(number, Integral):
      raise ValueError(f"sampling_strategy asks for {number!r} of the class {label!r}.")
    if number < counts[place[label]]:
      raise ValueError(
        f"sampling_strategy asks for {number} of the class {label!r}, which has"
        f" {counts[place[label]]}; nothing is taken away."
      )
    wanted[place[label]] = number
  return wanted


def _from_ratio(ratio: float, counts: np.ndarray) -> np.ndarray:
  if len(counts) != 2:
    raise ValueError(
      f"sampling_strategy is the ratio {ratio:g}, but that is for two classes, and y has"
      f" {len(counts)}."
    )
  wanted = round(ratio * counts.max())
  if not 0 < ratio <= 1 or wanted < counts.min():
    raise ValueError(
      f"sampling_strategy is the ratio {ratio:g}, but must be at most 1, and above"
      f" {counts.min() / counts.max():.3g}, which y has already."
    )
  return np.where(counts == counts.min(), max(wanted, counts.min()), counts)
