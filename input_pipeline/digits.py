"""scikit-learn's bundled digits: 1,797 real images of 8x8, the data set that needs no download.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
"""

import numpy as np

from input_pipeline.source import Source

_TEST_SHARE = 0.3  # the set has no official test split; this one is stratified by class


def load() -> Source:
  """The digits with a held-out, stratified test set of 30 %; grey values scaled to 0..255."""
  from sklearn.datasets import load_digits  # takes seconds
  from sklearn.model_selection import train_test_split

  digits = load_digits()
  images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
  train, test = train_test_split(
    np.arange(len(images)), test_size=_TEST_SHARE, stratify=digits.target, random_state=0
  )
  train, test = np.sort(train), np.sort(test)
  return Source(
    class_names=tuple(str(d) for d in range(10)),
    train_images=images[train],
    train_labels=digits.target[train],
    test_images=images[test],
    test_labels=digits.target[test],
  )
