"""LDMLR's U-Net: its size, its arithmetic against PyTorch, and what it cannot know."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.synthesis.unet1d import UNet1D, pointwise

CLASSES, DIM, WIDTH, LEVELS = 3, 8, 8, (1, 2)
STRIDE = 2
T = np.array([0.0, 3.0, 999.0, 500.0], np.float32)
LABEL = np.array([0, 2, 1, 1])
X = np.random.default_rng(0).normal(size=(4, DIM)).astype(np.float32)


def make_net(dim=DIM, positions=False):
  return UNet1D(CLASSES, dim, WIDTH, LEVELS, positions)


@functools.cache
def weights(dim=DIM, positions=False):
  """Random ones, so that no bias is zero and no gain one."""
  shapes = jax.eval_shape(
    make_net(dim, positions).init, jax.random.key(0), X[:, :dim], T, LABEL, ()
  )
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda s: (0.3 * rng.normal(size=s.shape)).astype(np.float32), shapes)


@functools.cache
def applied(dim=DIM, positions=False):
  net = make_net(dim, positions)
  return jax.jit(lambda variables, x, t, label: net.apply(variables, x, t, label, ()))


def run(x=X, t=T, label=LABEL, positions=False):
  return np.asarray(applied(positions=positions)(weights(positions=positions), x, t, label)[0])


# --- size ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "number"), [(100, 7_804_801), (10, 7_781_761)])
def test_the_published_network_has_its_number_of_parameters(classes, number):
  net = UNet1D(classes, 64, 64, (1, 2, 4, 8), False)
  shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 64)), T[:1], LABEL[:1], ())
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == number


def test_layers_start_as_those_of_pytorch():
  layer = pointwise(25, 4000)
  params = layer.init(jax.random.key(0), jnp.zeros((1, 25)))["params"]
  for leaf in (params["kernel"], params["bias"]):
    assert float(jnp.abs(leaf).max()) <= 0.2
    assert float(leaf.std()) == pytest.approx(0.4 / 12**0.5, rel=0.05)


# --- arithmetic ------------------------------------------------------------------------------


def test_the_network_computes_what_pytorch_does():
  torch = pytest.importorskip("torch")
  from benchmarks.torch_peers import UNet1D as Reference

  reference = Reference(weights()["params"], WIDTH, len(LEVELS))
  with torch.no_grad():
    expected = reference(*(torch.tensor(value) for value in (X, T, LABEL)))
  found = applied()(weights(), X, T, LABEL)
  for a, b in zip(found, expected, strict=True):
    b = b.numpy()
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * np.abs(b).max())


# --- places ----------------------------------------------------------------------------------

BLOCKS = np.arange(DIM).reshape(-1, STRIDE)[[2, 0, 3, 1]].ravel()
WITHIN = np.arange(DIM).reshape(-1, STRIDE)[:, [1, 0]].ravel()


def test_kernels_of_one_cannot_tell_blocks_of_features_apart():
  whole = run()
  np.testing.assert_allclose(run(X[:, BLOCKS]), whole[:, BLOCKS], atol=1e-3 * np.abs(whole).max())
  assert np.abs(run(X[:, WITHIN]) - whole[:, WITHIN]).max() > 0.01 * np.abs(whole).max()


def test_with_positions_they_can():
  whole = run(positions=True)
  difference = run(X[:, BLOCKS], positions=True) - whole[:, BLOCKS]
  assert np.abs(difference).max() > 0.01 * np.abs(whole).max()


# --- what a denoiser must do -----------------------------------------------------------------


@pytest.mark.parametrize("changed", ["x", "t", "label"])
def test_every_input_matters_and_only_to_its_own_row(changed):
  inputs = {"x": X, "t": T, "label": LABEL}
  other = dict(inputs)
  other[changed] = inputs[changed].copy()
  other[changed][1] = {"x": X[0], "t": 700.0, "label": 0}[changed]
  moved = np.abs(run(**other) - run(**inputs)).max(axis=1)
  assert moved[1] > 1e-3 and moved[[0, 2, 3]].max() < 1e-4


def test_lengths_that_do_not_halve_are_padded_with_zeros():
  """Seven features are eight of which the last is zero."""
  short = X[:, :7]
  out, _ = applied(7)(weights(), short, T, LABEL)
  longer = run(np.pad(short, ((0, 0), (0, 1))))
  assert out.shape == (4, 7)
  np.testing.assert_allclose(out, longer[:, :7], atol=1e-4 * np.abs(longer).max())


def test_positions_cover_the_padding():
  assert weights(7, True)["params"]["place"].shape == (8, WIDTH)


def test_conditioning_once_and_denoising_is_the_whole():
  net = make_net()
  context = net.apply(weights(), LABEL, (), method="condition")
  denoise = jax.jit(functools.partial(net.apply, method="denoise"))
  parts = denoise(weights(), X, T, context)
  whole = applied()(weights(), X, T, LABEL)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3), parts, whole)
  assert parts[1].shape == (4, WIDTH * LEVELS[-1])
