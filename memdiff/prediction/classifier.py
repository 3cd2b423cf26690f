"""A trained classifier as a function: from images or features to the log of probabilities."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from memdiff.classifier import encoder, posthoc
from memdiff.classifier.encoder import InputConfig
from memdiff.fitting import blend, heads


@flax.struct.dataclass
class Weights:
  """All numbers of M classifiers whose probabilities are averaged; what one lacks is None.

  Attributes:
    network: {"params", "batch_stats"}, leading with M.
    pixels: {"pixel_mean", "pixel_std"} [ch], what the network's input is standardised by.
    standardizer: {"mean", "scale"} [M, D], what features are standardised by before the head.
    head: {"kernel" [M, D, C], "bias" [M, C]}; None: the network's own, or fitted ones.
    fitted: {family: its arrays, leading with M}, heads of `memdiff.fitting`.
    blend: [M, F], weights of F families.
    offset: [M, C], which logits are lowered by.
    temperature: [], which logits are divided by.
  """

  network: Any
  pixels: Any
  standardizer: Any
  head: Any
  fitted: Any
  blend: Any
  offset: Any
  temperature: Any

  @property
  def num_models(self) -> int:
    return len(jax.tree.leaves(self._of_models())[0])

  def _of_models(self) -> "Weights":
    """What leads with models."""
    return self.replace(pixels=None, temperature=None)

  def of_model(self, number: int) -> "Weights":
    """Of one of the models, without the leading axis."""
    of_model = jax.tree.map(lambda x: x[number], self._of_models())
    return of_model.replace(pixels=self.pixels, temperature=self.temperature)


@dataclasses.dataclass(frozen=True)
class Classifier:
  """A method of a run, ready to predict.

  Attributes:
    method: its name.
    description: in words.
    class_names: C of them.
    input_shape: of one input: (H, W, ch) of an image, uint8, or (D,) of features, float32.
    margin: an image's shorter side is made so many times the side before its centre is cut out.
    calibration: {"temperature", "error", "error_before"} of the run's report.
    weights: of its models.
    network: from images to features; None if inputs are features.
    input: how the network sees pixels.
    by_cosine: whether the head compares directions.
    fitted: {family: name of its kind of head}, in the order of the weights of the blend.
  """

  method: str
  description: str
  class_names: tuple[str, ...]
  input_shape: tuple[int, ...]
  margin: float
  calibration: Mapping[str, Any]
  weights: Weights
  network: nn.Module | None = None
  input: InputConfig | None = None
  by_cosine: bool = False
  fitted: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def takes_images(self) -> bool:
    return self.network is not None

  @property
  def input_dtype(self) -> np.dtype:
    return np.dtype(np.uint8 if self.takes_images else np.float32)

  def log_probabilities(self, weights: Weights, inputs: jax.Array) -> jax.Array:
    """Of the classes, the models' probabilities averaged. [B, ...] -> [B, C]."""
    of_models = [
      jax.nn.log_softmax(self._logits(weights.of_model(number), inputs))
      for number in range(weights.num_models)
    ]
    return jax.nn.logsumexp(jnp.stack(of_models), axis=0) - math.log(weights.num_models)

  def _fitted_logits(self, weights: Weights, features: jax.Array) -> jax.Array:
    """Of one family, or of the blend of several. [B, C]."""
    found = [
      heads.KINDS[kind](**weights.fitted[name]).logits(features)
      for name, kind in self.fitted.items()
    ]
    if weights.blend is None:
      return found[0]
    parts = jnp.stack([blend.log_probabilities(logits) for logits in found])
    return jnp.tensordot(weights.blend, parts, axes=1)

  def _logits(self, weights: Weights, inputs: jax.Array) -> jax.Array:
    """Of one model. [B, C]."""
    features = inputs
    if self.network is not None:
      pixels = encoder.normalize(self.input, inputs, weights.pixels)
      logits, features = self.network.apply(weights.network, pixels, train=False)
    if weights.standardizer is not None:
      features = features - weights.standardizer["mean"][None]
      features = features / weights.standardizer["scale"][None]
    if weights.head is not None:
      features = posthoc.unit(features) if self.by_cosine else features
      logits = posthoc.linear_logits(weights.head, features)
    if self.fitted:
      logits = self._fitted_logits(weights, features)
    if weights.offset is not None:
      logits = logits - weights.offset[None]
    return logits / weights.temperature
