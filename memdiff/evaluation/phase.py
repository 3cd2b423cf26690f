"""The evaluation of an experiment on features: methods scored, features judged, pictures."""

import dataclasses
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from input_pipeline import embeddings
from memdiff import feature_experiment as experiment
from memdiff import joint, selection
from memdiff.classifier import heads
from memdiff.classifier.training import trained_losses
from memdiff.evaluation import classification, plots, quality, result
from memdiff.experiment import Experiment
from memdiff.feature_experiment import OWN, REAL, REFERENCES, Choice, Space
from memdiff.feature_space import raw_head
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.progress import release_memory
from memdiff.runtime.workdir import write_arrays

JOINT = "joint"  # joint:<generator>+<loss>
_MAX_CURVES = 6  # trainings in one picture


@dataclasses.dataclass(frozen=True)
class Scored:
  """The table.

  Attributes:
    rows: of the report.
    top1: method -> [S] test accuracy.
    heads: method -> {"kernel" [S, D, C], "bias" [S, C]} on standardised features.
  """

  rows: list[dict]
  top1: dict[str, np.ndarray]
  heads: dict[str, dict[str, jax.Array]]


def classify(e: Experiment, space: Space, choices: Mapping[str, Choice]) -> Scored:
  """Scores every method and reference on the test set."""
  described, found = {}, {}
  for loss, logits in space.own_logits.items():
    name = OWN if loss == e.config.classifier.loss else f"{OWN}:{loss}"
    words = experiment.describe_own(e, loss)
    adjusted = logits - experiment.log_prior(e.dataset.train_counts)
    described[name] = words, logits.argmax(axis=-1)
    described[f"{name}+logit_adjustment"] = (
      f"{words}; logits adjusted by the class prior afterwards",
      adjusted.argmax(axis=-1),
    )
  for name, logits in joint.load_logits(e).items():
    method = f"{JOINT}:{name}+{e.config.joint.loss}"
    described[method] = experiment.describe_joint(e, name), logits.argmax(axis=-1)
  for name in experiment.head_names(e):
    for loss, head in experiment.final_heads(e, space, choices, name).items():
      method = f"{name}+{loss}"
      logits = jax.jit(jax.vmap(heads.logits_of))(head, space.test)
      described[method] = (
        experiment.describe(e, method, choices),
        np.asarray(logits.argmax(axis=-1)),
      )
      found[method] = head
  labels, groups = e.dataset.test_labels, classification.make_groups(e.dataset.train_counts)
  rows = [
    classification.score_method(
      method, description, predictions, labels, groups, e.seeds, e.dataset.num_classes
    )
    for method, (description, predictions) in described.items()
  ]
  for row in rows:
    row["reference"] = row["method"].split("+")[0] in REFERENCES
  top1 = {method: (p == labels).mean(axis=1) for method, (_, p) in described.items()}
  return Scored(rows, top1, found)


def best_of(methods: list[str], scores: Mapping[str, float]) -> str:
  """The method with the best score by cross-validation; the first where there is none."""
  return max(methods, key=lambda method: scores.get(method, -1.0))


def compare(e: Experiment, scored: Scored, recommendation: Mapping | None) -> dict:
  """What hallucination adds to the real-only control, and how much the oracle would; paired.

  Which of the losses stands for memdiff, and which control it is held against, is chosen by
  cross-validation, never by the test set. Every row gets its share of the gap.
  """
  known = (recommendation or {}).get("scores", {})
  scores = {method: entry["score"] for method, entry in known.items()}
  name = "memdiff" if "memdiff" in e.config.generators.names else e.config.generators.names[0]
  method = best_of([f"{name}+{loss}" for loss in e.config.head.losses], scores)
  controls = [m for m in scores if m.split("+")[0] in (REAL, OWN)]
  control = best_of(controls or [f"{REAL}+{loss}" for loss in e.config.head.losses], scores)
  gain = scored.top1[method] - scored.top1[control]
  outcome = {
    "method": method,
    "control": control,
    "reference": None,
    "gain": classification.mean_std(gain),
    "headroom": None,
    "gap_closed": None,
  }
  reference = f"oracle+{method.split('+')[1]}"
  if reference in scored.top1:
    headroom = scored.top1[reference] - scored.top1[control]
    outcome |= {"reference": reference, "headroom": classification.mean_std(headroom)}
    if (headroom > 0).all():
      outcome["gap_closed"] = classification.mean_std(gain / headroom)
      for row in scored.rows:
        closed = (scored.top1[row["method"]] - scored.top1[control]) / headroom
        row["gap_closed"] = classification.mean_std(closed)
  return outcome


def compare_joint(e: Experiment, scored: Scored) -> list[dict]:
  """What each generator adds to joint training on real images alone; paired."""
  trained = {m: top1 for m, top1 in scored.top1.items() if m.startswith(f"{JOINT}:")}
  control = trained.get(f"{JOINT}:{REAL}+{e.config.joint.loss}") if trained else None
  if control is None:
    return []
  return [
    {"method": method, "gain": classification.mean_std(top1 - control)}
    for method, top1 in trained.items()
    if top1 is not control
  ]


def agreement(scored: Scored, recommendation: Mapping) -> dict:
  """How well cross-validation foresaw the test set; looked at only when all is chosen."""
  common = [m for m in recommendation["scores"] if m in scored.top1]
  ours = [recommendation["scores"][m]["score"] for m in common]
  test = [float(scored.top1[m].mean()) for m in common]
  gain = scored.top1[recommendation["best"]] - scored.top1[recommendation["control"]]
  chosen = float(scored.top1[recommendation["method"]].mean())
  return selection.rank_agreement(ours, test) | {
    "methods": len(common),
    "test_gain": classification.mean_std(gain),
    "regret_of_recommended": max(test) - chosen,
  }


def stages(e: Experiment) -> list[str]:
  """The folders of the trainings that are drawn."""
  folders = []
  if hasattr(e.config, "classifier"):
    folders += [f"classifier/{loss}" for loss in trained_losses(e.config.classifier)]
  folders += [f"diffusion/{name}" for name in e.config.generators.names]
  folders += [f"heads/{name}" for name in (REAL, "memdiff", "oracle")]
  return [f for f in folders if (e.workdir.path / f / "metrics.jsonl").exists()][:_MAX_CURVES]


def of_strength(synthetic: Mapping[str, np.ndarray], choice: Choice) -> dict[str, np.ndarray]:
  """A generator's features [S, M, D] and confidences [S, M] at one strength, with their labels."""
  k = synthetic["strengths"].tolist().index(choice.strength)
  return {name: synthetic[name] for name in ("labels", "number")} | {
    name: synthetic[name][:, k]
    for name in ("features", "confidence", "nearest_index", "nearest_distance")
  }


def judge(e: Experiment, space: Space, made: Mapping[str, Mapping[str, np.ndarray]]) -> dict:
  """Quality of every generator's features against unseen real ones."""
  data, exemplars = e.dataset, mesh_lib.fetch(space.runs.exemplars.features)
  left_out, standardizer = mesh_lib.fetch((space.left_out, space.runs.standardizer))

  def seeds():
    for number in range(len(e.seeds)):
      e.run.progress.say(f"measuring features, seed {number + 1} of {len(e.seeds)}")
      own = jax.tree.map(lambda x, n=number: x[n], standardizer)
      features = {name: own.forward(arrays["features"][number]) for name, arrays in made.items()}
      yield quality.Seed(exemplars[number], left_out[number], features)

  labels = {name: arrays["labels"] for name, arrays in made.items()}
  judged = quality.measure(
    seeds(), data.train_labels, data.left_out_labels, labels, data.num_classes
  )
  if not len(data.left_out_labels):
    for measured in judged.values():
      del measured["truth_test"]
  return judged


def seconds(e: Experiment) -> dict[str, dict[str, float | None]]:
  """What every generator took for all seeds together, compiling left out; on whatever ran it."""
  phases = {"training": "diffusion", "sampling": "hallucination"}
  taken = {what: e.workdir.manifest(phase)["metrics"] for what, phase in phases.items()}
  return {
    name: {what: metrics.get(name, {}).get("seconds") for what, metrics in taken.items()}
    for name in e.config.generators.names
  }


def draw(e: Experiment, space: Space, scored: Scored, comparison: Mapping, shown: Mapping):
  """The report's figures by name; the feature map shows the first seed.

  Args:
    shown: features of the generator that the comparison is about.
  """
  data = e.dataset
  made = np.bincount(shown["labels"], minlength=data.num_classes)
  first = jax.tree.map(lambda x: x[0], space.runs.standardizer)
  samples, left_out = mesh_lib.fetch((first.forward(shown["features"][0]), space.left_out[0]))
  named = [comparison[key] for key in ("control", "method", "reference") if comparison[key]]
  figures = {
    "long_tail_profile": plots.long_tail_profile(
      data.class_names, data.train_counts, made, result.group_of_class(e)
    ),
    "per_class_accuracy": result.accuracy_by_class(e, scored.rows, named),
    "feature_map": plots.feature_map(
      mesh_lib.fetch(space.runs.exemplars.features[0]),
      data.train_labels,
      left_out,
      data.left_out_labels,
      samples,
      shown["labels"],
      data.class_names,
      seed=0,
      max_per_class=e.config.evaluation.map_per_class,
    ),
    "confidence_histogram": plots.confidence_histogram(
      shown["confidence"][0], shown["labels"], data.class_names
    ),
    "training_curves": plots.training_curves(result.training_curves(e, stages(e))),
  }
  if comparison["gap_closed"]:
    figures["gap_closed"] = plots.gap_closed(
      [
        (row["method"], row["gap_closed"]["mean"], row["gap_closed"]["std"])
        for row in scored.rows
        if row["method"].split("+")[0] not in REFERENCES
      ]
    )
  if len(data.left_out_labels):
    near = quality.nearness(samples, shown["labels"], left_out, data.left_out_labels)
    figures["confidence_reliability"] = plots.reliability(shown["confidence"][0], near)
  return figures


def save_recommended_head(e: Experiment, space: Space, scored: Scored, method: str) -> None:
  """The recommended method's head on the encoder's own features: kernel [S, D, C], bias [S, C]."""
  head = scored.heads.get(method, space.runs.head)
  if method == f"{OWN}+logit_adjustment":
    head = head | {"bias": head["bias"] - experiment.log_prior(e.dataset.train_counts)[None]}
  raw = jax.jit(jax.vmap(raw_head))(head, space.runs.standardizer)
  write_arrays(e.workdir.path / "recommended_head.npz", mesh_lib.fetch(raw))


def export_embeddings(e: Experiment, generator: str, made: Mapping[str, np.ndarray]) -> None:
  """The first seed's synthetic features, in the format of the file that the features came from."""
  suffix = pathlib.Path(e.config.dataset.train_path).suffix.lower()
  path = e.workdir.path / f"synthetic_embeddings{'.parquet' if suffix == '.parquet' else '.npz'}"
  embeddings.write_synthetic(
    path,
    e.dataset,
    generator,
    labels=made["labels"],
    number=made["number"],
    num_exemplars=e.dataset.train_counts[made["labels"]],
    **{
      name: made[name][0]
      for name in ("features", "confidence", "nearest_index", "nearest_distance")
    },
  )
  e.run.progress.say(f"{len(made['labels']):,} features of {generator} are in {path}")


def evaluate(e: Experiment) -> dict:
  """Scores, measures, draws."""
  space, (choices, recommendation) = experiment.load_space(e), experiment.load_selection(e)
  e.run.progress.say("scoring the methods on the test set")
  scored = classify(e, space, choices)
  release_memory()
  comparison = compare(e, scored, recommendation)
  generator, _, loss = comparison["method"].partition("+")
  made = {
    name: of_strength(experiment.load_synthetic(e, name), choices[f"{name}+{loss}"])
    for name in e.config.generators.names
  }
  judged, shown = judge(e, space, made), made[generator]
  del made  # the features of all generators: much memory
  chosen = recommendation["method"] if recommendation else comparison["method"]
  save_recommended_head(e, space, scored, chosen)
  if isinstance(e.dataset, embeddings.LongTailEmbeddings):
    # The recommended generator's; where that is none, those of the one that was compared.
    known = chosen.split("+")[0] in e.config.generators.names
    name, _, loss = (chosen if known else comparison["method"]).partition("+")
    choice = choices[f"{name}+{loss}"]
    export_embeddings(e, name, of_strength(experiment.load_synthetic(e, name), choice))
  if recommendation:
    recommendation = recommendation | {"agreement": agreement(scored, recommendation)}
  outcome = result.record(e, scored.rows) | {
    "comparison": comparison,
    "joint": compare_joint(e, scored),
    "recommendation": recommendation,
    "choices": {method: dataclasses.asdict(choice) for method, choice in choices.items()},
    "features": judged[generator],
    "generators": judged,
    "generator_seconds": seconds(e),
    "synthetic_counts": np.bincount(shown["labels"], minlength=e.dataset.num_classes).tolist(),
  }
  e.run.progress.say("drawing")
  return result.save(e, outcome, draw(e, space, scored, comparison, shown))
