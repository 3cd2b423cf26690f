"""CLIP score: do images show what was asked for, by a CLIP of yours?

  python -m memdiff.evaluation.clip_score --images=FILE_OR_DIR --model=DIR --json=FILE

Hessel et al., "CLIPScore", 2021, equation 1: 2.5 max(cos(image, caption), 0) for each image and its
prompt, where "A photo depicts " stands before the prompt; the mean over images is printed. It
compares with published numbers only for ViT-B/32. FILE has `images` [N, H, W, 1 or 3] uint8 and
`prompt` [N], as `pool/`, `sampling/` and `memdiff.experiments.draw` write them; DIR is a folder of
such files. The model is a folder as KerasHub saves a CLIP (`save_to_preset` of its backbone and its
preprocessor). Images are resized to the model's side by Pillow's bicubic filter.
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

from memdiff.errors import DataError, MemdiffError, exit_code
from memdiff.runtime import keras_library
from memdiff.runtime.workdir import read_arrays

PREFIX, SCALE = "A photo depicts ", 2.5
_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_BATCH = 64
_NEEDED_BY = "The CLIP score"
DEFINITION = f"{SCALE} max(cos, 0), {PREFIX!r} before the prompt, mean over images"


def scores(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
  """2.5 max(cos, 0) of embeddings [N, D] of images and of their captions. [N]."""
  lengths = [np.linalg.norm(x, axis=1) for x in (images, captions)]
  cosines = (images * captions).sum(axis=1) / np.maximum(lengths[0] * lengths[1], 1e-12)
  return SCALE * np.maximum(cosines, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
  """A CLIP in memory.

  Attributes:
    backbone: a `keras_hub.models.CLIPBackbone`.
    preprocessor: a `keras_hub.models.CLIPPreprocessor`, which reads texts.
  """

  backbone: Any
  preprocessor: Any

  def of_images(self, images: np.ndarray) -> np.ndarray:
    """Embeddings of uint8 [N, H, W, 1 or 3]. [N, D]."""
    side = self.backbone.vision_encoder.image_shape[0]
    mean, deviation = (np.array(x, np.float32) for x in (_MEAN, _DEVIATION))
    found = []
    for start in range(0, len(images), _BATCH):
      pixels = [_resized(image, side) for image in images[start : start + _BATCH]]
      rows = (np.stack(pixels).astype(np.float32) / 255 - mean) / deviation
      found.append(np.asarray(self.backbone.get_vision_embeddings(rows), np.float32))
    return np.concatenate(found)

  def of_texts(self, texts: Sequence[str]) -> np.ndarray:
    """Embeddings of N texts; each distinct one is embedded once. [N, D]."""
    known, index = np.unique(np.array(texts, dtype=str), return_inverse=True)
    found = []
    for start in range(0, len(known), _BATCH):
      said = known[start : start + _BATCH].tolist()
      tokens = self.preprocessor({"prompts": said, "images": None})["token_ids"]
      found.append(np.asarray(self.backbone.get_text_embeddings(np.asarray(tokens)), np.float32))
    return np.concatenate(found)[index]

  def score(self, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Of uint8 images [N, H, W, 1 or 3] and what is said of each. [N]."""
    return scores(self.of_images(images), self.of_texts([PREFIX + text for text in texts]))


def _resized(image: np.ndarray, side: int) -> np.ndarray:
  """uint8 [H, W, 1 or 3] -> [side, side, 3]."""
  rgb = Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)))
  return np.asarray(rgb.resize((side, side), Image.Resampling.BICUBIC))


def check(path: str) -> None:
  """Whether the CLIP in a folder can be loaded, as far as that is seen without reading it.

  Raises:
    ConfigError: if KerasHub is not installed.
    DataError: if there is no CLIP.
  """
  keras_library.check(_NEEDED_BY)
  if not (pathlib.Path(path) / "config.json").is_file():
    raise DataError(f"{path} holds no config.json; give the folder of a CLIP as KerasHub saves it.")


def load(path: str) -> Clip:
  """Reads the CLIP in a folder.

  Raises:
    ConfigError: as `check`.
    DataError: as `check`, or if it is torn.
  """
  check(path)
  keras_hub = keras_library.keras_hub(_NEEDED_BY)
  with keras_library.reading(f"the CLIP in {path}"):
    backbone = keras_hub.models.CLIPBackbone.from_preset(path)
    preprocessor = keras_hub.models.CLIPPreprocessor.from_preset(path)
  return Clip(backbone, preprocessor)


def read(path: str) -> tuple[np.ndarray, list[str]]:
  """(images, prompts) of a file, or of all files in a folder.

  Raises:
    DataError: if there is none, or images have no prompts.
  """
  place = pathlib.Path(path)
  files = sorted(place.glob("*.npz")) if place.is_dir() else [place]
  images, prompts = [], []
  for file in files:
    try:
      arrays = read_arrays(file)
    except MemdiffError as error:
      raise DataError(f"Cannot read {file}: {error.__cause__}.") from error
    if "images" not in arrays or "prompt" not in arrays:
      raise DataError(f"{file} has no images with prompts; it needs the arrays images and prompt.")
    images.append(arrays["images"])
    prompts += arrays["prompt"].tolist()
  if not prompts:
    raise DataError(f"There is no .npz file in {path}.")
  return np.concatenate(images), prompts


def evaluate(path: str, model: str) -> dict[str, Any]:
  """The score with all it depends on, as it is printed and written."""
  images, prompts = read(path)
  clip = load(model)
  found = clip.score(images, prompts)
  return {
    "clip_score": float(found.mean()),
    "std": float(found.std()),
    "number": len(prompts),
    "definition": DEFINITION,
    "images": path,
    "model": model,
    "side": int(clip.backbone.vision_encoder.image_shape[0]),
  }


def _score(arguments: argparse.Namespace) -> None:
  result = evaluate(arguments.images, arguments.model)
  print(
    f"CLIP score {result['clip_score']:.4f} (standard deviation over {result['number']:,} images"
    f" {result['std']:.4f})\n{result['definition']}; images resized to {result['side']} px"
  )
  if arguments.json:
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m memdiff.evaluation.clip_score",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--images", required=True, help=".npz file, or folder of such")
  parser.add_argument("--model", required=True, help="folder of a CLIP")
  parser.add_argument("--json", type=pathlib.Path, help="write the result to this file too")
  arguments = parser.parse_args(argv)
  return exit_code(lambda: _score(arguments))


if __name__ == "__main__":
  sys.exit(main())
