"""What phases of a run that generates images leave to each other."""

import functools
import io
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from memdiff.experiments import prompting
from memdiff.experiments.base import Experiment
from memdiff.runtime import results
from memdiff.runtime.workdir import read_arrays
from memdiff.synthesis import image_methods, pixel_data, pixel_tuning
from memdiff.synthesis.pixel_tuning import PixelTuningConfig


def sample_folder(experiment: Experiment, method: str, scale: float, seed: int) -> pathlib.Path:
  """Of a method, a guidance scale and the `seed`-th seed."""
  folder = experiment.workdir.folder("sampling") / method / f"scale_{scale:g}"
  return folder / f"seed_{experiment.seeds[seed]}"


def read_drawn(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """All that is known of the images of all files, in order: images, labels, perhaps prompt."""
  parts = [read_arrays(path) for path in sorted(folder.glob("*.npz"))]
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def read_samples(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """(images, labels) of all files, in order."""
  drawn = read_drawn(folder)
  return drawn["images"], drawn["labels"]


def trained(experiment: Experiment, method: str, seed: int) -> Any:
  """The averaged weights of a method's U-Net, of the `seed`-th seed."""
  folder = experiment.workdir.folder("diffusion")
  return load_unet(folder, method, experiment.config.diffusion.tuning, seed, experiment.mesh)


@functools.lru_cache(maxsize=2)
def load_unet(
  folder: pathlib.Path, method: str, config: PixelTuningConfig, seed: int, mesh: Mesh
) -> Any:
  """The averaged weights of a method's U-Net, tuned if the method tunes it.

  Args:
    folder: which holds a folder of each training.
    method: by name.
    config: how it is tuned.
    seed: the number of the seed, or of the run.
    mesh: the device mesh.
  """

  def load(name: str) -> Any:
    return jax.tree.map(lambda x: x[seed], results.load(folder / name, mesh).ema_params)

  params, kind = load(image_methods.base(method)), image_methods.tuning(method)
  if not kind:
    return params
  return pixel_tuning.KINDS[kind](config).merged(params, load(image_methods.trained(method)))


def device_data(experiment: Experiment) -> pixel_data.ImageData:
  """The long-tailed training images, on every device."""
  data = experiment.dataset
  return pixel_data.make_data(
    data.train_images,
    data.train_labels,
    data.num_classes,
    experiment.mesh,
    prompting.caption_vectors(experiment),
  )


def png_bytes(pixels: np.ndarray) -> bytes:
  """An image [H, W, 1 or 3] uint8 as a .png file."""
  buffer = io.BytesIO()
  Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "png")
  return buffer.getvalue()
