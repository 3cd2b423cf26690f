"""Files of images: which formats are taken, and how their pixels become RGB."""

import contextlib
import functools
import pathlib

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

GROUND = (255, 255, 255)  # shows through where an image is transparent, as in most viewers
# Photographs are decoded at a fraction of their size that keeps so many times the final one: the
# smallest random crop then still has as many pixels.
DECODED = 5
_NO_PIXELS = ("EPS", "MPEG", "PDF")  # drawings and films that Pillow registers as well
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF


class UnreadableError(Exception):
  """An image cannot be used; the message says why, as the part of a sentence."""


@functools.cache
def formats() -> tuple[str, ...]:
  """Pillow's names for the formats of pixels that it opens, in the order in which it tries them."""
  Image.init()

  def is_stub(name: str) -> bool:  # recognised, but read by other libraries
    opener = Image.OPEN[name][0]
    return isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)

  return tuple(name for name in Image.ID if name not in _NO_PIXELS and not is_stub(name))


@functools.cache
def suffixes() -> frozenset[str]:
  """Suffixes of these formats, ".jpg", in lower case."""
  opened = {*formats(), "MPO"}  # several JPEGs in a file, which Pillow opens as JPEG
  return frozenset(s for s, name in Image.registered_extensions().items() if name in opened)


def decode(path: pathlib.Path, least: int = 0) -> Image.Image:
  """The first frame of a file, RGB and upright, on GROUND.

  Of pixels with more than 8 bits the upper 8 are taken, as their format counts them.

  Args:
    path: the file; its content decides the format, not its suffix.
    least: if above 0, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep
      so many pixels, which takes a fraction of the time.

  Raises:
    UnreadableError: saying why.
  """
  try:
    with Image.open(path, formats=formats()) as image:
      if least:
        image.draft("RGB", (least, least))
      image.load()  # what is torn fails here
      # Cameras write which side is up beside the pixels. Pillow raises many types where that is
      # damaged; the pixels are then used as they lie.
      with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
      return _to_rgb(image)
  except (UnreadableError, MemoryError):
    raise
  except UnidentifiedImageError as error:
    raise UnreadableError("it holds no image in a format that is read") from error
  except Image.DecompressionBombError as error:
    limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
    raise UnreadableError(
      f"it has more than {limit} million pixels, Pillow's limit against files that exhaust the"
      " memory; scale it down"
    ) from error
  except Exception as error:  # Pillow's readers of damaged files raise whatever comes up
    words = str(getattr(error, "strerror", None) or error) or type(error).__name__
    raise UnreadableError(" ".join(words.split())) from error


def _to_rgb(image: Image.Image) -> Image.Image:
  if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
    image = _upper_bits(image)
  elif image.mode in ("I", "F"):
    raise UnreadableError(
      "its pixels are 32-bit numbers, which do not say what white is; save it with 8 or 16 bits"
    )
  if not image.has_transparency_data:
    return image.convert("RGB")
  ground = Image.new("RGBA", image.size, GROUND)
  return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def _upper_bits(image: Image.Image) -> Image.Image:
  """Grey of 8 bits, of 16 or as many as a TIFF says; Pillow itself would clip at 255."""
  tags = getattr(image, "tag_v2", {})
  (bits,) = tags.get(_BITS_PER_SAMPLE, (16,))
  pixels = np.asarray(image)
  upper = (pixels >> (bits - 8)).astype(np.uint8)
  grey = Image.fromarray(255 - upper if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else upper)
  if "transparency" in image.info:  # of PNG: the grey that is transparent
    opaque = pixels != image.info["transparency"]
    grey.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
  return grey
