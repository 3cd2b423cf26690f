"""Encoders of captions and prompts, by name: sentences -> embeddings of length one."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from memdiff.errors import DataError, MemdiffError
from memdiff.runtime.workdir import read_arrays
from memdiff.synthesis.text_to_image import minilm

_ARRAYS = ("sentences", "embeddings")


class Encoder(Protocol):
  def embed(self, sentences: Sequence[str]) -> np.ndarray:
    """Embeddings of length one. float32 [n, D]."""

  def too_long(self, sentences: Sequence[str]) -> list[str]:
    """Sentences of which only the beginning is read."""


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """Embeddings that were made elsewhere.

  Attributes:
    path: of their file, for messages.
    rows: sentence -> its row.
    embeddings: [M, D] of length one.
  """

  path: str
  rows: Mapping[str, int]
  embeddings: np.ndarray

  def embed(self, sentences: Sequence[str]) -> np.ndarray:
    if missing := [sentence for sentence in sentences if sentence not in self.rows]:
      more = f" and of {len(missing) - 1} more" if len(missing) > 1 else ""
      raise DataError(f"{self.path} has no embedding of {missing[0]!r}{more}; add them.")
    return self.embeddings[[self.rows[sentence] for sentence in sentences]]

  def too_long(self, sentences: Sequence[str]) -> list[str]:
    del sentences  # whatever made the file has read them
    return []


def load_table(path: str) -> Table:
  """Reads a .npz file with the arrays `sentences` [M] and `embeddings` [M, D].

  Raises:
    DataError: if it cannot be read, or the arrays do not fit each other.
  """
  if not path:
    raise DataError(
      "config.diffusion.text.weights is empty; give the .npz file with sentences and embeddings."
    )
  try:
    arrays = read_arrays(pathlib.Path(path), _ARRAYS)
  except (MemdiffError, KeyError) as error:
    raise DataError(f"Cannot read the embeddings in {path}: {error.__cause__ or error}.") from error
  sentences, vectors = (arrays[name] for name in _ARRAYS)
  if vectors.ndim != 2 or sentences.shape != vectors.shape[:1] or not np.isfinite(vectors).all():
    raise DataError(
      f"{path} must hold sentences [M] and finite embeddings [M, D], but they are"
      f" {list(sentences.shape)} and {list(vectors.shape)}."
    )
  lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
  rows = {sentence: row for row, sentence in enumerate(sentences.tolist())}
  return Table(path, rows, (vectors / np.maximum(lengths, 1e-12)).astype(np.float32))


ENCODERS = {"minilm": minilm.load, "table": load_table}


def load(name: str, path: str) -> Encoder:
  """An encoder out of ENCODERS; `path` is of its weights, "" of its installed package.

  Raises:
    DataError: if it cannot be read.
  """
  return ENCODERS[name](path)


def embed(encoder: Encoder, sentences: Sequence[str]) -> np.ndarray:
  """Embeddings of length one, of "" zeros. A sentence that comes twice is embedded once.

  Returns:
    float32 [n, D].
  """
  known, index = np.unique(np.array(sentences, dtype=str), return_inverse=True)
  said = known != ""
  vectors = encoder.embed(known[said].tolist())
  found = np.zeros((len(known), vectors.shape[1]), np.float32)
  found[said] = vectors
  return found[index]
