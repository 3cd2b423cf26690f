"""Fitted heads as methods of an experiment on features: `real+lda`, ..., and `real+blend`.

They are what `LongTailClassifier` fits, on the same folds as all other methods. The blend is the
method to use unless another is clearly better.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from memdiff.evaluation import calibration
from memdiff.evaluation.method import Method
from memdiff.experiments.base import Experiment
from memdiff.experiments.feature_folds import Folds
from memdiff.experiments.feature_store import Space, load_class_embeddings
from memdiff.experiments.methods import REAL
from memdiff.fitting import blend, knowledge, selection
from memdiff.fitting.heads import FAMILIES, KINDS, Family, Head, Linear
from memdiff.fitting.selection import BLEND, Fold
from memdiff.memory.feature_space import FeatureRuns
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.workdir import read_arrays, read_json

FILE = "fitted.npz"  # RUN/FAMILY/FIELD of the heads; one run, if all have the same features
PREFERRED = Method.of(REAL, BLEND)
_BESIDE = {knowledge.ZERO_SHOT}  # in no blend
_DESCRIBED = FAMILIES | knowledge.families(np.zeros((0, 0)))  # what reports say of all


@dataclasses.dataclass(frozen=True)
class Fitted:
  """How heads are fitted: {family: setting}, and {family: weight} in the blend, or 0."""

  settings: Mapping[str, float]
  weights: Mapping[str, float]

  @property
  def methods(self) -> list[Method]:
    """One for each family, and the blend if there are several."""
    names = [*self.settings, *([BLEND] if len(self.settings) > 1 else [])]
    return [Method.of(REAL, name) for name in names]

  def parts(self, method: Method) -> list[str]:
    """The families of which a method is made."""
    if method.loss != BLEND:
      return [method.loss]
    return [name for name in self.settings if self.weights[name]]

  def describe(self, method: Method) -> str:
    if method.loss == BLEND:
      total = sum(self.weights.values())
      shares = sorted(((w / total, name) for name, w in self.weights.items() if w), reverse=True)
      return "real features only; a blend of " + ", ".join(f"{n} {s:.0%}" for s, n in shares)
    family = _DESCRIBED[method.loss]
    setting = f"{family.setting} {self.settings[method.loss]:g}"
    return f"real features only; {family.description} ({setting})"

  def logits(self, method: Method, heads: Mapping[str, Head], features: np.ndarray) -> np.ndarray:
    """Of standardised features [N, D]. [N, C]."""
    if method.loss != BLEND:
      return heads[method.loss].logits(features)
    names = self.parts(method)
    parts = [blend.log_probabilities(heads[name].logits(features)) for name in names]
    return blend.blended([self.weights[name] for name in names], parts)


def families(experiment: Experiment) -> dict[str, Family]:
  """Those that a run fits; those that know embeddings of the classes come last."""
  config = experiment.config
  names = selection.distinct(config.head.fitted, config.selection.criterion)
  embeddings = load_class_embeddings(experiment) if names else None
  more = {} if embeddings is None else knowledge.families(embeddings)
  return {name: FAMILIES[name] for name in names} | more


def unchosen(experiment: Experiment) -> Fitted:
  """Without cross-validation: the first settings; those without further knowledge weigh alike."""
  known = families(experiment)
  settings = {name: family.settings[0] for name, family in known.items()}
  blended = [name for name in known if name in FAMILIES]
  weights = dict.fromkeys(known, 0.0) | dict.fromkeys(blended, 1 / max(len(blended), 1))
  return Fitted(settings, weights)


def select(
  experiment: Experiment, folds: Folds
) -> tuple[Fitted, dict[str, np.ndarray], dict[str, dict[str, Any]]]:
  """Chooses settings and weights.

  Returns:
    (what was chosen; method -> cross-fitted predictions [E]; method -> its number of settings, its
    temperature and, of class knowledge, what the blend scores with it).
  """
  fits, judged = families(experiment), folds.judged
  if not fits:
    return Fitted({}, {}), {}, {}

  def fold(number: int) -> Fold:
    held_out = mesh_lib.fetch(folds.features[number])[folds.held_out[number] >= 0]
    return Fold(_training(experiment, folds.runs, number), held_out)

  makers = [functools.partial(fold, number) for number in range(len(folds.held_out))]
  with selection.few_threads(folds.features[0], judged.num_classes):
    found = selection.select(
      makers,
      judged,
      fits,
      experiment.run.progress.say,
      extra=[knowledge.NAME],
      beside=_BESIDE,
    )
  fitted = Fitted(found.settings, found.weights)
  predictions = {method: found.predictions[method.loss] for method in fitted.methods}
  known = {}
  for method in fitted.methods:
    logits, labels = found.logits[method.loss], judged.label[found.sample]
    several = fits[method.loss].settings if method.loss in fits else set(fits) - _BESIDE
    known[method] = {
      "settings": len(several),
      "temperature": calibration.fit_temperature(logits, labels, judged.criterion),
    }
    if method.loss == knowledge.NAME:
      known[method]["in_blend"] = found.recommendation["extra"]
  return fitted, predictions, known


def _training(experiment: Experiment, runs: FeatureRuns, number: int):
  """What heads of one run are fitted to."""
  config, num_classes = experiment.config, experiment.dataset.num_classes
  features, labels = mesh_lib.fetch(
    (runs.exemplars.features[number], runs.exemplars.labels[number])
  )
  inside = labels < num_classes
  return selection.training(
    features[inside], labels[inside], num_classes, config.selection.criterion
  )


def fit(experiment: Experiment, space: Space, fitted: Fitted) -> dict[str, np.ndarray]:
  """The final heads, as FILE has them."""
  arrays, fits = {}, families(experiment)
  for number in range(1 if space.runs.alike else len(experiment.seeds)):
    training = _training(experiment, space.runs, number)
    with selection.few_threads(training.features, experiment.dataset.num_classes):
      for name, setting in fitted.settings.items():
        (head,) = fits[name].fit(training, (setting,))
        for field in dataclasses.fields(head):
          arrays[f"{number}/{name}/{field.name}"] = np.asarray(getattr(head, field.name))
        arrays[f"{number}/{name}/kind"] = np.array(type(head).__name__)
  return arrays


def load_heads(folder: pathlib.Path) -> list[dict[str, Head]]:
  """{family: head} of every run; of one, if all have the same."""
  fields: dict[int, dict[str, dict[str, np.ndarray]]] = {}
  for path, array in read_arrays(folder / FILE).items():
    number, family, name = path.split("/")
    fields.setdefault(int(number), {}).setdefault(family, {})[name] = array
  return [
    {name: KINDS[str(parts.pop("kind"))](**parts) for name, parts in fields[number].items()}
    for number in sorted(fields)
  ]


def logits_of_test(
  experiment: Experiment, space: Space, fitted: Fitted
) -> Iterator[tuple[Method, np.ndarray]]:
  """(method, logits [S, T, C] of the test examples), of all fitted methods."""
  if not fitted.settings:
    return
  heads, test = load_heads(experiment.workdir.folder("heads")), mesh_lib.fetch(space.test)
  for method in fitted.methods:
    found = [fitted.logits(method, h, x) for h, x in zip(heads, test, strict=False)]
    yield method, np.stack(found * (len(experiment.seeds) // len(found)))


def linear_head(experiment: Experiment, method: str) -> dict[str, np.ndarray] | None:
  """{"kernel" [S, D, C], "bias" [S, C]} of a method on standardised features; None if it has none.

  A class without features has a bias of minus infinity.
  """
  heads = [h.get(Method(method).loss) for h in load_heads(experiment.workdir.folder("heads"))]
  if not isinstance(heads[0], Linear):
    return None
  every = heads * (len(experiment.seeds) // len(heads))
  return {name: np.stack([getattr(head, name) for head in every]) for name in ("kernel", "bias")}


def load(experiment: Experiment) -> Fitted:
  """What `select` has chosen."""
  saved = read_json(experiment.workdir.folder("selection") / "choices.json")
  return Fitted(**saved["fitted"])
