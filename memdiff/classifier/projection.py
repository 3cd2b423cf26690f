"""What balanced contrastive learning needs beside a classifier: embeddings and class centres.

As in the code of Zhu et al. 2022: a two-layer network with batch norm from features to unit-length
embeddings, and another of the same shape from the classifier's weights to the class centres. Its
parameters lie beside those of the backbone, under "projection", and are not used after training.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from memdiff.classifier import backbones
from memdiff.classifier.losses import LossConfig
from memdiff.contrastive import unit_length

NAME = "projection"


class Projection(nn.Module):
  """Features [N, D] and class weights [D, C] -> embeddings [N, P] and centres [C, P]."""

  embedding_dim: int

  @nn.compact
  def __call__(self, features: jax.Array, kernel: jax.Array, train: bool):
    def project(x, name):
      hidden = nn.Dense(x.shape[-1], name=f"{name}_hidden")(x)
      hidden = nn.relu(backbones.batch_norm(train, jnp.float32, f"{name}_bn")(hidden))
      return unit_length(nn.Dense(self.embedding_dim, name=f"{name}_out")(hidden), 1)

    return project(features, "feature"), project(kernel.T, "centre")


def extend(variables: dict[str, Any], config: LossConfig, key: jax.Array) -> dict[str, Any]:
  """A backbone's {"params", "batch_stats"} with those of a projection beside them."""
  kernel = variables["params"]["head"]["kernel"]
  drawn = Projection(config.embedding_dim).init(key, kernel.T, kernel, train=True)
  return {name: {**variables[name], NAME: drawn[name]} for name in ("params", "batch_stats")}


def project(params, batch_stats, features: jax.Array, config: LossConfig):
  """Embeddings [N, P], centres [C, P], and the batch statistics moved on."""
  (embeddings, centres), updates = Projection(config.embedding_dim).apply(
    {"params": params[NAME], "batch_stats": batch_stats[NAME]},
    features,
    params["head"]["kernel"],
    train=True,
    mutable=["batch_stats"],
  )
  return embeddings, centres, {**batch_stats, NAME: updates["batch_stats"]}
