"""The experiment on features: generators against each other, on any encoder or on embeddings.

Two kinds share it. `memdiff` trains (or reads) an image encoder first; `features` begins with
embeddings from a file.

classifier     images -> encoder, head and a moving bank              classifier/<loss>/checkpoints
memory_bank    frozen encoder, or embeddings -> features and bank     memory_bank/features.npz, bank
diffusion      features, bank -> denoisers                            diffusion/<generator>
selection      training features -> settings, recommendation          selection/choices.json
hallucination  denoisers, bank -> synthetic features                  hallucination/*.npz
heads          real and synthetic features -> heads                   heads/<generator>/checkpoints
joint          images and synthetic features -> encoders and heads    joint/<generator>/round_<n>
evaluation     everything -> report.json, report.html                 evaluation/

A *method* is a generator with a loss, `memdiff+balanced_softmax`. `real` is no generator at all.
Two references use what no method may: `oracle` adds the real features that the long tail left out,
`unseen_exemplars` trains on left-out features in place of the training ones, as far as there are
any.
"""

import dataclasses
import itertools
import json
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import dataset as dataset_lib
from input_pipeline import embeddings
from input_pipeline.long_tail import LongTailLabels
from memdiff import feature_space, generators, joint, memory_bank, selection, synthetic
from memdiff.classifier import encoder, heads, losses, training
from memdiff.config import at_least, each, one_of, some_of
from memdiff.errors import ConfigError, WorkdirError
from memdiff.experiment import (
  Experiment,
  Phase,
  check_seeds,
  classifier_stage,
  forward_images,
  last_metrics,
  load_classifier,
  seeds_field,
)
from memdiff.feature_diffusion import DiffusionConfig
from memdiff.feature_space import FeatureRuns
from memdiff.generators import GeneratorsConfig, Workshop
from memdiff.hallucination import SamplerConfig, check_conditions
from memdiff.runtime import loop, programs
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.checkpoint import Checkpointer, abstract
from memdiff.runtime.progress import CompileClock, Progress, release_memory
from memdiff.runtime.workdir import read_arrays, write_arrays, write_json
from memdiff.runtime.writers import TensorBoard
from memdiff.selection import SelectionConfig

REAL = "real"
OWN = "own_head"
REFERENCES = {
  "oracle": "real features that the long tail left out: the most that hallucination can reach",
  "unseen_exemplars": "left-out features in place of the training ones, as far as there are any",
}


@dataclasses.dataclass(frozen=True)
class MethodsConfig:
  """How heads are trained on what the generators make."""

  losses: tuple[str, ...] = some_of(heads.LOSSES)
  exponents: tuple[float, ...] = each(lambda e: 0 <= e <= 1, "numbers from 0 to 1")
  l2: tuple[float, ...] = each(lambda strength: strength >= 0, "numbers from 0")
  taus: tuple[float, ...] = each(lambda tau: tau >= 0, "numbers from 0")
  training: heads.HeadConfig

  def __post_init__(self):
    if not self.losses:
      raise ValueError("losses is empty, but heads must be trained by one.")
    if self.training.optimizer.weight_decay:
      raise ValueError(
        f"training.optimizer.weight_decay is {self.training.optimizer.weight_decay:g}, but heads"
        " are regularised by l2; set it to 0.0 and give l2 the candidates."
      )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  map_per_class: int = at_least(2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureConfig:
  """Everything that decides the results of an experiment on embeddings."""

  experiment: str = one_of(("features",))
  name: str
  seeds: tuple[int, ...] = seeds_field()
  dataset: embeddings.EmbeddingsConfig
  memory_bank: memory_bank.BankConfig
  diffusion: DiffusionConfig
  hallucination: SamplerConfig
  generators: GeneratorsConfig
  head: MethodsConfig
  selection: SelectionConfig
  evaluation: EvaluationConfig
  loop: loop.LoopConfig
  execution: loop.ExecutionConfig

  def __post_init__(self):
    check_seeds(self.seeds)
    check_conditions(self.diffusion, self.hallucination)
    if self.hallucination.num_steps > self.diffusion.schedule.num_steps:
      raise ValueError(
        f"hallucination.num_steps is {self.hallucination.num_steps}, but the diffusion has only"
        f" {self.diffusion.schedule.num_steps} steps."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemdiffConfig(FeatureConfig):
  """Everything that decides the results of an experiment on images."""

  experiment: str = one_of(("memdiff",))
  dataset: dataset_lib.DatasetConfig
  encoder: encoder.EncoderConfig
  classifier: training.ClassifierConfig
  joint: joint.JointConfig


def has_own_head(config: FeatureConfig) -> bool:
  """Whether the features come with a linear head that was trained on them."""
  if not isinstance(config, MemdiffConfig) or config.encoder.backbone.taps:
    return False
  return config.classifier.num_epochs > 0 or config.encoder.init_head


def check(config: FeatureConfig, data: LongTailLabels) -> None:
  """Raises ConfigError where the settings do not fit each other or the data."""
  generators.plan(data.train_counts, config.generators)
  if not has_own_head(config):
    if config.head.training.start == "encoder":
      raise ConfigError(
        "config.head.training.start is encoder, but these features come without a head; set it to"
        " zeros."
      )
    confidence = config.generators.confidence.name
    if confidence in synthetic.NEED_A_HEAD:
      raise ConfigError(
        f"config.generators.confidence.name is {confidence}, which asks the encoder's own head, but"
        " these features come without one; use cosine or none."
      )
  if config.selection.folds and data.train_counts.max() < 2:
    raise ConfigError(
      "config.selection.folds asks for cross-validation, but no class has two examples; set it to"
      " 0."
    )
  if (
    config.selection.folds
    and config.selection.encoder == "frozen"
    and config.head.training.start == "encoder"
  ):
    raise ConfigError(
      "config.head.training.start is encoder and config.selection.encoder is frozen, so that heads"
      " of the folds would begin with one that was trained on what they are judged on; set start to"
      " zeros, or config.selection.folds to 0."
    )


def check_memdiff(config: MemdiffConfig, data: dataset_lib.LongTailDataset) -> None:
  check(config, data)
  joint.check(config.joint, config.classifier, streamed=data.streamed)
  for loss in training.trained_losses(config.classifier):
    if encoder.has_cosine_head(config.encoder.backbone, loss):
      raise ConfigError(
        f"memdiff trains linear heads on features, but the loss {loss} has a cosine head; choose"
        " another config.classifier.loss, or set config.encoder.backbone.head to linear."
      )
  retrains = config.selection.folds and config.selection.encoder == "retrained"
  if retrains and config.classifier.num_epochs == 0:
    raise ConfigError(
      "config.selection.encoder is retrained, but config.classifier.num_epochs is 0; set it to"
      " frozen."
    )
  if retrains and data.streamed:
    raise ConfigError(
      f"config.selection.encoder is retrained, but {data.name} is streamed from disk; set it to"
      " frozen, or config.selection.folds to 0."
    )


def check_features(config: FeatureConfig, data: embeddings.LongTailEmbeddings) -> None:
  check(config, data)
  if config.selection.encoder == "retrained":
    raise ConfigError(
      "config.selection.encoder is retrained, but embeddings have no encoder to train; set it to"
      " frozen."
    )


# --- features --------------------------------------------------------------------------------


def train_classifier(e: Experiment) -> dict:
  summary = {}
  for loss in training.trained_losses(e.config.classifier):
    folder = e.workdir.folder("classifier") / loss
    loop.train(classifier_stage(e, loss), e.run, folder)
    summary[loss] = last_metrics(folder)
  return summary


def encode_memory_bank(e: Experiment) -> dict:
  """Encodes every image with the frozen encoders and fills the bank."""
  arrays, data = {}, e.dataset
  for loss in reversed(training.trained_losses(e.config.classifier)):  # the first comes last
    state = load_classifier(e, loss)
    if e.config.classifier.num_steps(len(data.train_labels)) == 0:  # alike for all seeds
      state = jax.tree.map(lambda x: x[:1], state)
    logits, arrays["test"] = forward_images(e, loss, state, data.test_images)
    if has_own_head(e.config):
      arrays |= {f"logits_{loss}": logits} | mesh_lib.fetch(state.params["head"])
  _, arrays["train"] = forward_images(e, loss, state, data.train_images)
  _, arrays["left_out"] = forward_images(e, loss, state, data.left_out_images)
  return _fill_memory_bank(e, arrays)


def read_memory_bank(e: Experiment) -> dict:
  """Takes embeddings as features and fills the bank."""
  parts = ("train", "left_out", "test")
  return _fill_memory_bank(e, {n: getattr(e.dataset, f"{n}_features")[None] for n in parts})


def say_constant_columns(progress: Progress, features: np.ndarray) -> None:
  """In one line, if [N, D] has any."""
  constant = feature_space.constant_columns(features)
  if len(constant):
    progress.say(
      f"{len(constant)} of {features.shape[1]} columns are constant in the training data and tell"
      f" nothing apart; the first is column {constant[0]}, counted from 0"
    )


def _fill_memory_bank(e: Experiment, arrays: dict[str, np.ndarray]) -> dict:
  folder = e.workdir.folder("memory_bank")
  say_constant_columns(e.run.progress, arrays["train"][0])
  bank = feature_space.fill_bank(
    arrays["train"],
    np.broadcast_to(e.dataset.train_labels, (len(e.seeds), len(e.dataset.train_labels))),
    e.dataset.num_classes,
    e.run.keys("memory_bank"),
    e.config.memory_bank,
    e.mesh,
  )
  checkpointer = Checkpointer(folder / "bank", keep=1)
  checkpointer.save(0, bank)
  checkpointer.close()
  write_arrays(folder / "features.npz", arrays)
  stored = np.minimum(mesh_lib.fetch(bank.seen), bank.slots.shape[2]).sum()
  return {"stored_features": int(stored), "feature_dim": arrays["train"].shape[-1]}


def _for_seeds(e: Experiment, array: np.ndarray) -> np.ndarray:
  """Arrays of one encoder that serves all seeds, once per seed."""
  return np.broadcast_to(array, (len(e.seeds), *array.shape[1:]))


def load_features(e: Experiment) -> dict[str, np.ndarray]:
  """features.npz: train, left_out, test [1 or S, n, D], and what the encoder's own head says."""
  return read_arrays(e.workdir.folder("memory_bank") / "features.npz")


def load_bank(e: Experiment, feature_dim: int) -> memory_bank.MemoryBank:
  """The filled bank, in the encoder's units, with a leading axis of seeds."""
  config = e.config.memory_bank
  shapes = jax.eval_shape(
    jax.vmap(lambda _: memory_bank.create(e.dataset.num_classes, config.num_slots, feature_dim)),
    jax.ShapeDtypeStruct((len(e.seeds),), np.int32),
  )
  sharding = feature_space.bank_sharding(e.dataset.num_classes, e.mesh)
  checkpointer = Checkpointer(e.workdir.folder("memory_bank") / "bank", keep=1)
  try:
    restored = checkpointer.restore(abstract(shapes, jax.tree.map(lambda _: sharding, shapes)))
  finally:
    checkpointer.close()
  if restored is None:
    raise WorkdirError(
      f"{e.workdir.folder('memory_bank')} holds no bank; remove that folder and run the same"
      " command again."
    )
  return restored[1]


@dataclasses.dataclass(frozen=True)
class Space:
  """The feature space of all seeds: standardised, on the devices."""

  runs: FeatureRuns
  left_out: jax.Array  # [S, L, D]
  test: jax.Array  # [S, T, D]
  own_logits: dict[str, np.ndarray]  # loss -> [S, T, C], of the encoders' own heads


def load_space(e: Experiment) -> Space:
  arrays, labels = load_features(e), e.dataset.train_labels
  head = None
  if "kernel" in arrays:
    head = {name: _for_seeds(e, arrays[name]) for name in ("kernel", "bias")}
  runs = feature_space.make_runs(
    arrays["train"],
    np.broadcast_to(labels, (len(e.seeds), len(labels))),
    load_bank(e, arrays["train"].shape[-1]),
    head,
    e.dataset.num_classes,
    e.mesh,
  )
  return Space(
    runs=runs,
    left_out=feature_space.standardize(runs.standardizer, arrays["left_out"], e.mesh),
    test=feature_space.standardize(runs.standardizer, arrays["test"], e.mesh),
    own_logits={
      name.removeprefix("logits_"): _for_seeds(e, value)
      for name, value in arrays.items()
      if name.startswith("logits_")
    },
  )


# --- denoisers -------------------------------------------------------------------------------


def workshop(e: Experiment) -> Workshop:
  config = e.config
  return Workshop(config.generators, config.diffusion, config.hallucination, e.dataset.num_classes)


def compile_denoisers(e: Experiment) -> None:
  """Compiles the trainings of denoisers on zeros; seeds and folds share them."""
  labels = np.broadcast_to(e.dataset.train_labels, (len(e.seeds), len(e.dataset.train_labels)))
  if isinstance(e.config, MemdiffConfig):
    dim = e.config.encoder.feature_dim
  else:
    dim = e.dataset.train_features.shape[1]
  nothing = np.zeros((len(e.seeds), labels.shape[1], dim), np.float32)
  classes = e.dataset.num_classes
  bank = feature_space.fill_bank(
    nothing, labels, classes, e.run.keys("memory_bank"), e.config.memory_bank, e.mesh
  )
  runs = feature_space.make_runs(nothing, labels, bank, None, classes, e.mesh)
  for name in e.config.generators.names:
    stage = generators.stage(name, workshop(e), runs, e.mesh)
    if stage is not None:
      programs.compile_ahead(stage, e.run)


def train_denoisers(e: Experiment) -> dict:
  space, summary, clock = load_space(e), {}, CompileClock()
  for name in e.config.generators.names:
    folder = e.workdir.folder("diffusion") / name
    spent = clock.start()
    generators.train(name, workshop(e), space.runs, e.run, folder)
    if folder.exists():
      summary[name] = last_metrics(folder) | {"seconds": spent()}
  return summary


# --- selection -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Folds:
  """The runs of cross-validation and what is held out in each."""

  runs: FeatureRuns
  run: loop.Run
  counts: np.ndarray  # [R, C] training examples
  held_out: np.ndarray  # [R, B] rows of the training set, -1 where there is none
  features: jax.Array  # [R, B, D] of them, standardised
  judged: selection.Judged
  own_logits: np.ndarray | None  # [R, B, C] of the folds' own heads, where they were trained so


def make_folds(e: Experiment) -> Folds:
  """Deals the training set, trains encoders where asked, and builds the runs."""
  config, labels, num_classes = e.config.selection, e.dataset.train_labels, e.dataset.num_classes
  train, held_out = selection.fold_rows(labels, config)
  run = dataclasses.replace(
    e.run, seeds=tuple(range(config.num_runs)), streams="folds/", tensorboard=_fold_writer(e)
  )
  if config.encoder == "retrained":
    features, head = _encode_folds(e, run, train)
  else:
    arrays, head = load_features(e), None
    features = arrays["train"][:1]
    if "kernel" in arrays:
      head = {n: np.repeat(arrays[n][:1], config.num_runs, axis=0) for n in ("kernel", "bias")}
  run_labels = np.where(train >= 0, labels[np.maximum(train, 0)], num_classes)
  bank = feature_space.fill_bank(
    features, run_labels, num_classes, run.keys("memory_bank"), e.config.memory_bank, e.mesh, train
  )
  runs = feature_space.make_runs(features, run_labels, bank, head, num_classes, e.mesh, train)
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
    features=feature_space.standardize(runs.standardizer, features, e.mesh, held_out),
    judged=selection.judged_examples(held_out, labels, config.criterion, num_classes),
    own_logits=own_logits,
  )


def _fold_writer(e: Experiment) -> TensorBoard:
  """Curves of folds are no results; TensorBoard gets them only if it is asked to show them."""
  if e.config.execution.show_folds:
    return e.run.tensorboard
  return TensorBoard(e.workdir.path / "tensorboard", enabled=False)


def _fold_encoders(e: Experiment, train: np.ndarray) -> loop.Stage:
  """Trains an encoder for every fold, on its part of the training images."""
  rows = train[:, : (train >= 0).sum(axis=1).max()]
  return dataclasses.replace(
    classifier_stage(e, e.config.classifier.loss, rows), name="selection/encoder"
  )


def compile_folds(e: Experiment) -> None:
  """Compiles the training of encoders of folds."""
  config = e.config.selection
  if config.folds and config.encoder == "retrained":
    train, _ = selection.fold_rows(e.dataset.train_labels, config)
    run = dataclasses.replace(e.run, seeds=tuple(range(config.num_runs)))
    programs.compile_ahead(_fold_encoders(e, train), run)


def _encode_folds(e: Experiment, run: loop.Run, train: np.ndarray):
  """Features [R, N, D] of all training images by encoders that saw their fold's part, and heads."""
  loss, stage = e.config.classifier.loss, _fold_encoders(e, train)
  folder = e.workdir.folder("selection") / "encoder"
  state = loop.train(stage, run, folder)
  _, features = forward_images(e, loss, state, e.dataset.train_images, stage.own["statistics"])
  head = mesh_lib.fetch(state.params["head"]) if has_own_head(e.config) else None
  return features, head


@dataclasses.dataclass(frozen=True)
class Choice:
  """How a method is set: what cross-validation chooses."""

  strength: float = 0.0
  fill: int = 0
  exponent: float = 1.0
  l2: float = 0.0
  tau: float = 1.0


def candidates(e: Experiment, name: str, loss: str) -> list[Choice]:
  """The settings of a method, the ones to take without cross-validation first.

  Those that differ in nothing but tau share their heads.
  """
  head = e.config.head
  taus = head.taus if loss == "logit_adjustment" else (1.0,)
  strengths, fills = (0.0,), (0,)
  if name != REAL:
    strengths = generators.strengths(name, workshop(e))
    fills = generators.fills(name, e.config.generators)
  every = itertools.product(taus, strengths, fills, head.exponents, head.l2)
  return [Choice(strength, fill, x, l2, tau) for tau, strength, fill, x, l2 in every]


def methods(e: Experiment) -> list[str]:
  """All methods that may be recommended."""
  names = (REAL, *e.config.generators.names)
  return [f"{name}+{loss}" for name in names for loss in e.config.head.losses]


def select(e: Experiment) -> dict:
  """Chooses every method's setting and recommends one, by cross-validation on training data."""
  folder = e.workdir.folder("selection")
  if e.config.selection.folds == 0:
    choices = {m: dataclasses.asdict(candidates(e, *m.split("+"))[0]) for m in methods(e)}
    write_json(folder / "choices.json", {"choices": choices, "recommendation": None})
    return {}
  folds, fitted, choices, numbers = make_folds(e), {}, {}, {}

  def take(method, settings, predictions):
    """Chooses among settings [J] by their predictions [J, E]."""
    choices[method] = settings[selection.choose(predictions, folds.judged)]
    fitted[method] = selection.cross_fitted(predictions, folds.judged)
    numbers[method] = len(settings)

  for name in (REAL, *e.config.generators.names):
    for loss, predictions in _predict_with(e, folds, name).items():
      take(f"{name}+{loss}", candidates(e, name, loss), predictions)
  if folds.own_logits is not None:
    for method, (settings, predictions) in _predict_with_own_heads(e, folds).items():
      take(method, settings, predictions)
  controls = [m for m in fitted if m.split("+")[0] in (REAL, OWN)]
  recommendation = selection.recommend(fitted, folds.judged, controls)
  for method, number in numbers.items():
    recommendation["scores"][method]["settings"] = number
  write_json(
    folder / "choices.json",
    {
      "choices": {method: dataclasses.asdict(choice) for method, choice in choices.items()},
      "recommendation": recommendation | {"basis": _basis(e)},
    },
  )
  judged = {name: getattr(folds.judged, name) for name in ("label", "example", "run")}
  write_arrays(folder / "predictions.npz", fitted | judged)
  return {"method": recommendation["method"], "expected_gain": recommendation["expected_gain"]}


def _basis(e: Experiment) -> dict[str, Any]:
  config = e.config.selection
  return {"folds": config.folds, "repeats": config.repeats, "encoder": config.encoder}


def _judged_rows(predictions: np.ndarray, folds: Folds) -> np.ndarray:
  """Predictions [..., R, B] of held-out rows -> [..., E] in the order of `judged`."""
  return predictions[..., folds.held_out >= 0]


def _predict_with(e: Experiment, folds: Folds, name: str) -> dict[str, np.ndarray]:
  """Predictions of every setting for held-out examples, by loss. [J, E]."""
  settings = candidates(e, name, "cross_entropy")
  if name != REAL:
    generators.train(name, workshop(e), folds.runs, folds.run, e.workdir.folder("selection") / name)
  parts = _strengths_at_a_time(e, folds, name, sorted({choice.strength for choice in settings}))
  found: list[Any] = [None] * len(settings)
  for number, strengths in enumerate(parts):
    of_part = [j for j, choice in enumerate(settings) if choice.strength in strengths]
    label = name if len(parts) == 1 else f"{name}/{number}"
    predictions = _predict_at(e, folds, name, label, [settings[j] for j in of_part])
    for j, own in zip(of_part, np.moveaxis(predictions, 2, 0), strict=True):
      found[j] = own
    if len(parts) > 1:
      release_memory()
  predictions, trained = _judged_rows(np.stack(found, axis=2), folds), _trained_losses(e)
  by_loss = {}
  for loss in e.config.head.losses:
    of_loss = predictions[:, trained.index(heads.trained_loss(loss))]
    of_loss = of_loss[1:] if loss == "logit_adjustment" else of_loss[:1]
    by_loss[loss] = of_loss.reshape(-1, of_loss.shape[-1])
  return by_loss


_AT_ONCE = 2**28  # bytes of synthetic features that heads are trained on at once


def _strengths_at_a_time(
  e: Experiment, folds: Folds, name: str, strengths: list[float]
) -> list[list[float]]:
  """The strengths, in parts whose features together take little memory."""
  made = 0
  if name != REAL:
    made = int(generators.numbers(name, e.dataset.train_counts, e.config.generators).sum())
  size = len(folds.run.seeds) * made * folds.features.shape[-1] * 4
  step = max(_AT_ONCE // max(size, 1), 1)
  return [strengths[start : start + step] for start in range(0, len(strengths), step)]


def _trained_losses(e: Experiment) -> tuple[str, ...]:
  return tuple(dict.fromkeys(heads.trained_loss(loss) for loss in e.config.head.losses))


def _predict_at(
  e: Experiment,
  folds: Folds,
  name: str,
  label: str,
  settings: list[Choice],
) -> np.ndarray:
  """Predictions of some settings for held-out rows. [1 + T taus, trained losses, J, R, B].

  Args:
    e: the experiment.
    folds: the runs.
    name: of the generator, whose denoiser has been trained.
    label: names the stage.
    settings: J of them.
  """
  folder, num_runs = e.workdir.folder("selection"), len(folds.run.seeds)
  strengths = sorted({choice.strength for choice in settings})
  if name == REAL:
    added = heads.nothing_added(num_runs, folds.features.shape[-1], e.dataset.num_classes)
  else:
    made = generators.numbers(name, e.dataset.train_counts, e.config.generators)
    features = generators.make(
      name, workshop(e), folds.runs, folds.run, folder / name, made, strengths
    )
    added = heads.Added(features.features, features.confidence, made)
  share = folds.counts.sum(axis=1) / len(e.dataset.train_labels)
  trained = _trained_losses(e)
  every = [
    _setting(folds.run, c, name, loss, run=r, seed=r, strengths=strengths, share=float(share[r]))
    for loss in trained
    for c in settings
    for r in range(num_runs)
  ]
  nothing = np.zeros((num_runs, 0), np.int32)
  data = heads.HeadData(
    exemplars=folds.runs.exemplars,
    added=mesh_lib.replicate(e.mesh, _of_one_size(e, added)),
    start=folds.runs.head,
    test_features=folds.features[:, :0],
    test_labels=mesh_lib.replicate(e.mesh, nothing),
  )
  stage = heads.make_stage(f"selection/heads/{label}", e.config.head.training, data, every, e.mesh)
  run = dataclasses.replace(folds.run, seeds=tuple(range(len(every))))
  state = loop.train(stage, run, folder / "heads" / label)
  taus = np.array([0.0, *e.config.head.taus], np.float32)
  predictions = mesh_lib.fetch(
    heads.predict(state.params, stage.own["mixture"].prior, taus, stage.own["run"], folds.features)
  )
  return predictions.reshape(len(taus), len(trained), len(settings), *folds.held_out.shape)


def _of_one_size(e: Experiment, added: heads.Added) -> heads.Added:
  """Padded to what generators make."""
  made = generators.plan(e.dataset.train_counts, e.config.generators)
  return heads.padded(added, int(made.sum()))


def _setting(
  of: loop.Run, choice: Choice, name: str, loss: str, *, run: int, seed: int, strengths, share=1.0
) -> heads.Setting:
  """A head of the method `name` + `loss`, set as chosen; `strengths` are those that were made."""
  return heads.Setting(
    run=run,
    seed=seed,
    stream=f"{of.streams}heads/{name}+{heads.trained_loss(loss)}",
    strength=strengths.index(choice.strength),
    fill=choice.fill,
    share=share,
    exponent=choice.exponent,
    l2=choice.l2,
    loss=heads.trained_loss(loss),
  )


def _predict_with_own_heads(
  e: Experiment, folds: Folds
) -> dict[str, tuple[list[Choice], np.ndarray]]:
  """method -> (settings [J], predictions [J, E]) of the folds' own heads, adjusted or not.

  The prior is the fold's own: that of the whole set knows what the fold has not seen.
  """
  plain = folds.own_logits.argmax(axis=-1)
  prior = np.stack([log_prior(counts) for counts in folds.counts])[:, None]
  adjusted = np.stack(
    [(folds.own_logits - tau * prior).argmax(axis=-1) for tau in e.config.head.taus]
  )
  return {
    OWN: ([Choice()], _judged_rows(plain[None], folds)),
    f"{OWN}+logit_adjustment": (
      [Choice(tau=tau) for tau in e.config.head.taus],
      _judged_rows(adjusted, folds),
    ),
  }


def log_prior(counts: np.ndarray) -> np.ndarray:
  """log of the share of each class. [C]."""
  return np.log(counts / counts.sum())


def own_tau(e: Experiment, choices: dict[str, Choice]) -> float:
  """By how many times the log prior the logits of the encoder's own head are lowered."""
  choice = choices.get(f"{OWN}+logit_adjustment")
  return e.config.head.taus[0] if choice is None else choice.tau


def load_selection(e: Experiment) -> tuple[dict[str, Choice], dict | None]:
  """(method -> choice, recommendation or None)."""
  path = e.workdir.folder("selection") / "choices.json"
  try:
    saved = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise WorkdirError(
      f"Cannot read {path} ({error}); remove the folder {path.parent} and run the same command"
      " again."
    ) from error
  return {m: Choice(**c) for m, c in saved["choices"].items()}, saved["recommendation"]


# --- synthetic features and heads ------------------------------------------------------------


def chosen_strengths(choices: dict[str, Choice], name: str) -> list[float]:
  """The strengths at which a generator is used, by any loss."""
  return sorted({c.strength for method, c in choices.items() if method.split("+")[0] == name})


def hallucinate(e: Experiment) -> dict:
  """Every generator's features, at the strengths that were chosen."""
  space, (choices, _) = load_space(e), load_selection(e)
  clock = CompileClock()
  return {
    name: _hallucinate_with(e, space.runs, name, chosen_strengths(choices, name), clock)
    for name in e.config.generators.names
  }


def _hallucinate_with(
  e: Experiment, runs: FeatureRuns, name: str, strengths: list[float], clock: CompileClock
) -> dict:
  """Writes the features of one generator, which are then no longer in memory."""
  made = generators.numbers(name, e.dataset.train_counts, e.config.generators)
  folder = e.workdir.folder("diffusion") / name
  spent = clock.start()
  features = generators.make(name, workshop(e), runs, e.run, folder, made, strengths)
  arrays = {name: vars(features)[name] for name in ("labels", "confidence", "number")}
  arrays |= _provenance(runs, features)
  arrays |= {"numbers": made, "strengths": np.array(strengths), "seeds": np.array(e.seeds)}
  write_arrays(e.workdir.folder("hallucination") / f"{name}.npz", arrays)
  return {"features": features.confidence.size, "seconds": spent()}


def _provenance(runs: FeatureRuns, features: synthetic.SyntheticFeatures) -> dict[str, np.ndarray]:
  """Features in the encoder's units, and the nearest exemplar of each."""
  backward = jax.jit(jax.vmap(lambda s, x: jax.lax.map(s.backward, x)))
  samples, raw = mesh_lib.fetch((features.features, backward(runs.standardizer, features.features)))
  exemplars, exemplar_labels = mesh_lib.fetch((runs.exemplars.features, runs.exemplars.labels))
  index, distance = np.zeros(samples.shape[:3], np.int32), np.zeros(samples.shape[:3], np.float32)
  for run, strength in np.ndindex(samples.shape[:2]):
    index[run, strength], distance[run, strength] = synthetic.nearest_of_class(
      samples[run, strength], features.labels, exemplars[run], exemplar_labels[run]
    )
  return {"features": raw, "nearest_index": index, "nearest_distance": distance}


def load_synthetic(
  e: Experiment, name: str, parts: Collection[str] | None = None
) -> dict[str, np.ndarray]:
  """What `hallucinate` wrote of a generator, in the encoder's units; all of it, or some arrays.

  features [S, K, M, D], labels [M], confidence [S, K, M], number [M], nearest_index and
  nearest_distance [S, K, M], numbers [C], strengths [K], seeds [S].
  """
  return read_arrays(e.workdir.folder("hallucination") / f"{name}.npz", parts)


def load_added(e: Experiment, space: Space, name: str) -> tuple[heads.Added, list[float]]:
  """What a generator made, standardised, and its strengths."""
  arrays = load_synthetic(e, name, ("features", "confidence", "numbers", "strengths"))
  features, confidence = mesh_lib.replicate(e.mesh, (arrays.pop("features"), arrays["confidence"]))
  forward = jax.jit(jax.vmap(lambda s, x: jax.lax.map(s.forward, x)))
  added = heads.Added(forward(space.runs.standardizer, features), confidence, arrays["numbers"])
  return added, arrays["strengths"].tolist()


@dataclasses.dataclass(frozen=True)
class Trained:
  """The heads of one generator or reference."""

  stage: loop.Stage
  run: loop.Run
  data: heads.HeadData
  settings: list[heads.Setting]
  losses: list[str]  # of the settings, seeds varying fastest


def train_heads(e: Experiment) -> dict:
  space, (choices, _) = load_space(e), load_selection(e)
  summary = {}
  for name in head_names(e):
    folder = e.workdir.folder("heads") / name
    trained = head_training(e, space, choices, name)
    state = loop.train(trained.stage, trained.run, folder)
    prior = trained.stage.own["mixture"].prior
    write_arrays(folder / _HEADS, mesh_lib.fetch(state.params | {"prior": prior}))
    summary[name] = last_metrics(folder)
  return summary


def head_names(e: Experiment) -> list[str]:
  """Everything that heads are trained on: nothing added, generators, references."""
  made = generators.plan(e.dataset.train_counts, e.config.generators)
  left_out = np.bincount(e.dataset.left_out_labels, minlength=e.dataset.num_classes)
  references = list(REFERENCES) if (left_out[made > 0] > 0).any() else []
  return [REAL, *e.config.generators.names, *references]


def head_training(e: Experiment, space: Space, choices: dict[str, Choice], name: str) -> Trained:
  """The heads of a generator, a reference, or of real features only: one per loss and seed."""
  exemplars, num_seeds, dim = space.runs.exemplars, len(e.seeds), space.test.shape[-1]
  strengths = [0.0]
  if name == "oracle":
    added = _left_out_pool(e, space)
  elif name == "unseen_exemplars":
    exemplars = _unseen_exemplars(e, space)
    added = heads.nothing_added(num_seeds, dim, e.dataset.num_classes)
  elif name == REAL:
    added = heads.nothing_added(num_seeds, dim, e.dataset.num_classes)
  else:
    added, strengths = load_added(e, space, name)
  settings, of_losses = [], []
  for loss in e.config.head.losses:
    choice = choices.get(f"{name}+{loss}") or _reference_choice(name, choices[f"{REAL}+{loss}"])
    for run, seed in enumerate(e.seeds):
      settings.append(_setting(e.run, choice, name, loss, run=run, seed=seed, strengths=strengths))
      of_losses.append(loss)
  data = heads.HeadData(
    exemplars=exemplars,
    added=mesh_lib.replicate(e.mesh, _of_one_size(e, added)),
    start=space.runs.head,
    test_features=space.test,
    test_labels=mesh_lib.replicate(
      e.mesh, np.broadcast_to(e.dataset.test_labels, space.test.shape[:2])
    ),
  )
  return Trained(
    stage=heads.make_stage(f"heads/{name}", e.config.head.training, data, settings, e.mesh),
    run=dataclasses.replace(e.run, seeds=tuple(range(len(settings)))),
    data=data,
    settings=settings,
    losses=of_losses,
  )


def _reference_choice(name: str, of_real: Choice) -> Choice:
  """References are no methods: set as `real` is, and the oracle with all that there is."""
  if name == "oracle":
    return dataclasses.replace(of_real, fill=generators.ALL, exponent=1.0)
  return of_real


def _left_out_pool(e: Experiment, space: Space) -> heads.Added:
  """Left-out features: as many per class as would be made, or all there are."""
  wanted = generators.plan(e.dataset.train_counts, e.config.generators)
  labels = e.dataset.left_out_labels
  rows = [np.flatnonzero(labels == c)[:n] for c, n in enumerate(wanted)]
  numbers = np.array([len(own) for own in rows], np.int32)
  features = space.left_out[:, np.concatenate(rows)][:, None]
  return heads.Added(features, jnp.ones(features.shape[:3]), numbers)


def _unseen_exemplars(e: Experiment, space: Space):
  """Exemplars in which a class's features are left-out ones, as many as it has or there are."""
  features = np.array(mesh_lib.fetch(space.runs.exemplars.features))
  for c, count in enumerate(e.dataset.train_counts):
    unseen = np.flatnonzero(e.dataset.left_out_labels == c)[:count]
    rows = np.flatnonzero(e.dataset.train_labels == c)[: len(unseen)]
    features[:, rows] = mesh_lib.fetch(space.left_out[:, unseen])
  return space.runs.exemplars.replace(features=mesh_lib.replicate(e.mesh, features))


_HEADS = "heads.npz"  # kernel, bias and prior, leading with losses and, varying fastest, seeds


def final_heads(e: Experiment, choices: dict[str, Choice], name: str):
  """Loss -> {"kernel" [S, D, C], "bias" [S, C]} on standardised features, adjusted if asked."""
  arrays, found = read_arrays(e.workdir.folder("heads") / name / _HEADS), {}
  num_seeds = len(e.seeds)
  for number, loss in enumerate(e.config.head.losses):
    rows = slice(number * num_seeds, (number + 1) * num_seeds)
    own = mesh_lib.replicate(e.mesh, {key: value[rows] for key, value in arrays.items()})
    prior = own.pop("prior")
    if loss == "logit_adjustment":
      choice = choices.get(f"{name}+{loss}") or choices[f"{REAL}+{loss}"]
      own = jax.vmap(heads.adjusted, in_axes=(0, 0, None))(own, prior, choice.tau)
    found[loss] = own
  return found


def train_jointly(e: Experiment) -> dict:
  return joint.train_all(e, workshop(e))


def describe(e: Experiment, method: str, choices: dict[str, Choice]) -> str:
  """A method in words."""
  name, _, loss = method.partition("+")
  if name == REAL:
    made = "real features only"
  elif name in REFERENCES:
    made = REFERENCES[name]
  else:
    made = generators.DESCRIPTIONS[name]
  words = f"{made}; {heads.LOSSES[loss]}"
  choice = choices.get(method)
  if choice is None:
    return words
  details = [f"classes drawn by count^{choice.exponent:g}", f"L2 {choice.l2:g}"]
  if loss == "logit_adjustment":
    details.append(f"tau {choice.tau:g}")
  if name != REAL and choice.fill != generators.ALL:
    details.append(f"filled to {choice.fill}")
  if name != REAL and len(generators.strengths(name, workshop(e))) > 1:
    details.append(f"strength {choice.strength:g}")
  return f"{words} ({', '.join(details)})"


def describe_joint(e: Experiment, name: str) -> str:
  """Joint training with a generator, in words."""
  made = "real images only" if name == REAL else f"real images and {generators.DESCRIPTIONS[name]}"
  return f"encoder and head trained together on {made}; {heads.LOSSES[e.config.joint.loss]}"


def describe_own(e: Experiment, loss: str) -> str:
  if e.config.classifier.num_epochs == 0:
    return "encoder and head as they were read"
  return f"encoder and head trained with {losses.LOSSES[loss].description}"


SHARED_PHASES = (
  Phase(
    "diffusion",
    "training denoisers on the features",
    train_denoisers,
    ("diffusion", "generators"),
    compile_ahead=compile_denoisers,
  ),
  Phase(
    "selection",
    "choosing settings by cross-validation",
    select,
    ("hallucination", "head", "selection"),
    compile_ahead=compile_folds,
  ),
  Phase("hallucination", "sampling features for the tail", hallucinate, ()),
  Phase("heads", "training the heads again", train_heads, ()),
)
