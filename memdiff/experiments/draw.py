"""Draws images of a class that training never saw, from exemplars of it alone.

  python -m memdiff.experiments.draw --workdir=runs/mine --exemplars=DIR --out=DIR2 --number=64

The run in the workdir must be finished and have trained `memdiff`, whose U-Net looks at exemplars.
DIR holds images of one class, at least one. DIR2 gets the images as files, and images.npz.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image

from input_pipeline import image_files
from memdiff import config as config_lib
from memdiff.errors import ConfigError, DataError, MemdiffError
from memdiff.experiments.image_settings import ImagesConfig
from memdiff.experiments.image_store import params_of_seed, png_bytes
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.random import stream
from memdiff.runtime.workdir import write_arrays, write_atomically, writing
from memdiff.synthesis import image_methods, pixel_diffusion


def read_report(workdir: pathlib.Path) -> dict:
  """The report of a finished run that generated images.

  Raises:
    ConfigError: if there is none.
  """
  try:
    report = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    report["images"]["image_shape"]
    return report
  except (OSError, ValueError, KeyError, TypeError):
    raise ConfigError(
      f"{workdir} holds no finished run that generated images; give the --workdir of one."
    ) from None


def choose_method(settings: ImagesConfig, wanted: str) -> str:
  """A method of the run whose U-Net looks at exemplars.

  Raises:
    ConfigError: if there is none, or `wanted` is not one.
  """
  able = [
    method
    for method in settings.methods
    if image_methods.apply(method, settings.diffusion).memory.num_exemplars
  ]
  if wanted and wanted not in able:
    raise ConfigError(
      f"--method is {wanted!r}, but must be a method of the run that looks at exemplars:"
      f" {', '.join(able) or 'it has none, train memdiff'}."
    )
  if not able:
    raise ConfigError(
      f"No method of this run looks at exemplars ({', '.join(settings.methods)}); train one with"
      " --config.methods=\"('memdiff',)\"."
    )
  return wanted or able[0]


def read_exemplars(folder: pathlib.Path, shape: Sequence[int]) -> np.ndarray:
  """All images of a folder, resized and in grey or colour as the run's are. [N, *shape] uint8.

  Raises:
    DataError: if there is none, or one cannot be read.
  """
  suffixes = image_files.suffixes()
  files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
  if not files:
    raise DataError(f"There is no image in {folder} that Pillow can read.")
  height, width, channels = shape
  images = []
  for path in files:
    try:
      image = image_files.decode(path).resize((width, height), Image.BICUBIC)
    except image_files.UnreadableError as error:
      raise DataError(f"The image {path} cannot be used: {error}.") from error
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    images.append(pixels.reshape(height, width, channels))
  return np.stack(images)


def draw(
  workdir: pathlib.Path,
  exemplars: np.ndarray,
  number: int,
  *,
  method: str = "",
  scale: float = 1.0,
  seed: int = 0,
) -> np.ndarray:
  """Images of one class, by the U-Net of a finished run.

  Args:
    workdir: of the run.
    exemplars: [N, H, W, ch] uint8, of the class.
    number: of images.
    method: of the run; "" for the first whose U-Net looks at exemplars.
    scale: of the guidance, 1 for none.
    seed: of the noise.

  Returns:
    [number, H, W, ch] uint8.
  """
  report = read_report(workdir)
  settings = config_lib.build(ImagesConfig, report["config"])
  method = choose_method(settings, method)
  config, mesh = image_methods.apply(method, settings.diffusion), mesh_lib.make_mesh()
  sampling = image_methods.apply_drawing(method, settings.sampling)
  classes, shape = report["dataset"]["num_classes"], tuple(report["images"]["image_shape"])
  params = params_of_seed(workdir / "diffusion" / image_methods.trained(method), 0, mesh)
  data = pixel_diffusion.make_data(exemplars, np.zeros(len(exemplars), np.int32), 1, mesh)
  size = min(sampling.chunk_size, number)
  program = pixel_diffusion.sampling_program(config, sampling, shape, classes, scale != 1, mesh)
  only, unnamed = mesh_lib.replicate(mesh, (np.zeros(size, np.int32), np.full(size, classes)))
  images = []
  for start in range(0, number, size):
    key = stream(jax.random.key(seed), "exemplars", start)
    memory = pixel_diffusion.exemplars_of(data, only, key, config.memory.num_exemplars)
    origin = ()
    if sampling.from_images:
      origin = pixel_diffusion.origins_of(data, only, stream(key, "origins"))
    placed = mesh_lib.replicate(mesh, (np.uint32(seed), np.int32(start), np.float32(scale)))
    images.append(np.asarray(mesh_lib.fetch(program(params, unnamed, memory, origin, *placed))))
  return np.concatenate(images)[:number]


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m memdiff.experiments.draw",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--workdir", type=pathlib.Path, required=True, help="of the finished run")
  parser.add_argument("--exemplars", type=pathlib.Path, required=True, help="folder of one class")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the images")
  parser.add_argument("--number", type=int, default=64, help="images to draw")
  parser.add_argument("--method", default="", help="of the run; the first that sees exemplars")
  parser.add_argument("--scale", type=float, default=1.0, help="of the guidance; 1: none")
  parser.add_argument("--seed", type=int, default=0, help="of the noise")
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  arguments = _parser().parse_args(argv)
  try:
    if arguments.number < 1 or arguments.scale < 0 or not 0 <= arguments.seed < 2**32:
      raise ConfigError("--number must be at least 1, --scale and --seed at least 0.")
    shape = read_report(arguments.workdir)["images"]["image_shape"]
    exemplars = read_exemplars(arguments.exemplars, shape)
    images = draw(
      arguments.workdir,
      exemplars,
      arguments.number,
      method=arguments.method,
      scale=arguments.scale,
      seed=arguments.seed,
    )
    with writing(arguments.out):
      arguments.out.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(images):
      write_atomically(arguments.out / f"{number:06d}.png", png_bytes(pixels))
    write_arrays(arguments.out / "images.npz", {"images": images})
    print(f"{len(images)} images drawn from {len(exemplars)} exemplars: {arguments.out}")
  except MemdiffError as error:
    print(f"memdiff: {error}", file=sys.stderr)
    return error.exit_code
  return 0


if __name__ == "__main__":
  sys.exit(main())
