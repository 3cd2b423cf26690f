"""Bottlenecks of U-Nets while they train: do they keep rare classes apart? CORAL's own diagnosis.

Real images that training does not see are noised to one level and go through the U-Net under their
own label. What it makes of them in its middle is compared by cosine.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from memdiff.contrastive import class_cosines
from memdiff.diffusion.sampler import model_time
from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.random import normal
from memdiff.synthesis.pixel_data import ImageData, to_model
from memdiff.synthesis.pixel_diffusion import make_denoiser
from memdiff.synthesis.pixel_sampling import memory_of
from memdiff.synthesis.pixel_settings import PixelDiffusionConfig

NOISED = 0.25  # share of the steps of the diffusion
_PER_CLASS, _CLASSES = 8, 64  # images in a probe, at most


@flax.struct.dataclass
class Probe:
  """Real images that training does not see, on the devices."""

  images: Any  # [P, H, W, ch] uint8
  labels: Any  # [P] int32


def make_probe(images: np.ndarray, labels: np.ndarray, counts: np.ndarray, mesh: Mesh) -> Probe:
  """A few images of some classes, from common to rare; `counts` [C] are training's."""
  order = np.argsort(-counts, kind="stable")
  ranks = np.linspace(0, len(order) - 1, min(len(order), _CLASSES)).round().astype(int)
  rows = np.concatenate([np.flatnonzero(labels == c)[:_PER_CLASS] for c in order[ranks]])
  return mesh_lib.replicate(mesh, Probe(images[rows], labels[rows].astype(np.int32)))


def bottlenecks(
  config: PixelDiffusionConfig,
  num_classes: int,
  params: Any,
  probe: Probe,
  memory: Any,
  key: jax.Array,
) -> jax.Array:
  """What the U-Net makes of noised images in its middle, averaged over positions. [P, W].

  Args:
    config: of the training.
    num_classes: C.
    params: of the U-Net.
    probe: P images and their labels.
    memory: as the U-Net takes it.
    key: of the noise.
  """
  schedule = NoiseSchedule(config.schedule)
  t = jnp.full(probe.labels.shape, int(NOISED * config.schedule.num_steps))
  x_t = schedule.noise(to_model(probe.images), t, normal(key, probe.images.shape))
  denoiser = make_denoiser(config, num_classes, probe.images.shape[-1])
  time = model_time(t, schedule)
  return denoiser.apply({"params": params}, x_t, time, probe.labels, memory)[1]


@functools.lru_cache(maxsize=16)
def bottleneck_program(config: PixelDiffusionConfig, num_classes: int, mesh: Mesh) -> Callable:
  """The jitted (params, probe, memory, key) -> [P, W] of `bottlenecks`."""

  def look(params, probe, memory, key):
    probe, memory = mesh_lib.shard_batch((probe, memory), mesh)
    return bottlenecks(config, num_classes, params, probe, memory, key)

  return jax.jit(look)


@functools.lru_cache(maxsize=16)
def evaluation(config: PixelDiffusionConfig, num_classes: int) -> Callable:
  """(state, data with a probe, per_seed) -> `class_cosines`; one function for stages of a config.

  The noise and the exemplars are the same at every step.
  """

  def evaluate(state, data: ImageData, per_seed):
    del per_seed
    key = jax.random.key(0)
    memory = memory_of(config, data, data.probe.labels, key)
    rows = bottlenecks(config, num_classes, state.ema_params, data.probe, memory, key)
    return class_cosines(rows, data.probe.labels, num_classes)

  return evaluate
