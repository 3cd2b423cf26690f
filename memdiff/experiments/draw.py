"""Draws images of a class that training never saw, from exemplars of it or from prompts.

  python -m memdiff.experiments.draw --workdir=runs/mine --exemplars=DIR --out=DIR2 --number=64
  python -m memdiff.experiments.draw --workdir=runs/mine --out=DIR2 --prompts "a red cat" "a fish"

The run in the workdir must be finished. For exemplars, it has trained `memdiff`, whose U-Net looks
at them; for prompts, `prompted`, whose U-Net reads them. DIR holds images of one class, at least
one. DIR2 gets the images as files, `number` for each prompt, and images.npz.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from input_pipeline import image_files
from memdiff import config as config_lib
from memdiff.diffusion.text_condition import Captioned
from memdiff.errors import ConfigError, DataError, exit_code
from memdiff.experiments.image_settings import ImagesConfig
from memdiff.experiments.image_store import load_unet, png_bytes
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.random import stream
from memdiff.runtime.workdir import write_arrays, write_atomically, writing
from memdiff.synthesis import image_methods, pixel_data, pixel_sampling
from memdiff.synthesis.pixel_settings import PixelDiffusionConfig
from memdiff.synthesis.text_to_image import sentences


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


def choose_method(settings: ImagesConfig, wanted: str, *, looks: bool, reads: bool) -> str:
  """A method of the run whose U-Net looks at exemplars, reads prompts, or both.

  Raises:
    ConfigError: if there is none, or `wanted` is not one.
  """
  does = " and ".join(["looks at exemplars"] * looks + ["reads prompts"] * reads)
  needed = "+".join(["memdiff"] * looks + ["prompted"] * reads)
  able = []
  for method in settings.methods:
    config = image_methods.apply(method, settings.diffusion)
    if (not looks or config.memory.num_shown) and (not reads or config.text.is_read):
      able.append(method)
  if wanted and wanted not in able:
    raise ConfigError(
      f"--method is {wanted!r}, but must be a method of the run that {does}:"
      f" {', '.join(able) or f'it has none, train {needed}'}."
    )
  if not able:
    raise ConfigError(
      f"No method of this run {does} ({', '.join(settings.methods)}); train one with"
      f" --config.methods=\"('{needed}',)\"."
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
      image = image_files.decode(path).resize((width, height), Image.Resampling.BICUBIC)
    except image_files.UnreadableError as error:
      raise DataError(f"The image {path} cannot be used: {error}.") from error
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    images.append(pixels.reshape(height, width, channels))
  return np.stack(images)


def _told(
  config: PixelDiffusionConfig, params: Mapping[str, Any], prompts: Sequence[str], number: int
) -> np.ndarray | None:
  """What is said of every image, [P number, D]; zeros if nothing is; None: nothing is read."""
  if not config.text.is_read:
    return None
  if not prompts:
    width = params["sentence_layer"]["Dense_0"]["kernel"].shape[0]
    return np.zeros((number, width), np.float32)
  encoder = sentences.load(config.text.encoder, config.text.weights)
  return sentences.embed(encoder, prompts).repeat(number, axis=0)


def _without_exemplars(memory: Any) -> Any:
  if isinstance(memory, Captioned):
    return memory.replace(memory=_without_exemplars(memory.memory))
  return memory.forget(jnp.ones(len(memory.mask), bool)) if memory else memory


def draw(
  workdir: pathlib.Path,
  number: int,
  *,
  exemplars: np.ndarray | None = None,
  prompts: Sequence[str] = (),
  method: str = "",
  scale: float = 1.0,
  seed: int = 0,
) -> np.ndarray:
  """Images of no class of the training, by the U-Net of a finished run.

  Args:
    workdir: of the run.
    number: of images, if there are prompts for each.
    exemplars: [N, H, W, ch] uint8, of the class; None: the U-Net is shown none.
    prompts: P sentences; (): nothing is said.
    method: of the run; "" for the first whose U-Net looks at and reads what is given.
    scale: of the guidance, 1 for none.
    seed: of the noise.

  Returns:
    [max(P, 1) number, H, W, ch] uint8.
  """
  report = read_report(workdir)
  settings = config_lib.build(ImagesConfig, report["config"])
  method = choose_method(settings, method, looks=exemplars is not None, reads=bool(prompts))
  config, mesh = image_methods.apply(method, settings.diffusion), mesh_lib.make_mesh()
  sampling = image_methods.apply_drawing(method, settings.sampling)
  if sampling.from_images and exemplars is None:
    raise ConfigError(f"{method} begins from images; give --exemplars, or another --method.")
  if sampling.guide.needs_negative:
    raise ConfigError(
      f"{method} leads away from a class that is like the one that is drawn, but what is drawn here"
      " is of none; give another --method."
    )
  classes, shape = report["dataset"]["num_classes"], tuple(report["images"]["image_shape"])
  params = load_unet(workdir / "diffusion", method, settings.diffusion.tuning, 0, mesh)
  told = _told(config, params, prompts, number)
  shown = np.zeros((1, *shape), np.uint8) if exemplars is None else exemplars
  data = pixel_data.make_data(shown, np.zeros(len(shown), np.int32), 1, mesh)
  total = max(len(prompts), 1) * number
  size = min(sampling.chunk_size, total)
  program = pixel_sampling.sampling_program(config, sampling, shape, classes, scale != 1, mesh)
  only, unnamed = mesh_lib.replicate(mesh, (np.zeros(size, np.int32), np.full(size, classes)))
  images = []
  for start in range(0, total, size):
    key = stream(jax.random.key(seed), "exemplars", start)
    said = None if told is None else np.take(told, range(start, start + size), 0, mode="clip")
    memory = pixel_sampling.memory_of(config, data, only, key, said)
    if exemplars is None:
      memory = _without_exemplars(memory)
    origin = ()
    if sampling.from_images:
      origin = pixel_sampling.origins_of(data, only, stream(key, "origins"))
    wanted = pixel_sampling.Wanted(unnamed, memory, origin)
    placed = mesh_lib.replicate(mesh, (np.uint32(seed), np.int32(start), np.float32(scale)))
    images.append(np.asarray(mesh_lib.fetch(program(params, wanted, *placed))))
  return np.concatenate(images)[:total]


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m memdiff.experiments.draw",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--workdir", type=pathlib.Path, required=True, help="of the finished run")
  parser.add_argument("--exemplars", type=pathlib.Path, help="folder of images of one class")
  parser.add_argument("--prompts", nargs="*", default=[], help="sentences to draw")
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the images")
  parser.add_argument("--number", type=int, default=64, help="number of images, for each prompt")
  parser.add_argument(
    "--method", default="", help="of the run; default: the first that can use these"
  )
  parser.add_argument("--scale", type=float, default=1.0, help="guidance scale; 1: no guidance")
  parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
  return parser


def _draw(arguments: argparse.Namespace) -> None:
  if arguments.number < 1 or arguments.scale < 0 or not 0 <= arguments.seed < 2**32:
    raise ConfigError("--number must be at least 1, --scale and --seed at least 0.")
  if not arguments.exemplars and not arguments.prompts:
    raise ConfigError("There is nothing to draw from; give --exemplars, --prompts, or both.")
  shape, exemplars = read_report(arguments.workdir)["images"]["image_shape"], None
  if arguments.exemplars:
    exemplars = read_exemplars(arguments.exemplars, shape)
  images = draw(
    arguments.workdir,
    arguments.number,
    exemplars=exemplars,
    prompts=arguments.prompts,
    method=arguments.method,
    scale=arguments.scale,
    seed=arguments.seed,
  )
  with writing(arguments.out):
    arguments.out.mkdir(parents=True, exist_ok=True)
  for number, pixels in enumerate(images):
    write_atomically(arguments.out / f"{number:06d}.png", png_bytes(pixels))
  arrays = {"images": images}
  if arguments.prompts:
    arrays["prompt"] = np.repeat(arguments.prompts, arguments.number)
  write_arrays(arguments.out / "images.npz", arrays)
  sources = [f"{len(exemplars)} exemplars"] if arguments.exemplars else []
  sources += [f"{len(arguments.prompts)} prompts"] if arguments.prompts else []
  print(f"{len(images)} images drawn from {' and '.join(sources)}: {arguments.out}")


def main(argv: Sequence[str] | None = None) -> int:
  arguments = _parser().parse_args(argv)
  return exit_code(lambda: _draw(arguments))


if __name__ == "__main__":
  sys.exit(main())
