"""How `LongTailClassifier` chooses: settings of its families, weights of its blend, and a word."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from memdiff.classifier import blend
from memdiff.classifier.fitted_heads import FAMILIES, PLAIN, Head, Training
from memdiff.evaluation import cross_validation
from memdiff.evaluation.cross_validation import Judged

_MARGIN = 2.0  # standard errors by which a setting may lie behind and still be looked at
_MOST = 2**25  # numbers of log probabilities by which a blend is fitted, of a family


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
  """What one fold trains on, and what it holds out, in the same scale.

  Attributes:
    training: of the rows that train.
    held_out: [B, D] features.
  """

  training: Training
  held_out: np.ndarray


@dataclasses.dataclass(frozen=True)
class Selected:
  """What was chosen.

  Attributes:
    settings: {family: setting}.
    weights: {family: weight in the blend}.
    recommendation: as of `LongTailClassifier.recommendation_`.
    skipped: {family: settings that no later fold looked at, since they could not win}.
  """

  settings: dict[str, float]
  weights: dict[str, float]
  recommendation: dict[str, Any]
  skipped: dict[str, list[float]]


@dataclasses.dataclass(eq=False)
class _Candidates:
  """The settings of one family that may still be chosen.

  Attributes:
    settings: J of them.
    alive: their numbers.
    predictions: [J, E] of held-out examples.
    heads: of every fold so far, by the number of the setting.
  """

  name: str
  settings: tuple[float, ...]
  alive: list[int]
  predictions: np.ndarray
  heads: list[dict[int, Head]]

  @classmethod
  def of(cls, name: str, number: int) -> "_Candidates":
    settings = FAMILIES[name].settings
    nothing = np.zeros((len(settings), number), np.int32)
    return cls(name, settings, list(range(len(settings))), nothing, [])

  def look(self, fold: Fold, inside: np.ndarray) -> None:
    """Fits those that are alive and predicts what the fold holds out, rows `inside` [E]."""
    fitted = FAMILIES[self.name].fit(fold.training, [self.settings[j] for j in self.alive])
    self.heads.append(dict(zip(self.alive, fitted, strict=True)))
    for j, head in self.heads[-1].items():
      self.predictions[j, inside] = head.logits(fold.held_out).argmax(axis=1)

  def drop(self, judged: Judged, seen: np.ndarray) -> None:
    """Leaves out what lies clearly behind on the examples `seen` [E]."""
    found = self.predictions[self.alive][:, seen]
    near = cross_validation.contenders(found, judged.only(seen), _MARGIN)
    self.alive = [j for j, is_near in zip(self.alive, near, strict=True) if is_near]

  def best(self, judged: Judged) -> int:
    scores = np.round(judged.score(self.predictions[self.alive]), 9)
    return self.alive[int(np.argmax(scores))]

  def log_probabilities(self, chosen: int, held_out: Sequence[np.ndarray]) -> np.ndarray:
    """Of all held-out examples, features [B, D] of each fold. [E, C]."""
    parts = [heads[chosen].logits(x) for heads, x in zip(self.heads, held_out, strict=True)]
    return blend.log_probabilities(np.concatenate(parts))


def select(
  folds: Sequence[Callable[[], Fold]],
  rows: Sequence[np.ndarray],
  labels: np.ndarray,
  families: Sequence[str],
  criterion: str,
  say: Callable[[str], None],
) -> Selected:
  """Chooses settings and weights by examples that folds hold out.

  Args:
    folds: each makes one fold.
    rows: [B] of each, the rows that it holds out.
    labels: [N] of all rows.
    families: names in the blend.
    criterion: of `memdiff.evaluation.criteria`.
    say: prints what is done.
  """
  held_out = cross_validation.padded(rows)
  num_classes = int(labels.max()) + 1
  judged = cross_validation.judged_examples(held_out, labels, criterion, num_classes)
  wanted = {
    name: _Candidates.of(name, len(judged.label)) for name in dict.fromkeys([*families, PLAIN])
  }
  held = []
  for number, make in enumerate(folds):
    say(f"fold {number + 1} of {len(folds)}")
    fold = make()
    for candidates in wanted.values():
      candidates.look(fold, judged.run == number)
      if number < len(folds) - 1:
        candidates.drop(judged, judged.run <= number)
    held.append(fold.held_out)  # without what it trained on
  chosen = {name: candidates.best(judged) for name, candidates in wanted.items()}
  parts = {name: wanted[name].log_probabilities(chosen[name], held) for name in families}
  weights, crossed = _blend(list(parts.values()), judged)
  fitted = {
    name: cross_validation.cross_fitted(candidates.predictions[candidates.alive], judged)
    for name, candidates in wanted.items()
  }
  gain = cross_validation.paired_gain(crossed, fitted[PLAIN], judged)
  weights = dict(zip(families, weights.tolist(), strict=True))
  found = {
    "method": "blend",
    "criterion": criterion,
    "score": float(judged.score(crossed)),
    "plain": float(judged.score(fitted[PLAIN])),
    "gain": gain.mean,
    "interval": list(gain.interval()),
    "scores": {name: float(judged.score(values)) for name, values in fitted.items()},
    "weights": weights,
  }
  say(
    f"{criterion} {found['score']:.3f} on held-out examples, plain logistic regression"
    f" {found['plain']:.3f}"
  )
  return Selected(
    {name: wanted[name].settings[chosen[name]] for name in families},
    weights,
    found,
    {
      name: [s for j, s in enumerate(candidates.settings) if j not in candidates.alive]
      for name, candidates in wanted.items()
    },
  )


def _blend(parts: Sequence[np.ndarray], judged: Judged) -> tuple[np.ndarray, np.ndarray]:
  """Weights [F], and predictions [E] with weights that were fitted without an example's fold."""
  importance = np.ones(len(judged.label))
  if judged.criterion != "accuracy":
    importance = 1 / np.bincount(judged.label, minlength=judged.num_classes)[judged.label]

  def fit(rows: np.ndarray) -> np.ndarray:
    step = max(len(rows) * judged.num_classes // _MOST, 1)
    some = rows[::step]
    return blend.fit_weights([part[some] for part in parts], judged.label[some], importance[some])

  every, crossed = np.arange(len(judged.label)), np.zeros(len(judged.label), np.int32)
  for run in np.unique(judged.run):
    inside = judged.run == run
    weights = fit(every[~inside]) if not inside.all() else np.ones(len(parts))
    crossed[inside] = blend.blended(weights, [part[inside] for part in parts]).argmax(axis=1)
  weights = fit(every)
  if not weights.any():  # nothing that is held out tells anything
    weights = np.full(len(parts), 1 / len(parts))
  return weights, crossed
