"""Tiny models that describe images, as KerasHub keeps real ones: they begin with random weights."""

import io
import os
import pathlib
from collections.abc import Sequence

import numpy as np

os.environ.setdefault("KERAS_BACKEND", "jax")
SIDE, LENGTH, HEADS = 16, 24, 2  # pixels; tokens of prompt and caption


def blip2(texts: Sequence[str]):
  """BLIP-2 with OPT; its tokens are single bytes, and one merge that tables cannot do without."""
  import keras_hub
  from keras_hub.src.models.blip2.blip2_custom_opt import BLIP2CustomOPT  # exported nowhere
  from keras_hub.src.models.blip2.blip2_opt_tokenizer import BLIP2OPTTokenizer
  from keras_hub.src.models.blip2.blip2_qformer import BLIP2QFormer

  from tests.synthesis.text_to_image import tiny_sd3

  del texts
  symbols = [token for token in tiny_sd3.vocabulary()[0] if len(token) == 1]
  tokens = ["<s>", "<pad>", "</s>", "<image>", *symbols, "re"]
  tokenizer = BLIP2OPTTokenizer(
    vocabulary={token: i for i, token in enumerate(tokens)}, merges=["r e"]
  )
  models = keras_hub.models
  preprocessor = models.BLIP2CausalLMPreprocessor(
    tokenizer, keras_hub.layers.BLIP2ImageConverter(image_size=(SIDE, SIDE)), LENGTH
  )
  vision = models.BLIP2VisionEncoder(
    image_size=SIDE, patch_size=8, num_layers=1, num_heads=HEADS, hidden_dim=16,
    intermediate_dim=32, use_patch_bias=True, use_class_token=True, use_mha_bias=True,
    use_mlp_bias=True, dropout_rate=0.0, layer_norm_epsilon=1e-6, initializer_range=0.02,
  )  # fmt: skip
  qformer = BLIP2QFormer(
    num_query_tokens=4, num_layers=1, num_heads=HEADS, hidden_dim=16, intermediate_dim=32,
    vision_dim=16, cross_attention_frequency=1, dropout=0.0, layer_norm_epsilon=1e-6,
  )  # fmt: skip
  language = BLIP2CustomOPT(
    vocabulary_size=len(tokens), num_layers=1, num_heads=HEADS, hidden_dim=32, intermediate_dim=64,
    num_query_tokens=4, dropout=0.0, max_sequence_length=64, qformer_hidden_dim=16,
  )  # fmt: skip
  return models.BLIP2CausalLM(preprocessor, models.BLIP2Backbone(vision, qformer, language))


def pali_gemma(texts: Sequence[str]):
  """PaliGemma, with a tokenizer of `texts`."""
  import keras_hub
  import sentencepiece

  proto = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([*texts, "caption en"] * 20), model_writer=proto, vocab_size=40,
    model_type="BPE", pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>",
    eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>", user_defined_symbols=["\n"],
    minloglevel=2,
  )  # fmt: skip
  models = keras_hub.models
  tokenizer = models.PaliGemmaTokenizer(proto=proto.getvalue())
  converter = keras_hub.layers.PaliGemmaImageConverter(
    image_size=(SIDE, SIDE), scale=1 / 127.5, offset=-1.0
  )
  preprocessor = models.PaliGemmaCausalLMPreprocessor(tokenizer, converter, LENGTH)
  backbone = models.PaliGemmaBackbone(
    vocabulary_size=tokenizer.vocabulary_size(), image_size=SIDE, num_layers=1,
    num_query_heads=HEADS, num_key_value_heads=1, hidden_dim=32, intermediate_dim=64, head_dim=16,
    vit_patch_size=8, vit_num_heads=HEADS, vit_hidden_dim=16, vit_num_layers=1,
    vit_intermediate_dim=32,
  )  # fmt: skip
  return models.PaliGemmaCausalLM(preprocessor, backbone)


def learn(task, inputs: dict, folder: pathlib.Path) -> pathlib.Path:
  """Trains the model by heart on a few images with texts, by the library, and saves it."""
  import keras

  task.compile(
    optimizer=keras.optimizers.Adam(5e-3),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
  )
  often = {name: np.repeat(np.asarray(values), 8, axis=0) for name, values in inputs.items()}
  task.fit(
    {name: x if x.dtype == np.uint8 else x.tolist() for name, x in often.items()},
    epochs=60, batch_size=24, verbose=0,
  )  # fmt: skip
  task.save_to_preset(str(folder))
  return folder
