"""How `LongTailClassifier` chooses: settings of its families, weights of its blend, and a word."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from memdiff.classifier import blend
from memdiff.classifier.fitted_heads import FAMILIES, PLAIN, Head, Training
from memdiff.evaluation import cross_validation
from memdiff.evaluation.cross_validation import Judged

BLEND = "blend"
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
    told: log probabilities [E, C] that were asked for, by the number of the setting.
  """

  name: str
  settings: tuple[float, ...]
  alive: list[int]
  predictions: np.ndarray
  heads: list[dict[int, Head]]
  told: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

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

  def best(self, judged: Judged, rows: np.ndarray) -> int:
    """The setting with the highest score on some examples [E]."""
    found = self.predictions[self.alive][:, rows]
    return self.alive[int(np.argmax(np.round(judged.only(rows).score(found), 9)))]

  def log_probabilities(self, chosen: int, held_out: Sequence[np.ndarray]) -> np.ndarray:
    """Of all held-out examples, features [B, D] of each fold. [E, C]."""
    if chosen not in self.told:
      parts = [heads[chosen].logits(x) for heads, x in zip(self.heads, held_out, strict=True)]
      self.told[chosen] = blend.log_probabilities(np.concatenate(parts))
    return self.told[chosen]


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
  crossed = {name: np.zeros(len(judged.label), np.int32) for name in (*wanted, BLEND)}
  every = np.ones(len(judged.label), bool)
  for run in np.unique(judged.run):  # all that is chosen for a fold is chosen without it
    inside = judged.run == run
    others = ~inside if not inside.all() else every
    settings = {name: candidates.best(judged, others) for name, candidates in wanted.items()}
    for name, candidates in wanted.items():
      crossed[name][inside] = candidates.predictions[settings[name], inside]
    parts = [wanted[name].log_probabilities(settings[name], held) for name in families]
    weights = _fit_weights(parts, judged, others)
    logits = blend.blended(weights, [part[inside] for part in parts])
    crossed[BLEND][inside] = logits.argmax(axis=1)
  chosen = {name: candidates.best(judged, every) for name, candidates in wanted.items()}
  parts = [wanted[name].log_probabilities(chosen[name], held) for name in families]
  weights = _fit_weights(parts, judged, every)
  gain = cross_validation.paired_gain(crossed[BLEND], crossed[PLAIN], judged)
  weights = dict(zip(families, weights.tolist(), strict=True))
  found = {
    "method": BLEND,
    "criterion": criterion,
    "score": float(judged.score(crossed[BLEND])),
    "plain": float(judged.score(crossed[PLAIN])),
    "gain": gain.mean,
    "interval": list(gain.interval()),
    "scores": {name: float(judged.score(crossed[name])) for name in wanted},
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


def _fit_weights(parts: Sequence[np.ndarray], judged: Judged, rows: np.ndarray) -> np.ndarray:
  """Weights [F] of a blend, by some of the held-out examples [E]."""
  labels, some = judged.label, np.flatnonzero(rows)
  importance = np.ones(len(labels))
  if judged.criterion != "accuracy":
    importance = 1 / np.bincount(labels, minlength=judged.num_classes)[labels]
  some = some[:: max(len(some) * judged.num_classes // _MOST, 1)]
  weights = blend.fit_weights([part[some] for part in parts], labels[some], importance[some])
  # Without any weight, nothing that is held out tells anything.
  return weights if weights.any() else np.full(len(parts), 1 / len(parts))
