"""The final heads of an experiment on features: of generators, real features and references."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from memdiff.classifier import heads
from memdiff.evaluation.method import Method
from memdiff.experiments import fitted
from memdiff.experiments.base import (
  Experiment,
  last_metrics,
)
from memdiff.experiments.feature_store import (
  Space,
  load_added,
  load_selection,
  load_space,
)
from memdiff.experiments.methods import (
  REAL,
  REFERENCES,
  Choice,
)
from memdiff.runtime import loop
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.workdir import read_arrays, write_arrays
from memdiff.synthesis import generators


@dataclasses.dataclass(frozen=True)
class Trained:
  """The heads of one generator or reference."""

  stage: loop.Stage
  run: loop.Run
  data: heads.HeadData
  settings: list[heads.Setting]
  losses: list[str]  # of the settings, seeds varying fastest


def train_heads(experiment: Experiment) -> dict:
  space, (choices, _) = load_space(experiment), load_selection(experiment)
  summary = {}
  for name in head_names(experiment):
    folder = experiment.workdir.folder("heads") / name
    trained = head_training(experiment, space, choices, name)
    state = loop.train(trained.stage, trained.run, folder)
    prior = trained.stage.per_seed["mixture"].prior
    write_arrays(folder / _HEADS, mesh_lib.fetch(state.params | {"prior": prior}))
    summary[name] = last_metrics(folder)
  folder = experiment.workdir.folder("heads")
  write_arrays(folder / STANDARDIZER, vars(mesh_lib.fetch(space.runs.standardizer)))
  write_arrays(folder / fitted.FILE, fitted.fit(experiment, space, fitted.load(experiment)))
  return summary


def head_names(experiment: Experiment) -> list[str]:
  """Everything that heads are trained on: nothing added, generators, references."""
  numbers = generators.plan(experiment.dataset.train_counts, experiment.config.generators)
  left_out = np.bincount(
    experiment.dataset.left_out_labels, minlength=experiment.dataset.num_classes
  )
  references = list(REFERENCES) if (left_out[numbers > 0] > 0).any() else []
  return [REAL, *experiment.config.generators.names, *references]


def head_training(
  experiment: Experiment, space: Space, choices: dict[str, Choice], name: str
) -> Trained:
  """The heads of a generator, a reference, or of real features only: one per loss and seed."""
  exemplars, num_seeds, dim = space.runs.exemplars, len(experiment.seeds), space.test.shape[-1]
  strengths = [0.0]
  if name == "oracle":
    added = _left_out_pool(experiment, space)
  elif name == "unseen_exemplars":
    exemplars = _unseen_exemplars(experiment, space)
    added = heads.nothing_added(num_seeds, dim, experiment.dataset.num_classes)
  elif name == REAL:
    added = heads.nothing_added(num_seeds, dim, experiment.dataset.num_classes)
  else:
    added, strengths = load_added(experiment, space, name)
  settings, of_losses = [], []
  for loss in experiment.config.head.losses:
    choice = choices.get(Method.of(name, loss)) or _reference_choice(
      name, choices[Method.of(REAL, loss)]
    )
    for run, seed in enumerate(experiment.seeds):
      settings.append(
        head_setting(experiment.run, choice, name, loss, run=run, seed=seed, strengths=strengths)
      )
      of_losses.append(loss)
  data = heads.HeadData(
    exemplars=exemplars,
    added=mesh_lib.replicate(experiment.mesh, of_one_size(experiment, added)),
    start=space.runs.head,
    test_features=space.test,
    test_labels=mesh_lib.replicate(
      experiment.mesh, np.broadcast_to(experiment.dataset.test_labels, space.test.shape[:2])
    ),
  )
  return Trained(
    stage=heads.make_stage(
      f"heads/{name}", experiment.config.head.training, data, settings, experiment.mesh
    ),
    run=dataclasses.replace(experiment.run, seeds=tuple(range(len(settings)))),
    data=data,
    settings=settings,
    losses=of_losses,
  )


def head_setting(
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


def trained_losses(experiment: Experiment) -> tuple[str, ...]:
  return tuple(dict.fromkeys(heads.trained_loss(loss) for loss in experiment.config.head.losses))


def of_one_size(experiment: Experiment, added: heads.Added) -> heads.Added:
  """Padded to what generators make."""
  numbers = generators.plan(experiment.dataset.train_counts, experiment.config.generators)
  return heads.padded(added, int(numbers.sum()))


def _reference_choice(name: str, of_real: Choice) -> Choice:
  """References are no methods: set as `real` is, and the oracle with all that there is."""
  if name == "oracle":
    return dataclasses.replace(of_real, fill=heads.ALL, exponent=1.0)
  return of_real


def _left_out_pool(experiment: Experiment, space: Space) -> heads.Added:
  """Left-out features: as many per class as would be made, or all there are."""
  wanted = generators.plan(experiment.dataset.train_counts, experiment.config.generators)
  labels = experiment.dataset.left_out_labels
  rows = [np.flatnonzero(labels == c)[:n] for c, n in enumerate(wanted)]
  numbers = np.array([len(row) for row in rows], np.int32)
  features = space.left_out[:, np.concatenate(rows)][:, None]
  return heads.Added(features, jnp.ones(features.shape[:3]), numbers)


def _unseen_exemplars(experiment: Experiment, space: Space):
  """Exemplars in which a class's features are left-out ones, as many as it has or there are."""
  features = np.array(mesh_lib.fetch(space.runs.exemplars.features))
  for c, count in enumerate(experiment.dataset.train_counts):
    unseen = np.flatnonzero(experiment.dataset.left_out_labels == c)[:count]
    rows = np.flatnonzero(experiment.dataset.train_labels == c)[: len(unseen)]
    features[:, rows] = mesh_lib.fetch(space.left_out[:, unseen])
  return space.runs.exemplars.replace(features=mesh_lib.replicate(experiment.mesh, features))


STANDARDIZER = "standardizer.npz"  # mean and scale [S, D] of the features that heads take
_HEADS = "heads.npz"  # kernel, bias and prior, leading with losses and, varying fastest, seeds


def read_heads(
  folder: pathlib.Path, losses: Sequence[str], num_seeds: int
) -> dict[str, dict[str, np.ndarray]]:
  """Loss -> {"kernel" [S, D, C], "bias" [S, C], "prior" [S, C]} on standardised features.

  Args:
    folder: of one generator or reference.
    losses: `head.losses` of the run.
    num_seeds: S.
  """
  arrays = read_arrays(folder / _HEADS)
  return {
    loss: {key: value[n * num_seeds : (n + 1) * num_seeds] for key, value in arrays.items()}
    for n, loss in enumerate(losses)
  }


def final_heads(experiment: Experiment, choices: dict[str, Choice], name: str):
  """Loss -> {"kernel" [S, D, C], "bias" [S, C]} on standardised features, adjusted if asked."""
  folder, found = experiment.workdir.folder("heads") / name, {}
  of_losses = read_heads(folder, experiment.config.head.losses, len(experiment.seeds))
  for loss, arrays in of_losses.items():
    head = mesh_lib.replicate(experiment.mesh, arrays)
    prior = head.pop("prior")
    if loss == "logit_adjustment":
      choice = choices.get(Method.of(name, loss)) or choices[Method.of(REAL, loss)]
      head = jax.vmap(heads.adjusted, in_axes=(0, 0, None))(head, prior, choice.tau)
    found[loss] = head
  return found
