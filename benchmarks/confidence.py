"""What each piece of the confidence-adaptive loss does: heads trained again with one thing changed.

  python main.py --config=configs/digits_lt.py --workdir=RUN
  python -m benchmarks.confidence --run=RUN [--generator=memdiff] --json FILE

RUN is a finished run of any experiment on features whose `head.losses` name csl. Its synthetic
features stay as they are, and every row draws the same minibatches; what is compared is how far
they are trusted and how classes weigh. A row that moves neither weights nor logits has tested
nothing, so the table says how far both move. Writes FILE and the table beside it, FILE.md.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from benchmarks import isolating, timing
from memdiff import pipeline
from memdiff.classifier import heads
from memdiff.evaluation.scores import mean_std
from memdiff.experiments import feature_heads, feature_settings, feature_store
from memdiff.experiments.base import Experiment
from memdiff.memory import feature_space
from memdiff.runtime import loop
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.workdir import write_atomically, write_json
from memdiff.synthesis import confidence as confidence_lib

_LOSS = "csl"


@dataclasses.dataclass(frozen=True)
class Variant:
  """A row: what it changes of `generators.confidence` and `head.training`, and of the filling."""

  title: str
  confidence: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  filled: bool = True


AS_RUN = Variant("as in the run")
VARIANTS = (
  AS_RUN,
  Variant("all trusted alike", {"name": "none"}),
  Variant("certainty of the encoder's head", {"name": "certainty"}),
  Variant("its probability of the class", {"name": "probability"}),
  Variant("its entropy, the letter of the design", {"name": "entropy_literal"}),
  Variant("confidence squared", {"power": 2.0}),
  Variant("calibrated on real features", {"calibrate": True}),
  Variant("not normalised within classes", {"normalize": False}),
  Variant("calibrated, not normalised", {"calibrate": True, "normalize": False}),
  Variant("class weights from real counts", {}, {"gamma_counts": "real"}),
  Variant("no class weights", {}, {"beta": 0.0}),
  Variant("class weights after half of the steps", {}, {"defer": 0.5}),
  Variant(
    "to the letter: entropy, real counts, not normalised",
    {"name": "entropy_literal", "normalize": False},
    {"gamma_counts": "real"},
  ),
  Variant("no synthetic features", filled=False),
)


def possible(e: Experiment) -> list[Variant]:
  """The variants that need nothing which the run does not have."""
  per_seed = feature_settings.has_own_head(e.config)
  return [
    v for v in VARIANTS if per_seed or v.confidence.get("name") not in confidence_lib.NEED_A_HEAD
  ]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a variant came to."""

  weights: np.ndarray | None  # [S, M] of synthetic features in the loss, of mean 1; None: without
  logits: np.ndarray  # [S, T, C] of the test set, of mean 0 over classes


def outcomes(e: Experiment, generator: str) -> dict[str, Outcome]:
  """Title of each variant -> what its heads came to."""
  space = feature_store.load_space(e)
  choices, _ = feature_store.load_selection(e)
  trained = feature_heads.head_training(e, space, choices, generator)
  rows = [i for i, loss in enumerate(trained.losses) if loss == _LOSS]
  labels = mesh_lib.replicate(e.mesh, feature_store.load_synthetic(e, generator)["labels"])

  def trust(config):
    """Confidence [R, K, M] of the generator's features, judged by `config`."""

    def of_run(arguments):
      features, exemplars, head = arguments
      known = confidence_lib.class_statistics(exemplars, head, config)
      return jax.lax.map(
        lambda x: confidence_lib.confidence(x, labels, known, head, config), features
      )

    runs = space.runs
    return jax.jit(lambda *a: jax.lax.map(of_run, a))(
      trained.data.added.features, runs.exemplars, runs.head
    )

  @jax.jit
  def logits_of(params, features):
    logits = jax.vmap(feature_space.linear_logits)(params, features)
    return logits - logits.mean(axis=-1, keepdims=True)

  found = {}
  for variant in possible(e):
    confidence = dataclasses.replace(e.config.generators.confidence, **variant.confidence)
    config = dataclasses.replace(e.config.head.training, **variant.training)
    settings = [trained.settings[i] for i in rows]
    if not variant.filled:
      settings = [dataclasses.replace(setting, fill=0) for setting in settings]
    trusted = mesh_lib.replicate(e.mesh, trust(confidence))
    added = trained.data.added.replace(confidence=trusted)
    stage = heads.make_stage(
      trained.stage.name, config, trained.data.replace(added=added), settings, e.mesh
    )
    run = dataclasses.replace(trained.run, seeds=tuple(range(len(rows))))
    with tempfile.TemporaryDirectory() as folder:
      state = loop.train(stage, run, pathlib.Path(folder))
    weights = None
    if variant.filled:
      of_setting = np.stack([mesh_lib.fetch(trusted)[s.run, s.strength] for s in settings])
      weights = of_setting * mesh_lib.fetch(stage.per_seed["gamma"])[:, mesh_lib.fetch(labels)]
      weights /= weights.mean(axis=1, keepdims=True)
    found[variant.title] = Outcome(weights, mesh_lib.fetch(logits_of(state.params, space.test)))
  return found


def summarise(found: Mapping[str, Outcome], test_labels: np.ndarray) -> list[dict[str, Any]]:
  """A row per variant: top-1, and what has moved from the run's own setting, paired by seed.

  Returns:
    {"variant", "top1_by_seed", "top1", "difference", "weights_moved": mean change of the
    weights of synthetic features, whose mean is 1, "logits_moved": root mean square of their change
    relative to the logits, "predictions_moved": share of test examples}.
  """
  first, rows = found[AS_RUN.title], []
  predicted, size = first.logits.argmax(axis=-1), np.square(first.logits).mean(axis=(1, 2))
  reference = (predicted == test_labels).mean(axis=1)
  for title, outcome in found.items():
    theirs = outcome.logits.argmax(axis=-1)
    top1 = (theirs == test_labels).mean(axis=1)
    scores = {
      "top1": top1,
      "difference": top1 - reference,
      "logits_moved": np.sqrt(np.square(outcome.logits - first.logits).mean(axis=(1, 2)) / size),
      "predictions_moved": (theirs != predicted).mean(axis=1),
    }
    if outcome.weights is not None:
      scores["weights_moved"] = np.abs(outcome.weights - first.weights).mean(axis=1)
    summary = {name: mean_std(values) for name, values in scores.items()}
    rows.append({"variant": title, "top1_by_seed": top1.tolist()} | summary)
  return rows


def markdown(result: Mapping[str, Any]) -> str:
  """The page, with the table."""
  lines = [
    "| `csl` with ... | weights move, % | logits move, % | predictions move, % | top-1 % |"
    " difference, points |",
    "|---|---|---|---|---|---|",
  ]
  for row in result["rows"]:
    same = row["variant"] == AS_RUN.title
    moved = [
      "" if same else isolating.percent(row.get(f"{name}_moved"), 2)
      for name in ("weights", "logits", "predictions")
    ]
    difference = "" if same else isolating.percent(row["difference"], 2)
    cells = [row["variant"], *moved, isolating.percent(row["top1"], 2), difference]
    lines.append(f"| {' | '.join(cells)} |")
  hardware, versions = result["hardware"], result["versions"]
  return "\n".join(
    [
      f"# Pieces of the confidence-adaptive loss: {result['name']}",
      "",
      f"`{result['generator']}`'s features as they are, heads trained with `csl`,"
      f" {result['num_seeds']} seeds, mean ± std; differences are paired by seed.",
      "",
      *lines,
      "",
      f"{hardware['cpu']}, {hardware['cpu_count']} cores; Python {versions['python']},"
      f" JAX {versions['jax']}.",
      "",
    ]
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--run", required=True, type=pathlib.Path, help="workdir of a finished run")
  parser.add_argument("--generator", default="memdiff", help="whose features")
  parser.add_argument("--json", required=True, type=pathlib.Path, help="file to write")
  arguments = parser.parse_args()
  path = arguments.run / "report.json"
  if not path.exists():
    parser.error(f"{path} does not exist; let the run finish first")
  report = json.loads(path.read_text(encoding="utf-8"))
  method = f"{arguments.generator}+{_LOSS}"
  if method not in (report.get("choices") or {}) or arguments.generator == "fasa":
    parser.error(f"the run has no {method} (fasa weighs its features by itself)")
  _, e = pipeline.open_experiment(
    report["config"], str(arguments.run), tensorboard=False, command=report["command"]
  )
  try:
    rows = summarise(outcomes(e, arguments.generator), e.dataset.test_labels)
  finally:
    e.workdir.close()
  result = {
    "name": report["name"], "generator": arguments.generator, "num_seeds": len(e.seeds),
    "rows": rows,
  } | timing.environment()  # fmt: skip
  write_json(arguments.json, result)
  page = markdown(result)
  write_atomically(arguments.json.with_suffix(".md"), page.encode())
  print(page)


if __name__ == "__main__":
  main()
