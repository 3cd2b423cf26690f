"""The U-Net that benchmarks hold ours against is the same function; without PyTorch, skipped."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.diffusion.unet import UNet, UNetConfig
from memdiff.synthesis.pixel_settings import PixelDiffusionConfig

torch = pytest.importorskip("torch", reason="PyTorch is no dependency of memdiff")
torch_unet = pytest.importorskip("benchmarks.torch_unet")

SMALL = UNetConfig(channels=8, multipliers=(1, 2), num_blocks=1, attention=(4,))
CONFIGS = {
  "two levels": (SMALL, 8, 1),
  "three levels, two attend": (
    dataclasses.replace(SMALL, multipliers=(1, 2, 3), attention=(8, 16), num_blocks=2), 16, 3
  ),
  "one level, odd side": (dataclasses.replace(SMALL, multipliers=(2,), attention=()), 7, 3),
}  # fmt: skip
CLASSES = 3


def both(config, side, channels):
  """(our network, its parameters moved at random, PyTorch's with the same)."""
  ours = UNet(CLASSES, channels, config)
  given = jnp.zeros((1, side, side, channels)), jnp.zeros(1), jnp.zeros(1, int), ()
  shapes = jax.eval_shape(ours.init, jax.random.key(0), *given)["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
  theirs = torch_unet.UNet(CLASSES, channels, side, config)
  torch_unet.load_parameters(theirs, params)
  return ours, params, theirs


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_equal(name):
  config, side, channels = CONFIGS[name]
  ours, params, theirs = both(config, side, channels)
  assert sum(p.numel() for p in theirs.parameters()) == sum(x.size for x in jax.tree.leaves(params))
  x_t = np.random.default_rng(1).normal(size=(3, side, side, channels)).astype(np.float32)
  t, label = np.array([0, 300, 999], np.float32), np.array([0, 2, CLASSES], np.int32)
  expected = np.asarray(jax.jit(ours.apply)({"params": params}, x_t, t, label, ())[0])
  found = torch_unet.output(theirs, x_t, t, label)
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_the_published_network_has_as_many_parameters():
  theirs = torch_unet.UNet(10, 3, 32, UNetConfig())
  assert sum(p.numel() for p in theirs.parameters()) == 35_746_307 + 11 * 512


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_learns(dtype):
  config = dataclasses.replace(
    PixelDiffusionConfig(), unet=dataclasses.replace(SMALL, dtype=dtype), batch_size=8
  )
  config = dataclasses.replace(
    config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-2, warmup=0.0)
  )
  images = np.full((20, 8, 8, 1), 30, np.uint8)
  model = torch_unet.UNet(CLASSES, 1, 8, config.unet)
  trainer = torch_unet.Trainer(model, config, images, np.arange(20) % CLASSES)
  first, averaged = trainer.run(3), [x.clone() for x in trainer.ema]
  last = trainer.run(30)
  assert math.isfinite(last) and last < first
  assert any((a != b).any() for a, b in zip(averaged, trainer.ema, strict=True))
