"""Stable Diffusion 3 and 3.5 by KerasHub, on JAX.

Esser et al., "Scaling rectified flow transformers for high-resolution image synthesis", 2024. A
model is a folder as KerasHub saves it (`save_to_preset`, or what it downloads).
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memdiff.errors import ConfigError
from memdiff.runtime import keras_library
from memdiff.runtime.stage import Run
from memdiff.synthesis.text_to_image import keras_hub_tuning
from memdiff.synthesis.text_to_image.backends import FEWER, TextToImageConfig
from memdiff.synthesis.text_to_image.tuning import Examples, TuningConfig

MARK = "task.json"  # in the folder of a model
_NEEDED_BY = "config.text_to_image.model"
_WORD = re.compile("[a-z]{3,}")


@dataclasses.dataclass(frozen=True, eq=False)
class KerasHub:
  """A model in memory.

  Attributes:
    task: a `keras_hub.models.TextToImage`.
    config: how it draws.
  """

  task: Any
  config: TextToImageConfig

  def generate(
    self, prompts: Sequence[str], negative: str, seeds: Sequence[int], guidance: float
  ) -> np.ndarray:
    size, images = self.config.batch_size, []
    for start in range(0, len(prompts), size):
      rows = [min(i, len(prompts) - 1) for i in range(start, start + size)]  # one program for all
      said, keys = [prompts[i] for i in rows], [seeds[i] for i in rows]
      images.append(self._draw(said, negative, keys, guidance)[: len(prompts) - start])
    return np.concatenate(images)

  def _draw(
    self, prompts: Sequence[str], negative: str, seeds: Sequence[int], guidance: float
  ) -> np.ndarray:
    """As `TextToImage.generate`, which draws the noise of a batch from one seed."""
    tokens = [
      self.task.preprocessor.generate_preprocess(list(texts))
      for texts in (prompts, [negative] * len(prompts))
    ]
    shape = self.task.latent_shape[1:]
    noise = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))
    latents = noise(jnp.array(seeds, jnp.uint32))
    self.task.backbone.configure_scheduler(self.config.num_steps)
    scale = jnp.float32(guidance) if guidance > 1 else None
    draw = self.task.make_generate_function()
    try:
      images = np.asarray(draw(latents, tuple(tokens), self.config.num_steps, scale), np.float32)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      raise ConfigError(FEWER.format(len(prompts))) from error
    return np.clip(np.round((images + 1) * 127.5), 0, 255).astype(np.uint8)

  def tune(
    self,
    config: TuningConfig,
    real: Examples,
    prior: Examples | None,
    run: Run,
    folder: pathlib.Path,
  ) -> None:
    keras_hub_tuning.tune(self.task, config, real, prior, run, folder)
    self.task.generate_function = None  # the compiled one knows only the variables that were there

  def words(self, number: int, avoid: Sequence[str]) -> list[str]:
    tokenizer = self.task.preprocessor.clip_l_preprocessor.tokenizer
    known, found = set(" ".join(avoid).lower().split()), []
    for token in reversed(tokenizer.get_vocabulary()):  # the rarest were merged last
      word = token.removesuffix("</w>")
      if word != token and _WORD.fullmatch(word) and word not in known:
        if len(tokenizer(word)) == 1:
          found.append(word)
        if len(found) == number:
          return found
    raise ConfigError(
      f"The vocabulary of the text-to-image model has only {len(found)} rare words, but there are"
      f" {number} classes to name by one; set config.text_to_image.tuning.method to lora."
    )

  def too_long(self, prompts: Sequence[str]) -> list[str]:
    preprocessor = self.task.preprocessor.clip_l_preprocessor
    room = preprocessor.sequence_length - 2  # marks of begin and end
    return [text for text in prompts if len(preprocessor.tokenizer(text)) > room]


def check(config: TextToImageConfig) -> None:
  """Raises ConfigError if KerasHub is not installed."""
  del config
  keras_library.check(_NEEDED_BY)


def load(config: TextToImageConfig) -> KerasHub:
  """Reads the model in `config.model`.

  Raises:
    ConfigError: if KerasHub is not installed, or Keras runs on another library than JAX.
    DataError: if the model is torn or of another kind.
  """
  keras_hub = keras_library.keras_hub(_NEEDED_BY)
  shape = {"image_shape": (config.side, config.side, 3)} if config.side else {}
  with keras_library.reading(f"the text-to-image model in {config.model}"):
    task = keras_hub.models.TextToImage.from_preset(config.model, dtype=config.dtype, **shape)
  return KerasHub(task, config)
