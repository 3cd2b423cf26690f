"""The experiment with generated images: classifiers are trained on real and generated ones.

critics      real images -> the classifiers that filters ask     critics/<part>/...
text_to_image  prompts -> images of a model trained elsewhere    text_to_image/*.npz
captions     captions of training images -> their embeddings      captions/embeddings.npz
diffusion    training images -> a U-Net, per method              diffusion/<part>/<method>
sampling     U-Nets -> images of the classes that lack some      sampling/<part>/<method>/run_<r>
pool         images -> what is known of each                     pool/<part>/<method>/run_<r>.npz
classifiers  real and generated images -> classifiers, per row   classifiers/<part>/<row>/<loss>
selection    held-out images of the folds -> what to use         selection/choices.json
evaluation   everything -> report.json, report.html              evaluation/

A part is `final`, one run per seed, or `folds`, runs of cross-validation whose generators and
classifiers have not seen what they are judged on.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from memdiff.classifier import encoder, encoder_training, new_head
from memdiff.classifier.encoder_training import Recipe
from memdiff.evaluation import report
from memdiff.experiments import (
  augmented_evaluation,
  augmented_pool,
  images,
  prompting,
  text_to_image,
  unet_stages,
)
from memdiff.experiments.augmented_runs import (
  PREDICTIONS,
  Part,
  classifier_folder,
  critic_folder,
  parts,
  save,
  second_folder,
)
from memdiff.experiments.augmented_selection import select
from memdiff.experiments.augmented_settings import (
  CRITIC_LOSS,
  REAL,
  AugmentedConfig,
  Row,
  Training,
  added_of,
  augmentation_of,
  check,
  in_folds,
  rows_of,
  trainings,
)
from memdiff.experiments.base import (
  Experiment,
  Kind,
  Phase,
  check_nothing_held_out,
  forward_images,
  last_metrics,
)
from memdiff.experiments.image_store import device_data
from memdiff.runtime import loop, programs, results
from memdiff.runtime.train_state import TrainState
from memdiff.synthesis import image_methods


def classifier_stage(
  experiment: Experiment, part: Part, row: Row, training: Training, name: str
) -> loop.Stage:
  """Trains a row's classifiers, all runs of a part at once; rows draw the same real images."""
  config, data, mesh = experiment.config, experiment.dataset, experiment.mesh
  shape = data.train_images.shape[1:]
  recipe = Recipe(
    dataclasses.replace(config.classifier, augment=augmentation_of(config, row.source, shape)),
    config.encoder,
    training.loss,
    images=added_of(config, row) if row.has_pool else None,
    counts=training.counts,
  )
  shared = encoder.device_data(config.encoder.input, data, mesh)
  stage = encoder_training.make_stage(recipe, data, shared, mesh, part.rows)
  per_seed = stage.per_seed
  if row.has_pool:
    per_seed = per_seed | {"images": augmented_pool.pools(experiment, part, row)}
  stage = dataclasses.replace(stage, name=name, streams="classifiers", per_seed=per_seed)
  if not row.head_only:
    return stage
  frozen = _encoders(experiment, part, training)
  return new_head.make_stage(stage, recipe, frozen, data.num_classes, part.rows.shape[1])


def _encoders(experiment: Experiment, part: Part, training: Training) -> TrainState:
  """Classifiers of real images by the same loss."""
  folder = classifier_folder(experiment, part, Row(REAL), Training(training.loss))
  return results.load(folder, experiment.mesh)


def train_critics(experiment: Experiment) -> dict:
  """Trains the classifier of real images that filters ask."""
  summary = {}
  for part in parts(experiment):
    folder = critic_folder(experiment, part)
    _train_critic(experiment, part, folder, "critics")
    summary[part.name] = last_metrics(folder)
  return summary


def _train_critic(experiment: Experiment, part: Part, folder: pathlib.Path, streams: str) -> None:
  name = str(folder.relative_to(experiment.workdir.path))
  stage = classifier_stage(experiment, part, Row(REAL), Training(CRITIC_LOSS), name)
  loop.train(dataclasses.replace(stage, streams=streams), part.run, folder)


def look_at_pools(experiment: Experiment) -> dict:
  """Writes what is known of every image; trains a second critic if a filter asks for one."""
  if experiment.config.pool.needs_second:
    for part in parts(experiment):
      _train_critic(experiment, part, second_folder(experiment, part), "pool/second")
  return augmented_pool.look_at_pools(experiment)


def method_stages(
  experiment: Experiment, methods: Sequence[str]
) -> Iterator[tuple[Part, str, loop.Stage]]:
  """(part, method, its training), made when it is asked for; all methods draw the same noise."""
  shared = device_data(experiment)
  for part in parts(experiment):
    folder = experiment.workdir.folder("diffusion") / part.name
    for method in methods:
      stage = unet_stages.make_stage(experiment, method, folder, shared, part.rows)
      yield part, method, dataclasses.replace(stage, name=f"diffusion/{part.name}/{method}")


def compile_denoisers(experiment: Experiment) -> None:
  """Those whose stages can be made before anything is trained."""
  for part, _, stage in method_stages(experiment, image_methods.bases(experiment.config.methods)):
    programs.compile_ahead(stage, part.run)


def train_denoisers(experiment: Experiment) -> dict:
  summary = {}
  methods = image_methods.trainings(experiment.config.methods)
  for part, method, stage in method_stages(experiment, methods):
    folder = experiment.workdir.folder("diffusion") / part.name / method
    loop.train(stage, part.run, folder)
    summary[f"{part.name}/{method}"] = last_metrics(folder)
  return summary


def train_classifiers(experiment: Experiment) -> dict:
  """Trains every row of the table, and keeps what its classifiers say of unseen images."""
  summary = {}
  for part in parts(experiment):
    for row in rows_of(experiment.config, experiment.dataset):
      if part.held_out is not None and not in_folds(experiment.config, row):
        continue
      for training in trainings(experiment.config, row):
        folder = classifier_folder(experiment, part, row, training)
        path = folder / PREDICTIONS
        if not path.exists():
          save(path, _train_row(experiment, part, row, training))
        summary[str(folder.relative_to(experiment.workdir.path))] = last_metrics(folder)
  return summary


def _train_row(
  experiment: Experiment, part: Part, row: Row, training: Training
) -> dict[str, np.ndarray]:
  """{"logits": [R, T, C] of the test images or [R, B, C] of held-out ones, "real", "effective":
  [R, C] counts of the classes}."""
  folder, data = classifier_folder(experiment, part, row, training), experiment.dataset
  name = str(folder.relative_to(experiment.workdir.path))
  stage = classifier_stage(experiment, part, row, training, name)
  state = loop.train(stage, part.run, folder)
  counts = {"real": part.counts(data).astype(np.float32)}
  if row.has_pool:
    pools = stage.per_seed["images"]
    added = added_of(experiment.config, row)
    counts["effective"] = augmented_pool.effective_counts(
      added, counts["real"], pools, experiment.config.classifier.batch_size
    )
  if row.head_only:
    state = new_head.whole(_encoders(experiment, part, training), state)
  unseen = data.test_images if part.held_out is None else data.train_images
  statistics = stage.per_seed["statistics"]
  logits, _ = forward_images(experiment, training.loss, state, unseen, statistics)
  if part.held_out is not None:
    logits = np.stack([of_run[held] for of_run, held in zip(logits, part.held_out, strict=True)])
  return {"logits": logits} | counts


_PHASES = (
  Phase(
    "critics",
    "training the classifiers that filters ask",
    train_critics,
    ("seeds", "dataset", "encoder", "classifier", "loop", "selection.folds", "selection.repeats"),
  ),
  Phase(
    "text_to_image",
    "asking the text-to-image model for images",
    text_to_image.ask,
    ("text_to_image", "pool.fill_to", "pool.surplus"),
    lambda settings: bool(settings.text_to_image.model),
  ),
  prompting.EMBED_CAPTIONS,
  Phase(
    "diffusion",
    "training U-Nets on the long-tailed images",
    train_denoisers,
    ("diffusion", "methods"),
    lambda settings: bool(settings.methods),
    compile_ahead=compile_denoisers,
  ),
  Phase(
    "sampling",
    "drawing images",
    augmented_pool.sample_pools,
    ("sampling", "pool.fill_to", "pool.surplus", "pool.guidance"),
    lambda settings: bool(settings.methods),
  ),
  Phase("pool", "looking at the images", look_at_pools, ("pool", "controls")),
  Phase(
    "classifiers", "training classifiers on real and generated images", train_classifiers,
    ("added", "losses", "head_only"),
  ),
  Phase("selection", "comparing the rows on held-out images", select, ("taus", "selection")),
  Phase("evaluation", "scoring and drawing", augmented_evaluation.evaluate, ("name",)),
)  # fmt: skip

KIND = Kind(
  AugmentedConfig,
  images.load,
  (check_nothing_held_out, check, prompting.check, text_to_image.check),
  _PHASES,
  report.render_html,
  report.text_table,
)
