"""Personalisation: a trained U-Net is tuned once more, on all classes equally often.

DreamBooth's prior preservation trains on images that the model generated, so that it does not
forget. Here, real images of common classes in the same batches serve that purpose.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import traverse_util

from memdiff.config import above, at_least, setting
from memdiff.diffusion.denoiser_training import Batch, Tuning
from memdiff.diffusion.text_condition import Captioned
from memdiff.diffusion.unet import Augmented
from memdiff.runtime.random import stream

LORA, CONDITIONS, SENTENCES = "lora", "conditions", "class_sentences"
_ATTENTION = ("query", "key", "value", "out")
_DOWN, _UP = "down", "up"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class PixelTuningConfig:
  """How methods that tune a trained U-Net do it; weights are averaged as in its training."""

  num_steps: int = setting(500, "training steps", at_least(1))
  learning_rate: float = setting(1e-3, "of the optimiser, after its warm-up", above(0))
  rank: int = setting(4, "lora: of the matrices that are added", at_least(1))


@dataclasses.dataclass(frozen=True)
class LowRank(Tuning):
  """LoRA (Hu et al. 2022, equation 3): a matrix of low rank is added to each of the attention."""

  rank: int

  def init(self, key: jax.Array, params: Any) -> Any:
    added = {}
    for path, kernel in traverse_util.flatten_dict(params).items():
      if path[-1] == "kernel" and path[-2] in _ATTENTION:
        inputs, outputs = kernel.shape
        drawn = jax.random.normal(stream(key, "/".join(path)), (inputs, self.rank))
        added[*path, _DOWN] = drawn / jnp.sqrt(inputs)
        added[*path, _UP] = jnp.zeros((self.rank, outputs))
    return traverse_util.unflatten_dict(added)

  def merged(self, params: Any, added: Any) -> Any:
    flat, matrices = (traverse_util.flatten_dict(tree) for tree in (params, added))
    for path in {path[:-1] for path in matrices}:
      flat[path] = flat[path] + matrices[*path, _DOWN] @ matrices[*path, _UP]
    return traverse_util.unflatten_dict(flat)


@dataclasses.dataclass(frozen=True)
class Conditions(Tuning):
  """Custom Diffusion (Kumari et al. 2023): only the weights through which a condition enters.

  There these are keys and values of the text's cross-attention. Here a class and a sentence are
  embedded, and exemplars are attended to.
  """

  def init(self, key: jax.Array, params: Any) -> Any:
    del key
    flat = traverse_util.flatten_dict(params)
    # A copy: states are donated, and what they are made from is not.
    chosen = {path: jnp.copy(leaf) for path, leaf in flat.items() if _takes_condition(path)}
    return traverse_util.unflatten_dict(chosen)

  def merged(self, params: Any, added: Any) -> Any:
    flat, tuned = (traverse_util.flatten_dict(tree) for tree in (params, added))
    return traverse_util.unflatten_dict(flat | tuned)


def _takes_condition(path: tuple[str, ...]) -> bool:
  looks = path[0].startswith("look_") and path[1] in ("key", "value")
  return looks or path[0] in ("label_embedding", "sentence_layer")


@dataclasses.dataclass(frozen=True)
class ClassSentences(Tuning):
  """Textual inversion (Gal et al. 2023): one point among sentences is learned for each class.

  The parameters hold where it begins, [C, D], and then where it is, beside those of the U-Net.
  """

  def init(self, key: jax.Array, params: Any) -> Any:
    del key
    return {SENTENCES: jnp.copy(params[SENTENCES])}

  def merged(self, params: Any, added: Any) -> Any:
    return params | added

  def told(self, params: Any, batch: Batch) -> Batch:
    """Labels must all be told, since they choose the sentence."""
    memory = _with_sentences(batch.memory, params[SENTENCES][batch.label])
    if batch.other_label is None:
      return batch.replace(memory=memory)
    other = _with_sentences(batch.other_memory, params[SENTENCES][batch.other_label])
    return batch.replace(memory=memory, other_memory=other)


def _with_sentences(memory: Any, vectors: jax.Array) -> Any:
  if isinstance(memory, Augmented):
    return memory.replace(memory=_with_sentences(memory.memory, vectors))
  return Captioned(memory.memory, vectors)


KINDS: dict[str, Callable[[PixelTuningConfig], Tuning]] = {
  LORA: lambda config: LowRank(config.rank),
  CONDITIONS: lambda _: Conditions(),
  SENTENCES: lambda _: ClassSentences(),
}


def training(kind: str, config: T) -> T:
  """How a U-Net is tuned that was trained by a `PixelDiffusionConfig`."""
  rate = config.tuning.learning_rate
  config = dataclasses.replace(
    config,
    num_steps=config.tuning.num_steps,
    optimizer=dataclasses.replace(config.optimizer, learning_rate=rate),
  )
  if kind != SENTENCES:
    return config
  return dataclasses.replace(  # the class of every image decides its sentence
    config,
    label_dropout=0.0,
    text=dataclasses.replace(config.text, hidden=0.0, alone=0.0),
    memory=dataclasses.replace(config.memory, hidden=0.0),
  )
