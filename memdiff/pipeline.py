"""Runs an experiment phase by phase; the phases of memdiff itself: what each reads and writes.

classifier     images -> encoder, head and a moving bank           classifier/<loss>/checkpoints
memory_bank    frozen encoder -> features and the refilled bank    memory_bank/features.npz, bank
diffusion      features, bank -> denoiser                          diffusion/checkpoints
hallucination  denoiser, bank -> synthetic features                hallucination/*.npz
heads          real and synthetic features -> heads                heads/<method>/checkpoints
evaluation     everything -> report.json, report.html              evaluation/
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from input_pipeline import dataset as dataset_lib
from memdiff import classification, feature_diffusion, feature_space, hallucination
from memdiff import config as config_lib
from memdiff.classifier import encoder, training
from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.errors import ConfigError
from memdiff.evaluation import phase as evaluation
from memdiff.evaluation import report, result
from memdiff.experiment import (
  Experiment,
  ExperimentConfig,
  Phase,
  classifier_stage,
  diffusion_stage,
  frozen_encoder,
  head_stage,
  last_metrics,
  load_space,
  make_pools,
)
from memdiff.runtime import environment, loop
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.checkpoint import Checkpointer
from memdiff.runtime.progress import CompileClock, Progress
from memdiff.runtime.random import base_keys
from memdiff.runtime.workdir import Workdir, write_arrays
from memdiff.runtime.writers import TensorBoard


def train_classifier(e: Experiment) -> dict:
  summary = {}
  for loss in training.trained_losses(e.config.classifier):
    folder = e.workdir.folder("classifier") / loss
    loop.train(classifier_stage(e, loss), e.run, folder)
    summary[loss] = last_metrics(folder)
  return summary


def build_memory_bank(e: Experiment) -> dict:
  """Encodes every image with the frozen encoders and refills the bank."""
  folder = e.workdir.folder("memory_bank")
  test_predictions = {}
  losses = training.trained_losses(e.config.classifier)
  for loss in reversed(losses):  # the encoder that is built upon comes last
    state, encode_chunk = frozen_encoder(e, loss)

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


def train_diffusion(e: Experiment) -> dict:
  folder = e.workdir.folder("diffusion")
  loop.train(diffusion_stage(e, load_space(e)), e.run, folder)
  return last_metrics(folder)


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


def train_heads(e: Experiment) -> dict:
  space, summary = load_space(e), {}
  for name, pool in make_pools(e, space).items():
    folder = e.workdir.folder("heads") / name
    loop.train(head_stage(e, space, name, pool), e.run, folder)
    summary[name] = last_metrics(folder)
  return summary


PHASES = (
  Phase(
    "classifier",
    "training the image classifiers",
    train_classifier,
    ("seeds", "dataset", "encoder", "classifier", "memory_bank", "loop"),
  ),
  Phase("memory_bank", "encoding all images, filling the bank", build_memory_bank, ()),
  Phase("diffusion", "training the denoiser on the features", train_diffusion, ("diffusion",)),
  Phase("hallucination", "sampling features for the tail", hallucinate, ("hallucination",)),
  Phase("heads", "training the heads again", train_heads, ("head",)),
  Phase("evaluation", "scoring and drawing", evaluation.evaluate, ("name", "evaluation")),
)


def check(settings: ExperimentConfig, data: dataset_lib.LongTailDataset) -> None:
  """Raises ConfigError where the settings of a memdiff experiment do not fit its data."""
  for loss in training.trained_losses(settings.classifier):
    if encoder.has_cosine_head(settings.encoder.backbone, loss):
      raise ConfigError(
        f"memdiff trains linear heads on features, but the loss {loss} has a cosine head; choose"
        " another config.classifier.loss, or set config.encoder.backbone.head to linear."
      )
  hallucination.plan(data.train_counts, settings.hallucination)


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of experiment: its settings, its rules, its phases in order."""

  settings: type
  check: Callable[[Any, dataset_lib.LongTailDataset], None]
  phases: tuple[Phase, ...]


KINDS = {
  "memdiff": Kind(ExperimentConfig, check, PHASES),
  "classification": Kind(
    classification.ClassificationConfig, classification.check, classification.PHASES
  ),
}


def kind_of(config: Mapping[str, Any]) -> Kind:
  """The kind that `config.experiment` names."""
  name = config.get("experiment")
  if name not in KINDS:
    raise ConfigError(f"config.experiment is {name!r}, but must be one of {', '.join(KINDS)}.")
  return KINDS[name]


def phase_config(e: Experiment, phases: tuple[Phase, ...], phase: Phase) -> dict[str, Any]:
  """The flat config that the phase's manifest is held against, earlier phases' included."""
  read = [name for p in phases[: phases.index(phase) + 1] for name in p.reads]
  everything = config_lib.as_dict(e.config)
  flat = config_lib.flatten({name: everything[name] for name in read})
  return flat | {
    "split_sha256": e.dataset.split_sha256,
    "init_from_sha256": encoder.weights_sha256(e.config.encoder),
  }


def run(config: Mapping[str, Any], workdir: str, *, tensorboard: bool, command: str) -> dict:
  """Runs an experiment from where its workdir stands to the report.

  Args:
    config: the values of the settings of its kind, which `config["experiment"]` names.
    workdir: folder of the run; made if it does not exist.
    tensorboard: whether to write TensorBoard events (needs TensorFlow).
    command: what the user typed, for the report.

  Returns:
    The report, as written to report.json.

  Raises:
    MemdiffError: with a sentence for the user.
  """
  kind = kind_of(config)
  settings = config_lib.build(kind.settings, config)
  data = dataset_lib.load(settings.dataset)
  encoder.check(settings.encoder, data)
  training.check(settings.classifier, settings.encoder, data)
  kind.check(settings, data)
  folder = Workdir(workdir)
  writer = TensorBoard(folder.path / "tensorboard", tensorboard)
  try:
    progress = Progress(len(kind.phases))
    e = Experiment(
      config=settings,
      dataset=data,
      workdir=folder,
      run=loop.Run(settings.seeds, mesh_lib.make_mesh(), settings.loop, progress, writer),
      command=command,
    )
    return _run_phases(e, kind.phases)
  finally:
    writer.close()
    folder.close()


def _run_phases(e: Experiment, phases: tuple[Phase, ...]) -> dict:
  clock, progress = CompileClock(), e.run.progress
  for phase in phases:  # a changed config is refused before any work
    if e.workdir.manifest(phase.name) is not None:
      e.workdir.begin(phase.name, phase_config(e, phases, phase))
  for number, phase in enumerate(phases, 1):
    progress.phase(number, phase.name)
    if e.workdir.begin(phase.name, phase_config(e, phases, phase)):
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
        "versions": environment.versions(),
        "metrics": metrics,
      },
    )
    progress.say(f"finished in {seconds:.1f} s, of which compiling {compile_seconds:.1f} s")
  manifests = {phase.name: e.workdir.manifest(phase.name) for phase in phases}
  written = result.write_report(e, manifests)
  print(report.text_table(written))
  print(f"\nreport: {e.workdir.path / 'report.html'}")
  return written
