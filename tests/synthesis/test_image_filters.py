"""Filters of generated images by hand-made signs."""

import numpy as np
import pytest

from memdiff.synthesis import image_filters
from memdiff.synthesis.image_filters import Limits, Signs

LIMITS = Limits(confidence=0.5, distance=0.4, nearest=0.1)
SIGNS = Signs(
  labels=np.array([0, 0, 1, 1, 2]),
  confidence=np.array([0.9, 0.4, 0.5, 0.6, 0.1]),
  predicted=np.array([0, 1, 1, 1, 2]),
  second=np.array([0, 0, 1, 2, 2]),
  distance=np.array([0.05, 0.3, 0.4, 0.5, 0.2]),
  copied=np.array([True, False, False, False, True]),
)


@pytest.mark.parametrize(
  ("name", "kept"),
  [
    ("none", [0, 1, 2, 3, 4]),
    ("confident", [0, 2, 3]),
    ("near", [0, 1, 2, 4]),
    ("diffult", [1, 2, 4]),
    ("diffult@0.3", [1, 2, 4]),
    ("agreeing", [0, 2, 4]),
    ("new", [1, 2, 3]),
    ("confident&new", [2, 3]),
    ("new&agreeing&near", [2]),
  ],
)
def test_what_is_kept(name, kept):
  assert np.flatnonzero(image_filters.keep(name, SIGNS, LIMITS)).tolist() == kept
  assert image_filters.is_known(name) and image_filters.describe(name)


def test_a_weight_may_stand_at_the_end():
  assert image_filters.weight_of("new&near@0.25") == 0.25
  assert image_filters.weight_of("new&near") == 1
  assert "weighs 0.25" in image_filters.describe("new&near@0.25")


@pytest.mark.parametrize(
  "name",
  [
    *("", "new&new", "confident&", "certain", "none & new"),
    *("@0.3", "none@", "none@0", "none@-1", "none@inf", "none@nan", "none@half", "near@1&new"),
  ],
)
def test_unknown_names(name):
  assert not image_filters.is_known(name)


def test_limits_reject_a_share_of_the_real_images_every_class_alike():
  """900 images of one class are sure, 10 of another are not: both weigh the same."""
  labels = np.repeat([0, 1], [900, 10])
  confidence = np.concatenate([np.linspace(0.8, 1, 900), np.linspace(0.1, 0.2, 10)])
  found = image_filters.limits(confidence, 1 - confidence, labels, 0.25)
  passes = confidence >= found.confidence
  assert passes[labels == 0].all()
  assert passes[labels == 1].mean() == pytest.approx(0.5, abs=0.11)
  assert found.distance == pytest.approx(1 - found.confidence, abs=0.02)
  assert found.nearest < found.distance


def test_every_filter_says_what_it_needs():
  """Without what a filter does not ask for, it works."""
  bare = Signs(SIGNS.labels, SIGNS.confidence, SIGNS.predicted, None, SIGNS.distance, SIGNS.copied)
  for name, row in image_filters.FILTERS.items():
    signs = SIGNS if row.needs_second else bare
    limits = LIMITS if row.needs_limits else None
    assert image_filters.keep(name, signs, limits).shape == (5,)
