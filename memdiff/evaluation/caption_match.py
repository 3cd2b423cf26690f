"""Do images show what was asked for? Arrays in, numbers out."""

import numpy as np

OTHERS = 99  # captions beside an image's own


def own_is_nearest(
  images: np.ndarray, own: np.ndarray, captions: np.ndarray, seed: int = 0
) -> np.ndarray:
  """Whether its own caption is nearer to an image than 99 others: R-precision's hits.

  Xu et al., "AttnGAN", 2018, section 4. By chance it is for one image in a hundred.

  Args:
    images: [n, D] where images lie in a space of sentences.
    own: [n, D] embeddings of their captions, of length one.
    captions: [M, D] embeddings of distinct captions, of which 99 that are not its own are drawn for
      each image, or all if there are fewer.
    seed: of the draw.

  Returns:
    [n] bool.
  """
  rng, hits = np.random.default_rng(seed), np.zeros(len(images), bool)
  for i, (image, caption) in enumerate(zip(images, own, strict=True)):
    others = captions[rng.permutation(len(captions))[: OTHERS + 1]]
    others = others[np.abs(others - caption[None]).max(axis=1) > 1e-6][:OTHERS]
    hits[i] = (others @ image < caption @ image).all()
  return hits
