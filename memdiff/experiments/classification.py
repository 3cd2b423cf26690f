"""The classification experiment: one row, or several, of the field's standard tables.

classifier   images -> encoder and head, per loss                    classifier/<loss>/checkpoints
features     frozen encoders -> logits, features, class means        features/*.npz
heads        the first loss's encoder -> retrained heads             heads/<method>/checkpoints
evaluation   everything -> report.json, report.html                  evaluation/
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import dataset as dataset_lib
from input_pipeline.dataset import DatasetConfig
from memdiff.classifier import decoupled, encoder, encoder_training, losses, posthoc
from memdiff.classifier.decoupled import DecoupledConfig
from memdiff.classifier.encoder import EncoderConfig
from memdiff.classifier.encoder_training import ClassifierConfig, Recipe
from memdiff.config import one_of, setting
from memdiff.errors import ConfigError
from memdiff.evaluation import calibration, scores
from memdiff.experiments import record
from memdiff.experiments.base import (
  TRAIN_CLASSIFIERS,
  Experiment,
  Kind,
  Phase,
  check_classifier,
  check_seeds,
  forward_images,
  last_metrics,
  load_classifier,
  seeds_field,
)
from memdiff.memory.memory_bank import BankConfig
from memdiff.runtime import loop, results
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.stage import ExecutionConfig, LoopConfig
from memdiff.runtime.workdir import read_arrays, write_arrays

_MAX_CURVES = 6  # methods in one picture
_CALIBRATED_FOR = "balanced_accuracy"  # as other kinds of experiment have it by default


@dataclasses.dataclass(frozen=True)
class ClassificationConfig:
  """Everything that decides a run's results."""

  experiment: str = setting("classification", "the kind of experiment", one_of(("classification",)))
  name: str = setting("classification", "of the run, for its report")
  seeds: tuple[int, ...] = seeds_field()
  dataset: DatasetConfig = setting(DatasetConfig(), "images, and how they are cut to a long tail")
  encoder: EncoderConfig = setting(EncoderConfig(), "from pixels to features and logits")
  classifier: ClassifierConfig = setting(ClassifierConfig(), "how encoder and head are trained")
  memory_bank: BankConfig = setting(
    BankConfig(), "features of each class, for losses that read them: semantic_scale"
  )
  decoupled: DecoupledConfig = setting(
    DecoupledConfig(), "heads that are made or trained afterwards"
  )
  loop: LoopConfig = setting(LoopConfig(), "records and checkpoints")
  execution: ExecutionConfig = setting(
    ExecutionConfig(), "how the run is executed; may change when it is resumed"
  )

  def __post_init__(self):
    check_seeds(self.seeds)


def check(settings: ClassificationConfig, _: dataset_lib.LongTailDataset) -> None:
  """Raises ConfigError if the heads do not go with the classifier they build on."""
  if settings.encoder.backbone.taps:
    raise ConfigError(
      "config.encoder.backbone.taps names inner stages for features, but classification scores the"
      " encoder with its own head; leave it empty."
    )
  loss = settings.classifier.loss
  linear = {"tau_norm", "lws"} & set(settings.decoupled.methods)
  if linear and encoder.has_cosine_head(settings.encoder.backbone, loss):
    raise ConfigError(
      f"config.decoupled.methods names {sorted(linear)[0]}, which scales the weights of a linear"
      f" head, but {loss} trains a cosine head, whose weights have no length."
    )


def extract_features(experiment: Experiment) -> dict:
  """Runs the images that are scored, and for NCM those that train, through the classifiers."""
  summary = {}
  for loss in encoder_training.trained_losses(experiment.config.classifier):
    state = load_classifier(experiment, loss)
    arrays = dict(mesh_lib.fetch(state.params["head"]))
    arrays["logits"], arrays["features"] = forward_images(
      experiment, loss, state, experiment.dataset.test_images
    )
    if len(experiment.dataset.holdout_labels):
      held_out = forward_images(experiment, loss, state, experiment.dataset.holdout_images)
      arrays["holdout_logits"], arrays["holdout_features"] = held_out
    if loss == experiment.config.classifier.loss and "ncm" in experiment.config.decoupled.methods:
      _, features = forward_images(experiment, loss, state, experiment.dataset.train_images)
      arrays["class_means"] = class_means(features, experiment.dataset)
    write_arrays(experiment.workdir.folder("features") / f"{loss}.npz", arrays)
    hits = arrays["logits"].argmax(axis=-1) == experiment.dataset.test_labels[None]
    summary[loss] = {"test_accuracy": float(hits.mean())}
  return summary


def class_means(features: np.ndarray, dataset: dataset_lib.LongTailDataset) -> np.ndarray:
  """Mean of the training features [S, N, D] per class and seed, [S, C, D]."""
  labels, number = dataset.train_labels, dataset.num_classes
  sums = np.stack([mesh_lib.fetch(jax.ops.segment_sum(f, labels, number)) for f in features])
  return sums / dataset.train_counts[None, :, None]


def head_stage(experiment: Experiment, method: str) -> loop.Stage:
  config = experiment.config
  loss = config.classifier.loss
  shared = encoder.device_data(config.encoder.input, experiment.dataset, experiment.mesh)
  return decoupled.make_stage(
    method,
    config.decoupled,
    Recipe(config.classifier, config.encoder, loss),
    load_classifier(experiment, loss),
    experiment.dataset,
    shared,
    experiment.mesh,
  )


def train_heads(experiment: Experiment) -> dict:
  summary = {}
  for method in decoupled.TRAINED:
    if method in experiment.config.decoupled.methods:
      folder = experiment.workdir.folder("heads") / method
      loop.train(head_stage(experiment, method), experiment.run, folder)
      summary[method] = last_metrics(folder)
  return summary


def head_rows(experiment: Experiment, arrays: dict[str, np.ndarray], part: str):
  """Logits of every head on the first loss's encoder, by method; tau not chosen yet.

  Args:
    arrays: of `extract_features`, for the first loss.
    part: "" for the test set, "holdout_" for the held-out images.

  Returns:
    name -> function of nothing that gives [S, T, C]; `tau_norm` takes tau.
  """
  config = experiment.config.decoupled
  features, logits = arrays[f"{part}features"], arrays[f"{part}logits"]
  own_head = {name: arrays[name] for name in ("kernel", "bias") if name in arrays}
  counts = jnp.asarray(experiment.dataset.train_counts, jnp.float32)

  def trained(method):
    state = results.load(experiment.workdir.folder("heads") / method, experiment.mesh)
    return jax.vmap(lambda p, h, f: decoupled.trained_logits(method, p, h, f))(
      state.params, own_head, features
    )

  rows = {
    "logit_adjustment": lambda: jax.vmap(
      lambda z: posthoc.adjusted_logits(z, counts, config.adjustment)
    )(logits),
    "tau_norm": lambda tau: jax.vmap(lambda h, f: posthoc.tau_normalized_logits(h, f, tau))(
      own_head, features
    ),
    "ncm": lambda: jax.vmap(posthoc.nearest_mean_logits)(features, arrays["class_means"]),
    "crt": lambda: trained("crt"),
    "lws": lambda: trained("lws"),
  }
  return {name: rows[name] for name in config.methods}


def choose_tau(experiment: Experiment, rows) -> tuple[float, str]:
  """tau of tau-normalisation and how it came about: chosen on held-out data, or as configured."""
  if not len(experiment.dataset.holdout_labels):
    return experiment.config.decoupled.tau, "as configured, nothing is held out"
  labels = experiment.dataset.holdout_labels[None]

  def accuracy(tau):
    return float((mesh_lib.fetch(rows["tau_norm"](tau)).argmax(-1) == labels).mean())

  tau = posthoc.select_tau(posthoc.TAUS, accuracy)
  return tau, "the best on the held-out images"


def predict(experiment: Experiment) -> dict[str, dict[str, Any]]:
  """Every row of the table: {description, logits of test [S, T, C] and holdout [S, H, C]}.

  Without held-out images, `holdout` is None. A row that has a tau says so.
  """
  held_out = len(experiment.dataset.holdout_labels) > 0
  rows = {}
  for loss in encoder_training.trained_losses(experiment.config.classifier):
    arrays = read_arrays(experiment.workdir.folder("features") / f"{loss}.npz")
    rows[loss] = {
      "description": f"encoder and head trained with {losses.LOSSES[loss].description}",
      "test": arrays["logits"],
      "holdout": arrays["holdout_logits"] if held_out else None,
    }
  loss = experiment.config.classifier.loss
  arrays = read_arrays(experiment.workdir.folder("features") / f"{loss}.npz")
  test_rows = head_rows(experiment, arrays, "")
  held_rows = head_rows(experiment, arrays, "holdout_") if held_out else {}
  for method, logits in test_rows.items():
    arguments, words, more = (), decoupled.METHODS[method], {}
    if method == "tau_norm":
      tau, how = choose_tau(experiment, held_rows)
      arguments, words, more = (tau,), f"{words}, tau = {tau:g} ({how})", {"tau": tau}
    if method == "logit_adjustment":
      tau = experiment.config.decoupled.adjustment
      words, more = f"{words}, tau = {tau:g}", {"tau": tau}
    rows[f"{loss}+{method}"] = {
      "description": words,
      "test": mesh_lib.fetch(logits(*arguments)),
      "holdout": mesh_lib.fetch(held_rows[method](*arguments)) if held_out else None,
    } | more
  return rows


def _temperature(experiment: Experiment, logits: np.ndarray | None) -> float | None:
  """By held-out logits [S, H, C]; None if there are none."""
  if logits is None:
    return None
  labels = np.tile(experiment.dataset.holdout_labels, len(logits))
  flat = logits.reshape(len(labels), -1)
  examples = calibration.enough(*flat.shape)
  return calibration.fit_temperature(flat[examples], labels[examples], _CALIBRATED_FOR)


def evaluate(experiment: Experiment) -> dict:
  """Scores every row on the test set and draws."""
  from memdiff.evaluation import plots  # matplotlib takes a second

  data, table, choices = experiment.dataset, [], {}
  groups = scores.make_groups(data.train_counts)
  experiment.run.progress.say("scoring on the test set")
  for method, row in predict(experiment).items():
    scored = scores.score_method(
      method,
      row["description"],
      row["test"].argmax(axis=-1),
      data.test_labels,
      groups,
      experiment.seeds,
      data.num_classes,
    )
    if "tau" in row:
      choices[method] = {"tau": row["tau"]}
    if row["holdout"] is not None:
      hits = row["holdout"].argmax(axis=-1) == data.holdout_labels[None]
      scored["holdout_top1"] = scores.mean_std(hits.mean(axis=1))
    scored["calibration"] = calibration.measure(
      row["test"], data.test_labels, _CALIBRATED_FOR, _temperature(experiment, row["holdout"])
    )
    table.append(scored)
  outcome = record.record(experiment, table) | {
    "choices": choices,
    "parameters": parameter_count(experiment),
    "num_steps": experiment.config.classifier.num_steps(len(data.train_labels)),
  }
  stages = [
    f"classifier/{loss}" for loss in encoder_training.trained_losses(experiment.config.classifier)
  ]
  stages += [f"heads/{m}" for m in decoupled.TRAINED if m in experiment.config.decoupled.methods]
  figures = {
    "long_tail_profile": plots.long_tail_profile(
      data.class_names,
      data.train_counts,
      np.zeros(data.num_classes, int),
      record.group_of_class(experiment),
    ),
    "per_class_accuracy": record.accuracy_by_class(
      experiment, table, [row["method"] for row in table][:_MAX_CURVES]
    ),
  }
  curves = record.training_curves(experiment, stages)
  if curves:
    figures["training_curves"] = plots.training_curves(curves)
  return record.save(experiment, outcome, figures.items())


def parameter_count(experiment: Experiment) -> int:
  """Trained numbers of encoder and head."""
  model = encoder.make_model(
    experiment.config.encoder, experiment.config.classifier.loss, experiment.dataset.num_classes
  )
  images = jnp.zeros((1, *experiment.dataset.train_images.shape[1:]))
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
  return sum(x.size for x in jax.tree.leaves(shapes["params"]))


_PHASES = (
  TRAIN_CLASSIFIERS,
  Phase("features", "encoding the images", extract_features, ("decoupled",)),
  Phase("heads", "training heads on the frozen encoder", train_heads, ()),
  Phase("evaluation", "scoring and drawing", evaluate, ("name",)),
)

KIND = Kind(ClassificationConfig, dataset_lib.load, (check_classifier, check), _PHASES)
