"""The evaluation of an experiment on features: methods scored, features judged, pictures."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import jax
import numpy as np

from input_pipeline import embeddings
from memdiff.classifier.encoder_training import trained_losses
from memdiff.classifier.priors import log_prior
from memdiff.evaluation import quality
from memdiff.evaluation.method import Method
from memdiff.experiments import fitted, record, summaries
from memdiff.experiments.base import Experiment
from memdiff.experiments.comparison import Scored, agreement, compare, headline, mark_shown
from memdiff.experiments.feature_scores import (
  classify,
  compare_joint,
  compared_methods,
  plain_training,
)
from memdiff.experiments.feature_store import Space, load_selection, load_space, load_synthetic
from memdiff.experiments.methods import (
  OWN,
  REAL,
  REFERENCES,
  Choice,
  methods,
  own_tau,
)
from memdiff.memory.feature_space import raw_head
from memdiff.runtime import distributed
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.progress import release_memory
from memdiff.runtime.workdir import write_arrays

if TYPE_CHECKING:
  from matplotlib.figure import Figure

  from memdiff.evaluation.plots import FeaturePlane


_MAX_CURVES = 6  # trainings in one picture


def stages(experiment: Experiment) -> list[str]:
  """The folders of the trainings that are drawn."""
  folders = []
  if hasattr(experiment.config, "classifier"):
    folders += [f"classifier/{loss}" for loss in trained_losses(experiment.config.classifier)]
  folders += [f"diffusion/{name}" for name in experiment.config.generators.names]
  folders += [f"heads/{name}" for name in (REAL, "memdiff", "oracle")]
  return [f for f in folders if (experiment.workdir.path / f / "metrics.jsonl").exists()][
    :_MAX_CURVES
  ]


def of_strength(synthetic: Mapping[str, np.ndarray], choice: Choice) -> dict[str, np.ndarray]:
  """A generator's features [S, M, D] and confidences [S, M] at one strength, with their labels."""
  k = synthetic["strengths"].tolist().index(choice.strength)
  alike, by_strength = (
    ("labels", "number"), ("features", "confidence", "nearest_index", "nearest_distance")
  )  # fmt: skip
  return {name: synthetic[name] for name in alike if name in synthetic} | {
    name: synthetic[name][:, k] for name in by_strength if name in synthetic
  }


def _synthetic(
  experiment: Experiment,
  choices: Mapping[str, Choice],
  name: str,
  loss: str,
  parts: Collection[str] | None = None,
) -> dict[str, np.ndarray]:
  """`of_strength` of the strength that was chosen for a generator and a loss; all or some parts."""
  if parts is not None:
    parts = ("strengths", *parts)
  return of_strength(load_synthetic(experiment, name, parts), choices[Method.of(name, loss)])


def judge(experiment: Experiment, space: Space, choices: Mapping[str, Choice], loss: str) -> dict:
  """Quality of every generator's features, as chosen for a loss, against unseen real ones."""
  data, exemplars = experiment.dataset, mesh_lib.fetch(space.runs.exemplars.features)
  left_out, standardizer = mesh_lib.fetch((space.left_out, space.runs.standardizer))
  names = experiment.config.generators.names

  def synthetic_of(name, seed):
    """[M, D]; read again for every seed, since those of all seeds and generators are large."""
    return _synthetic(experiment, choices, name, loss, ("features",))["features"][seed]

  def seeds():
    for number in range(len(experiment.seeds)):
      experiment.run.progress.say(
        f"measuring features, seed {number + 1} of {len(experiment.seeds)}"
      )
      of_seed = jax.tree.map(lambda x, n=number: x[n], standardizer)
      features = {name: of_seed.forward(synthetic_of(name, number)) for name in names}
      yield quality.Seed(exemplars[number], left_out[number], features)

  labels = {
    name: _synthetic(experiment, choices, name, loss, ("labels",))["labels"] for name in names
  }
  judged = quality.measure(
    seeds(), data.train_labels, data.left_out_labels, labels, data.num_classes
  )
  if not len(data.left_out_labels):
    for measured in judged.values():
      del measured["truth_test"]
  return judged


def seconds(experiment: Experiment) -> dict[str, dict[str, float | None]]:
  """What every generator took for all seeds together, compiling left out; on whatever ran it."""
  phases = {"training": "diffusion", "sampling": "hallucination"}
  taken = {what: experiment.workdir.manifest(phase)["metrics"] for what, phase in phases.items()}
  return {
    name: {what: metrics.get(name, {}).get("seconds") for what, metrics in taken.items()}
    for name in experiment.config.generators.names
  }


def features_of_first_seed(
  experiment: Experiment, space: Space, shown: Mapping[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Kind -> (standardised features [N, D], labels [N]): real, left out and synthetic.

  Args:
    experiment: the experiment.
    space: its features.
    shown: synthetic features [S, M, D] and their labels, of one generator.
  """
  data, first = experiment.dataset, jax.tree.map(lambda x: x[0], space.runs.standardizer)
  real, left_out, synthetic = mesh_lib.fetch(
    (space.runs.exemplars.features, space.left_out, first.forward(shown["features"][0]))
  )
  return {
    "real": (real[0], data.train_labels),  # of all seeds no copy is made; `judge` reads them too
    "left out": (left_out[0], data.left_out_labels),
    "synthetic": (synthetic, shown["labels"]),
  }


def draw(
  experiment: Experiment,
  scored: Scored,
  comparison: Mapping,
  shown: Mapping,
  features: Mapping[str, tuple[np.ndarray, np.ndarray]],
  plane: "Future[FeaturePlane]",
) -> Iterator[tuple[str, "Figure"]]:
  """The report's figures and their names; the one that takes longest to compute is the last.

  Args:
    experiment: the experiment.
    scored: the table.
    comparison: of `compare`.
    shown: what the generator made that the comparison is about.
    features: of the first seed.
    plane: where they lie on the map.
  """
  from memdiff.evaluation import plots  # matplotlib takes a second

  data = experiment.dataset
  numbers = np.bincount(shown["labels"], minlength=data.num_classes)
  named = [comparison[key] for key in ("control", "method", "reference") if comparison[key]]
  yield (
    "long_tail_profile",
    plots.long_tail_profile(
      data.class_names, data.train_counts, numbers, record.group_of_class(experiment)
    ),
  )
  yield "per_class_accuracy", record.accuracy_by_class(experiment, scored.rows, named)
  confidence = shown["confidence"][0]
  yield (
    "confidence_histogram",
    plots.confidence_histogram(confidence, shown["labels"], data.class_names),
  )
  yield (
    "training_curves",
    plots.training_curves(record.training_curves(experiment, stages(experiment))),
  )
  if comparison["gap_closed"]:
    gaps = [
      (row["method"], row["gap_closed"]["mean"], row["gap_closed"]["interval"])
      for row in scored.rows
      if Method(row["method"]).generator not in REFERENCES
    ]
    yield "gap_closed", plots.gap_closed(gaps)
  if len(data.left_out_labels):
    near = quality.nearness(*features["synthetic"], *features["left out"])
    yield "confidence_reliability", plots.reliability(confidence, near)
  yield "feature_map", plots.feature_map(plane.result(), data.class_names)


def place_on_map(
  experiment: Experiment, features: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> "FeaturePlane":
  """The first seed's features on a plane; takes seconds, most of them without Python's lock."""
  from memdiff.evaluation import plots  # matplotlib takes a second

  return plots.embed(
    features["real"],
    features["left out"],
    features["synthetic"],
    experiment.dataset.num_classes,
    max_per_class=experiment.config.evaluation.map_per_class,
  )


def save_recommended_head(
  experiment: Experiment, space: Space, scored: Scored, method: str, choices: Mapping[str, Choice]
) -> None:
  """The recommended method's head on the encoder's own features, if it is linear.

  kernel [S, D, C], bias [S, C], class_names [C].
  """
  if Method(method).generator == OWN:
    head = space.runs.head
  else:
    head = scored.heads.get(method) or fitted.linear_head(experiment, method)
  path = experiment.workdir.path / "recommended_head.npz"
  if head is None:
    if distributed.is_main():
      path.unlink(missing_ok=True)  # of an earlier evaluation
    experiment.run.progress.say(f"{method} has no linear head; memdiff.export writes a program")
    return
  if method == f"{OWN}+logit_adjustment":
    offset = own_tau(experiment, choices) * log_prior(experiment.dataset.train_counts)
    head = head | {"bias": head["bias"] - offset[None]}
  raw = mesh_lib.fetch(jax.jit(jax.vmap(raw_head))(head, space.runs.standardizer))
  names = {"class_names": np.array(experiment.dataset.class_names)}
  write_arrays(path, raw | names)


def export_embeddings(
  experiment: Experiment, generator: str, synthetic: Mapping[str, np.ndarray]
) -> None:
  """The first seed's synthetic features, in the format of the file that the features came from."""
  suffix = embeddings.export_suffix(experiment.config.dataset.train_path)
  path = experiment.workdir.path / f"synthetic_embeddings{suffix}"
  rows = embeddings.SyntheticRows(
    method=generator,
    labels=synthetic["labels"],
    number=synthetic["number"],
    num_exemplars=experiment.dataset.train_counts[synthetic["labels"]],
    **{
      name: synthetic[name][0]
      for name in ("features", "confidence", "nearest_index", "nearest_distance")
    },
  )
  embeddings.write_synthetic(path, experiment.dataset, rows)
  experiment.run.progress.say(f"{len(synthetic['labels']):,} features of {generator} are in {path}")


def evaluate(experiment: Experiment) -> dict:
  """Scores, measures, draws."""
  space, (choices, recommendation) = load_space(experiment), load_selection(experiment)
  method, control = compared_methods(experiment, recommendation)
  generator, loss = method.generator, method.loss
  shown = _synthetic(experiment, choices, generator, loss)
  features = features_of_first_seed(experiment, space, shown)
  del shown["features"]  # of all seeds: much memory
  with ThreadPoolExecutor(1) as pool:
    plane = pool.submit(place_on_map, experiment, features)  # beside all that follows
    experiment.run.progress.say("scoring the methods on the test set")
    scored = classify(experiment, space, choices, recommendation)
    release_memory()
    comparison = compare(scored, method, control)
    judged = judge(experiment, space, choices, loss)
    chosen = recommendation["method"] if recommendation else comparison["method"]
    save_recommended_head(experiment, space, scored, chosen, choices)
    if isinstance(experiment.dataset, embeddings.LongTailEmbeddings):
      # The recommended generator's; if that is none, those of the one that was compared.
      known = Method(chosen).generator in experiment.config.generators.names
      exported = Method(chosen if known else comparison["method"])
      name, loss = exported.generator, exported.loss
      export_embeddings(experiment, name, _synthetic(experiment, choices, name, loss))
    if recommendation:
      recommendation = recommendation | {"agreement": agreement(scored, recommendation)}
    synthetic = [m for m in methods(experiment) if m.generator != REAL]
    plain = plain_training(experiment, space)
    first = headline(scored, synthetic, plain, comparison, recommendation)
    mark_shown(scored, first, comparison)
    outcome = record.record(experiment, scored.rows) | {
      "criterion": scored.criterion,
      "headline": first,
      "comparison": comparison,
      "joint": compare_joint(experiment, scored),
      "recommendation": recommendation,
      "choices": {method: dataclasses.asdict(choice) for method, choice in choices.items()},
      "fitted": dataclasses.asdict(fitted.load(experiment)),
      "features": judged[generator],
      "generators": judged,
      "generator_seconds": seconds(experiment),
      "synthetic_counts": np.bincount(
        shown["labels"], minlength=experiment.dataset.num_classes
      ).tolist(),
    }
    experiment.run.progress.say("drawing")
    summaries.project(experiment, features)
    return record.save(
      experiment, outcome, draw(experiment, scored, comparison, shown, features, plane)
    )
