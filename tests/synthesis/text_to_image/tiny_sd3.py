"""A tiny Stable Diffusion 3 with random weights, on disk as KerasHub keeps real ones."""

import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "jax")

SIDE, LENGTH = 32, 12  # pixels; tokens of a prompt


def vocabulary() -> tuple[dict[str, int], list[str]]:
  """(tokens, merges) of a byte-level tokenizer as CLIP's, with a few words whole."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  table = dict(zip(printable, map(chr, printable), strict=True))
  spare = iter(range(256, 512))
  symbols = [table.get(byte) or chr(next(spare)) for byte in range(256)]
  merges = ["r e", "re d</w>", "b i", "r d</w>", "bi rd</w>", "c a", "ca t</w>"]
  merges += ["s k", "sk s</w>", "z w", "zw x</w>"]  # rare words
  tokens = [*symbols, *(s + "</w>" for s in symbols), *(m.replace(" ", "") for m in merges)]
  tokens += ["<|startoftext|>", "<|endoftext|>"]
  return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def build():
  """The model; its weights are those of Keras' seed."""
  import keras
  import keras_hub
  from keras_hub.src.models.vae.vae_backbone import VAEBackbone  # exported nowhere

  keras.utils.set_random_seed(0)
  words, merges = vocabulary()
  tokenizer = keras_hub.tokenizers.CLIPTokenizer(
    vocabulary=words, merges=merges, pad_with_end_token=True
  )
  preprocessors = [
    keras_hub.models.CLIPPreprocessor(tokenizer, sequence_length=LENGTH) for _ in range(2)
  ]

  def encoder(width: int, name: str):
    return keras_hub.models.CLIPTextEncoder(
      vocabulary_size=len(words), embedding_dim=width, hidden_dim=width, num_layers=2, num_heads=2,
      intermediate_dim=2 * width, intermediate_activation="quick_gelu",
      intermediate_output_index=0, max_sequence_length=LENGTH, name=name,
    )  # fmt: skip

  vae = VAEBackbone(
    encoder_num_filters=[32, 32, 32, 32], encoder_num_blocks=[1, 1, 1, 1],
    decoder_num_filters=[32, 32, 32, 32], decoder_num_blocks=[1, 1, 1, 1],
    sampler_method="sample", input_channels=3, sample_channels=8, output_channels=3, scale=1.5,
    shift=0.06, image_shape=(SIDE, SIDE, 3), name="vae",
  )  # fmt: skip
  backbone = keras_hub.models.StableDiffusion3Backbone(
    mmdit_patch_size=2, mmdit_hidden_dim=16, mmdit_num_layers=2, mmdit_num_heads=2,
    mmdit_position_size=32, mmdit_qk_norm=None, mmdit_dual_attention_indices=None, vae=vae,
    clip_l=encoder(8, "clip_l"), clip_g=encoder(12, "clip_g"), latent_channels=4,
    image_shape=(SIDE, SIDE, 3),
  )  # fmt: skip
  return keras_hub.models.StableDiffusion3TextToImage(
    backbone=backbone,
    preprocessor=keras_hub.models.StableDiffusion3TextToImagePreprocessor(*preprocessors),
  )


def write(folder: pathlib.Path) -> str:
  """Saves it; the path that loads it."""
  build().save_to_preset(str(folder))
  return str(folder)
