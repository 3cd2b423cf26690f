"""The encoder stage: images to features, with the memory bank inside the jitted step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from input_pipeline import batches
from input_pipeline.dataset import LongTailDataset
from memdiff import memory_bank
from memdiff.classifier import losses
from memdiff.classifier.backbones import BackboneConfig, ResNet
from memdiff.config import at_least, between, one_of, some_of
from memdiff.errors import ConfigError
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime import train_state
from memdiff.runtime.loop import Stage
from memdiff.runtime.random import stream
from memdiff.runtime.train_state import OptimizerConfig, TrainState


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  backbone: BackboneConfig
  loss: str = one_of(losses.LOSSES)
  references: tuple[str, ...] = some_of(losses.LOSSES)
  beta: float = between(0, 0.999999)
  defer: float = between(0, 1)
  shift: int = at_least(0)
  batch_size: int = at_least(1)
  num_steps: int = at_least(1)
  optimizer: OptimizerConfig


def check(config: EncoderConfig, dataset: LongTailDataset) -> None:
  """Raises ConfigError where the settings do not fit the data."""
  num_examples, size = len(dataset.train_labels), min(dataset.train_images.shape[1:3])
  if config.batch_size > num_examples:
    raise ConfigError(
      f"config.encoder.batch_size is {config.batch_size}, but the training set has only"
      f" {num_examples} images."
    )
  if config.shift >= size:
    raise ConfigError(
      f"config.encoder.shift is {config.shift} pixels, but the images have only {size}."
    )


def make_model(config: BackboneConfig, num_classes: int) -> ResNet:
  return ResNet(num_classes, config.stage_sizes, config.widths)


def device_data(dataset: LongTailDataset, mesh: Mesh) -> dict[str, jax.Array]:
  """The images as uint8 on every device, and the pixel statistics of the training set."""
  pixels = dataset.train_images.astype(np.float64)
  arrays = {
    "images": dataset.train_images,
    "labels": dataset.train_labels,
    "test_images": dataset.test_images,
    "test_labels": dataset.test_labels,
    "pixel_mean": pixels.mean(axis=(0, 1, 2)).astype(np.float32),
    "pixel_std": np.maximum(pixels.std(axis=(0, 1, 2)), 1.0).astype(np.float32),
  }
  return mesh_lib.replicate(mesh, arrays)


def normalize(images: jax.Array, shared: dict[str, jax.Array]) -> jax.Array:
  """uint8 [B, H, W, ch] -> float32 with the training set's mean 0 and deviation 1 per channel."""
  mean, std = (shared[n].reshape(1, 1, 1, -1) for n in ("pixel_mean", "pixel_std"))
  return (images.astype(jnp.float32) - mean) / std


def apply_eval(model: ResNet, state: TrainState, images: jax.Array):
  """(logits, features) of normalised images in evaluation mode."""
  variables = {"params": state.params, "batch_stats": state.model_state}
  return model.apply(variables, images, train=False)


def make_stage(
  config: EncoderConfig,
  bank_config: memory_bank.BankConfig,
  loss: str,
  dataset: LongTailDataset,
  shared: dict[str, jax.Array],
  mesh: Mesh,
) -> Stage:
  """Trains encoder, head and memory bank with `loss` (a name out of losses.LOSSES)."""
  num_examples = len(dataset.train_labels)
  model = make_model(config.backbone, dataset.num_classes)
  optimizer = train_state.make_optimizer(config.optimizer, config.num_steps)
  gamma = losses.effective_number(jnp.asarray(dataset.train_counts, jnp.float32), config.beta)
  start = round(config.defer * config.num_steps)
  weighted = losses.LOSSES[loss].uses_gamma

  def init(key, _):
    images = jnp.zeros((1, *dataset.train_images.shape[1:]))
    variables = model.init(stream(key, "params"), images, train=False)
    bank = memory_bank.create(
      dataset.num_classes, bank_config.num_slots, config.backbone.widths[-1]
    )
    return train_state.create(
      key, variables["params"], optimizer, model_state=variables["batch_stats"], bank=bank
    )

  def step(state, shared, _):
    indices = batches.epoch_indices(
      stream(state.key, "order"), state.step, num_examples, config.batch_size
    )
    images, labels = mesh_lib.shard_batch(
      (shared["images"][indices], shared["labels"][indices]), mesh
    )
    images = batches.random_shift(stream(state.key, "shift", state.step), images, config.shift)
    images = normalize(images, shared)
    weights = losses.deferred(gamma, state.step, start) if weighted else jnp.ones_like(gamma)

    def loss_of(params):
      variables = {"params": params, "batch_stats": state.model_state}
      (logits, features), updates = model.apply(
        variables, images, train=True, mutable=["batch_stats"]
      )
      value = losses.weighted_cross_entropy(logits, labels, weights[labels])
      return value, (logits, features, updates["batch_stats"])

    (value, (logits, features, model_state)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
      state.params
    )
    bank = memory_bank.update(
      state.bank,
      features,
      labels,
      jnp.ones(labels.shape, bool),
      stream(state.key, "reservoir", state.step),
      horizon=bank_config.horizon,
      mesh=mesh,
    )
    metrics = {"loss": value, "accuracy": jnp.mean(logits.argmax(axis=-1) == labels)}
    state = train_state.apply_gradients(
      state, gradients, optimizer, model_state=model_state, bank=bank
    )
    return state, metrics

  def evaluate(state, shared, _):
    logits, _ = apply_eval(model, state, normalize(shared["test_images"], shared))
    value = losses.cross_entropy(logits, shared["test_labels"]).mean()
    return {"loss": value, "accuracy": jnp.mean(logits.argmax(-1) == shared["test_labels"])}

  def partition(state):
    specs = jax.tree.map(lambda _: PartitionSpec(), state)
    rows = state.bank.seen.shape[0]
    return specs.replace(
      bank=jax.tree.map(lambda _: memory_bank.class_spec(rows, mesh), state.bank)
    )

  return Stage(
    name=f"encoder/{loss}",
    num_steps=config.num_steps,
    init=init,
    step=step,
    evaluate=evaluate,
    shared=shared,
    own=(),
    partition=partition,
  )
