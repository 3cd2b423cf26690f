"""The evaluation of an experiment on features: methods scored, features judged, pictures."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import jax
import numpy as np

from input_pipeline import embeddings
from memdiff import feature_experiment as experiment
from memdiff import joint, selection
from memdiff.classifier import heads
from memdiff.classifier.training import trained_losses
from memdiff.evaluation import classification, criteria, quality, result, summaries
from memdiff.experiment import Experiment
from memdiff.feature_experiment import OWN, REAL, REFERENCES, Choice, Space
from memdiff.feature_space import raw_head
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.progress import release_memory
from memdiff.runtime.workdir import write_arrays

if TYPE_CHECKING:
  from matplotlib.figure import Figure

  from memdiff.evaluation.plots import FeaturePlane

JOINT = "joint"  # joint:<generator>+<loss>
_MAX_CURVES = 6  # trainings in one picture


@dataclasses.dataclass(frozen=True)
class Scored:
  """The table.

  Attributes:
    rows: of the report.
    predictions: method -> [S, T] classes of the test examples.
    heads: method -> {"kernel" [S, D, C], "bias" [S, C]} on standardised features.
    labels: [T] of the test examples.
    criterion: by which methods are compared.
    groups: many, medium and few.
  """

  rows: list[dict]
  predictions: dict[str, np.ndarray]
  heads: dict[str, dict[str, jax.Array]]
  labels: np.ndarray
  criterion: str
  groups: tuple[classification.Group, ...]

  def score(self, method: str) -> float:
    """The criterion on the test set, mean over seeds."""
    return float(self._measure(criteria.score, method).mean())

  def gain(self, method: str, control: str, group: str | None = None) -> dict | None:
    """How much better a method does than another, by the criterion or on a group of classes.

    {mean, interval, std, ours, theirs}; None for a group without test examples.
    """
    if group is None:
      return self._measure(criteria.over_seeds_and_examples, method, control)
    classes = next(g.classes for g in self.groups if g.name == group)
    if not np.isin(self.labels, classes).any():
      return None
    return criteria.over_seeds_and_examples(
      self.predictions[method], self.predictions[control], self.labels, "balanced_accuracy",
      self._num_classes, classes,
    )  # fmt: skip

  def shares_of_room(self, control: str, reference: str) -> dict[str, dict]:
    """Of every method: its share of the way from the control to the reference."""
    shares = criteria.shares_of_room(
      list(self.predictions.values()),
      self.predictions[control],
      self.predictions[reference],
      self.labels,
      self.criterion,
      self._num_classes,
    )
    return dict(zip(self.predictions, shares, strict=True))

  def _measure(self, function, *methods: str):
    predictions = [self.predictions[method] for method in methods]
    return function(*predictions, self.labels, self.criterion, self._num_classes)

  @property
  def _num_classes(self) -> int:
    return sum(len(group.classes) for group in self.groups)


def classify(e: Experiment, space: Space, choices: Mapping[str, Choice]) -> Scored:
  """Scores every method and reference on the test set."""
  described, found = _own_heads(e, space, choices), {}
  for name, logits in joint.load_logits(e).items():
    method = f"{JOINT}:{name}+{e.config.joint.loss}"
    described[method] = experiment.describe_joint(e, name), logits.argmax(axis=-1)
  for name in experiment.head_names(e):
    for loss, head in experiment.final_heads(e, choices, name).items():
      method = f"{name}+{loss}"
      logits = _logits(head, space.test)
      words = experiment.describe(e, method, choices)
      described[method] = words, np.asarray(logits.argmax(axis=-1))
      found[method] = head
  labels, groups = e.dataset.test_labels, classification.make_groups(e.dataset.train_counts)
  rows = [
    classification.score_method(
      method, description, predictions, labels, groups, e.seeds, e.dataset.num_classes
    )
    | {"reference": method.split("+")[0] in REFERENCES}
    for method, (description, predictions) in described.items()
  ]
  return Scored(
    rows=rows,
    predictions={method: predictions for method, (_, predictions) in described.items()},
    heads=found,
    labels=labels,
    criterion=e.config.selection.criterion,
    groups=groups,
  )


_logits = jax.jit(jax.vmap(heads.logits_of))


def _own_heads(
  e: Experiment, space: Space, choices: Mapping[str, Choice]
) -> dict[str, tuple[str, np.ndarray]]:
  """method -> (words, predictions) of the heads that the encoders were trained with."""
  tau, described = experiment.own_tau(e, choices), {}
  for loss, logits in space.own_logits.items():
    name = _own_name(e, loss)
    words = experiment.describe_own(e, loss)
    adjusted = logits - tau * experiment.log_prior(e.dataset.train_counts)
    described[name] = words, logits.argmax(axis=-1)
    described[f"{name}+logit_adjustment"] = (
      f"{words}; logits adjusted by the class prior afterwards (tau {tau:g})",
      adjusted.argmax(axis=-1),
    )
  return described


def _own_name(e: Experiment, loss: str) -> str:
  return OWN if loss == e.config.classifier.loss else f"{OWN}:{loss}"


def plain_training(e: Experiment, space: Space) -> str:
  """The method that a user would have without memdiff: cross-entropy on the data as they are."""
  if space.own_logits:
    loss = "cross_entropy" if "cross_entropy" in space.own_logits else e.config.classifier.loss
    return _own_name(e, loss)
  losses = e.config.head.losses
  return f"{REAL}+{'cross_entropy' if 'cross_entropy' in losses else losses[0]}"


def best_of(methods: list[str], scores: Mapping[str, float]) -> str:
  """The method with the best score by cross-validation; the first where there is none."""
  return max(methods, key=lambda method: scores.get(method, -1.0))


def _known_scores(recommendation: Mapping | None) -> dict[str, float]:
  known = (recommendation or {}).get("scores", {})
  return {method: entry["score"] for method, entry in known.items()}


def compared_methods(e: Experiment, recommendation: Mapping | None) -> tuple[str, str]:
  """(the method that stands for memdiff, the real-only control that it is held against).

  Their losses are chosen by cross-validation, never by the test set.
  """
  scores = _known_scores(recommendation)
  name = "memdiff" if "memdiff" in e.config.generators.names else e.config.generators.names[0]
  method = best_of([f"{name}+{loss}" for loss in e.config.head.losses], scores)
  controls = [m for m in scores if m.split("+")[0] in (REAL, OWN)]
  return method, best_of(controls or [f"{REAL}+{loss}" for loss in e.config.head.losses], scores)


def compare(scored: Scored, method: str, control: str) -> dict:
  """What hallucination adds to the real-only control, and how much the oracle would; paired.

  Every row gets its share of the gap, if there is a gap that seeds and test examples can tell from
  none.
  """
  outcome = {
    "method": method,
    "control": control,
    "reference": None,
    "gain": scored.gain(method, control),
    "headroom": None,
    "gap_closed": None,
  }
  reference = f"oracle+{method.split('+')[1]}"
  if reference in scored.predictions:
    outcome |= {"reference": reference, "headroom": scored.gain(reference, control)}
    if outcome["headroom"]["interval"][0] > 0:
      shares = scored.shares_of_room(control, reference)
      for row in scored.rows:
        row["gap_closed"] = shares[row["method"]]
      outcome["gap_closed"] = shares[method]
  return outcome


def headline(
  e: Experiment, scored: Scored, plain: str, comparison: Mapping, recommendation: Mapping | None
) -> dict:
  """What a user asks first: what to use, what it is worth, and what synthetic features add."""
  scores = _known_scores(recommendation)
  names, losses = e.config.generators.names, e.config.head.losses
  synthetic = comparison["method"]
  if scores:
    synthetic = best_of([f"{name}+{loss}" for name in names for loss in losses], scores)
  chosen, control = comparison["method"], comparison["control"]
  entry = None
  if recommendation:
    chosen, entry = recommendation["method"], recommendation["scores"][synthetic]
  reference = comparison["reference"]
  return {
    "recommended": chosen,
    "by": "cross-validation" if recommendation else "default",
    "plain": plain,
    "over_plain": {"overall": scored.gain(chosen, plain)}
    | {group.name: scored.gain(chosen, plain, group.name) for group in scored.groups},
    "synthetic": {
      "method": synthetic,
      "control": control,
      "overall": scored.gain(synthetic, control),
      "few": scored.gain(synthetic, control, "few"),
      "expected": entry and {"mean": entry["gain"], "interval": entry["interval"]},
      "recommended": chosen == synthetic and recommendation is not None,
    },
    "room": reference and {"reference": reference, "overall": comparison["headroom"]},
  }


def mark_shown(scored: Scored, first: Mapping, comparison: Mapping) -> None:
  """Marks the rows of the short table: those that the first words and the comparison speak of."""
  named = {first["recommended"], first["plain"], first["synthetic"]["method"]}
  named |= {comparison[key] for key in ("method", "control", "reference")}
  for row in scored.rows:
    row["shown"] = row["method"] in named


def compare_joint(e: Experiment, scored: Scored) -> list[dict]:
  """What each generator adds to joint training on real images alone; paired."""
  control = f"{JOINT}:{REAL}+{getattr(getattr(e.config, 'joint', None), 'loss', None)}"
  if control not in scored.predictions:
    return []
  return [
    {"method": method, "gain": scored.gain(method, control)}
    for method in scored.predictions
    if method.startswith(f"{JOINT}:") and method != control
  ]


def agreement(scored: Scored, recommendation: Mapping) -> dict:
  """How well cross-validation foresaw the test set; looked at only when all is chosen."""
  common = [m for m in recommendation["scores"] if m in scored.predictions]
  ours = [recommendation["scores"][m]["score"] for m in common]
  test = [scored.score(m) for m in common]
  return selection.rank_agreement(ours, test) | {
    "methods": len(common),
    "test_gain": scored.gain(recommendation["best"], recommendation["control"]),
    "regret_of_recommended": max(test) - scored.score(recommendation["method"]),
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
  alike, by_strength = (
    ("labels", "number"), ("features", "confidence", "nearest_index", "nearest_distance")
  )  # fmt: skip
  return {name: synthetic[name] for name in alike if name in synthetic} | {
    name: synthetic[name][:, k] for name in by_strength if name in synthetic
  }


def _synthetic(
  e: Experiment,
  choices: Mapping[str, Choice],
  name: str,
  loss: str,
  parts: Collection[str] | None = None,
) -> dict[str, np.ndarray]:
  """`of_strength` of the strength that was chosen for a generator and a loss; all or some parts."""
  if parts is not None:
    parts = ("strengths", *parts)
  return of_strength(experiment.load_synthetic(e, name, parts), choices[f"{name}+{loss}"])


def judge(e: Experiment, space: Space, choices: Mapping[str, Choice], loss: str) -> dict:
  """Quality of every generator's features, as chosen for a loss, against unseen real ones."""
  data, exemplars = e.dataset, mesh_lib.fetch(space.runs.exemplars.features)
  left_out, standardizer = mesh_lib.fetch((space.left_out, space.runs.standardizer))
  names = e.config.generators.names

  def made(name, seed):
    """[M, D]; read again for every seed, since those of all seeds and generators are large."""
    return _synthetic(e, choices, name, loss, ("features",))["features"][seed]

  def seeds():
    for number in range(len(e.seeds)):
      e.run.progress.say(f"measuring features, seed {number + 1} of {len(e.seeds)}")
      own = jax.tree.map(lambda x, n=number: x[n], standardizer)
      features = {name: own.forward(made(name, number)) for name in names}
      yield quality.Seed(exemplars[number], left_out[number], features)

  labels = {name: _synthetic(e, choices, name, loss, ("labels",))["labels"] for name in names}
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


def features_of_first_seed(
  e: Experiment, space: Space, shown: Mapping[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Kind -> (standardised features [N, D], labels [N]): real, left out and synthetic.

  Args:
    e: the experiment.
    space: its features.
    shown: synthetic features [S, M, D] and their labels, of one generator.
  """
  data, first = e.dataset, jax.tree.map(lambda x: x[0], space.runs.standardizer)
  real, left_out, synthetic = mesh_lib.fetch(
    (space.runs.exemplars.features, space.left_out, first.forward(shown["features"][0]))
  )
  return {
    "real": (real[0], data.train_labels),  # of all seeds no copy is made; `judge` reads them too
    "left out": (left_out[0], data.left_out_labels),
    "synthetic": (synthetic, shown["labels"]),
  }


def draw(
  e: Experiment,
  scored: Scored,
  comparison: Mapping,
  shown: Mapping,
  features: Mapping[str, tuple[np.ndarray, np.ndarray]],
  plane: "Future[FeaturePlane]",
) -> Iterator[tuple[str, "Figure"]]:
  """The report's figures and their names; the one that takes longest to compute is the last.

  Args:
    e: the experiment.
    scored: the table.
    comparison: of `compare`.
    shown: what the generator made that the comparison is about.
    features: of the first seed.
    plane: where they lie on the map.
  """
  from memdiff.evaluation import plots  # matplotlib takes a second

  data = e.dataset
  made = np.bincount(shown["labels"], minlength=data.num_classes)
  named = [comparison[key] for key in ("control", "method", "reference") if comparison[key]]
  yield (
    "long_tail_profile",
    plots.long_tail_profile(data.class_names, data.train_counts, made, result.group_of_class(e)),
  )
  yield "per_class_accuracy", result.accuracy_by_class(e, scored.rows, named)
  confidence = shown["confidence"][0]
  yield (
    "confidence_histogram",
    plots.confidence_histogram(confidence, shown["labels"], data.class_names),
  )
  yield "training_curves", plots.training_curves(result.training_curves(e, stages(e)))
  if comparison["gap_closed"]:
    gaps = [
      (row["method"], row["gap_closed"]["mean"], row["gap_closed"]["interval"])
      for row in scored.rows
      if row["method"].split("+")[0] not in REFERENCES
    ]
    yield "gap_closed", plots.gap_closed(gaps)
  if len(data.left_out_labels):
    near = quality.nearness(*features["synthetic"], *features["left out"])
    yield "confidence_reliability", plots.reliability(confidence, near)
  yield "feature_map", plots.feature_map(plane.result(), data.class_names)


def place_on_map(
  e: Experiment, features: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> "FeaturePlane":
  """The first seed's features on a plane; takes seconds, most of them without Python's lock."""
  from memdiff.evaluation import plots  # matplotlib takes a second

  return plots.embed(
    *features["real"],
    *features["left out"],
    *features["synthetic"],
    e.dataset.num_classes,
    max_per_class=e.config.evaluation.map_per_class,
  )


def save_recommended_head(
  e: Experiment, space: Space, scored: Scored, method: str, choices: Mapping[str, Choice]
) -> None:
  """The recommended method's head on the encoder's own features.

  kernel [S, D, C], bias [S, C], class_names [C].
  """
  head = scored.heads.get(method, space.runs.head)
  if method == f"{OWN}+logit_adjustment":
    offset = experiment.own_tau(e, choices) * experiment.log_prior(e.dataset.train_counts)
    head = head | {"bias": head["bias"] - offset[None]}
  raw = mesh_lib.fetch(jax.jit(jax.vmap(raw_head))(head, space.runs.standardizer))
  names = {"class_names": np.array(e.dataset.class_names)}
  write_arrays(e.workdir.path / "recommended_head.npz", raw | names)


def export_embeddings(e: Experiment, generator: str, made: Mapping[str, np.ndarray]) -> None:
  """The first seed's synthetic features, in the format of the file that the features came from."""
  suffix = embeddings.export_suffix(e.config.dataset.train_path)
  path = e.workdir.path / f"synthetic_embeddings{suffix}"
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
  method, control = compared_methods(e, recommendation)
  generator, _, loss = method.partition("+")
  shown = _synthetic(e, choices, generator, loss)
  features = features_of_first_seed(e, space, shown)
  del shown["features"]  # of all seeds: much memory
  with ThreadPoolExecutor(1) as pool:
    plane = pool.submit(place_on_map, e, features)  # beside all that follows
    e.run.progress.say("scoring the methods on the test set")
    scored = classify(e, space, choices)
    release_memory()
    comparison = compare(scored, method, control)
    judged = judge(e, space, choices, loss)
    chosen = recommendation["method"] if recommendation else comparison["method"]
    save_recommended_head(e, space, scored, chosen, choices)
    if isinstance(e.dataset, embeddings.LongTailEmbeddings):
      # The recommended generator's; where that is none, those of the one that was compared.
      known = chosen.split("+")[0] in e.config.generators.names
      name, _, loss = (chosen if known else comparison["method"]).partition("+")
      export_embeddings(e, name, _synthetic(e, choices, name, loss))
    if recommendation:
      recommendation = recommendation | {"agreement": agreement(scored, recommendation)}
    first = headline(e, scored, plain_training(e, space), comparison, recommendation)
    mark_shown(scored, first, comparison)
    outcome = result.record(e, scored.rows) | {
      "criterion": scored.criterion,
      "headline": first,
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
    summaries.project(e, features)
    return result.save(e, outcome, draw(e, scored, comparison, shown, features, plane))
