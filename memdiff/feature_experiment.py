"""The experiment on features: generators against each other, on any encoder or on embeddings.

Two kinds share it. `memdiff` trains (or reads) an image encoder first; `features` begins with
embeddings from a file.

classifier     images -> encoder, head and a moving bank              classifier/<loss>/checkpoints
memory_bank    frozen encoder, or embeddings -> features and bank     memory_bank/features.npz, bank
diffusion      features, bank -> denoisers                            diffusion/<generator>
selection      training features -> settings, recommendation          selection/choices.json
hallucination  denoisers, bank -> synthetic features                  hallucination/*.npz
heads          real and synthetic features -> heads                   heads/<generator>/checkpoints
joint          images and synthetic features -> encoders and heads    joint/<generator>/round_<n>
evaluation     everything -> report.json, report.html                 evaluation/

A *method* is a generator with a loss, `memdiff+balanced_softmax`. `real` is no generator at all.
Two references use what no method may: `oracle` adds the real features that the long tail left out,
`unseen_exemplars` trains on as many left-out features as there are training ones, in their place.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import dataset as dataset_lib
from input_pipeline import embeddings
from input_pipeline.long_tail import LongTailLabels
from memdiff import feature_space, generators, joint, memory_bank, selection, synthetic
from memdiff.classifier import encoder, heads, losses, training
from memdiff.config import at_least, one_of, some_of
from memdiff.errors import ConfigError, WorkdirError
from memdiff.experiment import (
  Experiment,
  Phase,
  check_seeds,
  classifier_stage,
  forward_images,
  last_metrics,
  load_classifier,
  seeds_field,
)
from memdiff.feature_diffusion import DiffusionConfig
from memdiff.feature_space import FeatureRuns
from memdiff.generators import GeneratorsConfig, Workshop
from memdiff.hallucination import SamplerConfig, check_conditions
from memdiff.runtime import loop
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.checkpoint import Checkpointer, abstract
from memdiff.runtime.progress import CompileClock, Progress
from memdiff.runtime.workdir import read_arrays, write_arrays, write_json
from memdiff.selection import SelectionConfig

REAL = "real"
OWN = "own_head"
REFERENCES = {
  "oracle": "real features that the long tail left out: the most that hallucination can reach",
  "unseen_exemplars": "as many left-out features in place of the training ones",
}


@dataclasses.dataclass(frozen=True)
class MethodsConfig:
  """How heads are trained on what the generators make."""

  losses: tuple[str, ...] = some_of(heads.LOSSES)
  exponents: tuple[float, ...]
  training: heads.HeadConfig

  def __post_init__(self):
    if not self.losses:
      raise ValueError("losses is empty, but heads must be trained by one.")
    if not self.exponents or any(not 0 <= e <= 1 for e in self.exponents):
      raise ValueError(f"exponents are {self.exponents}, but must be numbers from 0 to 1.")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  map_per_class: int = at_least(2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureConfig:
  """Everything that decides the results of an experiment on embeddings."""

  experiment: str = one_of(("features",))
  name: str
  seeds: tuple[int, ...] = seeds_field()
  dataset: embeddings.EmbeddingsConfig
  memory_bank: memory_bank.BankConfig
  diffusion: DiffusionConfig
  hallucination: SamplerConfig
  generators: GeneratorsConfig
  head: MethodsConfig
  selection: SelectionConfig
  evaluation: EvaluationConfig
  loop: loop.LoopConfig
  execution: loop.ExecutionConfig

  def __post_init__(self):
    check_seeds(self.seeds)
    check_conditions(self.diffusion, self.hallucination)
    if self.hallucination.num_steps > self.diffusion.schedule.num_steps:
      raise ValueError(
        f"hallucination.num_steps is {self.hallucination.num_steps}, but the diffusion has only"
        f" {self.diffusion.schedule.num_steps} steps."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemdiffConfig(FeatureConfig):
  """Everything that decides the results of an experiment on images."""

  experiment: str = one_of(("memdiff",))
  dataset: dataset_lib.DatasetConfig
  encoder: encoder.EncoderConfig
  classifier: training.ClassifierConfig
  joint: joint.JointConfig


def has_own_head(config: FeatureConfig) -> bool:
  """Whether the features come with a linear head that was trained on them."""
  if not isinstance(config, MemdiffConfig) or config.encoder.backbone.taps:
    return False
  return config.classifier.num_epochs > 0 or config.encoder.init_head


def check(config: FeatureConfig, data: LongTailLabels) -> None:
  """Raises ConfigError where the settings do not fit each other or the data."""
  generators.plan(data.train_counts, config.generators)
  if not has_own_head(config):
    if config.head.training.start == "encoder":
      raise ConfigError(
        "config.head.training.start is encoder, but these features come without a head; set it to"
        " zeros."
      )
    confidence = config.generators.confidence.name
    if confidence in synthetic.NEED_A_HEAD:
      raise ConfigError(
        f"config.generators.confidence.name is {confidence}, which asks the encoder's own head, but"
        " these features come without one; use cosine or none."
      )
  if config.selection.folds and data.train_counts.max() < 2:
    raise ConfigError(
      "config.selection.folds asks for cross-validation, but no class has two examples; set it to"
      " 0."
    )


def check_memdiff(config: MemdiffConfig, data: dataset_lib.LongTailDataset) -> None:
  check(config, data)
  joint.check(config.joint, config.classifier, streamed=data.streamed)
  for loss in training.trained_losses(config.classifier):
    if encoder.has_cosine_head(config.encoder.backbone, loss):
      raise ConfigError(
        f"memdiff trains linear heads on features, but the loss {loss} has a cosine head; choose"
        " another config.classifier.loss, or set config.encoder.backbone.head to linear."
      )
  retrains = config.selection.folds and config.selection.encoder == "retrained"
  if retrains and config.classifier.num_epochs == 0:
    raise ConfigError(
      "config.selection.encoder is retrained, but config.classifier.num_epochs is 0; set it to"
      " frozen."
    )
  if retrains and data.streamed:
    raise ConfigError(
      f"config.selection.encoder is retrained, but {data.name} is streamed from disk; set it to"
      " frozen, or config.selection.folds to 0."
    )


def check_features(config: FeatureConfig, data: embeddings.LongTailEmbeddings) -> None:
  check(config, data)
  if config.selection.encoder == "retrained":
    raise ConfigError(
      "config.selection.encoder is retrained, but embeddings have no encoder to train; set it to"
      " frozen."
    )


# --- features --------------------------------------------------------------------------------


def train_classifier(e: Experiment) -> dict:
  summary = {}
  for loss in training.trained_losses(e.config.classifier):
    folder = e.workdir.folder("classifier") / loss
    loop.train(classifier_stage(e, loss), e.run, folder)
    summary[loss] = last_metrics(folder)
  return summary


def encode_memory_bank(e: Experiment) -> dict:
  """Encodes every image with the frozen encoders and fills the bank."""
  arrays, data = {}, e.dataset
  for loss in reversed(training.trained_losses(e.config.classifier)):  # the first comes last
    state = load_classifier(e, loss)
    if e.config.classifier.num_steps(len(data.train_labels)) == 0:  # alike for all seeds
      state = jax.tree.map(lambda x: x[:1], state)
    logits, arrays["test"] = forward_images(e, loss, state, data.test_images)
    if has_own_head(e.config):
      arrays |= {f"logits_{loss}": logits} | mesh_lib.fetch(state.params["head"])
  _, arrays["train"] = forward_images(e, loss, state, data.train_images)
  _, arrays["left_out"] = forward_images(e, loss, state, data.left_out_images)
  return _fill_memory_bank(e, arrays)


def read_memory_bank(e: Experiment) -> dict:
  """Takes embeddings as features and fills the bank."""
  parts = ("train", "left_out", "test")
  return _fill_memory_bank(e, {n: getattr(e.dataset, f"{n}_features")[None] for n in parts})


def say_constant_columns(progress: Progress, features: np.ndarray) -> None:
  """In one line, if [N, D] has any."""
  constant = feature_space.constant_columns(features)
  if len(constant):
    progress.say(
      f"{len(constant)} of {features.shape[1]} columns are constant in the training data and tell"
      f" nothing apart; the first is column {constant[0]}, counted from 0"
    )


def _fill_memory_bank(e: Experiment, arrays: dict[str, np.ndarray]) -> dict:
  folder = e.workdir.folder("memory_bank")
  say_constant_columns(e.run.progress, arrays["train"][0])
  bank = feature_space.fill_bank(
    arrays["train"],
    np.broadcast_to(e.dataset.train_labels, (len(e.seeds), len(e.dataset.train_labels))),
    e.dataset.num_classes,
    e.seeds,
    e.config.memory_bank,
    e.mesh,
  )
  checkpointer = Checkpointer(folder / "bank", keep=1)
  checkpointer.save(0, bank)
  checkpointer.close()
  write_arrays(folder / "features.npz", arrays)
  stored = np.minimum(mesh_lib.fetch(bank.seen), bank.slots.shape[2]).sum()
  return {"stored_features": int(stored), "feature_dim": arrays["train"].shape[-1]}


def _for_seeds(e: Experiment, array: np.ndarray) -> np.ndarray:
  """Arrays of one encoder that serves all seeds, once per seed."""
  return np.broadcast_to(array, (len(e.seeds), *array.shape[1:]))


def load_features(e: Experiment) -> dict[str, np.ndarray]:
  """features.npz: train, left_out, test [1 or S, n, D], and what the encoder's own head says."""
  return read_arrays(e.workdir.folder("memory_bank") / "features.npz")


def load_bank(e: Experiment, feature_dim: int) -> memory_bank.MemoryBank:
  """The filled bank, in the encoder's units, with a leading axis of seeds."""
  config = e.config.memory_bank
  shapes = jax.eval_shape(
    jax.vmap(lambda _: memory_bank.create(e.dataset.num_classes, config.num_slots, feature_dim)),
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
  """The feature space of all seeds: standardised, on the devices."""

  runs: FeatureRuns
  left_out: jax.Array  # [S, L, D]
  test: jax.Array  # [S, T, D]
  own_logits: dict[str, np.ndarray]  # loss -> [S, T, C], of the encoders' own heads


def load_space(e: Experiment) -> Space:
  arrays, labels = load_features(e), e.dataset.train_labels
  head = None
  if "kernel" in arrays:
    head = {name: _for_seeds(e, arrays[name]) for name in ("kernel", "bias")}
  runs = feature_space.make_runs(
    arrays["train"],
    np.broadcast_to(labels, (len(e.seeds), len(labels))),
    load_bank(e, arrays["train"].shape[-1]),
    head,
    e.dataset.num_classes,
    e.mesh,
  )
  return Space(
    runs=runs,
    left_out=feature_space.standardize(runs.standardizer, arrays["left_out"], e.mesh),
    test=feature_space.standardize(runs.standardizer, arrays["test"], e.mesh),
    own_logits={
      name.removeprefix("logits_"): _for_seeds(e, value)
      for name, value in arrays.items()
      if name.startswith("logits_")
    },
  )


# --- denoisers -------------------------------------------------------------------------------


def workshop(e: Experiment) -> Workshop:
  config = e.config
  return Workshop(config.generators, config.diffusion, config.hallucination, e.dataset.num_classes)


def train_denoisers(e: Experiment) -> dict:
  space, summary, clock = load_space(e), {}, CompileClock()
  for name in e.config.generators.names:
    folder = e.workdir.folder("diffusion") / name
    spent = clock.start()
    generators.train(name, workshop(e), space.runs, e.run, folder)
    if folder.exists():
      summary[name] = last_metrics(folder) | {"seconds": spent()}
  return summary


# --- selection -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Folds:
  """The runs of cross-validation and what is held out in each."""

  runs: FeatureRuns
  run: loop.Run
  held_out: np.ndarray  # [R, B] rows of the training set, -1 where there is none
  features: jax.Array  # [R, B, D] of them, standardised
  judged: selection.Judged
  own_logits: np.ndarray | None  # [R, B, C] of the folds' own heads, where they were trained so


def make_folds(e: Experiment) -> Folds:
  """Deals the training set, trains encoders where asked, and builds the runs."""
  config, labels = e.config.selection, e.dataset.train_labels
  train, held_out = selection.fold_rows(labels, config)
  run = dataclasses.replace(e.run, seeds=tuple(range(config.num_runs)))
  if config.encoder == "retrained":
    features, head = _encode_folds(e, run, train)
  else:
    arrays, head = load_features(e), None
    features = arrays["train"][:1]
    if "kernel" in arrays:
      head = {n: np.repeat(arrays[n][:1], config.num_runs, axis=0) for n in ("kernel", "bias")}
  features = np.broadcast_to(features, (config.num_runs, *features.shape[1:]))

  def take(rows):
    """[R, n, D] of rows [R, n]; zeros if a row is -1."""
    taken = np.take_along_axis(features, np.maximum(rows, 0)[:, :, None], axis=1)
    taken[rows < 0] = 0.0
    return taken

  num_classes = e.dataset.num_classes
  run_labels = np.where(train >= 0, labels[np.maximum(train, 0)], num_classes)
  run_features, held_features = take(train), take(held_out)
  bank = feature_space.fill_bank(
    run_features, run_labels, num_classes, run.seeds, e.config.memory_bank, e.mesh
  )
  runs = feature_space.make_runs(run_features, run_labels, bank, head, num_classes, e.mesh)
  own_logits = None
  if config.encoder == "retrained" and head is not None:
    own_logits = held_features @ head["kernel"] + head["bias"][:, None]
  return Folds(
    runs=runs,
    run=run,
    held_out=held_out,
    features=feature_space.standardize(runs.standardizer, held_features, e.mesh),
    judged=selection.judged_examples(held_out, labels, config.folds),
    own_logits=own_logits,
  )


def _encode_folds(e: Experiment, run: loop.Run, train: np.ndarray):
  """Features [R, N, D] of all training images by encoders that saw their fold's part, and heads."""
  loss = e.config.classifier.loss
  # Rows that pad a fold become a second copy of its first, which is of the largest class.
  rows = np.where(train >= 0, train, train[:, :1])
  stage = dataclasses.replace(classifier_stage(e, loss, rows=rows), name="selection/encoder")
  folder = e.workdir.folder("selection") / "encoder"
  loop.train(stage, run, folder)
  state = loop.load_final(stage, run, folder)
  _, features = forward_images(e, loss, state, e.dataset.train_images)
  head = mesh_lib.fetch(state.params["head"]) if has_own_head(e.config) else None
  return features, head


@dataclasses.dataclass(frozen=True)
class Choice:
  """How a method is set: what cross-validation chooses."""

  strength: float
  fill: int
  exponent: float


def candidates(e: Experiment, name: str) -> list[Choice]:
  """The settings of a generator, the ones to take without cross-validation first."""
  exponents = e.config.head.exponents
  if name == REAL:
    return [Choice(0.0, 0, exponent) for exponent in exponents]
  strengths = generators.strengths(name, workshop(e))
  fills = generators.fills(name, e.config.generators)
  return [Choice(s, f, x) for s in strengths for f in fills for x in exponents]


def methods(e: Experiment) -> list[str]:
  """All methods that may be recommended."""
  names = (REAL, *e.config.generators.names)
  return [f"{name}+{loss}" for name in names for loss in e.config.head.losses]


def select(e: Experiment) -> dict:
  """Chooses every method's setting and recommends one, by cross-validation on training data."""
  folder = e.workdir.folder("selection")
  if e.config.selection.folds == 0:
    choices = {m: dataclasses.asdict(candidates(e, m.split("+")[0])[0]) for m in methods(e)}
    write_json(folder / "choices.json", {"choices": choices, "recommendation": None})
    return {}
  folds, hits, choices = make_folds(e), {}, {}
  for name in (REAL, *e.config.generators.names):
    found = _score_generator(e, folds, name)
    settings = candidates(e, name)
    for loss, of_settings in found.items():
      method = f"{name}+{loss}"
      choices[method] = settings[selection.choose(of_settings, folds.judged.label)]
      hits[method] = selection.cross_fitted(of_settings, folds.judged)
  hits |= _own_head_hits(e, folds)
  controls = [m for m in hits if m.split("+")[0] in (REAL, OWN)]
  recommendation = selection.recommend(hits, folds.judged, controls)
  write_json(
    folder / "choices.json",
    {
      "choices": {method: dataclasses.asdict(choice) for method, choice in choices.items()},
      "recommendation": recommendation | {"basis": _basis(e)},
    },
  )
  write_arrays(folder / "hits.npz", hits | dataclasses.asdict(folds.judged))
  return {"method": recommendation["method"], "expected_gain": recommendation["expected_gain"]}


def _basis(e: Experiment) -> dict[str, Any]:
  config = e.config.selection
  return {"folds": config.folds, "repeats": config.repeats, "encoder": config.encoder}


def _hits(predictions: np.ndarray, folds: Folds, labels: np.ndarray) -> np.ndarray:
  """Predictions [..., R, B] of held-out rows -> hits [..., E] in the order of `judged`."""
  inside = folds.held_out >= 0
  hits = predictions == labels[np.maximum(folds.held_out, 0)]
  return hits[..., inside].astype(float)


def _score_generator(e: Experiment, folds: Folds, name: str) -> dict[str, np.ndarray]:
  """Hits of every setting on held-out examples, by loss. [J, E]."""
  folder, shop = e.workdir.folder("selection"), workshop(e)
  settings, num_runs = candidates(e, name), len(folds.run.seeds)
  strengths = sorted({choice.strength for choice in settings})
  if name == REAL:
    added = heads.nothing_added(num_runs, folds.features.shape[-1], e.dataset.num_classes)
  else:
    generators.train(name, shop, folds.runs, folds.run, folder / name)
    made = generators.numbers(name, e.dataset.train_counts, e.config.generators)
    features = generators.make(name, shop, folds.runs, folds.run, folder / name, made, strengths)
    added = heads.Added(features.features, features.confidence, made)
  trained = tuple(dict.fromkeys(heads.trained_loss(loss) for loss in e.config.head.losses))
  every = [
    heads.Setting(r, strengths.index(c.strength), c.fill, c.exponent, loss)
    for loss in trained
    for c in settings
    for r in range(num_runs)
  ]
  nothing = np.zeros((num_runs, 0), np.int32)
  data = heads.HeadData(
    exemplars=folds.runs.exemplars,
    added=mesh_lib.replicate(e.mesh, added),
    start=folds.runs.head,
    test_features=folds.features[:, :0],
    test_labels=mesh_lib.replicate(e.mesh, nothing),
  )
  stage = heads.make_stage(f"selection/heads/{name}", e.config.head.training, data, every, e.mesh)
  run = dataclasses.replace(e.run, seeds=tuple(range(len(every))))
  state = loop.train(stage, run, folder / "heads" / name)
  priors = heads.priors(data, every)

  @jax.jit
  def predict(params, priors, number, features):
    def of_head(arguments):
      params, prior, run = arguments
      plain = heads.logits_of(params, features[run])
      return plain.argmax(-1), (plain - jnp.log(jnp.maximum(prior, 1e-12))[None]).argmax(-1)

    return jax.lax.map(of_head, (params, priors, number))

  number = np.array([s.run for s in every])
  plain, adjusted = mesh_lib.fetch(predict(state.params, priors, number, folds.features))
  shape = (len(trained), len(settings), num_runs, -1)
  plain, adjusted = plain.reshape(shape), adjusted.reshape(shape)
  found = {}
  for loss in e.config.head.losses:
    of_loss = (adjusted if loss == "logit_adjustment" else plain)[
      trained.index(heads.trained_loss(loss))
    ]
    found[loss] = _hits(of_loss, folds, e.dataset.train_labels)
  return found


def _own_head_hits(e: Experiment, folds: Folds) -> dict[str, np.ndarray]:
  """Of the folds' own heads, where encoders were trained without what is held out."""
  if folds.own_logits is None:
    return {}
  adjusted = folds.own_logits - log_prior(e.dataset.train_counts)
  return {
    method: _hits(logits.argmax(axis=-1), folds, e.dataset.train_labels)
    for method, logits in ((OWN, folds.own_logits), (f"{OWN}+logit_adjustment", adjusted))
  }


def log_prior(counts: np.ndarray) -> np.ndarray:
  """log of the share of each class. [C]."""
  return np.log(counts / counts.sum())


def load_selection(e: Experiment) -> tuple[dict[str, Choice], dict | None]:
  """(method -> choice, recommendation or None)."""
  path = e.workdir.folder("selection") / "choices.json"
  try:
    saved = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise WorkdirError(
      f"Cannot read {path} ({error}); remove the folder {path.parent} and run the same command"
      " again."
    ) from error
  return {m: Choice(**c) for m, c in saved["choices"].items()}, saved["recommendation"]


# --- synthetic features and heads ------------------------------------------------------------


def chosen_strengths(choices: dict[str, Choice], name: str) -> list[float]:
  """The strengths at which a generator is used, by any loss."""
  return sorted({c.strength for method, c in choices.items() if method.split("+")[0] == name})


def hallucinate(e: Experiment) -> dict:
  """Every generator's features, at the strengths that were chosen."""
  space, (choices, _) = load_space(e), load_selection(e)
  clock = CompileClock()
  return {
    name: _hallucinate_with(e, space.runs, name, chosen_strengths(choices, name), clock)
    for name in e.config.generators.names
  }


def _hallucinate_with(
  e: Experiment, runs: FeatureRuns, name: str, strengths: list[float], clock: CompileClock
) -> dict:
  """Writes the features of one generator, which are then no longer in memory."""
  made = generators.numbers(name, e.dataset.train_counts, e.config.generators)
  folder = e.workdir.folder("diffusion") / name
  spent = clock.start()
  features = generators.make(name, workshop(e), runs, e.run, folder, made, strengths)
  arrays = {name: vars(features)[name] for name in ("labels", "confidence", "number")}
  arrays |= _provenance(runs, features)
  arrays |= {"numbers": made, "strengths": np.array(strengths), "seeds": np.array(e.seeds)}
  write_arrays(e.workdir.folder("hallucination") / f"{name}.npz", arrays)
  return {"features": features.confidence.size, "seconds": spent()}


def _provenance(runs: FeatureRuns, features: synthetic.SyntheticFeatures) -> dict[str, np.ndarray]:
  """Features in the encoder's units, and the nearest exemplar of each."""
  backward = jax.jit(jax.vmap(lambda s, x: jax.lax.map(s.backward, x)))
  samples, raw = mesh_lib.fetch((features.features, backward(runs.standardizer, features.features)))
  exemplars, exemplar_labels = mesh_lib.fetch((runs.exemplars.features, runs.exemplars.labels))
  index, distance = np.zeros(samples.shape[:3], np.int32), np.zeros(samples.shape[:3], np.float32)
  for run, strength in np.ndindex(samples.shape[:2]):
    index[run, strength], distance[run, strength] = synthetic.nearest_of_class(
      samples[run, strength], features.labels, exemplars[run], exemplar_labels[run]
    )
  return {"features": raw, "nearest_index": index, "nearest_distance": distance}


def load_synthetic(e: Experiment, name: str) -> dict[str, np.ndarray]:
  """What `hallucinate` wrote of a generator, in the encoder's units.

  features [S, K, M, D], labels [M], confidence [S, K, M], number [M], nearest_index and
  nearest_distance [S, K, M], numbers [C], strengths [K], seeds [S].
  """
  return read_arrays(e.workdir.folder("hallucination") / f"{name}.npz")


def load_added(e: Experiment, space: Space, name: str) -> tuple[heads.Added, list[float]]:
  """What a generator made, standardised, and its strengths."""
  arrays = load_synthetic(e, name)
  features, confidence = mesh_lib.replicate(e.mesh, (arrays["features"], arrays["confidence"]))
  forward = jax.jit(jax.vmap(lambda s, x: jax.lax.map(s.forward, x)))
  added = heads.Added(forward(space.runs.standardizer, features), confidence, arrays["numbers"])
  return added, arrays["strengths"].tolist()


@dataclasses.dataclass(frozen=True)
class Trained:
  """The heads of one generator or reference."""

  stage: loop.Stage
  run: loop.Run
  data: heads.HeadData
  settings: list[heads.Setting]
  losses: list[str]  # of the settings, seeds varying fastest


def train_heads(e: Experiment) -> dict:
  space, (choices, _) = load_space(e), load_selection(e)
  summary = {}
  for name in head_names(e):
    folder = e.workdir.folder("heads") / name
    trained = head_training(e, space, choices, name)
    loop.train(trained.stage, trained.run, folder)
    summary[name] = last_metrics(folder)
  return summary


def head_names(e: Experiment) -> list[str]:
  """Everything that heads are trained on: nothing added, generators, references."""
  made = generators.plan(e.dataset.train_counts, e.config.generators)
  left_out = np.bincount(e.dataset.left_out_labels, minlength=e.dataset.num_classes)
  references = list(REFERENCES) if (left_out[made > 0] > 0).any() else []
  return [REAL, *e.config.generators.names, *references]


def head_training(e: Experiment, space: Space, choices: dict[str, Choice], name: str) -> Trained:
  """The heads of a generator, a reference, or of real features only: one per loss and seed."""
  exemplars, num_seeds, dim = space.runs.exemplars, len(e.seeds), space.test.shape[-1]
  strengths = [0.0]
  if name == "oracle":
    added = _left_out_pool(e, space)
  elif name == "unseen_exemplars":
    exemplars = _unseen_exemplars(e, space)
    added = heads.nothing_added(num_seeds, dim, e.dataset.num_classes)
  elif name == REAL:
    added = heads.nothing_added(num_seeds, dim, e.dataset.num_classes)
  else:
    added, strengths = load_added(e, space, name)
  settings, of_losses = [], []
  for loss in e.config.head.losses:
    # References are no methods: they are trained as the data come, with all there is.
    choice = choices.get(f"{name}+{loss}", Choice(0.0, generators.ALL, 1.0))
    if name == "unseen_exemplars":
      choice = choices[f"{REAL}+{loss}"]
    for seed in range(num_seeds):
      settings.append(
        heads.Setting(
          seed,
          strengths.index(choice.strength),
          choice.fill,
          choice.exponent,
          heads.trained_loss(loss),
        )
      )
      of_losses.append(loss)
  data = heads.HeadData(
    exemplars=exemplars,
    added=mesh_lib.replicate(e.mesh, added),
    start=space.runs.head,
    test_features=space.test,
    test_labels=mesh_lib.replicate(
      e.mesh, np.broadcast_to(e.dataset.test_labels, space.test.shape[:2])
    ),
  )
  return Trained(
    stage=heads.make_stage(f"heads/{name}", e.config.head.training, data, settings, e.mesh),
    run=dataclasses.replace(e.run, seeds=tuple(range(len(settings)))),
    data=data,
    settings=settings,
    losses=of_losses,
  )


def _left_out_pool(e: Experiment, space: Space) -> heads.Added:
  """Left-out features: as many per class as would be made, or all there are."""
  wanted = generators.plan(e.dataset.train_counts, e.config.generators)
  labels = e.dataset.left_out_labels
  rows = [np.flatnonzero(labels == c)[:n] for c, n in enumerate(wanted)]
  numbers = np.array([len(own) for own in rows], np.int32)
  features = space.left_out[:, np.concatenate(rows)][:, None]
  return heads.Added(features, jnp.ones(features.shape[:3]), numbers)


def _unseen_exemplars(e: Experiment, space: Space):
  """Exemplars in which a class's features are left-out ones, as many as it has or there are."""
  features = np.array(mesh_lib.fetch(space.runs.exemplars.features))
  for c, count in enumerate(e.dataset.train_counts):
    unseen = np.flatnonzero(e.dataset.left_out_labels == c)[:count]
    rows = np.flatnonzero(e.dataset.train_labels == c)[: len(unseen)]
    features[:, rows] = mesh_lib.fetch(space.left_out[:, unseen])
  return space.runs.exemplars.replace(features=mesh_lib.replicate(e.mesh, features))


def final_heads(e: Experiment, space: Space, choices: dict[str, Choice], name: str):
  """Loss -> {"kernel" [S, D, C], "bias" [S, C]} on standardised features, adjusted where it is."""
  trained = head_training(e, space, choices, name)
  state = loop.load_final(trained.stage, trained.run, e.workdir.folder("heads") / name)
  priors = heads.priors(trained.data, trained.settings)
  found = {}
  for loss in e.config.head.losses:
    rows = np.array([i for i, own in enumerate(trained.losses) if own == loss])
    head = jax.tree.map(lambda x, rows=rows: x[rows], state.params)
    if loss == "logit_adjustment":
      head = jax.vmap(heads.adjusted)(head, priors[rows])
    found[loss] = head
  return found


def train_jointly(e: Experiment) -> dict:
  return joint.train_all(e, workshop(e))


def describe(e: Experiment, method: str, choices: dict[str, Choice]) -> str:
  """A method in words."""
  name, _, loss = method.partition("+")
  if name == REAL:
    made = "real features only"
  elif name in REFERENCES:
    made = REFERENCES[name]
  else:
    made = generators.DESCRIPTIONS[name]
  words = f"{made}; {heads.LOSSES[loss]}"
  choice = choices.get(method)
  if choice is None:
    return words
  details = [f"classes drawn by count^{choice.exponent:g}"]
  if name != REAL and choice.fill != generators.ALL:
    details.append(f"filled to {choice.fill}")
  if name != REAL and len(generators.strengths(name, workshop(e))) > 1:
    details.append(f"strength {choice.strength:g}")
  return f"{words} ({', '.join(details)})"


def describe_joint(e: Experiment, name: str) -> str:
  """Joint training with a generator, in words."""
  made = "real images only" if name == REAL else f"real images and {generators.DESCRIPTIONS[name]}"
  return f"encoder and head trained together on {made}; {heads.LOSSES[e.config.joint.loss]}"


def describe_own(e: Experiment, loss: str) -> str:
  if e.config.classifier.num_epochs == 0:
    return "encoder and head as they were read"
  return f"encoder and head trained with {losses.LOSSES[loss].description}"


SHARED_PHASES = (
  Phase("diffusion", "training denoisers on the features", train_denoisers,
        ("diffusion", "generators")),
  Phase("selection", "choosing settings by cross-validation", select,
        ("hallucination", "head", "selection")),
  Phase("hallucination", "sampling features for the tail", hallucinate, ()),
  Phase("heads", "training the heads again", train_heads, ()),
)  # fmt: skip
