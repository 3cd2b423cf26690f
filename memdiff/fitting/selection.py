"""How fitted heads are chosen: settings of families, weights of their blend, what it is worth."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from memdiff.evaluation import calibration, cross_validation
from memdiff.evaluation.cross_validation import Judged
from memdiff.fitting import blend
from memdiff.fitting.heads import FAMILIES, PLAIN, REGRESSIONS, Family, Head, Training

BLEND, WITH_EXTRA = "blend", "blend with extra families"
_MARGIN = 2.0  # standard errors by which a setting may lie behind and still be looked at
_SMALL = 2**29  # multiplications of features with a kernel
_AT_ONCE = 2**24  # logits


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
  """What one fold trains on, and what it holds out, in the same scale.

  Attributes:
    training: of the rows that train.
    held_out: [B, D] features, or what makes some of these rows when it is indexed.
  """

  training: Training
  held_out: Any


@dataclasses.dataclass(frozen=True)
class Selected:
  """What was chosen.

  Attributes:
    settings: {family: setting} of all.
    weights: {family: weight in the blend}, 0 of those that are not in it.
    recommendation: as of `LongTailClassifier.recommendation_`.
    skipped: {family: settings that no later fold looked at, since they could not win}.
    predictions: {family or BLEND: [E] classes of held-out examples}, cross-fitted.
    sample: [n] numbers of some held-out examples, or of all if they are few.
    logits: {family or BLEND: [n, C]} of these, as chosen.
  """

  settings: dict[str, float]
  weights: dict[str, float]
  recommendation: dict[str, Any]
  skipped: dict[str, list[float]]
  predictions: dict[str, np.ndarray]
  sample: np.ndarray
  logits: dict[str, np.ndarray]


@dataclasses.dataclass(eq=False)
class _Candidates:
  """The settings of one family that may still be chosen.

  Attributes:
    family: its settings, J of them.
    alive: the numbers of those.
    predictions: [J, E] of held-out examples.
    heads: of every fold so far, by the number of the setting.
  """

  family: Family
  alive: list[int]
  predictions: np.ndarray
  heads: list[dict[int, Head]]

  @classmethod
  def of(cls, family: Family, number: int) -> "_Candidates":
    nothing = np.zeros((len(family.settings), number), np.int32)
    return cls(family, list(range(len(family.settings))), nothing, [])

  def look(self, fold: Fold, inside: np.ndarray) -> None:
    """Fits those that are alive and predicts what the fold holds out, rows `inside` [E]."""
    settings = [self.family.settings[j] for j in self.alive]
    fitted = self.family.fit(fold.training, settings)
    self.heads.append(dict(zip(self.alive, fitted, strict=True)))
    num_classes = len(fold.training.shares)
    rows = np.flatnonzero(inside)
    for part in _parts(len(fold.held_out), num_classes):
      features = fold.held_out[part]
      for j, head in self.heads[-1].items():
        self.predictions[j, rows[part]] = head.logits(features).argmax(axis=1)

  def drop(self, judged: Judged, seen: np.ndarray) -> None:
    """Leaves out what lies clearly behind on the examples `seen` [E]."""
    found = self.predictions[self.alive][:, seen]
    near = cross_validation.contenders(found, judged.only(seen), _MARGIN)
    self.alive = [j for j, is_near in zip(self.alive, near, strict=True) if is_near]

  @property
  def skipped(self) -> list[float]:
    """Settings that no later fold looked at."""
    return [s for j, s in enumerate(self.family.settings) if j not in self.alive]

  def best(self, judged: Judged, rows: np.ndarray) -> int:
    """The setting with the highest score on some examples [E]."""
    found = self.predictions[self.alive][:, rows]
    return self.alive[int(np.argmax(np.round(judged.only(rows).score(found), 9)))]


def _parts(number: int, num_classes: int) -> Iterator[slice]:
  """Parts of some rows whose logits take little memory."""
  size = max(_AT_ONCE // num_classes, 1)
  for start in range(0, number, size):
    yield slice(start, start + size)


@dataclasses.dataclass(frozen=True, eq=False)
class _HeldOut:
  """What all folds hold out.

  Attributes:
    features: of each fold, as it has them.
    run: [E] the fold of each example.
    place: [E] its row there.
  """

  features: list[Any]
  run: np.ndarray
  place: np.ndarray

  def log_probabilities(
    self, candidates: _Candidates, chosen: int, examples: np.ndarray
  ) -> np.ndarray:
    """By the heads of a setting, each of its fold, for some examples [n]. [n, C]."""
    found = None
    for run in np.unique(self.run[examples]):
      inside = self.run[examples] == run
      features = self.features[run][self.place[examples[inside]]]
      told = blend.log_probabilities(candidates.heads[run][chosen].logits(features))
      if found is None:
        found = np.empty((len(examples), told.shape[1]), told.dtype)
      found[inside] = told
    return found


def distinct(families: Sequence[str], criterion: str) -> list[str]:
  """Names of families, each once; of those that are one and the same, the first."""
  names = list(dict.fromkeys(families))
  if criterion == "accuracy":  # all regressions then minimise the same
    regressions = [name for name in names if name in REGRESSIONS]
    names = [name for name in names if name not in regressions[1:]]
  return names


def training(
  features: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
  criterion: str,
  weights: np.ndarray | None = None,
) -> Training:
  """What heads are fitted to, for classes as a criterion counts them.

  Args:
    features: [N, D], every column with mean 0 and deviation 1.
    labels: [N] int.
    num_classes: C.
    criterion: of `memdiff.evaluation.criteria`.
    weights: [N] of the examples, above 0; None: all count alike. With accuracy, classes are as
      frequent as their examples weigh.
  """
  shares = np.full(num_classes, 1 / num_classes)
  if criterion == "accuracy":
    totals = np.bincount(labels, weights, minlength=num_classes)
    shares = totals / totals.sum()
  if weights is not None:
    weights = (weights / weights.mean()).astype(np.float32)
  return Training(features, labels, shares, weights)


def few_threads(features: np.ndarray, num_classes: int) -> threadpool_limits:
  """One thread for small products, in which several only wait for each other."""
  is_small = features.size * num_classes < _SMALL
  return threadpool_limits(1 if is_small else None, user_api="blas")


@dataclasses.dataclass(frozen=True, eq=False)
class _Choice:
  """What some of the held-out examples choose.

  Attributes:
    settings: {family: number of its setting}.
    weights: {blend: weight of each of its families}.
    parts: {family: log probabilities [n, C] of the examples that were looked at}.
  """

  settings: dict[str, int]
  weights: dict[str, np.ndarray]
  parts: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class _Chooser:
  """Chooses settings of families and weights of blends.

  Attributes:
    wanted: {family: its candidates}, those of the blends and others.
    blends: {blend: its families}.
    held_out: what the folds hold out.
    judged: the same examples.
    sample: [n] numbers of those that weights are fitted by.
  """

  wanted: Mapping[str, _Candidates]
  blends: Mapping[str, list[str]]
  held_out: _HeldOut
  judged: Judged
  sample: np.ndarray

  def choose(self, rows: np.ndarray) -> _Choice:
    """By some examples, a mask [E]."""
    settings = {name: of_family.best(self.judged, rows) for name, of_family in self.wanted.items()}
    some = self.sample[rows[self.sample]]
    some = some if len(some) else np.flatnonzero(rows)
    parts = self._log_probabilities(settings, some)
    weights = {
      which: _fit_weights([parts[name] for name in names], self.judged, some)
      for which, names in self.blends.items()
    }
    return _Choice(settings, weights, parts)

  def _log_probabilities(
    self, settings: Mapping[str, int], examples: np.ndarray
  ) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for names in self.blends.values() for name in names)
    return {
      name: self.held_out.log_probabilities(self.wanted[name], settings[name], examples)
      for name in names
    }

  def cross_fitted(self) -> dict[str, np.ndarray]:
    """{family or blend: [E] classes}, each example's chosen without its fold."""
    judged, every = self.judged, np.ones(len(self.judged.label), bool)
    crossed = {n: np.zeros(len(every), np.int32) for n in (*self.wanted, *self.blends)}
    for run in np.unique(judged.run):
      inside = np.flatnonzero(judged.run == run)
      others = ~np.isin(judged.example, judged.example[inside])
      choice = self.choose(others if others.any() else every)
      for name, candidates in self.wanted.items():
        crossed[name][inside] = candidates.predictions[choice.settings[name], inside]
      for rows in _parts(len(inside), judged.num_classes):
        part = inside[rows]
        told = self._log_probabilities(choice.settings, part)
        for which, names in self.blends.items():
          logits = blend.blended(choice.weights[which], [told[name] for name in names])
          crossed[which][part] = logits.argmax(axis=1)
    return crossed


def select(
  folds: Sequence[Callable[[], Fold]],
  judged: Judged,
  families: Mapping[str, Family],
  say: Callable[[str], None],
  extra: Sequence[str] = (),
  plain: bool = True,
  beside: Collection[str] = (),
) -> Selected:
  """Chooses settings and weights by examples that folds hold out.

  Args:
    folds: each makes one fold, run r the r-th.
    judged: the examples that they hold out, and the criterion.
    families: those of the blend, by name.
    say: prints what is done.
    extra: families that take part only if the blend is better with them, with 95 % confidence.
    plain: whether plain regression is fitted too, to be held against the blend.
    beside: families that take part in no blend.
  """
  known = ({PLAIN: FAMILIES[PLAIN]} if plain else {}) | dict(families)
  wanted = {name: _Candidates.of(family, len(judged.label)) for name, family in known.items()}
  held_out = _look(folds, judged, wanted, say)
  blended = [name for name in families if name not in beside]
  base = [name for name in blended if name not in extra] or blended
  blends = {BLEND: base} | ({WITH_EXTRA: blended} if len(base) < len(blended) else {})
  blends |= {name: [name] for name in families if name in beside}
  sample = calibration.enough(len(judged.label), judged.num_classes)
  chooser = _Chooser(wanted, blends, held_out, judged, sample)
  crossed = chooser.cross_fitted()
  choice = chooser.choose(np.ones(len(judged.label), bool))
  used, of_extra = _with_or_without(crossed, judged)
  weights = dict(zip(blends[used], choice.weights[used].tolist(), strict=True))
  found = {
    "method": BLEND,
    "criterion": judged.criterion,
    "score": float(judged.score(crossed[used])),
    **_beside_plain(crossed[used], crossed.get(PLAIN), judged),
    "scores": {name: float(judged.score(crossed[name])) for name in wanted},
    "weights": weights,
  } | of_extra
  plain = f", plain logistic regression {found['plain']:.3f}" if PLAIN in known else ""
  say(f"{judged.criterion} {found['score']:.3f} on held-out examples{plain}")
  logits = blend.blended(choice.weights[used], [choice.parts[name] for name in blends[used]])
  return Selected(
    settings={name: known[name].settings[choice.settings[name]] for name in families},
    weights=dict.fromkeys(families, 0.0) | weights,
    recommendation=found,
    skipped={name: candidates.skipped for name, candidates in wanted.items()},
    predictions=crossed | {BLEND: crossed[used]},
    sample=sample,
    logits=choice.parts | {BLEND: logits},
  )


def _look(
  folds: Sequence[Callable[[], Fold]],
  judged: Judged,
  wanted: Mapping[str, _Candidates],
  say: Callable[[str], None],
) -> _HeldOut:
  """Fits all candidates in all folds, fewer from fold to fold."""
  held_out = []
  for number, make in enumerate(folds):
    say(f"fold {number + 1} of {len(folds)}")
    fold = make()
    for candidates in wanted.values():
      candidates.look(fold, judged.run == number)
      if number < len(folds) - 1:
        candidates.drop(judged, judged.run <= number)
    held_out.append(fold.held_out)  # without what it trained on
  return _HeldOut(held_out, judged.run, _places(judged.run))


def _beside_plain(blended: np.ndarray, plain: np.ndarray | None, judged: Judged) -> dict[str, Any]:
  """{"plain", "gain", "interval"} of predictions [E]; None without plain regression."""
  if plain is None:
    return dict.fromkeys(("plain", "gain", "interval"))
  gain = cross_validation.paired_gain(blended, plain, judged)
  return {
    "plain": float(judged.score(plain)),
    "gain": gain.mean,
    "interval": list(gain.interval()),
  }


def _with_or_without(
  crossed: Mapping[str, np.ndarray], judged: Judged
) -> tuple[str, dict[str, Any]]:
  """(the blend to use, what extra families are worth: {"extra"}, if there are any)."""
  if WITH_EXTRA not in crossed:
    return BLEND, {}
  gain = cross_validation.paired_gain(crossed[WITH_EXTRA], crossed[BLEND], judged)
  used = gain.interval()[0] > 0
  worth = {
    "score": float(judged.score(crossed[WITH_EXTRA])),
    "gain": gain.mean,
    "interval": list(gain.interval()),
    "used": bool(used),
  }
  return WITH_EXTRA if used else BLEND, {"extra": worth}


def _places(run: np.ndarray) -> np.ndarray:
  """[E] the position of each example in its run; runs stand one after the other."""
  first = np.searchsorted(run, run)
  return np.arange(len(run)) - first


def _fit_weights(parts: Sequence[np.ndarray], judged: Judged, some: np.ndarray) -> np.ndarray:
  """Weights [F] of a blend, by some of the held-out examples [n], parts F x [n, C]."""
  labels = judged.label[some]
  importance = np.ones(len(some))
  if judged.criterion != "accuracy":
    importance = 1 / np.bincount(judged.label, minlength=judged.num_classes)[labels]
  weights = blend.fit_weights(parts, labels, importance)
  # Without any weight, nothing that is held out tells anything.
  return weights if weights.any() else np.full(len(parts), 1 / len(parts))
