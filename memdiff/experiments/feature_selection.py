"""Cross-validation of an experiment on features: every method's setting, and a recommendation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from memdiff.classifier import heads
from memdiff.classifier.priors import log_prior, log_shares
from memdiff.evaluation import calibration, cross_validation
from memdiff.evaluation.method import Method
from memdiff.experiments import fitted
from memdiff.experiments.base import Experiment
from memdiff.experiments.feature_folds import Folds, make_folds
from memdiff.experiments.feature_heads import head_setting, of_one_size, trained_losses
from memdiff.experiments.methods import (
  OWN,
  REAL,
  Choice,
  candidates,
  methods,
  synthesis_settings,
)
from memdiff.runtime import loop
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.progress import release_memory
from memdiff.runtime.workdir import write_arrays, write_json
from memdiff.synthesis import generators


@dataclasses.dataclass(frozen=True)
class Predicted:
  """What the heads of a method say of the held-out examples.

  Attributes:
    settings: J of them.
    predictions: [J, E] classes.
    logits: (number of a setting, examples [n]) -> [n, C].
  """

  settings: list[Choice]
  predictions: np.ndarray
  logits: Callable[[int, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _FoldHeads:
  """The heads of a generator, by all settings that differ in more than tau; R runs each.

  Attributes:
    classes: [1 + T taus, trained losses, J, R, B] that they predict for held-out rows.
    fitted: {"kernel" [trained losses, J, R, D, C], "bias", "prior" [trained losses, J, R, C]}.
  """

  classes: np.ndarray
  fitted: dict[str, np.ndarray]

  @classmethod
  def joined(cls, parts: list["_FoldHeads"], order: np.ndarray) -> "_FoldHeads":
    """Heads of several parts of the settings, which stand in `order` when they are joined."""
    back = np.argsort(order)
    fitted = {
      name: np.concatenate([part.fitted[name] for part in parts], axis=1)[:, back]
      for name in parts[0].fitted
    }
    return cls(np.concatenate([part.classes for part in parts], axis=2)[:, :, back], fitted)


def select(experiment: Experiment) -> dict:
  """Chooses every method's setting and recommends one, by cross-validation on training data."""
  folder = experiment.workdir.folder("selection")
  if experiment.config.selection.folds == 0:
    choices = {
      m: dataclasses.asdict(candidates(experiment, m.generator, m.loss)[0])
      for m in methods(experiment)
    }
    unchosen = dataclasses.asdict(fitted.unchosen(experiment))
    saved = {"choices": choices, "recommendation": None, "fitted": unchosen}
    write_json(folder / "choices.json", saved)
    return {}
  folds, choices = make_folds(experiment), {}
  fitted_heads, predictions, known = fitted.select(experiment, folds)

  def take(method: str, predicted: Predicted) -> None:
    """Chooses among the settings of a method."""
    chosen = cross_validation.choose(predicted.predictions, folds.judged)
    choices[method] = predicted.settings[chosen]
    predictions[method] = cross_validation.cross_fitted(predicted.predictions, folds.judged)
    known[method] = {
      "settings": len(predicted.settings),
      "temperature": _temperature(folds, predicted, chosen),
    }

  for name in (REAL, *experiment.config.generators.names):
    for loss, predicted in _predict_with(experiment, folds, name).items():
      take(Method.of(name, loss), predicted)
  if folds.own_logits is not None:
    for method, predicted in _predict_with_own_heads(experiment, folds).items():
      take(method, predicted)
  controls = [m for m in predictions if Method(m).generator in (REAL, OWN)]
  recommendation = cross_validation.recommend(predictions, folds.judged, controls, fitted.PREFERRED)
  for method, more in known.items():
    recommendation["scores"][method] |= more
  write_json(
    folder / "choices.json",
    {
      "choices": {method: dataclasses.asdict(choice) for method, choice in choices.items()},
      "recommendation": recommendation | {"basis": _basis(experiment)},
      "fitted": dataclasses.asdict(fitted_heads),
    },
  )
  judged = {name: getattr(folds.judged, name) for name in ("label", "example", "run")}
  write_arrays(folder / "predictions.npz", predictions | judged)
  return {"method": recommendation["method"], "expected_gain": recommendation["expected_gain"]}


def _basis(experiment: Experiment) -> dict[str, Any]:
  config = experiment.config.selection
  return {"folds": config.folds, "repeats": config.repeats, "encoder": config.encoder}


def _temperature(folds: Folds, predicted: Predicted, chosen: int) -> float:
  """Of a method that is set as chosen."""
  judged = folds.judged
  examples = calibration.enough(len(judged.label), judged.num_classes)
  logits = predicted.logits(chosen, examples)
  return calibration.fit_temperature(logits, judged.label[examples], judged.criterion)


def _predict_with(experiment: Experiment, folds: Folds, name: str) -> dict[str, Predicted]:
  """What the heads of a generator say of held-out examples, by loss."""
  settings = candidates(experiment, name, "cross_entropy")
  if name != REAL:
    folder, synthesis = (
      experiment.workdir.folder("selection") / name,
      synthesis_settings(experiment),
    )
    generators.train(name, synthesis, folds.runs, folds.run, folder, f"selection/{name}")
  parts = _strengths_at_a_time(
    experiment, folds, name, sorted({choice.strength for choice in settings})
  )
  found, order = [], []
  for number, strengths in enumerate(parts):
    of_part = [j for j, choice in enumerate(settings) if choice.strength in strengths]
    label = name if len(parts) == 1 else f"{name}/{number}"
    found.append(_train_at(experiment, folds, name, label, [settings[j] for j in of_part]))
    order += of_part
    if len(parts) > 1:
      release_memory()
  together = _FoldHeads.joined(found, np.array(order))
  return {
    loss: _predicted(experiment, folds, name, loss, together)
    for loss in experiment.config.head.losses
  }


def _predicted(
  experiment: Experiment, folds: Folds, name: str, loss: str, trained: _FoldHeads
) -> Predicted:
  """What a generator's heads say by a loss, for every tau that it has."""
  of_loss = trained_losses(experiment).index(heads.trained_loss(loss))
  taus = slice(1, None) if loss == "logit_adjustment" else slice(0, 1)
  classes = folds.judged_rows(trained.classes[taus, of_loss])
  settings = candidates(experiment, name, loss)
  features = mesh_lib.fetch(folds.features)

  def logits(number: int, examples: np.ndarray) -> np.ndarray:
    j = number % classes.shape[1]  # taus vary slowest
    head = {key: values[of_loss, j] for key, values in trained.fitted.items()}
    run, column = folds.at(examples)
    found = np.empty((len(examples), head["bias"].shape[-1]), np.float32)
    for r in np.unique(run):
      inside = run == r
      found[inside] = features[r, column[inside]] @ head["kernel"][r] + head["bias"][r]
    if loss == "logit_adjustment":
      found -= settings[number].tau * log_shares(head["prior"])[run]
    return found

  return Predicted(settings, classes.reshape(-1, classes.shape[-1]), logits)


_AT_ONCE = 2**28  # bytes of synthetic features that heads are trained on at once


def _strengths_at_a_time(
  experiment: Experiment, folds: Folds, name: str, strengths: list[float]
) -> list[list[float]]:
  """The strengths, in parts whose features together take little memory."""
  total = 0
  if name != REAL:
    total = int(synthesis_settings(experiment).numbers(name, experiment.dataset.train_counts).sum())
  size = len(folds.run.seeds) * total * folds.features.shape[-1] * 4
  step = max(_AT_ONCE // max(size, 1), 1)
  return [strengths[start : start + step] for start in range(0, len(strengths), step)]


def _train_at(
  experiment: Experiment,
  folds: Folds,
  name: str,
  label: str,
  settings: list[Choice],
) -> _FoldHeads:
  """The heads of some settings.

  Args:
    experiment: the experiment.
    folds: the runs.
    name: of the generator, whose denoiser has been trained.
    label: names the stage.
    settings: J of them.
  """
  folder, num_runs = experiment.workdir.folder("selection"), len(folds.run.seeds)
  strengths = sorted({choice.strength for choice in settings})
  if name == REAL:
    added = heads.nothing_added(num_runs, folds.features.shape[-1], experiment.dataset.num_classes)
  else:
    synthesis = synthesis_settings(experiment)
    numbers = synthesis.numbers(name, experiment.dataset.train_counts)
    features = generators.make(
      name, synthesis, folds.runs, folds.run, folder / name, numbers, strengths
    )
    added = heads.Added(features.features, features.confidence, numbers)
  share = folds.counts.sum(axis=1) / len(experiment.dataset.train_labels)
  trained = trained_losses(experiment)
  every = [
    head_setting(
      folds.run, c, name, loss, run=r, seed=r, strengths=strengths, share=float(share[r])
    )
    for loss in trained
    for c in settings
    for r in range(num_runs)
  ]
  nothing = np.zeros((num_runs, 0), np.int32)
  data = heads.HeadData(
    exemplars=folds.runs.exemplars,
    added=mesh_lib.replicate(experiment.mesh, of_one_size(experiment, added)),
    start=folds.runs.head,
    test_features=folds.features[:, :0],
    test_labels=mesh_lib.replicate(experiment.mesh, nothing),
  )
  stage = heads.make_stage(
    f"selection/heads/{label}", experiment.config.head.training, data, every, experiment.mesh
  )
  run = dataclasses.replace(folds.run, seeds=tuple(range(len(every))))
  state = loop.train(stage, run, folder / "heads" / label)
  taus = np.array([0.0, *experiment.config.head.taus], np.float32)
  prior = stage.per_seed["mixture"].prior
  classes = heads.predict(state.params, prior, taus, stage.per_seed["run"], folds.features)
  classes, fitted = mesh_lib.fetch((classes, state.params | {"prior": prior}))
  size = len(trained), len(settings)
  return _FoldHeads(
    classes.reshape(len(taus), *size, *folds.held_out.shape),
    {key: value.reshape(*size, num_runs, *value.shape[1:]) for key, value in fitted.items()},
  )


def _predict_with_own_heads(experiment: Experiment, folds: Folds) -> dict[str, Predicted]:
  """What the folds' own heads say of held-out examples, adjusted or not, by method.

  The prior is the fold's own: that of the whole set knows what the fold has not seen.
  """
  prior = np.stack([log_prior(counts) for counts in folds.counts])[:, None]

  def predicted(taus: Sequence[float]) -> Predicted:
    classes = np.stack([(folds.own_logits - tau * prior).argmax(axis=-1) for tau in taus])

    def logits(number: int, examples: np.ndarray) -> np.ndarray:
      return (folds.own_logits - taus[number] * prior)[folds.at(examples)]

    return Predicted([Choice(tau=tau) for tau in taus], folds.judged_rows(classes), logits)

  plain = dataclasses.replace(predicted((0.0,)), settings=[Choice()])
  return {OWN: plain, f"{OWN}+logit_adjustment": predicted(experiment.config.head.taus)}
