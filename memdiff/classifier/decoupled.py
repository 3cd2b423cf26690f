"""Heads on a frozen, trained encoder: cRT, LWS, tau-normalisation, NCM, post-hoc adjustment.

Kang et al., "Decoupling representation and classifier for long-tailed recognition", 2020, and
Menon et al., "Long-tail learning via logit adjustment", 2021. cRT and LWS are trained, with
class-balanced sampling, on augmented images through the frozen encoder in evaluation mode; the
others need no training (`posthoc`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from input_pipeline import batches
from input_pipeline.dataset import LongTailDataset
from memdiff.classifier import encoder, image_batches, losses, posthoc
from memdiff.classifier.encoder_training import Recipe
from memdiff.config import above, at_least, between, setting, some_of
from memdiff.memory.feature_space import linear_logits
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime import train_state
from memdiff.runtime.loop import Stage
from memdiff.runtime.random import stream
from memdiff.runtime.train_state import OptimizerConfig, TrainState, nesterov_cosine

TRAINED = ("crt", "lws")
METHODS = {
  "logit_adjustment": "own head, logits adjusted by the class prior after training",
  "tau_norm": "own head, tau-normalised",
  "ncm": "nearest class mean of the training features, by cosine",
  "crt": "a new linear head, trained with class-balanced sampling (cRT)",
  "lws": "own head with a learned scale per class, trained with class-balanced sampling (LWS)",
}


@dataclasses.dataclass(frozen=True)
class DecoupledConfig:
  methods: tuple[str, ...] = setting((), "heads on the frozen encoder", some_of(METHODS))
  adjustment: float = setting(
    1.0, "logit_adjustment: times the log of the class prior", at_least(0)
  )
  tau: float = setting(1.0, "tau_norm, if nothing is held out to choose it", between(0, 2))
  num_epochs: float = setting(10.0, "crt and lws: passes over the training images", above(0))
  optimizer: OptimizerConfig = setting(nesterov_cosine(0.1, 5e-4), "of crt and lws")


def make_stage(
  method: str,
  config: DecoupledConfig,
  trained: Recipe,
  frozen: TrainState,
  dataset: LongTailDataset,
  shared: dict[str, jax.Array],
  mesh: Mesh,
) -> Stage:
  """Trains the head of `method`, crt or lws, on a trained encoder.

  Args:
    method: one of TRAINED.
    config: `num_epochs` counts drawn examples: an epoch draws as many as the training set has.
    trained: how the classifier was trained; its augmentation and batch size are used here too,
      mixup excepted.
    frozen: its final state, seeds leading.
    dataset, shared, mesh: as for the classifier's own stage.
  """
  classifier, encoder_config = trained.classifier, trained.encoder
  num_examples, num_classes = len(dataset.train_labels), dataset.num_classes
  num_steps = round(config.num_epochs * num_examples / classifier.batch_size)
  optimizer = train_state.make_optimizer(config.optimizer, num_steps)
  model = encoder.make_model(encoder_config, trained.loss, num_classes)
  by_class = mesh_lib.replicate(mesh, batches.group_by_class(dataset.train_labels, num_classes))

  def init(key, per_seed):
    if method == "lws":
      return train_state.create(key, {"scale": jnp.ones((num_classes,))}, optimizer)
    kernel = jax.nn.initializers.lecun_normal()(
      stream(key, "params"), (encoder_config.feature_dim, num_classes)
    )
    return train_state.create(key, {"kernel": kernel, "bias": jnp.zeros((num_classes,))}, optimizer)

  def draw(state, shared, per_seed):
    if dataset.streamed:
      per_seed, batch = per_seed
      return per_seed, batch["images"], batch["labels"]
    index = batches.balanced_indices(
      stream(state.key, "order"), state.step, shared["by_class"], classifier.batch_size
    )
    images, labels = mesh_lib.shard_batch((shared["images"][index], shared["labels"][index]), mesh)
    return per_seed, images, labels

  def prepare(state, shared, per_seed):
    """(frozen encoder, normalised images, labels)."""
    frozen, images, labels = draw(state, shared, per_seed)
    key = stream(state.key, "views", state.step)
    images = image_batches.augmented(key, images, classifier.augment, encoder_config.input, shared)
    return frozen, images, labels

  def step(state, shared, per_seed):
    frozen, images, labels = prepare(state, shared, per_seed)
    _, features = model.apply(frozen, images, train=False)

    def loss_of(params):
      logits = trained_logits(method, params, frozen["params"]["head"], features)
      return losses.cross_entropy(logits, labels).mean()

    value, gradients = jax.value_and_grad(loss_of)(state.params)
    return train_state.apply_gradients(state, gradients, optimizer), {"loss": value}

  return Stage(
    name=f"heads/{method}",
    num_steps=num_steps,
    init=init,
    batch=lambda *arguments: prepare(*arguments)[1:],
    step=step,
    evaluate=None,
    shared=shared | {"by_class": by_class},
    per_seed={"params": frozen.params, "batch_stats": frozen.model_state},
    batch_size=classifier.batch_size,
    batches=image_batches.host_batches(
      dataset, classifier.batch_size, classifier.stream, f"heads/{method}", balanced=True
    ),
  )


def trained_logits(method: str, params, own_head, features: jax.Array) -> jax.Array:
  """Logits [N, C] of a head that `make_stage` trained; `own_head` is the encoder's."""
  if method == "lws":
    return posthoc.scaled_logits(own_head, params["scale"], features)
  return linear_logits(params, features)
