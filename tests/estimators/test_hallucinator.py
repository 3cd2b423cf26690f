"""The sampler as its users meet it: how many of which class, how near to what is known."""

import numpy as np
import pytest

from memdiff import FeatureHallucinator, LongTailClassifier

COUNTS = {"common": 40, "rare": 9, "single": 1}


@pytest.fixture(scope="module")
def data():
  rng = np.random.default_rng(0)
  y = np.repeat(list(COUNTS), list(COUNTS.values()))
  centres = {name: rng.normal(size=6) * 4 for name in COUNTS}
  X = np.stack([centres[name] for name in y]) + rng.normal(size=(len(y), 6)) + 100
  return X, y


def made(sampler, data):
  X, y = sampler.fit_resample(*data)
  np.testing.assert_array_equal(X[: len(data[0])], data[0])
  np.testing.assert_array_equal(y[: len(data[1])], data[1])
  return X[len(data[0]) :], y[len(data[1]) :]


@pytest.mark.parametrize("generator", ["gaussian_shared", "feature_mixup", "memdiff"])
def test_rare_classes_are_filled_up_with_features_like_theirs(data, generator):
  sampler = FeatureHallucinator(generator, num_steps=60, random_state=0)
  X, y = made(sampler, data)
  assert sampler.sampling_strategy_ == {"common": 0, "rare": 8, "single": 16}
  assert dict(zip(*np.unique(y, return_counts=True), strict=True)) == {"rare": 8, "single": 16}
  assert np.isfinite(X).all() and (np.abs(X - 100) < 30).all()  # in the units of the features
  assert (data[1][sampler.nearest_index_] == y).all()
  assert 0 <= sampler.memorization_ <= 1 and sampler.confidence_.shape == y.shape


def test_copies_are_recognised(data):
  copies = FeatureHallucinator("duplicate", random_state=0)
  X, _ = made(copies, data)
  assert copies.memorization_ == 1 and copies.nearest_distance_.max() < 1e-4
  np.testing.assert_allclose(X, data[0][copies.nearest_index_], rtol=1e-4)
  drawn = FeatureHallucinator("gaussian_shared", random_state=0)
  made(drawn, data)
  assert drawn.memorization_ < 0.5 and drawn.nearest_distance_.min() > 0


@pytest.mark.parametrize(
  ("strategy", "expected"),
  [
    ("tail", {"common": 0, "rare": 8, "single": 16}),
    ("auto", {"common": 0, "rare": 31, "single": 39}),
    ("not majority", {"common": 0, "rare": 31, "single": 39}),
    ("all", {"common": 0, "rare": 31, "single": 39}),
    ("minority", {"common": 0, "rare": 0, "single": 39}),
    ("not minority", {"common": 0, "rare": 31, "single": 0}),
    ({"single": 5}, {"common": 0, "rare": 0, "single": 4}),
    (lambda y: {"rare": (y == "common").sum()}, {"common": 0, "rare": 31, "single": 0}),
    ({}, {"common": 0, "rare": 0, "single": 0}),
  ],
)
def test_strategies_are_those_of_imbalanced_learn(data, strategy, expected):
  sampler = FeatureHallucinator("duplicate", sampling_strategy=strategy, random_state=0)
  _, y = made(sampler, data)
  assert sampler.sampling_strategy_ == expected and len(y) == sum(expected.values())


def test_a_ratio_is_that_of_two_classes(data):
  X, y = (x[data[1] != "single"] for x in data)
  sampler = FeatureHallucinator("duplicate", sampling_strategy=0.5, random_state=0)
  assert len(made(sampler, (X, y))[1]) == 11 and sampler.sampling_strategy_["rare"] == 11


@pytest.mark.parametrize(
  ("generator", "steps"),
  [("gaussian_shared", None), pytest.param("memdiff", 60, marks=pytest.mark.slow)],
)
def test_the_strength_changes_what_is_made(data, generator, steps):
  first, second = (
    made(FeatureHallucinator(generator, num_steps=steps, strength=s, random_state=0), data)[0]
    for s in (0.5, 2.0)
  )
  assert not np.allclose(first, second)


def test_a_gaussian_is_as_wide_as_its_class(data):
  X, y = made(FeatureHallucinator("gaussian_shared", sampling_strategy={"rare": 400}), data)
  spread = X[y == "rare"].std(axis=0).mean()
  assert 0.6 < spread / data[0][data[1] == "common"].std(axis=0).mean() < 1.4


@pytest.mark.parametrize("change", [lambda X: X + 1e9, lambda X: X * 1e38, lambda X: X * 1e-30])
def test_features_of_any_size_are_made_alike(data, change):
  sampler = FeatureHallucinator("gaussian_shared", random_state=0)
  X, _ = made(sampler, (change(data[0]), data[1]))
  plain, _ = made(sampler, data)
  np.testing.assert_allclose(X, change(plain), rtol=1e-3)


def test_whole_numbers_come_back_as_they_were(data):
  X = np.round(data[0]).astype(np.int64) + 2**30
  found, _ = FeatureHallucinator("duplicate", random_state=0).fit_resample(X, data[1])
  np.testing.assert_array_equal(found[: len(X)], X)


@pytest.mark.parametrize("generator", ["distribution_calibration", "gaussian_shared"])
def test_trust_lies_between_nothing_and_all(data, generator):
  sampler = FeatureHallucinator(generator, random_state=0)
  made(sampler, data)
  assert (sampler.confidence_ >= 0).all() and (sampler.confidence_ <= 1).all()


def test_seeds_decide_everything(data):
  first, again, other = (
    made(FeatureHallucinator("gaussian_shared", random_state=seed), data)[0] for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)


def test_what_it_makes_is_of_the_type_of_the_data_and_can_be_learned(data):
  X, y = FeatureHallucinator("gaussian_shared", random_state=0).fit_resample(
    data[0].astype(np.float32), data[1]
  )
  assert X.dtype == np.float32
  assert LongTailClassifier(["lda"], random_state=0).fit(X, y).score(*data) > 0.9


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"generator": "gan"}, "generator is 'gan', but must be one of"),
    ({"generator": ["gan"]}, "but must be one of"),
    ({"num_steps": 0}, "num_steps is 0, but must be a whole number from 1"),
    ({"num_steps": 2.5}, "num_steps is 2.5, but must be a whole number"),
    ({"strength": -1}, "strength is -1, but must be a number from 0"),
    ({"generator": "duplicate", "strength": 2}, "this generator has none"),
    ({"generator": "class_only", "strength": 2}, "this generator has none"),
    ({"sampling_strategy": {"rare": 30.7}}, "asks for 30.7 of the class 'rare'"),
    ({"generator": "ldmlr_published"}, "makes as many features of each class as its paper says"),
    ({"sampling_strategy": "most"}, "sampling_strategy is 'most', but must be one of tail"),
    ({"sampling_strategy": {"none": 3}}, "names the class 'none', which is not in y"),
    ({"sampling_strategy": {"rare": 3}}, "asks for 3 of the class 'rare', which has 9"),
    ({"sampling_strategy": 0.5}, "that is for two classes, and y has 3"),
  ],
)
def test_what_means_nothing_is_refused(data, changes, words):
  with pytest.raises(ValueError, match=words):
    FeatureHallucinator(**changes).fit_resample(*data)


@pytest.mark.slow
def test_embeddings_of_classes_are_for_the_generator_that_reads_them(data):
  known = {"common": [1.0, 0.0], "rare": [0.0, 1.0], "single": [0.5, 0.5]}
  sampler = FeatureHallucinator(
    "memdiff_described", class_embeddings=known, num_steps=5, random_state=0
  )
  X, y = made(sampler, data)
  assert len(X) == len(y) > 0 and np.isfinite(X).all()
  for generator, given in (("memdiff_described", None), ("duplicate", known)):
    with pytest.raises(ValueError, match="class_embeddings are for the generator 'memdiff_desc"):
      FeatureHallucinator(generator, class_embeddings=given).fit_resample(*data)


def test_a_ratio_that_is_reached_already_is_refused(data):
  X, y = (x[data[1] != "single"] for x in data)
  for ratio in (0.1, 1.5):
    with pytest.raises(ValueError, match=r"must be at most 1, and above 0\.225"):
      FeatureHallucinator(sampling_strategy=ratio).fit_resample(X, y)
