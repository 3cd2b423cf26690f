"""A classifier of features whose classes are imbalanced, in the manner of scikit-learn."""

import dataclasses
import functools
import json
import numbers
import os
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

import memdiff
from memdiff.errors import DataError, WorkdirError
from memdiff.estimators import generated
from memdiff.estimators.scale import Scale, ScaledRows
from memdiff.evaluation import criteria, cross_validation
from memdiff.fitting import blend, knowledge
from memdiff.fitting.heads import FAMILIES, KINDS, REGRESSIONS, Head, Training
from memdiff.fitting.selection import Fold, distinct, few_threads, select, training
from memdiff.runtime.workdir import read_arrays, write_arrays
from memdiff.synthesis import class_embeddings

FAST, AUTO = "fast", "auto"
_REGRESSED = 2**34  # numbers times classes up to which regressions are fitted unasked
_LEAST_WEIGHT = 1e-9  # of an example, relative to the largest
_SCALE = dataclasses.fields(Scale)
# Of a saved classifier.
_KEPT = ("settings_", "weights_", "recommendation_", "skipped_", "n_features_in_")


class LongTailClassifier(ClassifierMixin, BaseEstimator):
  """Classifies features of imbalanced classes, by what cross-validation finds best.

  Several families of linear and Gaussian heads are fitted. Cross-validation chooses the setting of
  each, and the weights with which their log probabilities are blended. It says what the blend is
  worth beside plain logistic regression, before any test example is seen.

  Parameters:
    methods: "fast" for all families of `memdiff.fitting.heads`, regressions excepted if they would
      take hours, "auto" for these and three
      generators of features, or names of families and generators. What generators make takes part
      only if the blend is better with it, with 95 % confidence in cross-validation. They take
      minutes; what they will cost is said on stderr.
    criterion: what counts, "balanced_accuracy", "accuracy" or "macro_f1". Unless it is accuracy,
      heads and probabilities are those of classes that come equally often.
    class_embeddings: what is known of the classes beside their examples, as embeddings of names or
      descriptions: an array [C, E] in the order of the sorted labels, {label: embedding}, the path
      of a .npz file with `names` and `embeddings`, or "names" for labels in words, which MiniLM
      reads. A family that expects the means of classes where these tell takes part only if the
      blend is better with it, as generators do.
    cv: folds of cross-validation. A class with one example always trains.
    random_state: seed of the folds; an int makes results reproducible.
    verbose: 1 prints what is done.

  Attributes:
    classes_: [C] labels.
    n_features_in_: D.
    settings_: {family: setting that was chosen}.
    weights_: {family: weight in the blend}.
    recommendation_: {"method", "weights", "score", "plain", "gain", "interval", "scores"}: the
      criterion on held-out examples, of the blend, of plain logistic regression, their difference
      with a 95 % interval (None if plain regression was not fitted), and the criterion of every
      family; with generators or embeddings of
      classes also "extra": the score with them, its gain over that without, and whether they are
      used. None if no class has two examples.
    skipped_: {family: settings that later folds did not look at, since they lay clearly behind}.
  """

  def __init__(
    self,
    methods: str | Sequence[str] = FAST,
    *,
    criterion: str = "balanced_accuracy",
    class_embeddings: Any = None,
    cv: int = 5,
    random_state: Any = None,
    verbose: int = 0,
  ):
    self.methods = methods
    self.criterion = criterion
    self.class_embeddings = class_embeddings
    self.cv = cv
    self.random_state = random_state
    self.verbose = verbose

  def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
    """Fits to features [N, D] and labels [N] of any type.

    Args:
      X: features.
      y: labels.
      sample_weight: [N] how much each example counts, not below 0; only ratios matter, and 0 leaves
        an example out. Heads are fitted with them, and with `criterion="accuracy"` classes are as
        frequent as their examples weigh. Cross-validation scores examples without weights, as
        scikit-learn's searches do. To Gaussian heads a weight of 2 is not two examples: how
        uncertain a mean is depends on Kish's effective number.

    Raises:
      ValueError: if there is one class only, a parameter is none of those that are allowed, or the
        weights are not valid.
    """
    families = self._families()
    X, y = validate_data(self, _in_single(X), y, dtype=(np.float64, np.float32))
    check_classification_targets(y)
    weights = None
    if sample_weight is not None:
      X, y, weights = self._weighted(X, y, sample_weight, families)
    self.classes_, labels = np.unique(y, return_inverse=True)
    if len(self.classes_) < 2:
      raise ValueError(
        f"Only one class is in y, {self.classes_[0]!r}, but a classifier needs two or more."
      )
    if self._is_large(X) and isinstance(self.methods, str):
      families = [name for name in families if name not in REGRESSIONS]
      _say_on_stderr(
        f"regressions are left out, since they would take hours on {len(X):,} x {X.shape[1]:,}"
        f" features of {len(self.classes_):,} classes; name them in methods to fit them"
      )
    with few_threads(X, len(self.classes_)):
      self._fit(X, labels, weights, families)
    return self

  def _weighted(
    self, X: np.ndarray, y: np.ndarray, sample_weight: Any, families: Sequence[str]
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels and weights of the examples that weigh anything.

    Raises:
      ValueError: if the weights are not valid, or there are generators, which cannot use them.
    """
    if any(name not in FAMILIES for name in families):
      raise ValueError(
        f"sample_weight is given, but generators cannot use it; set methods to {FAST!r} or to names"
        f" out of {', '.join(FAMILIES)}."
      )
    weights = check_array(
      sample_weight, ensure_2d=False, dtype=np.float64, input_name="sample_weight"
    )
    if weights.shape != (len(X),):
      raise ValueError(
        f"sample_weight has shape {list(weights.shape)}, but must have one number for each of the"
        f" {len(X)} rows of X."
      )
    if (weights < 0).any() or not weights.any():
      raise ValueError(
        "sample_weight must not contain negative numbers, and at least one weight must be above"
        " zero."
      )
    kept = weights > 0
    if len(lost := np.setdiff1d(y, y[kept])):
      raise ValueError(
        f"All examples of the class {lost[0]!r} have a sample_weight of zero; leave them out, or"
        " give one of them some weight."
      )
    weights = np.maximum(weights / weights.max(), _LEAST_WEIGHT)
    return (X, y, weights) if kept.all() else (X[kept], y[kept], weights[kept])

  def _families(self) -> list[str]:
    """Names of the families.

    Raises:
      ValueError: if a parameter is none of those that are allowed.
    """
    sets = {FAST: list(FAMILIES), AUTO: [*FAMILIES, *generated.AUTO]}
    if isinstance(self.methods, str):
      names = sets.get(self.methods, [])
    else:
      names = list(self.methods) if isinstance(self.methods, Iterable) else []
    known = (*FAMILIES, *generated.NAMES)
    if not names or not set(names) <= set(known):
      raise ValueError(
        f"methods is {self.methods!r}, but must be {FAST!r}, {AUTO!r} or names out of"
        f" {', '.join(known)}."
      )
    if self.criterion not in criteria.CRITERIA:
      raise ValueError(
        f"criterion is {self.criterion!r}, but must be one of {', '.join(criteria.CRITERIA)}."
      )
    if not isinstance(self.cv, numbers.Integral) or self.cv < 2:
      raise ValueError(f"cv is {self.cv!r}, but must be a whole number from 2.")
    return distinct(names, self.criterion)

  def _is_large(self, features: np.ndarray) -> bool:
    """Whether regressions take hours."""
    return features.size * len(self.classes_) > _REGRESSED

  def _say(self, words: str) -> None:
    if self.verbose:
      print(words)

  def _training(
    self,
    features: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray | None,
    rows: np.ndarray | None = None,
  ) -> tuple[Scale, Training]:
    """All or some rows in the scale in which heads are fitted, and that scale."""
    scale = Scale.of(features, rows, weights)
    if rows is not None:
      labels, weights = labels[rows], None if weights is None else weights[rows]
    scaled = scale.forward(features, rows)
    return scale, training(scaled, labels, len(self.classes_), self.criterion, weights)

  def _held_out(self, labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """The rows that each fold holds out."""
    fold = cross_validation.deal(labels, self.cv, seed)
    rows = [np.flatnonzero(fold == k) for k in range(self.cv)]
    return [of_fold for of_fold in rows if len(of_fold)]

  def _fit(
    self,
    features: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray | None,
    names: Sequence[str],
  ) -> None:
    seed = check_random_state(self.random_state).randint(2**31)
    made = {n: generated.Generated(n, seed) for n in names if n not in FAMILIES}
    extra = {name: one.family() for name, one in made.items()}
    if self.class_embeddings is not None:
      embeddings = class_embeddings.of_classes(self.class_embeddings, self.classes_)
      extra[knowledge.NAME] = knowledge.family(embeddings)
    families = {name: FAMILIES[name] for name in names if name not in made} | extra
    rows = self._held_out(labels, seed)
    whole = None  # it takes as much memory as the features, so that folds do without if they can
    if made:
      whole = self._training(features, labels, weights)
      generated.prepare(list(made.values()), whole[1], len(rows), _say_on_stderr)

    def fold(held_out: np.ndarray) -> Fold:
      trains = np.ones(len(labels), bool)
      trains[held_out] = False
      scale, training = self._training(features, labels, weights, np.flatnonzero(trains))
      return Fold(training, ScaledRows(scale, features, held_out))

    if rows:
      folds = [functools.partial(fold, of_fold) for of_fold in rows]
      judged = cross_validation.judged_examples(
        cross_validation.padded(rows), labels, self.criterion, len(self.classes_)
      )
      selected = select(
        folds, judged, families, self._say, list(extra), not self._is_large(features)
      )
      self.weights_ = selected.recommendation["weights"]
      self.settings_ = {name: selected.settings[name] for name in self.weights_}
      self.recommendation_, self.skipped_ = selected.recommendation, selected.skipped
    else:  # nothing can be held out
      used = [name for name in families if name not in extra] or list(families)
      self.settings_ = {name: families[name].settings[0] for name in used}
      self.weights_ = {name: 1 / len(used) for name in used}
      self.recommendation_, self.skipped_ = None, {}
    self._scale, training = whole or self._training(features, labels, weights)
    self._heads = {
      name: families[name].fit(training, (setting,))[0]
      for name, setting in self.settings_.items()
      if self.weights_[name]
    }

  def decision_function(self, X: Any) -> np.ndarray:
    """Logits [N, C]; of two classes [N], those of the second less those of the first."""
    check_is_fitted(self)
    X = validate_data(self, _in_single(X), dtype=(np.float64, np.float32), reset=False)
    with few_threads(X, len(self.classes_)):
      logits = self._logits(X)
    return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

  def _logits(self, features: np.ndarray) -> np.ndarray:
    features = self._scale.forward(features)
    parts = [blend.log_probabilities(head.logits(features)) for head in self._heads.values()]
    return blend.blended([self.weights_[name] for name in self._heads], parts)

  def predict_log_proba(self, X: Any) -> np.ndarray:
    """[N, C]."""
    scores = self.decision_function(X)
    if len(self.classes_) == 2:
      scores = np.stack([np.zeros_like(scores), scores], axis=1)
    shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))

  def predict_proba(self, X: Any) -> np.ndarray:
    """Calibrated by cross-validation, for classes as `criterion` counts them. [N, C]."""
    return np.exp(self.predict_log_proba(X))

  def predict(self, X: Any) -> np.ndarray:
    """Labels [N], of the type that was fitted."""
    check_is_fitted(self)
    return self.classes_[self.predict_log_proba(X).argmax(axis=1)]

  def save(self, path: str | os.PathLike) -> None:
    """Writes the fitted classifier to a .npz file, which holds no Python objects.

    Raises:
      ValueError: if labels are neither numbers nor texts.
      DataError: if the file cannot be written.
    """
    check_is_fitted(self)
    classes = self.classes_
    if classes.dtype == object and all(isinstance(label, str) for label in classes):
      classes = classes.astype(str)
    if classes.dtype.kind not in "biufU":
      raise ValueError(f"Labels of the type {classes.dtype} cannot be saved; fit texts or numbers.")
    params = {name: _plain(value) for name, value in self.get_params().items()}
    about = {
      "version": memdiff.__version__,
      "params": params,
      "heads": {name: type(head).__name__ for name, head in self._heads.items()},
      "is_object": self.classes_.dtype == object,
    }
    about |= {name: getattr(self, name) for name in _KEPT}
    arrays = {f"scale/{f.name}": getattr(self._scale, f.name) for f in _SCALE}
    for name, head in self._heads.items():
      arrays |= {f"{name}/{f.name}": getattr(head, f.name) for f in dataclasses.fields(head)}
    if hasattr(self, "feature_names_in_"):
      arrays["feature_names"] = self.feature_names_in_.astype(str)
    arrays |= {"classes": classes, "about": np.array(json.dumps(about))}
    try:
      write_arrays(pathlib.Path(path), arrays)
    except WorkdirError as error:
      raise DataError(f"Cannot write {path} ({error.__cause__}).") from error

  @classmethod
  def load(cls, path: str | os.PathLike) -> Self:
    """What `save` wrote.

    Raises:
      DataError: if the file cannot be read, or is of something else.
    """
    try:
      arrays = read_arrays(pathlib.Path(path))
      about = json.loads(str(arrays["about"]))
      model = cls(**about["params"])
      for name in _KEPT:
        setattr(model, name, about[name])
      classes = arrays["classes"]
      model.classes_ = classes.astype(object) if about["is_object"] else classes
      if "feature_names" in arrays:
        model.feature_names_in_ = arrays["feature_names"].astype(object)
      model._scale = Scale(**{f.name: arrays[f"scale/{f.name}"] for f in _SCALE})
      model._heads = {name: _read(KINDS[k], name, arrays) for name, k in about["heads"].items()}
    except (WorkdirError, KeyError, TypeError, ValueError) as error:
      raise DataError(f"{path} holds no LongTailClassifier that can be read.") from error
    return model


def _in_single(X: Any) -> Any:
  """Features in half precision as float32, which is what heads are fitted to; others as they are.

  scikit-learn would make float64 of them, which takes twice the memory.
  """
  return X.astype(np.float32) if getattr(X, "dtype", None) == np.float16 else X


def _say_on_stderr(words: str) -> None:
  print(f"memdiff: {words}", file=sys.stderr)


def _plain(value: Any) -> Any:
  """A parameter as JSON has it; random states and embeddings of classes are not kept."""
  if isinstance(value, numbers.Integral):
    return int(value)
  if isinstance(value, (str, type(None))):
    return value
  listed = isinstance(value, Iterable) and not isinstance(value, Mapping)
  names = list(value) if listed else []
  return names if names and all(isinstance(name, str) for name in names) else None


def _read(kind: type[Head], name: str, arrays: Mapping[str, np.ndarray]) -> Head:
  return kind(**{f.name: arrays[f"{name}/{f.name}"] for f in dataclasses.fields(kind)})
