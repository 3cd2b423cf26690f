"""Captions of your images, by a model that describes images: BLIP-2 or PaliGemma of KerasHub.

  python -m memdiff.synthesis.text_to_image.captioner --images=DIR/train --model=/models/blip2

Every image below the folder that has no caption gets one, in its metadata.csv (or .jsonl), where
runs and you read them; correct what is wrong. An interrupted command goes on where it stopped. The
model is a folder as KerasHub saves `BLIP2CausalLM` (Li et al. 2023) or `PaliGemmaCausalLM` (Beyer
et al. 2024) by `save_to_preset`.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from input_pipeline import captions, class_folders, image_files
from memdiff.errors import ConfigError, DataError, exit_code
from memdiff.runtime import keras_library
from memdiff.runtime.progress import Progress

MODELS = {"BLIP2CausalLM": ("text", ""), "PaliGemmaCausalLM": ("prompts", "caption en\n")}
DTYPES = ("bfloat16", "float32")
_TOKENS = 64  # of prompt and caption, at most


@dataclasses.dataclass(frozen=True, eq=False)
class Captioner:
  """A model in memory.

  Attributes:
    task: a KerasHub task of `MODELS`.
    key: its input for texts.
    prompt: what it is asked.
  """

  task: Any
  key: str
  prompt: str

  @property
  def side(self) -> tuple[int, int]:
    """Height and width that it sees."""
    return tuple(self.task.preprocessor.image_converter.image_size)

  def describe(self, images: Sequence[Image.Image]) -> list[str]:
    """A caption of each RGB image; always as many images, or it compiles anew."""
    height, width = self.side
    resized = [image.resize((width, height), Image.Resampling.BICUBIC) for image in images]
    pixels = np.stack([np.asarray(image) for image in resized])
    length = min(_TOKENS, self.task.preprocessor.sequence_length)
    asked = {"images": pixels, self.key: [self.prompt] * len(images)}
    said = self.task.generate(asked, max_length=length, strip_prompt=True)
    return [" ".join(text.split()) for text in said]


def load(folder: pathlib.Path, prompt: str | None = None, dtype: str = DTYPES[0]) -> Captioner:
  """Reads a model.

  Args:
    folder: as KerasHub saves it.
    prompt: what it is asked; None: as its makers ask it.
    dtype: of its weights and computation.

  Raises:
    ConfigError: if KerasHub is not installed.
    DataError: if there is no such model, or it is torn or of another kind.
  """
  keras_hub = keras_library.keras_hub("The captioner")
  try:
    kind = json.loads((folder / "task.json").read_text(encoding="utf-8"))["class_name"]
  except (OSError, ValueError, KeyError, TypeError):
    raise DataError(
      f"{folder} holds no task.json of a model; give the folder of one as KerasHub saves it."
    ) from None
  if kind not in MODELS:  # KerasHub's own CausalLM takes any subclass with the same backbone
    raise DataError(f"The model in {folder} is a {kind}, but must be {' or '.join(MODELS)}.")
  with keras_library.reading(f"the captioner in {folder}"):
    task = getattr(keras_hub.models, kind).from_preset(str(folder), dtype=dtype)
  key, usual = MODELS[kind]
  return Captioner(task, key, usual if prompt is None else prompt)


def find(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """{path from the folder on: image} of the classes in a folder, as data sets find them.

  Raises:
    DataError: if there is none.
  """
  classes, _ = class_folders.find_classes(folder)
  files = [path for place in classes.values() for path in class_folders.find_images(place)[0]]
  if not files:
    raise DataError(f"There is no image in the folders of {folder} that Pillow can read.")
  return {path.relative_to(folder).as_posix(): path for path in files}


def caption(folder: pathlib.Path, captioner: Captioner, batch_size: int = 8) -> dict[str, int]:
  """Captions the images of a folder of classes that have none.

  Returns:
    {"had", "captioned", "silent", "unreadable": numbers of images}; the last two got no caption,
    since the model said nothing or the file, or its name, cannot be read.

  Raises:
    DataError: if there is no image, or captions cannot be read or written.
  """
  known, names = captions.known(folder), find(folder)
  missing = [name for name in names if name not in known]
  numbers = {"had": len(names) - len(missing), "captioned": 0, "silent": 0, "unreadable": 0}
  progress = Progress(num_phases=1)
  progress.start_stage(0)
  for start in range(0, len(missing), batch_size):
    readable = {}
    for name in missing[start : start + batch_size]:
      try:
        name.encode()
        readable[name] = image_files.decode(names[name])
      except UnicodeEncodeError:
        progress.say(f"{name!r} gets no caption: its name is no UTF-8")
        numbers["unreadable"] += 1
      except image_files.UnreadableError as error:
        progress.say(f"{names[name]} gets no caption: {error}")
        numbers["unreadable"] += 1
    if readable:
      images = list(readable.values())
      said = captioner.describe([images[min(i, len(images) - 1)] for i in range(batch_size)])
      found = {name: text for name, text in zip(readable, said, strict=False) if text}
      captions.append(folder, found)
      numbers["captioned"] += len(found)
      numbers["silent"] += len(readable) - len(found)
    progress.step("captioning", min(start + batch_size, len(missing)), len(missing), {})
  return numbers


def _caption(arguments: argparse.Namespace) -> None:
  if arguments.batch_size < 1:
    raise ConfigError("--batch_size must be at least 1.")
  if not arguments.images.is_dir():
    raise DataError(f"There is no folder {arguments.images}.")
  captions.known(arguments.images)  # what cannot be used is said before the model is read
  find(arguments.images)
  captioner = load(arguments.model, arguments.prompt, arguments.dtype)
  numbers = caption(arguments.images, captioner, arguments.batch_size)
  lacking = [f"{numbers[name]} {name}" for name in ("silent", "unreadable") if numbers[name]]
  print(
    f"{numbers['captioned']:,} images captioned, {numbers['had']:,} had a caption"
    + (f"; without one: {', '.join(lacking)}" if lacking else "")
  )


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m memdiff.synthesis.text_to_image.captioner",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--images", type=pathlib.Path, required=True, help="folder of the classes")
  parser.add_argument("--model", type=pathlib.Path, required=True, help="folder of the model")
  parser.add_argument("--prompt", help="what the model is asked; as its makers ask it")
  parser.add_argument("--batch_size", type=int, default=8, help="images at a time")
  parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of weights")
  arguments = parser.parse_args(argv)
  return exit_code(lambda: _caption(arguments))


if __name__ == "__main__":
  sys.exit(main())
