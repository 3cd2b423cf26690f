"""What classifiers are trained on: random views of images, batches from the host, folds."""

from typing import Any

import flax.struct
import jax
import numpy as np

from input_pipeline import augment, streaming
from input_pipeline.augment import AugmentConfig
from input_pipeline.dataset import LongTailDataset
from input_pipeline.streaming import Order, StreamConfig
from memdiff.classifier import encoder, losses
from memdiff.classifier.added_images import Drawn
from memdiff.classifier.encoder import EncoderConfig
from memdiff.runtime.random import stream


def augmented(
  key: jax.Array,
  images: jax.Array,
  config: AugmentConfig,
  input_config: encoder.InputConfig,
  shared: dict[str, jax.Array],
) -> jax.Array:
  """One random view of uint8 images [B, H, W, ch], normalised."""
  images = augment.augment(stream(key, "augment"), images, config)
  images = encoder.normalize(input_config, images, shared)
  return augment.cutout(stream(key, "cutout"), images, config.cutout)


def host_batches(
  dataset: LongTailDataset,
  batch_size: int,
  config: StreamConfig,
  name: str,
  *,
  balanced: bool = False,
):
  """`Stage.batches` of the stage `name` for a set that is too large for the devices, else None."""
  if not dataset.streamed:
    return None
  process = {"process_index": jax.process_index(), "process_count": jax.process_count()}

  def make(seed: int, first_step: int):
    order = Order(streaming.stream_seed(seed, name), first_step, balanced)
    return streaming.train_batches(
      dataset.train_images, dataset.train_labels, batch_size, order, config, **process
    )

  return make


def fold_data(
  encoder_config: EncoderConfig, dataset: LongTailDataset, rows: np.ndarray
) -> dict[str, Any]:
  """What is known of the training set in each of R runs that see a part of it.

  Args:
    encoder_config, dataset: see there.
    rows: [R, A] training images; if a run has fewer, -1 behind them.

  Returns:
    {"rows" [R, A], of which the first "number" [R] count, "counts" [R, C], "statistics":
    {"pixel_mean", "pixel_std"} [R, ch]}.
  """
  seen = [row[row >= 0] for row in rows]
  statistics = [
    encoder.pixel_statistics(encoder_config.input, dataset.train_images[row]) for row in seen
  ]
  return {
    "rows": rows,
    "number": np.array(list(map(len, seen)), np.int32),
    "counts": np.stack(
      [np.bincount(dataset.train_labels[row], minlength=dataset.num_classes) for row in seen]
    ),
    "statistics": jax.tree.map(lambda *leaves: np.stack(leaves), *statistics),
  }


@flax.struct.dataclass
class PreparedBatch:
  """What a step is trained on.

  Attributes:
    images: [V B, H, W, ch] float32, the loss's V views of B images, one after the other.
    rows: labels and weights of the B images.
    partner: [B] the rows that mixup has mixed in; None: it is off.
    share: [] in [0, 1], of each image itself in mixup.
  """

  images: jax.Array
  rows: Drawn
  partner: jax.Array | None = None
  share: jax.Array | None = None


def seen(logits: jax.Array, features: jax.Array, batch: PreparedBatch) -> losses.Batch:
  """What a network says of the first view of a batch."""
  rows, partner = batch.rows, batch.partner
  size, mixed = len(rows.labels), partner is not None
  return losses.Batch(
    logits=logits[:size],
    features=features[:size],
    labels=rows.labels,
    partner_labels=rows.labels[partner] if mixed else None,
    share=batch.share,
    weight=rows.weight,
    partner_weight=rows.weight[partner] if mixed and rows.weight is not None else None,
  )
