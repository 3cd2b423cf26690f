"""Captions in training: which rows of a batch are told by their sentence, their class, or both."""

import dataclasses

import jax
import jax.numpy as jnp

from memdiff.config import between, one_of, path_setting, setting
from memdiff.synthesis.text_to_image.sentences import ENCODERS


@dataclasses.dataclass(frozen=True)
class PixelTextConfig:
  is_read: bool = setting(False, "whether every U-Net reads captions; prompted turns it on")
  encoder: str = setting("minilm", "of captions and prompts", one_of(ENCODERS))
  weights: str = path_setting('its folder or file, "": of its installed package')
  hidden: float = setting(
    0.25, "share of the images whose caption is hidden, their class told", between(0, 1)
  )
  alone: float = setting(
    0.25, "share of the images whose class is hidden, their caption told", between(0, 1)
  )

  @property
  def input_files(self) -> dict[str, str]:
    """What decides embeddings, if it is not a package: what it is, and where."""
    return {"sentence_encoder": self.weights} if self.weights else {}

  def __post_init__(self):
    if self.hidden + self.alone > 1:
      raise ValueError(
        f"hidden is {self.hidden:g} and alone {self.alone:g}, which are more than all images"
        " together; lower one of them."
      )


def draw_told(
  key: jax.Array, config: PixelTextConfig, vectors: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(embeddings [B, D], 0 if the caption is hidden; whether the class is hidden [B]).

  Args:
    key: of the step.
    config: the shares.
    vectors: [B, D] of the captions, 0 for an image without one, whose class is always told.
  """
  coin = jax.random.uniform(key, vectors.shape[:1])
  alone = (coin > 1 - config.alone) & (vectors != 0).any(axis=1)
  return jnp.where((coin < config.hidden)[:, None], 0, vectors), alone
