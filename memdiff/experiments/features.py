"""The experiment on features: generators against each other, on any encoder or on embeddings.

Two kinds share it. `memdiff` trains (or reads) an image encoder first; `features` begins with
embeddings from a file.

classifier     images -> encoder and head                             classifier/<loss>/checkpoints
memory_bank    frozen encoder, or embeddings -> features and bank     memory_bank/features.npz, bank
diffusion      features, bank -> denoisers                            diffusion/<generator>
selection      training features -> settings, recommendation          selection/choices.json
hallucination  denoisers, bank -> synthetic features                  hallucination/*.npz
heads          real and synthetic features -> heads                   heads/<generator>/checkpoints
joint          images and synthetic features -> encoders and heads    joint/<generator>/round_<n>
evaluation     everything -> report.json, report.html                 evaluation/

`methods.py` says what methods and references are.
"""

import jax
import numpy as np

from input_pipeline import dataset as dataset_lib
from input_pipeline import embeddings
from memdiff.classifier import encoder_training
from memdiff.experiments import joint
from memdiff.experiments.base import (
  TRAIN_CLASSIFIERS,
  Experiment,
  Kind,
  Phase,
  check_classifier,
  check_nothing_held_out,
  forward_images,
  last_metrics,
  load_classifier,
)
from memdiff.experiments.feature_evaluation import evaluate
from memdiff.experiments.feature_folds import compile_folds
from memdiff.experiments.feature_heads import train_heads
from memdiff.experiments.feature_selection import select
from memdiff.experiments.feature_settings import (
  FeatureConfig,
  MemdiffConfig,
  check_features,
  check_memdiff,
  has_own_head,
)
from memdiff.experiments.feature_store import fill_memory_bank, load_selection, load_space
from memdiff.experiments.methods import chosen_strengths, synthesis_settings
from memdiff.memory import feature_space
from memdiff.memory.feature_space import FeatureRuns
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime import programs
from memdiff.runtime.progress import CompileClock
from memdiff.runtime.workdir import write_arrays
from memdiff.synthesis import confidence as confidence_lib
from memdiff.synthesis import generators


def encode_memory_bank(experiment: Experiment) -> dict:
  """Encodes every image with the frozen encoders and fills the bank."""
  arrays, data = {}, experiment.dataset
  losses = encoder_training.trained_losses(experiment.config.classifier)
  for loss in reversed(losses):  # the first comes last
    state = load_classifier(experiment, loss)
    if experiment.config.classifier.num_steps(len(data.train_labels)) == 0:  # alike for all seeds
      state = jax.tree.map(lambda x: x[:1], state)
    logits, arrays["test"] = forward_images(experiment, loss, state, data.test_images)
    if has_own_head(experiment.config):
      arrays |= {f"logits_{loss}": logits} | mesh_lib.fetch(state.params["head"])
  _, arrays["train"] = forward_images(experiment, loss, state, data.train_images)
  _, arrays["left_out"] = forward_images(experiment, loss, state, data.left_out_images)
  return fill_memory_bank(experiment, arrays)


def read_memory_bank(experiment: Experiment) -> dict:
  """Takes embeddings as features and fills the bank."""
  parts = ("train", "left_out", "test")
  return fill_memory_bank(
    experiment, {n: getattr(experiment.dataset, f"{n}_features")[None] for n in parts}
  )


def compile_denoisers(experiment: Experiment) -> None:
  """Compiles the trainings of denoisers on zeros; seeds and folds share them."""
  labels = np.broadcast_to(
    experiment.dataset.train_labels, (len(experiment.seeds), len(experiment.dataset.train_labels))
  )
  if isinstance(experiment.config, MemdiffConfig):
    dim = experiment.config.encoder.feature_dim
  else:
    dim = experiment.dataset.train_features.shape[1]
  nothing = np.zeros((len(experiment.seeds), labels.shape[1], dim), np.float32)
  classes = experiment.dataset.num_classes
  bank = feature_space.fill_bank(
    nothing,
    labels,
    classes,
    experiment.run.keys("memory_bank"),
    experiment.config.memory_bank,
    experiment.mesh,
  )
  runs = feature_space.make_runs(nothing, labels, bank, None, classes, experiment.mesh)
  for name in experiment.config.generators.names:
    generator = synthesis_settings(experiment).generator(name)
    if generator.trains and not generator.needs_class_embeddings:  # which are not read yet
      programs.compile_ahead(generator.stage(runs, experiment.mesh), experiment.run)


def train_denoisers(experiment: Experiment) -> dict:
  space, summary, clock = load_space(experiment), {}, CompileClock()
  for name in experiment.config.generators.names:
    folder = experiment.workdir.folder("diffusion") / name
    spent = clock.start()
    generators.train(
      name, synthesis_settings(experiment), space.runs, experiment.run, folder, f"diffusion/{name}"
    )
    if folder.exists():
      summary[name] = last_metrics(folder) | {"seconds": spent()}
  return summary


def hallucinate(experiment: Experiment) -> dict:
  """Every generator's features, at the strengths that were chosen."""
  space, (choices, _) = load_space(experiment), load_selection(experiment)
  clock = CompileClock()
  return {
    name: _hallucinate_with(experiment, space.runs, name, chosen_strengths(choices, name), clock)
    for name in experiment.config.generators.names
  }


def _hallucinate_with(
  experiment: Experiment, runs: FeatureRuns, name: str, strengths: list[float], clock: CompileClock
) -> dict:
  """Writes the features of one generator, which are then no longer in memory."""
  settings = synthesis_settings(experiment)
  numbers = settings.numbers(name, experiment.dataset.train_counts)
  folder = experiment.workdir.folder("diffusion") / name
  spent = clock.start()
  features = generators.make(name, settings, runs, experiment.run, folder, numbers, strengths)
  arrays = {name: vars(features)[name] for name in ("labels", "confidence", "number")}
  arrays |= _provenance(runs, features)
  arrays |= {
    "numbers": numbers,
    "strengths": np.array(strengths),
    "seeds": np.array(experiment.seeds),
  }
  write_arrays(experiment.workdir.folder("hallucination") / f"{name}.npz", arrays)
  return {"features": features.confidence.size, "seconds": spent()}


def _provenance(
  runs: FeatureRuns, features: confidence_lib.SyntheticFeatures
) -> dict[str, np.ndarray]:
  """Features in the encoder's units, and the nearest exemplar of each."""
  backward = jax.jit(jax.vmap(lambda s, x: jax.lax.map(s.backward, x)))
  samples, raw = mesh_lib.fetch((features.features, backward(runs.standardizer, features.features)))
  exemplars, exemplar_labels = mesh_lib.fetch((runs.exemplars.features, runs.exemplars.labels))
  index, distance = np.zeros(samples.shape[:3], np.int32), np.zeros(samples.shape[:3], np.float32)
  for run, strength in np.ndindex(samples.shape[:2]):
    index[run, strength], distance[run, strength] = confidence_lib.nearest_of_class(
      samples[run, strength], features.labels, exemplars[run], exemplar_labels[run]
    )
  return {"features": raw, "nearest_index": index, "nearest_distance": distance}


def train_jointly(experiment: Experiment) -> dict:
  return joint.train_all(experiment, synthesis_settings(experiment))


_SHARED_PHASES = (
  Phase(
    "diffusion",
    "training denoisers on the features",
    train_denoisers,
    ("diffusion", "generators.names", "generators.ldmlr_share"),
    compile_ahead=compile_denoisers,
  ),
  Phase(
    "selection",
    "choosing settings by cross-validation",
    select,
    ("generators", "hallucination", "head", "selection"),
    compile_ahead=compile_folds,
  ),
  Phase("hallucination", "sampling features for the tail", hallucinate, ()),
  Phase("heads", "training the heads again", train_heads, ()),
)

_EVALUATION = Phase("evaluation", "scoring and drawing", evaluate, ("name", "evaluation"))

_MEMDIFF = (
  TRAIN_CLASSIFIERS,
  Phase(
    "memory_bank",
    "encoding all images, filling the bank",
    encode_memory_bank,
    ("memory_bank", "class_embeddings"),
  ),
  *_SHARED_PHASES,
  Phase(
    "joint",
    "training encoders and heads together",
    train_jointly,
    ("joint",),
    lambda settings: bool(settings.joint.generators),
  ),
  _EVALUATION,
)

_FEATURES = (
  Phase(
    "memory_bank",
    "reading the embeddings, filling the bank",
    read_memory_bank,
    ("seeds", "dataset", "memory_bank", "class_embeddings", "loop"),
  ),
  *_SHARED_PHASES,
  _EVALUATION,
)

IMAGES = Kind(
  MemdiffConfig,
  dataset_lib.load,
  (check_nothing_held_out, check_classifier, check_memdiff),
  _MEMDIFF,
)
EMBEDDINGS = Kind(FeatureConfig, embeddings.load, (check_features,), _FEATURES)
