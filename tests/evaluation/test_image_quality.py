"""Generated images against real ones: by group, by class, and the nearest training images."""

import numpy as np
import pytest

from memdiff.evaluation import image_quality, set_metrics
from memdiff.evaluation.image_quality import Labelled
from memdiff.evaluation.scores import Group

GROUPS = (Group("many", "", (0,)), Group("few", "", (1, 2)))


def make(seed, shift=0.0, per_class=60, spread=1.0):
  draw = np.random.default_rng(seed)
  labels = np.repeat(np.arange(3), per_class)
  features = spread * draw.normal(size=(len(labels), 4)) + 5 * labels[:, None]
  features[labels == 2] += shift
  return Labelled(features.astype(np.float32), labels)


def test_groups_are_compared_by_their_own_classes_alone():
  real, generated = make(0), make(1, shift=4.0)
  found = image_quality.by_group(real, generated, GROUPS)
  assert set(found) == {"fd_many", "fd_few", "kid_many", "kid_few"}
  assert found["fd_many"] < 1 < 5 < found["fd_few"]
  few = [x.features[x.labels > 0] for x in (real, generated)]
  np.testing.assert_allclose(found["fd_few"], set_metrics.frechet_distance(*few))
  np.testing.assert_allclose(found["kid_few"], set_metrics.kernel_distance_of_all(*few))


def test_kid_of_all_equals_the_sum_over_pairs():
  x, y = np.random.default_rng(0).normal(size=(2, 5, 3))
  kernel = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
  within = sum(
    kernel(s[i], s[j]) / 20 for s in (x, y) for i in range(5) for j in range(5) if i != j
  )
  across = sum(kernel(a, b) / 25 for a in x for b in y)
  np.testing.assert_allclose(set_metrics.kernel_distance_of_all(x, y), within - 2 * across)


def test_classes_have_a_distance_and_a_diversity_of_their_own():
  found = image_quality.by_class(make(0), make(1, shift=4.0), 4)
  assert abs(found["kid"][0]) < 1 < 100 < found["kid"][2]
  np.testing.assert_allclose(found["diversity"][:3], 1.0, atol=0.25)
  assert np.isnan(found["kid"][3]) and np.isnan(found["diversity"][3])  # no image of it
  narrow = image_quality.by_class(make(0), make(1, spread=0.5), 3)
  np.testing.assert_allclose(narrow["diversity"], 0.5, atol=0.1)


@pytest.mark.parametrize("per_class", [0, 1])
def test_a_class_or_group_of_too_few_images_has_no_score(per_class):
  few = make(1, per_class=per_class)
  assert np.isnan(image_quality.by_class(make(0), few, 3)["kid"]).all()
  groups = image_quality.by_group(make(0), few, (Group("many", "", (0,)),))
  assert np.isnan(groups["fd_many"]) and np.isnan(groups["kid_many"])


def test_copies_are_told_from_new_images():
  draw = np.random.default_rng(0)
  train = draw.integers(0, 256, (30, 6, 6, 1)).astype(np.uint8)
  nearly = np.clip(train[[3, 7]].astype(int) + draw.integers(-9, 9, (2, 6, 6, 1)), 0, 255)
  new = draw.integers(0, 256, (5, 6, 6, 1)).astype(np.uint8)
  found = image_quality.nearest(np.concatenate([nearly.astype(np.uint8), new]), train)
  np.testing.assert_array_equal(found.index[:2], [3, 7])
  np.testing.assert_array_equal(found.copied, [True, True, *[False] * 5])
  exact = np.linalg.norm(new.reshape(5, 1, -1) / 1.0 - train.reshape(1, 30, -1), axis=2)
  np.testing.assert_allclose(found.distance[2:], exact.min(axis=1), rtol=1e-4)
  np.testing.assert_array_equal(found.index[2:], exact.argmin(axis=1))
