"""Batches of images for the diffusion engine: what is drawn, and what the denoiser is told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.batches import draw_labels, draw_members
from memdiff.diffusion import objectives, terms
from memdiff.diffusion.denoiser_training import Batch
from memdiff.diffusion.exemplar_images import ExemplarImages
from memdiff.diffusion.text_condition import Captioned
from memdiff.diffusion.unet import Augmented
from memdiff.runtime.random import stream
from memdiff.synthesis import pixel_augmentation, pixel_memory, pixel_text
from memdiff.synthesis.pixel_data import ImageData, to_model
from memdiff.synthesis.pixel_settings import PixelDiffusionConfig


def draw_batch(
  key: jax.Array,
  data: ImageData,
  cumulative: np.ndarray | jax.Array,
  config: PixelDiffusionConfig,
) -> Batch:
  """A batch of images, a class first, drawn with replacement.

  Args:
    key: of the step.
    data: see there.
    cumulative: [C] cumulated probability of drawing each class.
    config: batch size, flips, and how labels are dropped (the unconditional model of guidance).
  """
  size, num_classes = config.batch_size, len(cumulative)
  label = draw_labels(stream(key, "class"), jnp.asarray(cumulative, jnp.float32), size)
  index = draw_members(stream(key, "member"), data.by_class, label)
  coins = (1,) if config.dropped_by == "batch" else (size,)
  dropped = jax.random.bernoulli(stream(key, "drop"), config.label_dropout, coins)
  dropped = jnp.broadcast_to(dropped, (size,))
  x0, condition = to_model(data.images[index]), _Conditions(key, data, config, dropped)
  if config.memory.num_shown:
    memory, shown = condition.with_exemplars(label, index)
    x0 = pixel_memory.turned(x0, shown.ways)
  else:
    memory, shown = (), None
  x0, vector = _changed(key, x0, config)
  invented = jnp.zeros(size, bool) if shown is None else shown.invented
  silent = dropped if shown is None else dropped | shown.hidden  # the class is not told
  caption = None
  if config.text.is_read:
    caption, alone = condition.captions(index, invented)
    silent, memory = silent | alone, Captioned(memory, caption)
  batch = Batch(x0=x0, label=jnp.where(silent, num_classes, label), memory=memory)
  needed = terms.needed(config.objective)
  if "true_label" in needed:  # a class that was made up has no other member in the batch
    batch = batch.replace(true_label=jnp.where(invented, num_classes + jnp.arange(size), label))
  if "class_count" in needed:
    batch = batch.replace(class_count=jnp.where(invented, 0, data.by_class.counts[label]))
  if "class_share" in needed:
    share, rarity = (w[label] for w in objectives.capacity_weights(data.by_class.counts))
    batch = batch.replace(
      class_share=jnp.where(invented, 0, share), class_rarity=jnp.where(invented, 0, rarity)
    )
  if "other_label" in needed:
    weights = objectives.other_weights(data.by_class.counts, config.objective.other_labels)
    other = draw_labels(stream(key, "other"), weights, size)
    other_memory = () if shown is None else condition.of_others(other, label, memory, shown)
    if caption is not None:  # what the caption says is true of the image's own class alone
      same = jnp.where((other == label)[:, None], caption, 0)
      other_memory = Captioned(other_memory, same)
    other_label = jnp.where(silent, num_classes, other)
    batch = batch.replace(other_label=other_label, other_memory=other_memory)
  if vector is None:
    return batch
  other_memory = None if batch.other_label is None else Augmented(batch.other_memory, vector)
  return batch.replace(memory=Augmented(batch.memory, vector), other_memory=other_memory)


def _changed(
  key: jax.Array, x0: jax.Array, config: PixelDiffusionConfig
) -> tuple[jax.Array, jax.Array | None]:
  """Images mirrored or augmented; (images, what the U-Net is told of it, or None)."""
  if probability := config.augmentation.probability:
    return pixel_augmentation.augment(stream(key, "augment"), x0, probability, config.mirror)
  return (_mirrored(stream(key, "mirror"), x0) if config.mirror else x0), None


def _mirrored(key: jax.Array, x: jax.Array) -> jax.Array:
  """Images [B, ..., H, W, ch], half of them flipped left to right."""
  flip = jax.random.bernoulli(key, 0.5, x.shape[:-3])
  return jnp.where(flip[..., None, None, None], x[..., ::-1, :], x)


@dataclasses.dataclass(frozen=True)
class _Conditions:
  """What the denoiser is told of the rows of a batch, whose labels are `dropped` or not [B]."""

  key: jax.Array
  data: ImageData
  config: PixelDiffusionConfig
  dropped: jax.Array

  def captions(self, index: jax.Array, invented: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(embeddings [B, D], whether they stand for the class [B]); classes made up have none."""
    known = jnp.where(invented[:, None], 0, self.data.captions[index])
    vectors, alone = pixel_text.draw_told(stream(self.key, "caption"), self.config.text, known)
    return jnp.where(self.dropped[:, None], 0, vectors), alone

  def with_exemplars(self, label: jax.Array, index: jax.Array):
    """(exemplars, themselves left out, and what is shown of the rows)."""
    number = self.config.memory.num_shown
    found, mask = pixel_memory.draw_exemplars(
      stream(self.key, "exemplars"), self.data.by_class, label, number, self.data.places[index]
    )
    mask = pixel_memory.thin_out(stream(self.key, "thin"), mask)
    channels = self.data.images.shape[-1]
    shown = pixel_memory.draw_shown(
      self.key, self.config.memory, mask.any(axis=1), channels, self.config.mirror
    )
    return self._placed(found, mask, shown, "mirror_exemplars"), shown

  def of_others(self, other: jax.Array, label: jax.Array, memory: ExemplarImages, shown):
    """Exemplars of the other classes; those of the row itself if it is the same class."""
    found, mask = pixel_memory.draw_exemplars(
      stream(self.key, "other_exemplars"),
      self.data.by_class,
      other,
      self.config.memory.num_shown,
    )
    mask = pixel_memory.thin_out(stream(self.key, "thin_other"), mask)
    placed = self._placed(found, mask, shown, "mirror_others")
    same = other == label
    return jax.tree.map(
      lambda a, b: jnp.where(same.reshape(-1, *(1,) * (a.ndim - 1)), a, b), memory, placed
    )

  def _placed(self, index: jax.Array, mask: jax.Array, shown, name: str) -> ExemplarImages:
    """The exemplars of these indices as the U-Net sees them, turned as their rows are."""
    images = pixel_memory.turned(to_model(self.data.images[index]), shown.ways)
    if self.config.mirror:
      images = _mirrored(stream(self.key, name), images)
    return ExemplarImages(images, mask).forget(self.dropped)
