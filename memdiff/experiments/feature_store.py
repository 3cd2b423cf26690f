"""What the phases of an experiment on features leave in its folder, and read again."""

import dataclasses
from collections.abc import Collection

import jax
import numpy as np

from memdiff.classifier import heads
from memdiff.errors import WorkdirError
from memdiff.experiments.base import Experiment
from memdiff.experiments.methods import Choice
from memdiff.memory import feature_space, memory_bank
from memdiff.memory.feature_space import FeatureRuns
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.checkpoint import Checkpointer, abstract
from memdiff.runtime.progress import Progress
from memdiff.runtime.workdir import read_arrays, read_json, write_arrays
from memdiff.synthesis import class_embeddings

_KNOWN = "class_embeddings"


def fill_memory_bank(experiment: Experiment, arrays: dict[str, np.ndarray]) -> dict:
  """Fills the bank from features of the training set, and writes it and all `arrays`.

  What else is known of the classes is read and written, too.
  """
  given = experiment.config.class_embeddings
  if given:
    names = np.array(experiment.dataset.class_names)
    arrays |= {_KNOWN: class_embeddings.of_classes(given, names)}
  folder = experiment.workdir.folder("memory_bank")
  say_constant_columns(experiment.run.progress, arrays["train"][0])
  bank = feature_space.fill_bank(
    arrays["train"],
    np.broadcast_to(
      experiment.dataset.train_labels, (len(experiment.seeds), len(experiment.dataset.train_labels))
    ),
    experiment.dataset.num_classes,
    experiment.run.keys("memory_bank"),
    experiment.config.memory_bank,
    experiment.mesh,
  )
  checkpointer = Checkpointer(folder / "bank", keep=1)
  checkpointer.save(0, bank)
  checkpointer.close()
  write_arrays(folder / "features.npz", arrays)
  stored = np.minimum(mesh_lib.fetch(bank.seen), bank.slots.shape[2]).sum()
  return {"stored_features": int(stored), "feature_dim": arrays["train"].shape[-1]}


def say_constant_columns(progress: Progress, features: np.ndarray) -> None:
  """In one line, if [N, D] has any."""
  constant = feature_space.constant_columns(features)
  if len(constant):
    progress.say(
      f"{len(constant)} of {features.shape[1]} columns are constant in the training data and tell"
      f" nothing apart; the first is column {constant[0]}, counted from 0"
    )


def load_features(experiment: Experiment) -> dict[str, np.ndarray]:
  """features.npz: train, left_out, test [1 or S, n, D], and what the encoder's own head says."""
  return read_arrays(experiment.workdir.folder("memory_bank") / "features.npz")


def load_class_embeddings(experiment: Experiment) -> np.ndarray | None:
  """[C, E], or None if there are none."""
  if not experiment.config.class_embeddings:
    return None
  path = experiment.workdir.folder("memory_bank") / "features.npz"
  return read_arrays(path, (_KNOWN,))[_KNOWN]


def with_class_embeddings(experiment: Experiment, runs: FeatureRuns) -> FeatureRuns:
  """The same runs, with the embeddings of the classes in their banks if there are any."""
  given = load_class_embeddings(experiment)
  if given is None:
    return runs
  components = class_embeddings.components(given)
  return feature_space.with_class_embeddings(runs, components, experiment.mesh)


def load_bank(experiment: Experiment, feature_dim: int) -> memory_bank.MemoryBank:
  """The filled bank, in the encoder's units, with a leading axis of seeds."""
  config = experiment.config.memory_bank
  shapes = jax.eval_shape(
    jax.vmap(
      lambda _: memory_bank.create(experiment.dataset.num_classes, config.num_slots, feature_dim)
    ),
    jax.ShapeDtypeStruct((len(experiment.seeds),), np.int32),
  )
  sharding = feature_space.bank_sharding(experiment.dataset.num_classes, experiment.mesh)
  checkpointer = Checkpointer(experiment.workdir.folder("memory_bank") / "bank", keep=1)
  try:
    restored = checkpointer.restore(abstract(shapes, jax.tree.map(lambda _: sharding, shapes)))
  finally:
    checkpointer.close()
  if restored is None:
    raise WorkdirError(
      f"{experiment.workdir.folder('memory_bank')} holds no bank; remove that folder and run the"
      " same command again."
    )
  return restored[1]


@dataclasses.dataclass(frozen=True)
class Space:
  """The feature space of all seeds: standardised, on the devices."""

  runs: FeatureRuns
  left_out: jax.Array  # [S, L, D]
  test: jax.Array  # [S, T, D]
  own_logits: dict[str, np.ndarray]  # loss -> [S, T, C], of the encoders' own heads


def load_space(experiment: Experiment) -> Space:
  arrays, labels = load_features(experiment), experiment.dataset.train_labels
  head = None
  if "kernel" in arrays:
    head = {name: _for_seeds(experiment, arrays[name]) for name in ("kernel", "bias")}
  runs = feature_space.make_runs(
    arrays["train"],
    np.broadcast_to(labels, (len(experiment.seeds), len(labels))),
    load_bank(experiment, arrays["train"].shape[-1]),
    head,
    experiment.dataset.num_classes,
    experiment.mesh,
  )
  return Space(
    runs=with_class_embeddings(experiment, runs),
    left_out=feature_space.standardize(runs.standardizer, arrays["left_out"], experiment.mesh),
    test=feature_space.standardize(runs.standardizer, arrays["test"], experiment.mesh),
    own_logits={
      name.removeprefix("logits_"): _for_seeds(experiment, value)
      for name, value in arrays.items()
      if name.startswith("logits_")
    },
  )


def _for_seeds(experiment: Experiment, array: np.ndarray) -> np.ndarray:
  """Arrays of one encoder that serves all seeds, once per seed."""
  return np.broadcast_to(array, (len(experiment.seeds), *array.shape[1:]))


def load_selection(experiment: Experiment) -> tuple[dict[str, Choice], dict | None]:
  """(method -> choice, recommendation or None)."""
  saved = read_json(experiment.workdir.folder("selection") / "choices.json")
  return {m: Choice(**c) for m, c in saved["choices"].items()}, saved["recommendation"]


def load_synthetic(
  experiment: Experiment, name: str, parts: Collection[str] | None = None
) -> dict[str, np.ndarray]:
  """What `hallucinate` wrote of a generator, in the encoder's units; all of it, or some arrays.

  features [S, K, M, D], labels [M], confidence [S, K, M], number [M], nearest_index and
  nearest_distance [S, K, M], numbers [C], strengths [K], seeds [S].
  """
  return read_arrays(experiment.workdir.folder("hallucination") / f"{name}.npz", parts)


def load_added(experiment: Experiment, space: Space, name: str) -> tuple[heads.Added, list[float]]:
  """What a generator made, standardised, and its strengths."""
  arrays = load_synthetic(experiment, name, ("features", "confidence", "numbers", "strengths"))
  features, confidence = mesh_lib.replicate(
    experiment.mesh, (arrays.pop("features"), arrays["confidence"])
  )
  forward = jax.jit(jax.vmap(lambda s, x: jax.lax.map(s.forward, x)))
  added = heads.Added(forward(space.runs.standardizer, features), confidence, arrays["numbers"])
  return added, arrays["strengths"].tolist()
