"""The classifier stage: encoder, head and memory bank trained on long-tailed images."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from input_pipeline import augment, batches
from input_pipeline.augment import AugmentConfig
from input_pipeline.dataset import LongTailDataset
from input_pipeline.streaming import StreamConfig
from memdiff.classifier import added, added_images, encoder, image_batches, losses, projection
from memdiff.classifier.added import AddedRows, Pool
from memdiff.classifier.added_images import AddedImagesConfig, Drawn
from memdiff.classifier.encoder import EncoderConfig
from memdiff.classifier.image_batches import PreparedBatch
from memdiff.classifier.losses import LossConfig
from memdiff.config import at_least, one_of, setting, some_of
from memdiff.errors import ConfigError
from memdiff.memory import feature_space, memory_bank
from memdiff.memory.memory_bank import BankConfig
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime import train_state
from memdiff.runtime.loop import Stage
from memdiff.runtime.random import stream
from memdiff.runtime.train_state import OptimizerConfig, TrainState


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
  loss: str = setting("cross_entropy", "what the classifier minimises", one_of(losses.LOSSES))
  references: tuple[str, ...] = setting(
    (), "further losses, trained as rows of the table", some_of(losses.LOSSES)
  )
  loss_parameters: LossConfig = setting(LossConfig(), "each is read by the losses that have it")
  augment: AugmentConfig = setting(AugmentConfig(), "changes of training images at random")
  stream: StreamConfig = setting(StreamConfig(), "how large sets are read while training")
  batch_size: int = setting(128, "images", at_least(1))
  num_epochs: float = setting(
    200.0, "passes over the training images; 0: none, with encoder.init_from", at_least(0)
  )
  optimizer: OptimizerConfig = setting(OptimizerConfig(), "of encoder and head")

  def num_steps(self, num_examples: int) -> int:
    return round(self.num_epochs * num_examples / self.batch_size)


def trained_losses(config: ClassifierConfig) -> tuple[str, ...]:
  """The losses a classifier is trained with, each once; what follows builds on the first."""
  return tuple(dict.fromkeys((config.loss, *config.references)))


def check(
  config: ClassifierConfig, encoder_config: EncoderConfig, dataset: LongTailDataset
) -> None:
  """Raises ConfigError if the settings do not fit the data or each other."""
  num_examples = len(dataset.train_labels)
  if config.batch_size > num_examples:
    raise ConfigError(
      f"config.classifier.batch_size is {config.batch_size}, but the training set has only"
      f" {num_examples} images."
    )
  if config.num_steps(num_examples) == 0 and not encoder_config.init_from:
    raise ConfigError(
      f"config.classifier.num_epochs is {config.num_epochs:g}, not one step, and"
      " config.encoder.init_from is empty; train, or start from weights."
    )
  augment.check(config.augment, dataset.train_images.shape[1:])
  for loss in trained_losses(config):
    losses.check(loss, mixup=config.augment.mixup > 0)
    if losses.LOSSES[loss].cosine_head and encoder_config.backbone.head == "linear":
      raise ConfigError(
        f"The loss {loss} is defined on cosines, but config.encoder.backbone.head is linear; use"
        " auto or cosine."
      )


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a classifier is trained, whatever its data.

  Attributes:
    classifier, encoder: see there.
    loss: a name out of losses.LOSSES.
    bank: of the memory bank that moves along; None: there is none.
    added: how synthetic features take part; None: there are none. Needs a bank, and a loss without
      a state whose head is linear on the features that the encoder returns.
    images: how generated images take part; None: there are none. Needs a set in memory, and a loss
      without a state and with one view.
    counts: of the classes, for the loss: `real`, or `effective`, generated images included.
  """

  classifier: ClassifierConfig
  encoder: EncoderConfig
  loss: str
  bank: BankConfig | None = None
  added: AddedRows | None = None
  images: AddedImagesConfig | None = None
  counts: str = "real"


def make_stage(
  recipe: Recipe,
  dataset: LongTailDataset,
  shared: dict[str, jax.Array],
  mesh: Mesh,
  rows: np.ndarray | None = None,
) -> Stage:
  """Trains encoder, head and, if there is one, memory bank.

  Runs of a recipe with `added` have a pool of synthetic features, or None, as `per_seed["pool"]`,
  those of one with `images` an `ImagePool` as `per_seed["images"]`.

  Args:
    recipe: see there.
    dataset: the long-tailed set.
    shared: of `encoder.device_data`.
    mesh: the device mesh.
    rows: [R, A] the training images of each of R runs, of a set in memory; if a run has fewer, -1
      behind them; None: all of them. Class counts and pixel statistics are then a run's own, and
      the stage scores nothing while it trains.
  """
  name = f"classifier/{recipe.loss}"
  num_examples = len(dataset.train_labels) if rows is None else rows.shape[1]
  folds = {} if rows is None else image_batches.fold_data(recipe.encoder, dataset, rows)
  setup = _Setup(recipe, dataset.num_classes, dataset.train_images.shape[1:], mesh)
  program = _program(
    setup,
    num_examples,
    streamed=dataset.streamed,
    of_runs=rows is not None,
    held_out=len(dataset.holdout_labels) > 0,
  )
  return Stage(
    name=name,
    num_steps=recipe.classifier.num_steps(num_examples),
    init=_make_init(setup, encoder.weights_sha256(recipe.encoder)),
    batch=program.prepare,
    step=program.step,
    evaluate=None if dataset.streamed or rows is not None else program.evaluate,
    shared=shared,
    per_seed=mesh_lib.replicate(mesh, folds),
    batch_size=recipe.classifier.batch_size,
    batches=image_batches.host_batches(
      dataset, recipe.classifier.batch_size, recipe.classifier.stream, name
    ),
    result=("params", "model_state"),
    one_by_one=mesh_lib.one_by_one(mesh),
  )


@dataclasses.dataclass(frozen=True)
class _Setup:
  """All that a network and its training are built of, beside the data."""

  recipe: Recipe
  num_classes: int
  image_shape: tuple[int, ...]
  mesh: Mesh

  @property
  def config(self) -> ClassifierConfig:
    return self.recipe.classifier

  @property
  def row(self) -> losses.Loss:
    return losses.LOSSES[self.recipe.loss]

  @property
  def model(self) -> nn.Module:
    return encoder.make_model(self.recipe.encoder, self.recipe.loss, self.num_classes)

  def optimizer(self, num_steps: int) -> optax.GradientTransformation:
    return train_state.make_optimizer(self.config.optimizer, num_steps)

  def objective(self, counts: Any, num_examples: int) -> losses.Objective:
    """Of a training set with `counts` [C] examples per class, perhaps traced."""
    return losses.make(
      self.recipe.loss,
      self.config.loss_parameters,
      counts,
      scale=self.recipe.encoder.backbone.scale,
      num_steps=self.config.num_steps(num_examples),
      steps_per_epoch=max(num_examples // self.config.batch_size, 1),
    )


@functools.lru_cache(maxsize=8)
def _make_init(setup: _Setup, weights: str | None) -> Callable:
  """The initial state; the same function for seeds and folds, so that it compiles once.

  `weights` is the digest of the file that parameters are read from.
  """
  del weights
  row, model = setup.row, setup.model

  def init(key, _):
    variables = encoder.initial_variables(
      setup.recipe.encoder, model, setup.image_shape, stream(key, "params")
    )
    if row.contrastive:
      variables = projection.extend(
        variables, setup.config.loss_parameters, stream(key, "projection")
      )
    bank = setup.recipe.bank and memory_bank.create(
      setup.num_classes, setup.recipe.bank.num_slots, setup.recipe.encoder.feature_dim
    )
    return train_state.create(
      key,
      variables["params"],
      setup.optimizer(1),  # the number of steps does not matter yet
      model_state=variables["batch_stats"],
      bank=bank,
      loss_state=setup.objective(np.ones(setup.num_classes), 1).init(),
    )

  return init


@dataclasses.dataclass(frozen=True)
class _Program:
  """The functions of a stage.

  Attributes:
    setup: see there.
    num_examples: in an epoch.
    streamed: whether batches come from the host.
    of_runs: whether every run has rows, class counts and pixel statistics of its own.
    held_out: whether there are held-out images to score.
  """

  setup: _Setup
  num_examples: int
  streamed: bool
  of_runs: bool
  held_out: bool

  def draw(self, state: TrainState, shared: Any, per_seed: Any) -> Drawn:
    """A batch of uint8 images and labels, split over the devices."""
    if self.streamed:
      _, batch = per_seed
      return Drawn(batch["images"], batch["labels"])
    config, size = self.setup.recipe.images, self.setup.config.batch_size
    key, pool = stream(state.key, "order"), per_seed["images"] if config else None
    if pool is not None and not config.joint:
      number = pool.number + (per_seed["number"] if self.of_runs else self.num_examples)
      places = batches.padded_epoch_indices(key, state.step, number, len(pool.union), size)
      weight = self._image_weight(state.step)
      rows = added_images.merged(config, places, shared["images"], shared["labels"], pool, weight)
      return mesh_lib.shard_batch(rows, self.setup.mesh)
    if self.of_runs:
      number = per_seed["number"]
      index = batches.padded_epoch_indices(key, state.step, number, self.num_examples, size)
      index = per_seed["rows"][index]
    else:
      index = batches.epoch_indices(key, state.step, self.num_examples, size)
    rows = Drawn(shared["images"][index], shared["labels"][index])
    if pool is not None:
      key = stream(state.key, "generated", state.step)
      rows = added_images.beside(config, key, rows, pool, self._image_weight(state.step))
    return mesh_lib.shard_batch(rows, self.setup.mesh)

  def _image_weight(self, step: jax.Array) -> jax.Array:
    """Of a generated image in the loss."""
    num_steps = self.setup.config.num_steps(self.num_examples)
    return self.setup.recipe.images.weight_at(step, num_steps)

  def prepare(self, state: TrainState, shared: Any, per_seed: Any) -> PreparedBatch:
    config = self.setup.config
    rows = self.draw(state, shared, per_seed)
    images, rows = rows.images, rows.replace(images=None)
    key = stream(state.key, "views", state.step)
    statistics = per_seed["statistics"] if self.of_runs else shared
    views = [
      image_batches.augmented(
        jax.random.fold_in(key, view),
        images,
        config.augment,
        self.setup.recipe.encoder.input,
        statistics,
      )
      for view in range(self.setup.row.views)
    ]
    partner = share = None
    if config.augment.mixup > 0:
      views[0], partner, share = augment.mixup(stream(key, "mixup"), views[0], config.augment.mixup)
    return PreparedBatch(jnp.concatenate(views), rows, partner, share)

  def step(self, state: TrainState, shared: Any, per_seed: Any):
    batch = self.prepare(state, shared, per_seed)
    counts = per_seed["counts"] if self.of_runs else shared["train_counts"]
    if self.setup.recipe.images and self.setup.recipe.counts == "effective":
      counts = added_images.effective_counts(
        self.setup.recipe.images,
        jnp.asarray(counts, jnp.float32),
        per_seed["images"],
        self._image_weight(state.step),
        self.setup.config.batch_size,
      )
    pool = per_seed["pool"] if self.setup.recipe.added else None
    if pool is not None:
      num_steps = self.setup.config.num_steps(self.num_examples)
      weight = self.setup.recipe.added.weight(state.step, num_steps)
      counts = self.setup.recipe.added.class_counts(jnp.asarray(counts, jnp.float32), pool, weight)
    objective = self.setup.objective(counts, self.num_examples)

    def loss_of(params):
      value, changes = self._loss(params, state, batch, objective)
      if pool is not None:
        value = value + weight * self._added_loss(params, state, pool, objective)
      return value, changes

    (value, (logits, features, changes)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
      state.params
    )
    rows = batch.rows
    real = jnp.ones(rows.labels.shape, bool) if rows.real is None else rows.real
    changes["bank"] = state.bank and memory_bank.update(
      state.bank,
      features,
      rows.labels,
      real,
      stream(state.key, "reservoir", state.step),
      horizon=self.setup.recipe.bank.horizon,
      mesh=self.setup.mesh,
    )
    metrics = {"loss": value, "accuracy": jnp.mean(logits.argmax(axis=-1) == rows.labels)}
    if rows.real is not None:
      metrics["generated"] = jnp.mean(~real & (rows.weight > 0))
    if pool is not None:
      metrics["drift"] = added.drift(changes["bank"], pool)
    optimizer = self.setup.optimizer(self.setup.config.num_steps(self.num_examples))
    return train_state.apply_gradients(state, gradients, optimizer, **changes), metrics

  def _loss(
    self, params: Any, state: TrainState, batch: PreparedBatch, objective: losses.Objective
  ):
    """(loss, (logits, features, changed fields of the state)), of the first view's rows."""
    config = self.setup.config.loss_parameters
    variables = {"params": params, "batch_stats": state.model_state}
    (logits, features), updates = self.setup.model.apply(
      variables, batch.images, train=True, mutable=["batch_stats"]
    )
    rows = image_batches.seen(logits, features, batch)
    size = len(rows.labels)
    value, loss_state = objective(rows, state.loss_state, state.step, state.bank)
    statistics = updates["batch_stats"]
    if self.setup.row.contrastive:
      embeddings, centres, statistics = projection.project(
        params, statistics, features[size:], config
      )
      value = value + objective.contrastive_term(embeddings, centres, rows.labels)
    changes = {"model_state": statistics, "loss_state": loss_state}
    return value, (rows.logits, rows.features, changes)

  def _added_loss(
    self, params: Any, state: TrainState, pool: Pool, objective: losses.Objective
  ) -> jax.Array:
    """What synthetic features add at full weight: each is one image, as far as it is trusted."""
    key = stream(state.key, "added", state.step)
    number = self.setup.recipe.added.batch_size
    features, labels, trust = added.draw(key, pool, state.bank, number)
    logits = feature_space.linear_logits(params["head"], features)
    rows = trust * objective.weighted_rows(logits, labels, state.step)
    return len(pool.labels) / self.num_examples * rows.mean()

  def evaluate(self, state: TrainState, shared: Any, _) -> dict[str, jax.Array]:
    def predict(images):
      images = encoder.normalize(self.setup.recipe.encoder.input, images, shared)
      return encoder.apply_eval(self.setup.model, state, images)[0]

    scores = encoder.score(predict, shared["test_images"], shared["test_labels"])
    if self.held_out:
      others = encoder.score(predict, shared["holdout_images"], shared["holdout_labels"])
      scores |= {f"holdout_{name}": value for name, value in others.items()}
    return scores


# The same object whenever it is asked for, so that stages share their programs.
_program = functools.lru_cache(maxsize=8)(_Program)
