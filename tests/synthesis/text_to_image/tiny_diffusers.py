"""A tiny Stable Diffusion with random weights, on disk as diffusers keeps real ones."""

import json
import pathlib

from tests.synthesis.text_to_image import tiny_sd3

SIDE, LENGTH = 32, 12  # pixels; tokens of a prompt
_WIDTH = 32  # of texts


def _tokenizer(folder: pathlib.Path):
  import transformers

  words, merges = tiny_sd3.vocabulary()
  folder.mkdir(parents=True)
  (folder / "vocab.json").write_text(json.dumps(words))
  (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
  return transformers.CLIPTokenizer(
    str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH
  )


def _text_encoder(words: int):
  import transformers

  return transformers.CLIPTextModel(
    transformers.CLIPTextConfig(
      vocab_size=words, hidden_size=_WIDTH, intermediate_size=2 * _WIDTH, num_hidden_layers=2,
      num_attention_heads=2, max_position_embeddings=LENGTH, bos_token_id=words - 2,
      eos_token_id=words - 1, pad_token_id=words - 1, projection_dim=_WIDTH,
    )
  )  # fmt: skip


def write(folder: pathlib.Path) -> str:
  """Saves a Stable Diffusion 1; the path that loads it."""
  import diffusers
  import torch

  torch.manual_seed(0)
  tokenizer = _tokenizer(folder.with_name(f"{folder.name}_words"))
  unet = diffusers.UNet2DConditionModel(
    sample_size=SIDE // 2, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=8,
    block_out_channels=(16, 32), cross_attention_dim=_WIDTH, attention_head_dim=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
  )  # fmt: skip
  vae = diffusers.AutoencoderKL(
    in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 32),
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=8,
  )  # fmt: skip
  pipeline = diffusers.StableDiffusionPipeline(
    vae=vae, text_encoder=_text_encoder(len(tokenizer)), tokenizer=tokenizer, unet=unet,
    scheduler=diffusers.EulerAncestralDiscreteScheduler(), safety_checker=None,
    feature_extractor=None, requires_safety_checker=False,
  )  # fmt: skip
  pipeline.save_pretrained(str(folder))
  return str(folder)
