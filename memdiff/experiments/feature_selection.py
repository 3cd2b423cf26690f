"""Cross-validation of an experiment on features: every method's setting, and a recommendation."""

import dataclasses
from typing import Any

import jax
import numpy as np

from memdiff.classifier import heads
from memdiff.classifier.priors import log_prior
from memdiff.evaluation import cross_validation
from memdiff.evaluation.method import Method
from memdiff.experiments.base import (
  Experiment,
  classifier_stage,
  forward_images,
)
from memdiff.experiments.feature_heads import head_setting, of_one_size, trained_losses
from memdiff.experiments.feature_settings import has_own_head
from memdiff.experiments.feature_store import load_features
from memdiff.experiments.methods import (
  OWN,
  REAL,
  Choice,
  candidates,
  methods,
  synthesis_settings,
)
from memdiff.memory import feature_space
from memdiff.memory.feature_space import FeatureRuns
from memdiff.runtime import loop, programs
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.progress import release_memory
from memdiff.runtime.workdir import write_arrays, write_json
from memdiff.runtime.writers import TensorBoard
from memdiff.synthesis import generators


@dataclasses.dataclass(frozen=True)
class Folds:
  """The runs of cross-validation and what is held out in each."""

  runs: FeatureRuns
  run: loop.Run
  counts: np.ndarray  # [R, C] training examples
  held_out: np.ndarray  # [R, B] rows of the training set, -1 if there is none
  features: jax.Array  # [R, B, D] of them, standardised
  judged: cross_validation.Judged
  own_logits: np.ndarray | None  # [R, B, C] of the folds' own heads, where they were trained so


def make_folds(experiment: Experiment) -> Folds:
  """Deals the training set, trains encoders if asked, and builds the runs."""
  config, labels, num_classes = (
    experiment.config.selection,
    experiment.dataset.train_labels,
    experiment.dataset.num_classes,
  )
  train, held_out = cross_validation.fold_rows(labels, config)
  run = dataclasses.replace(
    experiment.run,
    seeds=tuple(range(config.num_runs)),
    streams="folds/",
    tensorboard=_fold_writer(experiment),
  )
  if config.encoder == "retrained":
    features, head = _encode_folds(experiment, run, train)
  else:
    arrays, head = load_features(experiment), None
    features = arrays["train"][:1]
    if "kernel" in arrays:
      head = {n: np.repeat(arrays[n][:1], config.num_runs, axis=0) for n in ("kernel", "bias")}
  run_labels = np.where(train >= 0, labels[np.maximum(train, 0)], num_classes)
  bank = feature_space.fill_bank(
    features,
    run_labels,
    num_classes,
    run.keys("memory_bank"),
    experiment.config.memory_bank,
    experiment.mesh,
    train,
  )
  runs = feature_space.make_runs(
    features, run_labels, bank, head, num_classes, experiment.mesh, train
  )
  own_logits = None
  if config.encoder == "retrained" and head is not None:
    held_features = np.stack(
      [feature_space.take(features, held_out, run) for run in range(config.num_runs)]
    )
    own_logits = held_features @ head["kernel"] + head["bias"][:, None]
  return Folds(
    runs=runs,
    run=run,
    counts=mesh_lib.fetch(runs.exemplars.by_class.counts),
    held_out=held_out,
    features=feature_space.standardize(runs.standardizer, features, experiment.mesh, held_out),
    judged=cross_validation.judged_examples(held_out, labels, config.criterion, num_classes),
    own_logits=own_logits,
  )


def _fold_writer(experiment: Experiment) -> TensorBoard:
  """Curves of folds are no results; TensorBoard gets them only if it is asked to show them."""
  if experiment.config.execution.show_folds:
    return experiment.run.tensorboard
  return TensorBoard(experiment.workdir.path / "tensorboard", enabled=False)


def _fold_encoders(experiment: Experiment, train: np.ndarray) -> loop.Stage:
  """Trains an encoder for every fold, on its part of the training images."""
  rows = train[:, : (train >= 0).sum(axis=1).max()]
  return dataclasses.replace(
    classifier_stage(experiment, experiment.config.classifier.loss, rows),
    name="selection/encoder",
    result=(),
  )


def compile_folds(experiment: Experiment) -> None:
  """Compiles the training of encoders of folds."""
  config = experiment.config.selection
  if config.folds and config.encoder == "retrained":
    train, _ = cross_validation.fold_rows(experiment.dataset.train_labels, config)
    run = dataclasses.replace(experiment.run, seeds=tuple(range(config.num_runs)))
    programs.compile_ahead(_fold_encoders(experiment, train), run)


def _encode_folds(experiment: Experiment, run: loop.Run, train: np.ndarray):
  """Features [R, N, D] of all training images by encoders that saw their fold's part, and heads."""
  loss, stage = experiment.config.classifier.loss, _fold_encoders(experiment, train)
  folder = experiment.workdir.folder("selection") / "encoder"
  state = loop.train(stage, run, folder)
  _, features = forward_images(
    experiment, loss, state, experiment.dataset.train_images, stage.per_seed["statistics"]
  )
  head = mesh_lib.fetch(state.params["head"]) if has_own_head(experiment.config) else None
  return features, head


def select(experiment: Experiment) -> dict:
  """Chooses every method's setting and recommends one, by cross-validation on training data."""
  folder = experiment.workdir.folder("selection")
  if experiment.config.selection.folds == 0:
    choices = {
      m: dataclasses.asdict(candidates(experiment, m.generator, m.loss)[0])
      for m in methods(experiment)
    }
    write_json(folder / "choices.json", {"choices": choices, "recommendation": None})
    return {}
  folds, fitted, choices, numbers = make_folds(experiment), {}, {}, {}

  def take(method, settings, predictions):
    """Chooses among settings [J] by their predictions [J, E]."""
    choices[method] = settings[cross_validation.choose(predictions, folds.judged)]
    fitted[method] = cross_validation.cross_fitted(predictions, folds.judged)
    numbers[method] = len(settings)

  for name in (REAL, *experiment.config.generators.names):
    for loss, predictions in _predict_with(experiment, folds, name).items():
      take(Method.of(name, loss), candidates(experiment, name, loss), predictions)
  if folds.own_logits is not None:
    for method, (settings, predictions) in _predict_with_own_heads(experiment, folds).items():
      take(method, settings, predictions)
  controls = [m for m in fitted if Method(m).generator in (REAL, OWN)]
  recommendation = cross_validation.recommend(fitted, folds.judged, controls)
  for method, number in numbers.items():
    recommendation["scores"][method]["settings"] = number
  write_json(
    folder / "choices.json",
    {
      "choices": {method: dataclasses.asdict(choice) for method, choice in choices.items()},
      "recommendation": recommendation | {"basis": _basis(experiment)},
    },
  )
  judged = {name: getattr(folds.judged, name) for name in ("label", "example", "run")}
  write_arrays(folder / "predictions.npz", fitted | judged)
  return {"method": recommendation["method"], "expected_gain": recommendation["expected_gain"]}


def _basis(experiment: Experiment) -> dict[str, Any]:
  config = experiment.config.selection
  return {"folds": config.folds, "repeats": config.repeats, "encoder": config.encoder}


def _judged_rows(predictions: np.ndarray, folds: Folds) -> np.ndarray:
  """Predictions [..., R, B] of held-out rows -> [..., E] in the order of `judged`."""
  return predictions[..., folds.held_out >= 0]


def _predict_with(experiment: Experiment, folds: Folds, name: str) -> dict[str, np.ndarray]:
  """Predictions of every setting for held-out examples, by loss. [J, E]."""
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
  found: list[Any] = [None] * len(settings)
  for number, strengths in enumerate(parts):
    of_part = [j for j, choice in enumerate(settings) if choice.strength in strengths]
    label = name if len(parts) == 1 else f"{name}/{number}"
    predictions = _predict_at(experiment, folds, name, label, [settings[j] for j in of_part])
    for j, of_head in zip(of_part, np.moveaxis(predictions, 2, 0), strict=True):
      found[j] = of_head
    if len(parts) > 1:
      release_memory()
  predictions, trained = _judged_rows(np.stack(found, axis=2), folds), trained_losses(experiment)
  by_loss = {}
  for loss in experiment.config.head.losses:
    of_loss = predictions[:, trained.index(heads.trained_loss(loss))]
    of_loss = of_loss[1:] if loss == "logit_adjustment" else of_loss[:1]
    by_loss[loss] = of_loss.reshape(-1, of_loss.shape[-1])
  return by_loss


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


def _predict_at(
  experiment: Experiment,
  folds: Folds,
  name: str,
  label: str,
  settings: list[Choice],
) -> np.ndarray:
  """Predictions of some settings for held-out rows. [1 + T taus, trained losses, J, R, B].

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
  predictions = mesh_lib.fetch(
    heads.predict(
      state.params, stage.per_seed["mixture"].prior, taus, stage.per_seed["run"], folds.features
    )
  )
  return predictions.reshape(len(taus), len(trained), len(settings), *folds.held_out.shape)


def _predict_with_own_heads(
  experiment: Experiment, folds: Folds
) -> dict[str, tuple[list[Choice], np.ndarray]]:
  """method -> (settings [J], predictions [J, E]) of the folds' own heads, adjusted or not.

  The prior is the fold's own: that of the whole set knows what the fold has not seen.
  """
  plain = folds.own_logits.argmax(axis=-1)
  prior = np.stack([log_prior(counts) for counts in folds.counts])[:, None]
  adjusted = np.stack(
    [(folds.own_logits - tau * prior).argmax(axis=-1) for tau in experiment.config.head.taus]
  )
  return {
    OWN: ([Choice()], _judged_rows(plain[None], folds)),
    f"{OWN}+logit_adjustment": (
      [Choice(tau=tau) for tau in experiment.config.head.taus],
      _judged_rows(adjusted, folds),
    ),
  }
