"""The policies' tables, strengths and chances, against the papers' numbers written out again."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from input_pipeline import image_ops, policies
from input_pipeline.image_ops import OPERATIONS

# Cubuk et al. 2019, table 7: operation, probability and magnitude, twice per sub-policy.
PAPER = """
Invert .1 7 Contrast .2 6 | Rotate .7 2 TranslateX .3 9 | Sharpness .8 1 Sharpness .9 3
ShearY .5 8 TranslateY .7 9 | AutoContrast .5 8 Equalize .9 2 | ShearY .2 7 Posterize .3 7
Color .4 3 Brightness .6 7 | Sharpness .3 9 Brightness .7 9 | Equalize .6 5 Equalize .5 1
Contrast .6 7 Sharpness .6 5 | Color .7 7 TranslateX .5 8 | Equalize .3 7 AutoContrast .4 8
TranslateY .4 3 Sharpness .2 6 | Brightness .9 6 Color .2 8 | Solarize .5 2 Invert .0 3
Equalize .2 0 AutoContrast .6 0 | Equalize .2 8 Equalize .6 4 | Color .9 9 Equalize .6 6
AutoContrast .8 4 Solarize .2 8 | Brightness .1 3 Color .7 0 | Solarize .4 5 AutoContrast .9 3
TranslateY .9 9 TranslateY .7 9 | AutoContrast .9 2 Solarize .8 3 | Equalize .8 8 Invert .1 3
TranslateY .7 9 AutoContrast .9 1
"""
NAMES = {name.replace("_", ""): name for name in OPERATIONS}
WITHOUT_STRENGTH = ("identity", "autocontrast", "equalize", "invert")
SIGNED = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate",
          "brightness", "color", "contrast", "sharpness")  # fmt: skip
HEIGHT, WIDTH = 3, 2


def table():
  """[25] pairs of (operation, probability, magnitude), magnitude 0 where it means nothing."""
  pairs = []
  for entry in PAPER.replace("\n", "|").split("|"):
    words = entry.split()
    pair = []
    for word, probability, magnitude in zip(words[::3], words[1::3], words[2::3], strict=True):
      name = NAMES[word.lower()]
      used = 0 if name in WITHOUT_STRENGTH else int(magnitude)
      pair.append((name, float(probability), used))
    pairs += [tuple(pair)] if pair else []
  return pairs


def strength(name, share, sign, height, width):
  """Of an operation at a share of its largest magnitude: table 6 of AutoAugment."""
  if name in ("shear_x", "shear_y"):
    return sign * 0.3 * share
  if name in ("translate_x", "translate_y"):
    return sign * share * 150 / 331 * (width if name == "translate_x" else height)
  if name == "rotate":
    return sign * 30 * share
  if name in ("brightness", "color", "contrast", "sharpness"):
    return 1 + sign * 0.9 * share
  if name == "posterize":
    return round(8 - 4 * share)
  return 256 * (1 - share) if name == "solarize" else 0


@pytest.fixture
def applied(monkeypatch):
  """[(names, strengths)] of each call of image_ops.apply, which still does its work."""
  calls, apply = [], jax.jit(image_ops.apply)

  def record(images, operation, strengths):
    calls.append((np.array(OPERATIONS)[np.asarray(operation)], np.asarray(strengths)))
    return apply(images, operation, strengths)

  monkeypatch.setattr(image_ops, "apply", record)
  return calls


def plain(number):
  return jnp.full((number, HEIGHT, WIDTH, 3), 77, jnp.uint8)


# --- strengths -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_strengths_are_linear_in_the_magnitude(name):
  shares = np.array([m / 9 for m in range(10)] + [m / 30 for m in range(31)], np.float32)
  for sign in (-1.0, 1.0):
    operation = jnp.full(len(shares), OPERATIONS.index(name))
    ours = policies.strengths(operation, shares, jnp.full(len(shares), sign), 40, 60)
    theirs = [strength(name, share, sign, 40, 60) for share in shares]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_each_image_has_the_strength_of_its_own_operation():
  operation = jnp.arange(len(OPERATIONS))
  share = jnp.linspace(0.1, 0.9, len(OPERATIONS))
  sign = jnp.where(operation % 2 == 0, 1.0, -1.0)
  ours = policies.strengths(operation, share, sign, 32, 48)
  theirs = [
    strength(name, float(share[i]), float(sign[i]), 32, 48) for i, name in enumerate(OPERATIONS)
  ]
  np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n not in WITHOUT_STRENGTH[1:]])
def test_magnitude_0_changes_nothing(name):
  images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
  images[0, 0] = 255
  operation, sign = jnp.full(8, OPERATIONS.index(name)), jnp.array([1.0, -1.0] * 4)
  strengths = policies.strengths(operation, jnp.zeros(8), sign, 8, 8)
  np.testing.assert_array_equal(jax.jit(image_ops.apply)(images, operation, strengths), images)


# --- AutoAugment -----------------------------------------------------------------------------


def test_the_table_is_that_of_the_paper():
  assert len(policies.AUTOAUGMENT_CIFAR10) == 25
  assert list(policies.AUTOAUGMENT_CIFAR10) == table()


def outcomes():
  """{(what the first does, what the second does): probability}, over all sub-policies."""
  chances = collections.Counter()
  for pair in table():
    ways = []
    for name, probability, magnitude in pair:
      done = (name, round(abs(strength(name, magnitude / 9, 1, HEIGHT, WIDTH)), 3))
      ways.append([(done, probability), (("identity", 0), 1 - probability)])
    for first, p in ways[0]:
      for second, q in ways[1]:
        chances[first, second] += p * q / 25
  return {key: chance for key, chance in chances.items() if chance > 0}


def unsigned(names, strengths):
  """Like the keys of `outcomes`; brightness and its like are folded to above 1."""
  folded = np.abs(np.where(strengths < 1, 2 - strengths, strengths))
  is_factor = np.isin(names, ("brightness", "color", "contrast", "sharpness"))
  amounts = np.where(is_factor, folded, np.abs(strengths))
  amounts = np.where(np.isin(names, WITHOUT_STRENGTH), 0, amounts)
  return [(str(n), round(float(a), 3)) for n, a in zip(names, amounts, strict=True)]


def test_every_sub_policy_happens_with_its_probabilities(applied):
  number, expected = 40_000, outcomes()
  policies.autoaugment(jax.random.key(0), plain(number))
  assert len(applied) == 2
  seen = collections.Counter(zip(*(unsigned(*call) for call in applied), strict=True))
  assert set(seen) == set(expected)
  counts = [seen[key] for key in expected]
  assert stats.chisquare(counts, [number * chance for chance in expected.values()]).pvalue > 1e-3
  assert sum(expected.values()) == pytest.approx(1)


def test_signs_go_either_way_independently(applied):
  policies.autoaugment(jax.random.key(1), plain(40_000))
  signs = []
  for names, strengths in applied:
    origin = np.isin(names, ("brightness", "color", "contrast", "sharpness"))
    moved = strengths - origin
    moved[~np.isin(names, SIGNED) | (np.abs(moved) < 1e-6)] = 0
    for name in np.unique(names[moved != 0]):
      up = int((moved[names == name] > 0).sum())
      assert stats.binomtest(up, int((moved[names == name] != 0).sum())).pvalue > 1e-4
    signs.append(np.sign(moved))
  both = (signs[0] != 0) & (signs[1] != 0)
  same = int((signs[0] == signs[1])[both].sum())
  assert both.sum() > 1000 and stats.binomtest(same, int(both.sum())).pvalue > 1e-3


@pytest.mark.parametrize("policy", ["autoaugment", "randaugment"])
def test_operations_follow_each_other(applied, policy):
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.integers(0, 256, (128, 8, 8, 3), np.uint8))
  extra = () if policy == "autoaugment" else (3, 20.0)
  result = getattr(policies, policy)(jax.random.key(2), images, *extra)
  expected = images
  for names, strengths in list(applied):
    operation = np.array([OPERATIONS.index(name) for name in names])
    expected = image_ops.apply(expected, operation, strengths)
  np.testing.assert_array_equal(result, expected)
  assert result.dtype == jnp.uint8
  assert (np.asarray(result) != images).any(axis=(1, 2, 3)).mean() > 0.5


# --- RandAugment -----------------------------------------------------------------------------


def test_randaugment_knows_every_operation_but_invert():
  assert sorted(policies.RANDAUGMENT) == sorted(set(OPERATIONS) - {"invert"})
  assert len(policies.RANDAUGMENT) == 14


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_randaugment_draws_every_operation_alike_in_each_layer(applied, num_layers):
  policies.randaugment(jax.random.key(3), plain(14_000), num_layers, 9.0)
  assert len(applied) == num_layers
  for names, _ in applied:
    counts = collections.Counter(names.tolist())
    assert set(counts) == set(policies.RANDAUGMENT)
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3
  if num_layers > 1:
    pairs = collections.Counter(zip(applied[0][0].tolist(), applied[-1][0].tolist(), strict=True))
    assert len(pairs) == 14**2
    assert stats.chisquare(list(pairs.values())).pvalue > 1e-3


@pytest.mark.parametrize("magnitude", [0.0, 4.5, 9.0, 30.0])
def test_randaugment_has_one_magnitude_of_30_and_both_signs(applied, magnitude):
  policies.randaugment(jax.random.key(4), plain(4000), 1, magnitude)
  ((names, strengths),) = applied
  for name in policies.RANDAUGMENT:
    own = strengths[names == name]
    either = [strength(name, magnitude / 30, sign, HEIGHT, WIDTH) for sign in (-1, 1)]
    near = np.abs(own[:, None] - np.array(either)[None]) < 1e-4
    assert near.any(axis=1).all()
    if name in SIGNED and magnitude:
      assert stats.binomtest(int(near[:, 1].sum()), len(own)).pvalue > 1e-4


# --- keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["autoaugment", "randaugment"])
def test_a_policy_is_a_pure_function_of_its_key(policy):
  extra = () if policy == "autoaugment" else (2, 9.0)
  images = np.random.default_rng(5).integers(0, 256, (64, 8, 8, 3), np.uint8)
  act = jax.jit(lambda key: getattr(policies, policy)(key, jnp.asarray(images), *extra))
  first, again, other = (np.asarray(act(jax.random.key(seed))) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any(axis=(1, 2, 3)).mean() > 0.7
