"""Bottlenecks along training: which images are looked at, and that the curve says what they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.contrastive import class_cosines
from memdiff.runtime import loop
from memdiff.runtime.writers import read_history
from memdiff.synthesis import (
  image_methods,
  pixel_bottlenecks,
  pixel_data,
  pixel_diffusion,
  pixel_sampling,
)
from memdiff.synthesis.pixel_settings import PixelDiffusionConfig
from tests.support import TINY_UNET, make_run

COUNTS = np.array([9, 3, 5])
LABELS = np.repeat(np.arange(3), COUNTS)
IMAGES = np.random.default_rng(0).integers(0, 256, (17, 8, 8, 1), np.uint8)


def test_a_probe_has_a_few_images_of_classes_from_common_to_rare(mesh):
  counts, labels = np.arange(200), np.repeat(np.arange(200), 9)
  images = np.zeros((len(labels), 2, 2, 1), np.uint8)
  probe = pixel_bottlenecks.make_probe(images, labels, counts, mesh)
  classes, numbers = np.unique(probe.labels, return_counts=True)
  assert len(classes) == 64 and set(numbers) == {8} and {0, 199} <= set(classes)
  few = pixel_bottlenecks.make_probe(IMAGES, LABELS, COUNTS, mesh)
  np.testing.assert_array_equal(np.bincount(few.labels), [8, 3, 5])
  np.testing.assert_array_equal(few.images[8:13], IMAGES[LABELS == 2])  # the second by count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm", "memdiff"])
def test_curves_hold_the_cosines_of_the_averaged_weights(mesh, tmp_path, name):
  base = PixelDiffusionConfig(unet=TINY_UNET, batch_size=8, num_steps=2, ema_decay=0.5)
  config = image_methods.apply(name, base)
  probe = pixel_bottlenecks.make_probe(IMAGES, LABELS, COUNTS, mesh)
  data = pixel_data.make_data(IMAGES, LABELS, 3, mesh).replace(probe=probe)
  stage = pixel_diffusion.make_stage(config, data, COUNTS, mesh)
  stage = dataclasses.replace(stage, evaluate=pixel_bottlenecks.evaluation(config, 3))
  state = loop.train(stage, make_run(mesh, (0, 1), 2), tmp_path)
  (last,) = [
    record["metrics"]
    for record in read_history(tmp_path / "metrics.jsonl")
    if record["kind"] == "eval" and record["step"] == 2
  ]
  key = jax.random.key(0)
  memory = ()
  if config.memory.num_shown:
    memory = pixel_sampling.exemplars_of(data, probe.labels, key, config.memory.num_shown)
  program = pixel_bottlenecks.bottleneck_program(config, 3, mesh)
  for seed in (0, 1):
    rows = program(jax.tree.map(lambda x, s=seed: x[s], state.ema_params), probe, memory, key)
    expected = class_cosines(rows, jnp.asarray(probe.labels), 3)
    for metric, value in expected.items():
      assert last[metric][seed] == pytest.approx(float(value), abs=1e-5)
