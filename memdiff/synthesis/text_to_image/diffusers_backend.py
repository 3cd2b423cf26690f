"""Stable Diffusion 1.5, 2.1, XL and other models of diffusers, on PyTorch; they draw, untuned.

A model is a folder as diffusers saves it (`save_pretrained`). It runs on the first GPU that PyTorch
knows, or on the CPU.
"""

import dataclasses
import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from memdiff.errors import ConfigError, DataError
from memdiff.synthesis.text_to_image.backends import FEWER, TextToImageConfig

MARK = "model_index.json"  # in the folder of a model
_TAKES = (
  "prompt",
  "negative_prompt",
  "generator",
  "guidance_scale",
  "num_inference_steps",
  "height",
)
_INSTALL = "pip install -r requirements-text-to-image-torch.txt"


@dataclasses.dataclass(frozen=True, eq=False)
class Diffusers:
  """A model in memory.

  Attributes:
    pipeline: a `diffusers.DiffusionPipeline` that takes prompts.
    config: how it draws.
  """

  pipeline: Any
  config: TextToImageConfig

  def generate(
    self, prompts: Sequence[str], negative: str, seeds: Sequence[int], guidance: float
  ) -> np.ndarray:
    size, images = self.config.batch_size, []
    for start in range(0, len(prompts), size):
      rows = slice(start, start + size)
      images.append(self._draw(prompts[rows], negative, seeds[rows], guidance))
    return np.concatenate(images)

  def _draw(
    self, prompts: Sequence[str], negative: str, seeds: Sequence[int], guidance: float
  ) -> np.ndarray:
    import torch

    side = {name: self.config.side for name in ("height", "width") if self.config.side}
    try:
      drawn = self.pipeline(
        list(prompts),
        negative_prompt=[negative] * len(prompts) if guidance > 1 else None,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        guidance_scale=guidance,
        num_inference_steps=self.config.num_steps,
        output_type="np",
        **side,
      )
    except torch.OutOfMemoryError as error:
      raise ConfigError(FEWER.format(len(prompts))) from error
    return np.clip(np.round(drawn.images * 255), 0, 255).astype(np.uint8)

  def too_long(self, prompts: Sequence[str]) -> list[str]:
    tokenizer = self.pipeline.tokenizer
    room = tokenizer.model_max_length
    return [text for text in prompts if len(tokenizer(text, truncation=False).input_ids) > room]


def check(config: TextToImageConfig) -> None:
  """Raises ConfigError if the libraries are not installed, or the model is to be tuned."""
  for name in ("torch", "diffusers", "transformers"):
    if importlib.util.find_spec(name) is None:
      raise ConfigError(f"config.text_to_image.model needs {name}: {_INSTALL}.")
  if config.tuning.is_on:
    raise ConfigError(
      f"config.text_to_image.tuning.method is {config.tuning.method}, but models of diffusers are"
      " not tuned here; set it to none, or give a model of KerasHub."
    )


def load(config: TextToImageConfig) -> Diffusers:
  """Reads the model in `config.model`; nothing is downloaded.

  Raises:
    DataError: if the model is torn.
  """
  import diffusers
  import torch
  import transformers

  diffusers.utils.logging.set_verbosity_error()
  transformers.logging.set_verbosity_error()
  try:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
      config.model,
      torch_dtype=getattr(torch, config.dtype),
      local_files_only=True,
    )
    pipeline = pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
  except torch.OutOfMemoryError as error:
    raise ConfigError(
      f"The text-to-image model in {config.model} does not fit into the memory of the GPU; set"
      " XLA_PYTHON_CLIENT_PREALLOCATE=false, so that JAX leaves it some, or take a smaller one."
    ) from error
  except Exception as error:  # many types for torn files, as many as there are parts
    reason = str(error).strip().split("\n")[0]
    raise DataError(
      f"Cannot read the text-to-image model in {config.model} ({type(error).__name__}: {reason})."
    ) from error
  lacking = [name for name in _TAKES if name not in inspect.signature(pipeline).parameters]
  if lacking:
    raise DataError(
      f"The model in {config.model} is a {type(pipeline).__name__}, which takes no"
      f" {' and no '.join(lacking)}; give one that draws from prompts, such as Stable Diffusion."
    )
  pipeline.set_progress_bar_config(disable=True)
  return Diffusers(pipeline, config)
