"""Where the generated images of a run are."""

import pathlib

import numpy as np

from memdiff.experiments.base import Experiment
from memdiff.runtime.workdir import read_arrays


def sample_folder(experiment: Experiment, method: str, scale: float, seed: int) -> pathlib.Path:
  """Of a method, a guidance scale and the `seed`-th seed."""
  folder = experiment.workdir.folder("sampling") / method / f"scale_{scale:g}"
  return folder / f"seed_{experiment.seeds[seed]}"


def read_samples(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """(images, labels) of all files, in order."""
  parts = [read_arrays(path, ("images", "labels")) for path in sorted(folder.glob("*.npz"))]
  return tuple(np.concatenate([part[name] for part in parts]) for name in ("images", "labels"))
