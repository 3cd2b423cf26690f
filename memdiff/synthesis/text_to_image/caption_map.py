"""From features of images to sentences: a linear map between two spaces, learned from captions.

The map is ridge regression, its penalty chosen by leave-one-out on what it learns from. What it
makes of the features of a class is a soft prompt: a point in the space of sentences that need not
be the embedding of any. In words it is the caption that lies nearest.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

_PENALTIES = np.logspace(-4, 4, 17)


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionMap:
  """Features -> soft prompts.

  Attributes:
    kernel: [D, T].
    bias: [T].
    vectors: [M, T] embeddings of the captions that it knows.
    captions: M of them.
  """

  kernel: np.ndarray
  bias: np.ndarray
  vectors: np.ndarray
  captions: Sequence[str]

  def soft(self, features: np.ndarray) -> np.ndarray:
    """[n, D] -> [n, T] of length one."""
    mapped = features @ self.kernel + self.bias[None]
    length = np.linalg.norm(mapped, axis=1, keepdims=True)
    return (mapped / np.maximum(length, 1e-12)).astype(np.float32)

  def words(self, soft: np.ndarray) -> list[str]:
    """The nearest caption of each soft prompt [n, T]."""
    return [self.captions[i] for i in (soft @ self.vectors.T).argmax(axis=1)]


def fit(features: np.ndarray, vectors: np.ndarray, captions: Sequence[str]) -> CaptionMap:
  """Learns the map from images with captions.

  Args:
    features: [N, D] of the images.
    vectors: [N, T] of their captions, of length one.
    captions: N of them.
  """
  from sklearn.linear_model import RidgeCV  # scikit-learn takes a second

  model = RidgeCV(alphas=_PENALTIES).fit(features, vectors)
  _, first = np.unique(np.array(captions), return_index=True)
  kernel = model.coef_.T.astype(np.float32)
  bias = np.asarray(model.intercept_, np.float32)
  return CaptionMap(kernel, bias, vectors[first], [captions[i] for i in first])
