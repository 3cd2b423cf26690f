"""Joint training: encoder and head learn from real images and hallucinated features together.

The encoder is trained from scratch in rounds. The first sees real images only. Before each further
round the class means of the bank, which follows the encoder, are held against those for which the
synthetic features were made: where they have moved far, all is made anew (features, bank, denoiser,
samples); in between, synthetic features move along with their class mean. They enter at the head,
at first with little weight; a gradient reaches the encoder from real images alone.

`real` goes through the same rounds without synthetic features: the control. Its first round is
shared, so that seeds are paired.
"""

import dataclasses
import itertools
import pathlib
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import batches
from memdiff.classifier import encoder, encoder_training, heads, losses
from memdiff.classifier.heads import HeadConfig
from memdiff.classifier.priors import effective_number, log_prior
from memdiff.config import at_least, between, one_of, setting, some_of
from memdiff.errors import ConfigError
from memdiff.experiments.base import Experiment, forward_images
from memdiff.memory import feature_space, memory_bank
from memdiff.runtime import loop, train_state
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.random import stream
from memdiff.runtime.train_state import TrainState
from memdiff.runtime.workdir import read_arrays, write_arrays
from memdiff.synthesis import generators
from memdiff.synthesis.generators import GENERATORS, SynthesisSettings

REAL = "real"


@dataclasses.dataclass(frozen=True)
class JointConfig:
  """How encoder and head are trained together; no generators: not at all."""

  generators: tuple[str, ...] = setting(
    (),
    "real (the control) and any of generators.names; (): no joint training",
    some_of((REAL, *GENERATORS)),
  )
  loss: str = setting(
    "balanced_softmax", "what is minimised; csl with head.training's beta", one_of(heads.TRAINED)
  )
  counts: str = setting(
    "real",
    "of prior and gamma; effective adds trusted synthetic features",
    one_of(heads.GAMMA_COUNTS),
  )
  num_rounds: int = setting(4, "of equal length; the first sees images only", at_least(2))
  ramp: float = setting(
    0.5, "share of the other rounds over which synthetic features gain weight", between(0, 1)
  )
  refresh_drift: float = setting(
    0.1, "shift of the class means, over their spread, that asks for new features", at_least(0)
  )
  added_batch_size: int = setting(
    64, "synthetic features beside classifier.batch_size images", at_least(1)
  )


@flax.struct.dataclass
class Pool:
  """One seed's synthetic features, and where the classes were when they were made."""

  features: Any  # [M, D] in the encoder's units
  confidence: Any  # [M]
  labels: Any  # [M] int32
  prototype: Any  # [C, D] of the moving bank


def drift(bank: memory_bank.MemoryBank, pool: Pool) -> jax.Array:
  """How far the classes have moved since: mean shift of a class over the spread of the classes.

  Args:
    bank: of one seed, now.
    pool: the features in use.
  """
  known = (bank.seen > 0)[: pool.prototype.shape[0]]
  number = jnp.maximum(known.sum(), 1)

  def rms(rows):
    return jnp.sqrt(jnp.where(known, jnp.square(rows).sum(axis=1), 0.0).sum() / number)

  centre = jnp.where(known[:, None], pool.prototype, 0.0).sum(axis=0) / number
  moved = bank.prototype[: pool.prototype.shape[0]] - pool.prototype
  return rms(moved) / jnp.maximum(rms(pool.prototype - centre[None]), 1e-12)


def curriculum(step: jax.Array, first: int, num_steps: int, ramp: float) -> jax.Array:
  """Weight of synthetic features: 0 at step `first`, rising to 1 over `ramp` of the rest."""
  length = max(round(ramp * (num_steps - first)), 1)
  return jnp.clip((step - first + 1) / length, 0.0, 1.0)


def weighted_rows(
  loss: str, real_counts, added_counts, weight, counts: str, beta: float, active
) -> tuple[jax.Array, jax.Array]:
  """(offset [C] of the logits, gamma [C]) of a loss on real and synthetic rows.

  Args:
    loss: out of heads.TRAINED.
    real_counts: [C].
    added_counts: [C] sums of the confidences of synthetic features.
    weight: of the curriculum.
    counts: whether prior and gamma come from real or from effective (real and trusted synthetic)
      counts. Real ones keep, on real rows, the margins of training without synthetic features.
    beta: of gamma, as in the head stage.
    active: whether the class weights of csl have set in.
  """
  seen = real_counts + weight * added_counts if counts == "effective" else real_counts
  offset, gamma = jnp.zeros_like(seen), jnp.ones_like(seen)
  if loss == "balanced_softmax":
    offset = log_prior(seen)
  if loss == "csl":
    own = effective_number(jnp.maximum(seen, 1e-3), beta)
    gamma = jnp.where(active, own, 1.0)
  return offset, gamma


def make_stage(
  experiment: Experiment,
  config: JointConfig,
  head: HeadConfig,
  name: str,
  first: int,
  last: int,
  start: Any,
  pool: Pool | None,
) -> loop.Stage:
  """Trains from step `first` to `last` of the whole training.

  Args:
    experiment: the experiment; its classifier's batches, augmentation and optimiser are used.
    config, head: see there.
    name: of the stage.
    first, last: steps.
    start: the state at `first`, seeds leading; None: a new one.
    pool: synthetic features, seeds leading; None: none.
  """
  program = _Program(experiment, config, head)
  return loop.Stage(
    name=name,
    num_steps=last - first,
    init=program.init,
    batch=lambda state, shared, _: program.draw(state, shared),
    step=program.step,
    evaluate=program.evaluate,
    shared=encoder.device_data(
      experiment.config.encoder.input, experiment.dataset, experiment.mesh
    ),
    own={"start": start, "pool": pool},
    batch_size=experiment.config.classifier.batch_size,
    result=(),  # the state goes from round to round
  )


class _Program:
  """The functions of a stage."""

  def __init__(self, experiment: Experiment, config: JointConfig, head: HeadConfig):
    self._config, self._head, self._dataset, self._mesh = (
      config,
      head,
      experiment.dataset,
      experiment.mesh,
    )
    self._classifier, self._encoder = experiment.config.classifier, experiment.config.encoder
    self._bank = experiment.config.memory_bank
    self._num_examples = len(experiment.dataset.train_labels)
    self._num_steps = self._classifier.num_steps(self._num_examples)
    self._model = encoder.make_model(self._encoder, config.loss, experiment.dataset.num_classes)
    self._optimizer = train_state.make_optimizer(self._classifier.optimizer, self._num_steps)
    self._real_counts = jnp.asarray(experiment.dataset.train_counts, jnp.float32)

  def init(self, key: jax.Array, own: Any) -> TrainState:
    if own["start"] is not None:
      return jax.tree.map(jnp.copy, own["start"])  # the state is donated
    variables = encoder.initial_variables(
      self._encoder, self._model, self._dataset.train_images.shape[1:], stream(key, "params")
    )
    return train_state.create(
      key,
      variables["params"],
      self._optimizer,
      model_state=variables["batch_stats"],
      bank=memory_bank.create(
        self._dataset.num_classes, self._bank.num_slots, self._encoder.feature_dim
      ),
    )

  def draw(self, state: TrainState, shared: Any) -> tuple[jax.Array, jax.Array]:
    """Normalised images and labels of a batch."""
    index = batches.epoch_indices(
      stream(state.key, "order"), state.step, self._num_examples, self._classifier.batch_size
    )
    rows = shared["images"][index], shared["labels"][index]
    images, labels = mesh_lib.shard_batch(rows, self._mesh)
    key, config = stream(state.key, "views", state.step), self._classifier.augment
    return encoder_training.augmented(key, images, config, self._encoder.input, shared), labels

  def _added_rows(self, state: TrainState, pool: Pool):
    """Features [A, D] as they would be now, labels [A], confidence [A]."""
    key = stream(state.key, "added", state.step)
    index = jax.random.randint(key, (self._config.added_batch_size,), 0, len(pool.labels))
    labels = pool.labels[index]
    moved = (state.bank.prototype[: len(pool.prototype)] - pool.prototype)[labels]
    features = jnp.maximum(pool.features[index] + moved, 0.0)  # as after the encoder's ReLU
    return features, labels, pool.confidence[index]

  def _class_terms(self, state: TrainState, pool: Pool | None, weight: jax.Array):
    """(offset [C], gamma [C]) of the loss."""
    added_counts = jnp.zeros_like(self._real_counts)
    if pool is not None:
      number = self._dataset.num_classes
      added_counts = jax.ops.segment_sum(pool.confidence, pool.labels, number)
    active = state.step >= round(self._head.defer * self._num_steps)
    return weighted_rows(
      self._config.loss, self._real_counts, added_counts, weight, self._config.counts,
      self._head.beta, active,
    )  # fmt: skip

  def step(self, state: TrainState, shared: Any, own: Any):
    (images, labels), pool = self.draw(state, shared), own["pool"]
    size, ramp_from = len(labels), round_limits(self._config, self._num_steps)[1]
    weight = curriculum(state.step, ramp_from, self._num_steps, self._config.ramp)
    offset, gamma = self._class_terms(state, pool, weight)

    def loss_of(params):
      variables = {"params": params, "batch_stats": state.model_state}
      (logits, features), updates = self._model.apply(
        variables, images, train=True, mutable=["batch_stats"]
      )
      total = jnp.sum(gamma[labels] * losses.cross_entropy(logits + offset[None], labels))
      if pool is not None:
        added, added_labels, trust = self._added_rows(state, pool)
        added_logits = feature_space.logits_of(params["head"], added) + offset[None]
        # Every synthetic feature counts as one image that is trusted so far.
        share = len(pool.labels) / self._num_examples * size / self._config.added_batch_size
        rows = gamma[added_labels] * trust * losses.cross_entropy(added_logits, added_labels)
        total = total + weight * share * jnp.sum(rows)
      return total / size, (logits, features, updates["batch_stats"])

    (value, (logits, features, model_state)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
      state.params
    )
    key = stream(state.key, "reservoir", state.step)
    bank = memory_bank.update(
      state.bank, features, labels, jnp.ones(labels.shape, bool), key,
      horizon=self._bank.horizon, mesh=self._mesh,
    )  # fmt: skip
    metrics = {"loss": value, "accuracy": jnp.mean(logits.argmax(axis=-1) == labels)}
    if pool is not None:
      metrics["drift"] = drift(bank, pool)
    state = train_state.apply_gradients(
      state, gradients, self._optimizer, model_state=model_state, bank=bank
    )
    return state, metrics

  def evaluate(self, state: TrainState, shared: Any, _) -> dict[str, jax.Array]:
    def predict(images):
      images = encoder.normalize(self._encoder.input, images, shared)
      return encoder.apply_eval(self._model, state, images)[0]

    return encoder.score(predict, shared["test_images"], shared["test_labels"])


def round_limits(config: JointConfig, num_steps: int) -> list[int]:
  """The steps at which rounds begin, and the last one."""
  return np.linspace(0, num_steps, config.num_rounds + 1).round().astype(int).tolist()


def make_pool(
  experiment: Experiment,
  settings: SynthesisSettings,
  generator: str,
  state: Any,
  folder: pathlib.Path,
) -> Pool:
  """Synthetic features of the encoders as they are now, seeds leading; trains what it takes."""
  run = dataclasses.replace(experiment.run, streams=f"{folder.name}/")  # every refresh draws anew
  loss, labels = experiment.config.joint.loss, experiment.dataset.train_labels
  _, features = forward_images(experiment, loss, state, experiment.dataset.train_images)
  labels = np.broadcast_to(labels, features.shape[:2])
  bank = feature_space.fill_bank(
    features,
    labels,
    experiment.dataset.num_classes,
    run.keys("memory_bank"),
    experiment.config.memory_bank,
    experiment.mesh,
  )
  head = mesh_lib.fetch(state.params["head"])
  runs = feature_space.make_runs(
    features, labels, bank, head, experiment.dataset.num_classes, experiment.mesh
  )
  generators.train(generator, settings, runs, run, folder, f"{folder.parent.name}/{folder.name}")
  numbers = settings.numbers(generator, experiment.dataset.train_counts)
  strength = settings.generator(generator).strengths[0]
  made = generators.make(generator, settings, runs, run, folder, numbers, [strength])
  backward = jax.jit(jax.vmap(lambda s, x: s.backward(x)))
  own_labels = np.broadcast_to(made.labels, made.confidence[:, 0].shape)
  return Pool(
    features=backward(runs.standardizer, made.features[:, 0]),
    confidence=made.confidence[:, 0],
    labels=mesh_lib.replicate(experiment.mesh, own_labels),
    prototype=jnp.copy(
      state.bank.prototype[:, : experiment.dataset.num_classes]
    ),  # the state is donated
  )


def train(
  experiment: Experiment, settings: SynthesisSettings, generator: str
) -> tuple[Any, list[float]]:
  """Goes through all rounds with a generator, or with REAL.

  Returns:
    (final state, seeds leading; the drift at the beginning of every round but the first two).
  """
  config, head = experiment.config.joint, experiment.config.head.training
  folder = experiment.workdir.folder("joint")
  limits = round_limits(
    config, experiment.config.classifier.num_steps(len(experiment.dataset.train_labels))
  )
  state, pool, drifts = None, None, []
  for number, (first, last) in enumerate(itertools.pairwise(limits)):
    name = "shared" if number == 0 else generator
    if number > 0 and generator != REAL:
      if pool is not None:
        drifts.append(float(jax.jit(jax.vmap(drift))(state.bank, pool).mean()))
      if pool is None or drifts[-1] > config.refresh_drift:
        pool = make_pool(
          experiment, settings, generator, state, folder / name / f"generator_{number}"
        )
    stage = make_stage(
      experiment, config, head, f"joint/{name}/round_{number}", first, last, state, pool
    )
    state = loop.train(stage, experiment.run, folder / name / f"round_{number}")
  return state, drifts


def train_all(experiment: Experiment, settings: SynthesisSettings) -> dict:
  """Trains with every generator and keeps what the classifiers say of the test images.

  Returns:
    generator -> metrics, for the manifest.
  """
  config, logits, summary = experiment.config.joint, {}, {}
  for generator in config.generators:
    state, drifts = train(experiment, settings, generator)
    logits[generator], _ = forward_images(
      experiment, config.loss, state, experiment.dataset.test_images
    )
    refreshed = sum(d > config.refresh_drift for d in drifts) + 1
    summary[generator] = {} if generator == REAL else {"drift": drifts, "made": refreshed}
  if logits:
    write_arrays(experiment.workdir.folder("joint") / "logits.npz", logits)
  return summary


def load_logits(experiment: Experiment) -> dict[str, np.ndarray]:
  """generator -> [S, T, C] on the test images; empty where nothing was trained jointly."""
  config = getattr(experiment.config, "joint", None)
  if config is None or not config.generators:
    return {}
  return read_arrays(experiment.workdir.folder("joint") / "logits.npz")


def check(
  config: JointConfig, classifier: encoder_training.ClassifierConfig, *, streamed: bool
) -> None:
  """Raises ConfigError where joint training does not fit the other settings."""
  if not config.generators:
    return
  for wrong, words in (
    (streamed, "the data set is streamed from disk, and only sets in memory are trained jointly"),
    (classifier.num_epochs == 0, "config.classifier.num_epochs is 0"),
    (classifier.augment.mixup > 0, "config.classifier.augment.mixup is not 0"),
  ):
    if wrong:
      raise ConfigError(
        f"config.joint.generators is {config.generators}, but {words}; set it to ()."
      )
