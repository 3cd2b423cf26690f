"""R-precision by hand and by chance."""

import numpy as np

from memdiff.evaluation import caption_match


def unit(rows):
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_hits_are_images_that_lie_at_their_caption():
  captions = np.eye(4)
  images = np.array([[0.9, 0.1, 0, 0], [0.4, 0.6, 0, 0], [0, 0, 0.2, 0.1]])
  hits = caption_match.own_is_nearest(images, captions[[0, 0, 2]], captions)
  assert hits.tolist() == [True, False, True]


def test_by_chance_one_image_in_a_hundred_is_hit():
  rng = np.random.default_rng(0)
  captions = unit(rng.normal(size=(300, 16)))
  images = unit(rng.normal(size=(20_000, 16)))
  own = captions[rng.integers(0, 300, 20_000)]
  share = caption_match.own_is_nearest(images, own, captions).mean()
  assert abs(share - 0.01) < 0.003


def test_the_own_caption_is_not_its_rival():
  captions = np.eye(3)
  hits = caption_match.own_is_nearest(captions, captions, captions)
  assert hits.all()
