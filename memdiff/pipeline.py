"""The phases of an experiment, in order: what each reads and what it writes.

encoder        images -> encoder, head and a moving bank           encoder/<loss>/checkpoints
memory_bank    frozen encoder -> features and the refilled bank    memory_bank/features.npz, bank
diffusion      features, bank -> denoiser                          diffusion/checkpoints
hallucination  denoiser, bank -> synthetic features                hallucination/*.npz
classifier     real and synthetic features -> heads                classifier/<method>/checkpoints
evaluation     everything -> report.json, report.html              evaluation/
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import memdiff
from input_pipeline import dataset as dataset_lib
from memdiff import config as config_lib
from memdiff import feature_diffusion, feature_space, hallucination, memory_bank
from memdiff.classifier import encoder, head, losses
from memdiff.config import at_least, each
from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.diffusion.training import DiffusionConfig
from memdiff.errors import WorkdirError
from memdiff.evaluation import classification, plots, quality, report
from memdiff.runtime import loop
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.checkpoint import Checkpointer, abstract
from memdiff.runtime.progress import CompileClock, Progress
from memdiff.runtime.random import base_keys
from memdiff.runtime.workdir import Workdir, read_arrays, write_arrays, write_atomically, write_json
from memdiff.runtime.writers import TensorBoard, read_history

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  map_per_class: int = at_least(2)


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
  """Everything that decides a run's results."""

  name: str
  seeds: tuple[int, ...] = each(lambda s: 0 <= s < 2**32, "whole numbers from 0 to 2^32 - 1")
  dataset: dataset_lib.DatasetConfig
  encoder: encoder.EncoderConfig
  memory_bank: memory_bank.BankConfig
  diffusion: DiffusionConfig
  hallucination: hallucination.HallucinationConfig
  head: head.HeadConfig
  evaluation: EvaluationConfig
  loop: loop.LoopConfig

  def __post_init__(self):
    if len(set(self.seeds)) != len(self.seeds):
      raise ValueError(f"seeds are {self.seeds}, but each may stand only once.")
    if self.hallucination.num_steps > self.diffusion.schedule.num_steps:
      raise ValueError(
        f"hallucination.num_steps is {self.hallucination.num_steps}, but the diffusion has only"
        f" {self.diffusion.schedule.num_steps} steps."
      )


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A checked config with its data, devices and folder."""

  config: ExperimentConfig
  dataset: dataset_lib.LongTailDataset
  workdir: Workdir
  run: loop.Run
  command: str

  @property
  def mesh(self):
    return self.run.mesh

  @property
  def seeds(self) -> tuple[int, ...]:
    return self.config.seeds


# --- encoder ---------------------------------------------------------------------------------


def encoder_losses(config: ExperimentConfig) -> tuple[str, ...]:
  """The losses an encoder is trained with; hallucination builds on the first."""
  return tuple(dict.fromkeys((config.encoder.loss, *config.encoder.references)))


def encoder_stage(e: Experiment, loss: str) -> loop.Stage:
  shared = encoder.device_data(e.dataset, e.mesh)
  return encoder.make_stage(e.config.encoder, e.config.memory_bank, loss, e.dataset, shared, e.mesh)


def train_encoder(e: Experiment) -> dict:
  summary = {}
  for loss in encoder_losses(e.config):
    folder = e.workdir.folder("encoder") / loss
    loop.train(encoder_stage(e, loss), e.run, folder)
    summary[loss] = last_metrics(folder)
  return summary


def last_metrics(folder: pathlib.Path) -> dict[str, float]:
  """The mean over seeds of every metric's last value, of a finished stage."""
  last = {}
  for record in read_history(folder / "metrics.jsonl"):
    for name, values in record["metrics"].items():
      last[f"{record['kind']}_{name}"] = float(np.mean(values))
  return last


# --- memory bank -----------------------------------------------------------------------------


def build_memory_bank(e: Experiment) -> dict:
  """Encodes every image with the frozen encoders and refills the bank."""
  folder = e.workdir.folder("memory_bank")
  model = encoder.make_model(e.config.encoder.backbone, e.dataset.num_classes)
  test_predictions = {}
  for loss in reversed(encoder_losses(e.config)):  # the encoder that is built upon comes last
    stage = encoder_stage(e, loss)
    state = loop.load_final(stage, e.run, e.workdir.folder("encoder") / loss)

    @jax.jit
    def encode_chunk(images, state=state, shared=stage.shared):
      images = encoder.normalize(mesh_lib.shard_batch(images, e.mesh), shared)
      return jax.vmap(lambda s: encoder.apply_eval(model, s, images)[1])(state)

    test = feature_space.encode(encode_chunk, e.dataset.test_images)
    own_head = jax.device_get(state.params["head"])
    logits = test @ own_head["kernel"] + own_head["bias"][:, None]
    test_predictions[f"predictions_{loss}"] = logits.argmax(axis=-1)
  train = feature_space.encode(encode_chunk, e.dataset.train_images)
  left_out = feature_space.encode(encode_chunk, e.dataset.left_out_images)
  bank = feature_space.fill_bank(
    train,
    e.dataset.train_labels,
    e.dataset.num_classes,
    e.seeds,
    e.config.memory_bank,
    e.mesh,
  )
  checkpointer = Checkpointer(folder / "bank", keep=1)
  checkpointer.save(0, bank)
  checkpointer.close()
  write_arrays(
    folder / "features.npz",
    {"train": train, "left_out": left_out, "test": test, **own_head, **test_predictions},
  )
  return {"stored_features": int(np.minimum(bank.seen, bank.slots.shape[2]).sum())}


def load_bank(e: Experiment) -> memory_bank.MemoryBank:
  """The refilled bank, in the encoder's units, with a leading axis of seeds."""
  config = e.config.memory_bank
  dim = e.config.encoder.backbone.widths[-1]
  shapes = jax.eval_shape(
    jax.vmap(lambda _: memory_bank.create(e.dataset.num_classes, config.num_slots, dim)),
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
  """The feature space as later phases need it: standardised, on the devices, seeds leading."""

  standardizer: feature_space.Standardizer
  train: jax.Array  # [S, N, D]
  left_out: jax.Array
  test: jax.Array
  head: dict[str, jax.Array]  # the encoder's own head on standardised features
  bank: memory_bank.MemoryBank
  test_predictions: dict[str, np.ndarray]  # loss -> [S, T], of the encoders' own heads


def load_space(e: Experiment) -> Space:
  arrays = read_arrays(e.workdir.folder("memory_bank") / "features.npz")
  raw = mesh_lib.replicate(e.mesh, {n: arrays[n] for n in ("train", "left_out", "test")})
  own_head = mesh_lib.replicate(e.mesh, {n: arrays[n] for n in ("kernel", "bias")})
  standardizer = jax.jit(jax.vmap(feature_space.fit_standardizer))(raw["train"])
  forward = jax.jit(jax.vmap(lambda s, x: s.forward(x)))
  bank = jax.jit(jax.vmap(lambda b, s: memory_bank.standardize(b, s.mean, s.scale)))
  return Space(
    standardizer=standardizer,
    train=forward(standardizer, raw["train"]),
    left_out=forward(standardizer, raw["left_out"]),
    test=forward(standardizer, raw["test"]),
    head=jax.jit(jax.vmap(head.standardized_head))(own_head, standardizer),
    bank=bank(load_bank(e), standardizer),
    test_predictions={
      name.removeprefix("predictions_"): value
      for name, value in arrays.items()
      if name.startswith("predictions_")
    },
  )


# --- diffusion -------------------------------------------------------------------------------


def diffusion_stage(e: Experiment, space: Space) -> loop.Stage:
  own = feature_diffusion.FeatureData(features=space.train, bank=space.bank)
  return feature_diffusion.make_stage(
    e.config.diffusion, own, e.dataset.train_labels, e.dataset.num_classes, e.mesh
  )


def train_diffusion(e: Experiment) -> dict:
  folder = e.workdir.folder("diffusion")
  loop.train(diffusion_stage(e, load_space(e)), e.run, folder)
  return last_metrics(folder)


# --- hallucination ---------------------------------------------------------------------------


def hallucinate(e: Experiment) -> dict:
  space = load_space(e)
  state = loop.load_final(diffusion_stage(e, space), e.run, e.workdir.folder("diffusion"))
  numbers = hallucination.plan(e.dataset.train_counts, e.config.hallucination)
  dim = space.train.shape[-1]
  denoiser = feature_diffusion.make_denoiser(e.config.diffusion, e.dataset.num_classes, dim)
  schedule = NoiseSchedule(e.config.diffusion.schedule)

  @jax.jit
  @functools.partial(jax.vmap, in_axes=(0, 0, 0, 0, 0, 0, None))
  def make(params, bank, standardizer, own_head, features, key, labels):
    return hallucination.hallucinate(
      denoiser, params, schedule, bank, standardizer, own_head, features, labels, numbers, key,
      e.config.hallucination, e.config.diffusion.prediction, e.mesh,
    )  # fmt: skip

  with e.run.progress.compiling(f"the sampler, and sampling {numbers.sum()} features per seed"):
    synthetic = make(
      state.ema_params,
      space.bank,
      space.standardizer,
      space.head,
      space.train,
      base_keys(e.seeds, "hallucination"),
      mesh_lib.replicate(e.mesh, e.dataset.train_labels),
    )
    arrays = jax.device_get(vars(synthetic))
  arrays["labels"] = arrays["labels"][0]
  arrays["number"] = arrays["number"][0]
  arrays["num_exemplars"] = arrays["num_exemplars"][0]
  arrays["seeds"] = np.asarray(e.seeds)
  write_arrays(e.workdir.folder("hallucination") / "synthetic_features.npz", arrays)
  return {
    "features_per_seed": int(numbers.sum()),
    "mean_confidence": float(arrays["confidence"].mean()),
  }


def load_synthetic(e: Experiment) -> dict[str, np.ndarray]:
  """What `hallucinate` wrote; features [S, M, D] in the encoder's units, labels [M], ..."""
  return read_arrays(e.workdir.folder("hallucination") / "synthetic_features.npz")


# --- classifier ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pool:
  """Features added to the real ones when a head is trained."""

  description: str
  features: jax.Array  # [S, M, D] standardised
  labels: np.ndarray  # [M] int32
  confidence: np.ndarray  # [S, M]


def oracle_rows(left_out_labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
  """Rows of the left-out set: as many per class as were hallucinated, or all there are."""
  rows = [np.flatnonzero(left_out_labels == c)[:n] for c, n in enumerate(numbers)]
  return np.concatenate(rows)


def make_pools(e: Experiment, space: Space) -> dict[str, Pool]:
  """The methods that train a head: name -> what is added to the real features."""
  synthetic = load_synthetic(e)
  features = jax.jit(jax.vmap(lambda s, x: s.forward(x)))(
    space.standardizer, mesh_lib.replicate(e.mesh, synthetic["features"])
  )
  numbers = hallucination.plan(e.dataset.train_counts, e.config.hallucination)
  rows = oracle_rows(e.dataset.left_out_labels, numbers)
  num_seeds = len(e.seeds)
  return {
    "csl_retrain": Pool(
      "the CSL encoder, its head trained again with CSL on real features only (the control)",
      features[:, :0],
      synthetic["labels"][:0],
      np.ones((num_seeds, 0), np.float32),
    ),
    "memdiff": Pool(
      "the same head training with hallucinated tail features, trusted by their confidence",
      features,
      synthetic["labels"],
      synthetic["confidence"],
    ),
    "oracle": Pool(
      "the same with real, left-out features instead: the most that hallucination can reach",
      space.left_out[:, rows],
      e.dataset.left_out_labels[rows],
      np.ones((num_seeds, len(rows)), np.float32),
    ),
  }


def head_stage(e: Experiment, space: Space, name: str, pool: Pool) -> loop.Stage:
  own = head.HeadData(
    features=space.train,
    added=pool.features,
    confidence=mesh_lib.replicate(e.mesh, pool.confidence),
    test_features=space.test,
    start=space.head,
  )
  return head.make_stage(
    name,
    e.config.head,
    own,
    e.dataset.train_labels,
    pool.labels,
    e.dataset.test_labels,
    e.dataset.num_classes,
    e.mesh,
  )


def train_classifier(e: Experiment) -> dict:
  space, summary = load_space(e), {}
  for name, pool in make_pools(e, space).items():
    folder = e.workdir.folder("classifier") / name
    loop.train(head_stage(e, space, name, pool), e.run, folder)
    summary[name] = last_metrics(folder)
  return summary


# --- evaluation ------------------------------------------------------------------------------


def classify(e: Experiment, space: Space) -> tuple[list[dict], dict[str, np.ndarray]]:
  """The table's rows, and per-seed top-1 accuracy [S] by method."""
  labels = e.dataset.test_labels
  described = {
    loss: (f"encoder and head trained with {losses.LOSSES[loss].description}", predictions)
    for loss, predictions in space.test_predictions.items()
  }
  for name, pool in make_pools(e, space).items():
    folder = e.workdir.folder("classifier") / name
    state = loop.load_final(head_stage(e, space, name, pool), e.run, folder)
    logits = jax.jit(jax.vmap(head.logits_of))(state.params, space.test)
    described[name] = pool.description, np.asarray(logits.argmax(axis=-1))
  groups = classification.make_groups(e.dataset.train_counts)
  rows = [
    classification.score_method(
      method, description, predictions, labels, groups, e.seeds, e.dataset.num_classes
    )
    for method, (description, predictions) in described.items()
  ]
  top1 = {method: (p == labels).mean(axis=1) for method, (_, p) in described.items()}
  return rows, top1


def compare(top1: Mapping[str, np.ndarray]) -> dict:
  """What hallucination adds to the real-only control, and how much the oracle would; paired."""
  gain = top1["memdiff"] - top1["csl_retrain"]
  headroom = top1["oracle"] - top1["csl_retrain"]
  gap_closed = None
  if (headroom > 0).all():
    gap_closed = classification.mean_std(gain / headroom)
  return {
    "method": "memdiff",
    "control": "csl_retrain",
    "reference": "oracle",
    "gain": classification.mean_std(gain),
    "headroom": classification.mean_std(headroom),
    "gap_closed": gap_closed,
  }


def training_curves(e: Experiment) -> list[dict]:
  """Loss and accuracy of every stage from its metrics.jsonl, mean and deviation over seeds."""
  stages = [f"encoder/{loss}" for loss in encoder_losses(e.config)]
  stages += ["diffusion", "classifier/csl_retrain", "classifier/memdiff", "classifier/oracle"]
  curves = []
  for stage in stages:
    series: dict[str, list] = {}
    for record in read_history(e.workdir.path / stage / "metrics.jsonl"):
      for name, values in record["metrics"].items():
        kind = "test " if record["kind"] == "eval" else ""
        series.setdefault(kind + name, []).append((record["step"], np.mean(values), np.std(values)))
    for metric, points in series.items():
      step, mean, std = zip(*points, strict=True)
      curves.append(
        {
          "stage": stage,
          "metric": metric,
          "step": step,
          "mean": np.array(mean),
          "std": np.array(std),
        }
      )
  return curves


def draw(e: Experiment, space: Space, rows: list[dict], synthetic: Mapping[str, np.ndarray]):
  """The report's figures by name; the feature map shows the first seed."""
  data = e.dataset
  groups = classification.make_groups(data.train_counts)
  group_of_class = [next(g.name for g in groups if c in g.classes) for c in range(data.num_classes)]
  made = np.bincount(synthetic["labels"], minlength=data.num_classes)
  first = jax.tree.map(lambda x: x[0], space.standardizer)
  return {
    "long_tail_profile": plots.long_tail_profile(
      data.class_names, data.train_counts, made, group_of_class
    ),
    "per_class_accuracy": plots.per_class_accuracy(
      data.class_names,
      data.train_counts,
      [
        (r["method"], np.array(r["per_class_top1"]["mean"]), np.array(r["per_class_top1"]["std"]))
        for r in rows
        if r["method"] in ("csl_retrain", "memdiff", "oracle")
      ],
    ),
    "feature_map": plots.feature_map(
      np.asarray(space.train[0]),
      data.train_labels,
      np.asarray(space.left_out[0]),
      data.left_out_labels,
      np.asarray(first.forward(synthetic["features"][0])),
      synthetic["labels"],
      data.class_names,
      seed=0,
      max_per_class=e.config.evaluation.map_per_class,
    ),
    "confidence_histogram": plots.confidence_histogram(
      synthetic["confidence"][0], synthetic["labels"], data.class_names
    ),
    "training_curves": plots.training_curves(training_curves(e)),
  }


def evaluate(e: Experiment) -> dict:
  """Writes report.json, report.html, the figures, and TensorBoard's pictures and table."""
  space, synthetic, data = load_space(e), load_synthetic(e), e.dataset
  e.run.progress.say("scoring the methods on the test set")
  rows, top1 = classify(e, space)
  e.run.progress.say("measuring the hallucinated features against unseen real ones")
  forward = jax.jit(jax.vmap(lambda s, x: s.forward(x)))
  made = np.asarray(forward(space.standardizer, synthetic["features"]))
  measured = quality.measure(
    np.asarray(space.train),
    data.train_labels,
    np.asarray(space.left_out),
    data.left_out_labels,
    made,
    synthetic["labels"],
    data.num_classes,
  )
  groups = classification.make_groups(data.train_counts)
  result = {
    "schema": SCHEMA,
    "name": e.config.name,
    "command": e.command,
    "config": config_lib.as_dict(e.config),
    "versions": versions(),
    "hardware": hardware(),
    "dataset": {
      "name": data.name,
      "num_classes": data.num_classes,
      "class_names": list(data.class_names),
      "train_counts": data.train_counts.tolist(),
      "left_out_counts": np.bincount(data.left_out_labels, minlength=data.num_classes).tolist(),
      "test_count": len(data.test_labels),
      "split_sha256": data.split_sha256,
      "imbalance": data.imbalance,
    },
    "groups": [dataclasses.asdict(g) | {"classes": list(g.classes)} for g in groups],
    "classification": rows,
    "comparison": compare(top1),
    "features": measured,
    "synthetic_counts": np.bincount(synthetic["labels"], minlength=data.num_classes).tolist(),
  }
  e.run.progress.say("drawing")
  figures = draw(e, space, rows, synthetic)
  folder = e.workdir.folder("evaluation")
  for name, figure in figures.items():
    write_atomically(folder / f"{name}.png", plots.to_png(figure, dpi=150))
    e.run.tensorboard.pictures(0, {f"report/{name}": plots.to_rgb(figure, dpi=100)})
  for row in rows:
    scores = {k: v["mean"] for k, v in row.items() if k in ("top1", "many", "few", "macro_f1")}
    e.run.tensorboard.scalars(0, {f"table/{row['method']}/{k}": v for k, v in scores.items()})
  e.run.tensorboard.hparams(config_lib.flatten(config_lib.as_dict(e.config)))
  write_json(folder / "result.json", result)
  return {row["method"]: row["top1"] for row in rows}


def write_report(e: Experiment) -> dict:
  """report.json and report.html from the evaluation's result and the manifests' timings."""
  folder = e.workdir.folder("evaluation")
  result = json.loads((folder / "result.json").read_text())
  phases = {
    phase.name: {key: e.workdir.manifest(phase.name)[key] for key in ("seconds", "compile_seconds")}
    for phase in PHASES
  }
  result["timing"] = {
    "phases": phases,
    "total_seconds": sum(p["seconds"] for p in phases.values()),
    "total_compile_seconds": sum(p["compile_seconds"] for p in phases.values()),
  }
  pictures = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.png"))}
  write_json(e.workdir.path / "report.json", result)
  html = report.render_html(result, pictures)
  write_atomically(e.workdir.path / "report.html", html.encode())
  return result


def versions() -> dict[str, str]:
  """Versions of what decides the numbers."""
  packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn")
  found = {name: importlib.metadata.version(name) for name in packages}
  return {"memdiff": memdiff.__version__, "python": platform.python_version()} | found


def hardware() -> dict[str, Any]:
  device = jax.devices()[0]
  return {
    "platform": device.platform,
    "device_kind": device.device_kind,
    "devices": jax.device_count(),
    "processes": jax.process_count(),
    "cpu_count": os.cpu_count(),
  }


# --- the run ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Phase:
  name: str
  title: str  # for the user, when it starts
  work: Callable[[Experiment], dict]  # returns metrics for the manifest
  reads: tuple[str, ...]  # parts of the config that decide its result, beyond earlier phases'


PHASES = (
  Phase(
    "encoder",
    "training the image classifiers",
    train_encoder,
    ("seeds", "dataset", "encoder", "memory_bank", "loop"),
  ),
  Phase("memory_bank", "encoding all images, filling the bank", build_memory_bank, ()),
  Phase("diffusion", "training the denoiser on the features", train_diffusion, ("diffusion",)),
  Phase("hallucination", "sampling features for the tail", hallucinate, ("hallucination",)),
  Phase("classifier", "training the heads again", train_classifier, ("head",)),
  Phase("evaluation", "scoring and drawing", evaluate, ("name", "evaluation")),
)


def phase_config(e: Experiment, phase: Phase) -> dict[str, Any]:
  """The flat config that the phase's manifest is held against, earlier phases' included."""
  read = [name for p in PHASES[: PHASES.index(phase) + 1] for name in p.reads]
  everything = config_lib.as_dict(e.config)
  flat = config_lib.flatten({name: everything[name] for name in read})
  return flat | {"split_sha256": e.dataset.split_sha256}


def run(config: Mapping[str, Any], workdir: str, *, tensorboard: bool, command: str) -> dict:
  """Runs an experiment from where its workdir stands to the report.

  Args:
    config: the values of an ExperimentConfig.
    workdir: folder of the run; made if it does not exist.
    tensorboard: whether to write TensorBoard events (needs TensorFlow).
    command: what the user typed, for the report.

  Returns:
    The report, as written to report.json.

  Raises:
    MemdiffError: with a sentence for the user.
  """
  settings = config_lib.build(ExperimentConfig, config)
  data = dataset_lib.load(settings.dataset)
  encoder.check(settings.encoder, data)
  hallucination.plan(data.train_counts, settings.hallucination)
  folder = Workdir(workdir)
  writer = TensorBoard(folder.path / "tensorboard", tensorboard)
  try:
    progress = Progress(len(PHASES))
    e = Experiment(
      config=settings,
      dataset=data,
      workdir=folder,
      run=loop.Run(settings.seeds, mesh_lib.make_mesh(), settings.loop, progress, writer),
      command=command,
    )
    return _run_phases(e)
  finally:
    writer.close()
    folder.close()


def _run_phases(e: Experiment) -> dict:
  clock, progress = CompileClock(), e.run.progress
  for phase in PHASES:  # a changed config is refused before any work
    if e.workdir.manifest(phase.name) is not None:
      e.workdir.begin(phase.name, phase_config(e, phase))
  for number, phase in enumerate(PHASES, 1):
    progress.phase(number, phase.name)
    if e.workdir.begin(phase.name, phase_config(e, phase)):
      progress.say("finished earlier")
      continue
    progress.say(phase.title)
    start, compiled = time.perf_counter(), clock.seconds
    metrics = phase.work(e)
    seconds, compile_seconds = time.perf_counter() - start, clock.seconds - compiled
    e.workdir.finish(
      phase.name,
      {
        "seconds": round(seconds, 3),
        "compile_seconds": round(compile_seconds, 3),
        "versions": versions(),
        "metrics": metrics,
      },
    )
    progress.say(f"finished in {seconds:.1f} s, of which compiling {compile_seconds:.1f} s")
  result = write_report(e)
  print(report.text_table(result))
  print(f"\nreport: {e.workdir.path / 'report.html'}")
  return result
