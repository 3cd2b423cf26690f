"""The networks that judge images, by name.

Another one is a file with its functions, such as `efficientnet.py`, and a row of `NETWORKS`.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from memdiff.errors import ConfigError
from memdiff.evaluation import dinov2, efficientnet, inception

AS_THEY_ARE = 0  # in place of a side: images are not resized before they go into the network


@dataclasses.dataclass(frozen=True)
class Row:
  """A network.

  Attributes:
    weights_path: path or "" -> the file of its weights; DataError if there is none.
    load: that file -> its arrays; DataError if they do not fit.
    features: (arrays, uint8 RGB [n, H, W, 3]) -> float32 [n, D].
    probabilities: (arrays, features [n, D]) -> [n, classes]; None: it knows no classes.
    side: pixels that images are resized to unless told otherwise, or AS_THEY_ARE.
    least_side: in pixels.
    multiple_of: the side is one of this.
    batch: images at a time.
    resize: what the network itself does to the side, for people; "": nothing.
    is_fid: whether the Fréchet distance of its features is FID.
  """

  weights_path: Callable
  load: Callable
  features: Callable
  probabilities: Callable | None = None
  side: int = 64
  least_side: int = 32
  multiple_of: int = 1
  batch: int = 256
  resize: str = ""
  is_fid: bool = False


NETWORKS = {
  "efficientnet_lite0": Row(
    efficientnet.weights_path,
    efficientnet.load,
    jax.jit(efficientnet.features),
    jax.jit(efficientnet.probabilities),
  ),
  "inception_fid": Row(
    inception.weights_path,
    inception.load,
    jax.jit(inception.features),
    jax.jit(inception.probabilities),
    side=AS_THEY_ARE,
    batch=32,
    resize=f"TensorFlow 1, bilinear, {inception.SIDE} px",
    is_fid=True,
  ),
  "dinov2": Row(
    dinov2.weights_path,
    dinov2.load,
    jax.jit(dinov2.features),
    side=224,
    least_side=224,
    multiple_of=dinov2.PATCH,
    batch=32,
  ),
}


def find(name: str, setting: str) -> Row:
  """The row of a network.

  Raises:
    ConfigError: with the names that `setting` may have.
  """
  if name not in NETWORKS:
    raise ConfigError(f"{setting} is {name!r}, but must be one of {', '.join(NETWORKS)}.")
  return NETWORKS[name]


def make_network(name: str, weights: str) -> tuple[Callable, Callable | None]:
  """(uint8 images [n, H, W, 3] -> features [n, D], features -> class probabilities or None).

  Args:
    name: out of NETWORKS.
    weights: path of its file; "": from its package, if it has one.

  Raises:
    ConfigError: if there is no such network.
    DataError: if its weights are missing or do not fit.
  """
  row = find(name, "--network")
  loaded = row.load(row.weights_path(weights))

  def by_batch(function: Callable) -> Callable:
    def call(rows: np.ndarray) -> np.ndarray:
      # XLA may otherwise round factors to ten bits on a GPU.
      with jax.default_matmul_precision("float32"):
        starts = range(0, len(rows), row.batch)
        return np.concatenate(
          [np.asarray(function(loaded, rows[start : start + row.batch])) for start in starts]
        )

    return call

  return by_batch(row.features), row.probabilities and by_batch(row.probabilities)


def checked_side(name: str, side: int, setting: str) -> int:
  """Pixels that images are resized to: `side`, or the network's own if that is 0.

  Raises:
    ConfigError: if the network takes no such side; `setting` names where it was given.
  """
  row = find(name, "--network")
  if side == 0:
    return row.side
  if side < row.least_side:
    raise ConfigError(
      f"{setting} is {side}, but {name} needs {row.least_side} pixels at least; 0 takes its own."
    )
  if side % row.multiple_of:
    raise ConfigError(
      f"{setting} is {side}, but {name} needs a multiple of {row.multiple_of}; 0 takes its own."
    )
  return side


def describe_resize(name: str, side: int) -> str:
  """How images come to the size that the network sees."""
  first = "as they are" if side == AS_THEY_ARE else f"Pillow, bicubic, {side} px"
  return "; then ".join(filter(None, (first, NETWORKS[name].resize)))


def is_fid(name: str) -> bool:
  """Whether the Fréchet distance of its features is FID; other things than networks have none."""
  return name in NETWORKS and NETWORKS[name].is_fid


def distance_name(name: str) -> str:
  """What the Fréchet distance is called: "fid" for FID's own network alone."""
  return "fid" if is_fid(name) else f"fd_{name}"


def distance_title(name: str) -> str:
  """The same for people."""
  return "FID" if is_fid(name) else f"FD-{name}"


def score_name(name: str) -> str:
  """What the score named after the Inception network is called."""
  return "is" if is_fid(name) else f"is_{name}"
