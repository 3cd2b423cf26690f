"""Files of images in many formats and modes: which are taken, and that they look as in a viewer."""

import functools
import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from input_pipeline import image_files
from input_pipeline.image_files import UnreadableError, decode, suffixes
from input_pipeline.lazy_images import resize_and_crop

SHAPE = (6, 6)


def noise(seed, shape=SHAPE, channels=3):
  pixels = np.random.default_rng(seed).integers(0, 256, (*shape, channels), np.uint8)
  return pixels if channels > 1 else pixels[..., 0]


def grey(values):
  return np.repeat(np.asarray(values)[..., None], 3, axis=-1)


def decoded(path, pixels, **options):
  """What is read of `pixels` saved at `path`."""
  Image.fromarray(pixels).save(path, **options)
  return np.asarray(decode(path))


# --- formats ---------------------------------------------------------------------------------


def test_common_suffixes_are_images_and_documents_are_none():
  common = "png jpg jpeg jpe jfif bmp dib webp gif tif tiff ppm pgm pbm pnm tga jp2 j2k apng ico"
  assert {f".{name}" for name in common.split()} <= suffixes()
  others = "pdf eps ps mpg mpeg mp4 h5 hdf grib bufr wmf emf svg txt json npy zip heic"
  assert not {f".{name}" for name in others.split()} & suffixes()
  assert all(suffix == suffix.lower() for suffix in suffixes())


EXACT = {
  "png": {}, "bmp": {}, "tif": {}, "tiff": {"compression": "tiff_lzw"}, "ppm": {}, "pnm": {},
  "tga": {}, "webp": {"lossless": True}, "jp2": {}, "sgi": {}, "pcx": {}, "qoi": {},
}  # fmt: skip
LOSSY = {"jpg": {}, "jpeg": {}, "jpe": {"format": "JPEG"}, "jfif": {"format": "JPEG"},
         "mpo": {"format": "MPO"}, "gif": {}}  # fmt: skip
if features.check("avif"):
  LOSSY["avif"] = {}


@pytest.mark.parametrize("suffix", [*EXACT, *LOSSY])
def test_every_format_that_is_taken_is_read(tmp_path, suffix):
  smooth = np.linspace(0, 255, 16 * 16 * 3).reshape(16, 16, 3).astype(np.uint8)
  assert f".{suffix}" in suffixes()
  options = EXACT.get(suffix, LOSSY.get(suffix))
  quality = {"quality": 95} if suffix in LOSSY and suffix != "gif" else {}
  image = decoded(tmp_path / f"a.{suffix}", smooth, **options, **quality).astype(int)
  assert np.abs(image - smooth).max() <= (0 if suffix in EXACT else 30)


def test_the_content_decides_not_the_suffix(tmp_path):
  Image.fromarray(noise(0)).save(tmp_path / "a.png")
  (tmp_path / "a.jpg").write_bytes((tmp_path / "a.png").read_bytes())
  np.testing.assert_array_equal(decode(tmp_path / "a.jpg"), noise(0))


def test_documents_called_images_are_refused(tmp_path):
  for format in ("PDF", "EPS"):
    Image.fromarray(noise(0)).save(tmp_path / "a.png", format=format)
    with pytest.raises(UnreadableError, match="no image in a format that is read"):
      decode(tmp_path / "a.png")


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_several_frames_the_first_is_read(tmp_path, format):
  frames = [Image.new("RGB", SHAPE, colour) for colour in ((250, 0, 0), (0, 250, 0))]
  options = {"lossless": True} if format == "WEBP" else {}
  frames[0].save(tmp_path / "a", format=format, save_all=True, append_images=frames[1:], **options)
  assert (np.asarray(decode(tmp_path / "a")) == (250, 0, 0)).all()


# --- pixels ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("pixels", "expected"), [
  (noise(20, channels=1), grey(noise(20, channels=1))),
  (noise(23, channels=1) > 99, grey(255 * (noise(23, channels=1) > 99))),
  (np.arange(36, dtype=np.uint16).reshape(6, 6) * 1800,
   grey(np.arange(36).reshape(6, 6) * 1800 // 256)),
], ids=["grey", "black and white", "16 bits"])  # fmt: skip
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_every_image_becomes_rgb(tmp_path, suffix, pixels, expected):
  np.testing.assert_array_equal(decoded(tmp_path / f"a.{suffix}", pixels), expected)


def on_white(colour, alpha):
  alpha = alpha[..., None] / 255
  return colour * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "tga"])
def test_transparent_parts_show_the_ground(tmp_path, suffix):
  pixels = noise(21, channels=4)
  pixels[:3, :, 3], pixels[3, :, 3] = 0, 255
  pixels[:3, :, :3] = 0  # black underneath, as drawing programs leave it
  options = {"lossless": True, "exact": True} if suffix == "webp" else {}
  image = decoded(tmp_path / f"a.{suffix}", pixels, **options)
  assert (image[:3] == 255).all()
  np.testing.assert_array_equal(image[3], pixels[3, :, :3])
  np.testing.assert_allclose(image, on_white(pixels[..., :3], pixels[..., 3]), atol=1)


def test_grey_with_alpha_shows_the_ground(tmp_path):
  pixels = noise(22, channels=2)
  image = decoded(tmp_path / "a.png", pixels)
  np.testing.assert_allclose(image, on_white(grey(pixels[..., 0]), pixels[..., 1]), atol=1)


@pytest.mark.parametrize(("options", "alpha"), [
  ({}, (255, 255)), ({"transparency": 0}, (0, 255)), ({"transparency": 1}, (255, 0)),
  ({"transparency": bytes([0, 128])}, (0, 128)),
])  # fmt: skip
def test_palettes_become_their_colours_on_the_ground(tmp_path, options, alpha):
  palette = Image.new("P", SHAPE)
  palette.putpalette([10, 20, 30, 40, 50, 60])
  palette.putpixel((1, 0), 1)
  palette.save(tmp_path / "a.png", **options)
  colours = np.array([[10, 20, 30], [40, 50, 60]])
  expected = on_white(colours, np.array(alpha))
  np.testing.assert_allclose(np.asarray(decode(tmp_path / "a.png"))[0, :2], expected, atol=1)


@pytest.mark.parametrize(("pixels", "key"), [
  (noise(24, channels=1), int(noise(24, channels=1)[2, 3])),
  (noise(25), tuple(noise(25)[2, 3].tolist())),
  (np.arange(36, dtype=np.uint16).reshape(6, 6) * 7, 15 * 7),
], ids=["grey", "RGB", "16 bits"])  # fmt: skip
def test_a_colour_that_stands_for_transparent_shows_the_ground(tmp_path, pixels, key):
  image = decoded(tmp_path / "a.png", pixels, transparency=key)
  opaque = np.asarray(decode_without_key(tmp_path, pixels))
  assert (image[2, 3] == 255).all()
  hidden = (pixels == key).reshape(6, 6, -1).all(axis=-1)
  np.testing.assert_array_equal(image[~hidden], opaque[~hidden])


def decode_without_key(tmp_path, pixels):
  Image.fromarray(pixels).save(tmp_path / "opaque.png")
  return decode(tmp_path / "opaque.png")


def test_a_transparent_gif_shows_the_ground(tmp_path):
  palette = Image.new("P", SHAPE, 0)
  palette.putpalette([0, 0, 0, 200, 100, 50])
  palette.paste(1, (2, 2, 4, 4))
  palette.save(tmp_path / "a.gif", transparency=0)
  image = np.asarray(decode(tmp_path / "a.gif"))
  assert (image[2:4, 2:4] == (200, 100, 50)).all() and (image[0] == 255).all()


def tiff(path, pixels, bits, *, photometric=1, data=None):
  """A grey TIFF written tag by tag: Pillow writes neither 12 bits nor white as zero."""
  data = pixels.astype("<u2").tobytes() if data is None else data
  height, width = pixels.shape
  tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 9 * 12 + 4,
          277: 1, 278: height, 279: len(data)}  # fmt: skip
  entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
  path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data)
  return path


def test_sixteen_bits_are_those_of_the_format(tmp_path):
  """White is the largest number that the format can hold: none is clipped at 255."""
  deep = np.array([[0, 255, 4095], [32768, 65279, 65535]], np.uint16)
  expected = grey(deep // 256)
  Image.fromarray(deep).save(tmp_path / "a.png")
  Image.fromarray(deep.astype(np.int32)).save(tmp_path / "a.pgm")
  for path in (tmp_path / "a.png", tmp_path / "a.pgm", tiff(tmp_path / "a.tif", deep, 16)):
    np.testing.assert_array_equal(decode(path), expected)
  inverted = decode(tiff(tmp_path / "b.tif", deep, 16, photometric=0))
  np.testing.assert_array_equal(inverted, 255 - expected)


def test_twelve_bits_of_a_tiff_reach_white_at_4095(tmp_path):
  values = np.array([[4095, 0], [2048, 16]])
  packed = bytes([0xFF, 0xF0, 0x00, 0x80, 0x00, 0x10])
  image = decode(tiff(tmp_path / "a.tif", values, 12, data=packed))
  np.testing.assert_array_equal(image, grey(values // 16))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_white_are_refused_with_a_reason(tmp_path, dtype):
  Image.fromarray(noise(3, channels=1).astype(dtype)).save(tmp_path / "a.tif")
  with pytest.raises(UnreadableError, match="32-bit numbers, which do not say what white is; save"):
    decode(tmp_path / "a.tif")


def test_cmyk_becomes_its_colours(tmp_path):
  Image.new("RGB", SHAPE, (200, 50, 60)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
  assert np.abs(np.asarray(decode(tmp_path / "a.jpg")).astype(int) - (200, 50, 60)).max() <= 3


# --- orientation -----------------------------------------------------------------------------

# How pixels that a camera stored with each orientation become upright (EXIF 2.3, tag 0x0112).
UPRIGHT = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.transpose(1, 0, 2),
  6: lambda x: np.rot90(x, -1),
  7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
  8: lambda x: np.rot90(x),
}


def exif_of(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return exif


@pytest.mark.parametrize("orientation", [*UPRIGHT, 0, 9])
@pytest.mark.parametrize("mode", ["RGB", "P", "L", "I;16"])
def test_photographs_are_turned_upright(tmp_path, orientation, mode):
  pixels = noise(40, (4, 7), channels=3 if mode == "RGB" else 1)
  if mode == "I;16":
    picture = Image.fromarray(pixels.astype(np.uint16) * 256)
  else:
    picture = Image.fromarray(pixels)
    picture = picture.convert(mode) if mode == "P" else picture
  picture.save(tmp_path / "a.png", exif=exif_of(orientation))
  stored = pixels if mode == "RGB" else grey(pixels)
  shown = decode(tmp_path / "a.png")
  np.testing.assert_array_equal(shown, UPRIGHT.get(orientation, UPRIGHT[1])(stored))


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_other_formats_are_turned_too(tmp_path, suffix):
  pixels = np.zeros((8, 16, 3), np.uint8)
  pixels[:, :8] = 255
  image = decoded(tmp_path / f"a.{suffix}", pixels, exif=exif_of(6), quality=95)
  assert image.shape == (16, 8, 3) and image[:6].min() > 230 and image[10:].max() < 25


@pytest.mark.filterwarnings("ignore:.*EXIF")
@pytest.mark.parametrize("exif", [
  b"Exif\0\0nonsense", b"Exif\0\0MM\0*", b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01", b"?" * 40,
])  # fmt: skip
def test_damaged_exif_does_not_spoil_the_pixels(tmp_path, exif):
  np.testing.assert_array_equal(decoded(tmp_path / "a.png", noise(41), exif=exif), noise(41))


# --- reduced decoding ------------------------------------------------------------------------


@functools.cache
def photograph(width, height):
  """Shapes of many sizes and some noise."""
  rng = np.random.default_rng(0)
  layers = [
    np.asarray(
      Image.fromarray(rng.integers(0, 256, (n, n, 3), np.uint8)).resize((width, height)), float
    )
    for n in (3, 10, 40, 150)
  ]
  mixed = np.average(layers, axis=0, weights=(8, 4, 2, 1)) + rng.normal(0, 4, (height, width, 3))
  return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(("least", "size"), [
  (0, (1200, 900)), (901, (1200, 900)), (451, (1200, 900)), (450, (600, 450)), (225, (300, 225)),
  (113, (300, 225)), (112, (150, 113)), (1, (150, 113)),
])  # fmt: skip
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_is_decoded_as_small_as_allowed(tmp_path, least, size, orientation):
  Image.new("RGB", (1200, 900)).save(tmp_path / "a.jpg", exif=exif_of(orientation))
  assert decode(tmp_path / "a.jpg", least).size == (size if orientation == 1 else size[::-1])


def test_other_formats_are_decoded_whole(tmp_path):
  image = decoded(tmp_path / "a.png", noise(0, (80, 60)))
  np.testing.assert_array_equal(decode(tmp_path / "a.png", 4), image)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [24, 64, 150])
def test_reduced_decoding_changes_the_final_image_little(tmp_path, mode, size):
  """By a level or two of 255, at the ratio that folders use."""
  photograph(1200, 900).convert(mode).save(tmp_path / "a.jpg", quality=92, exif=exif_of(8))
  whole, reduced = decode(tmp_path / "a.jpg"), decode(tmp_path / "a.jpg", 5 * size)
  assert (reduced.size == whole.size) == (5 * size > 450)
  difference = np.abs(
    resize_and_crop(whole, size).astype(int) - resize_and_crop(reduced, size).astype(int)
  )
  assert difference.mean() < 1 and np.percentile(difference, 99) <= 3 and difference.max() <= 8


def test_a_torn_jpeg_is_noticed_in_reduced_decoding_too(tmp_path):
  photograph(400, 300).save(tmp_path / "a.jpg")
  data = (tmp_path / "a.jpg").read_bytes()
  for share in (0.05, 0.5, 0.98):
    (tmp_path / "b.jpg").write_bytes(data[: int(share * len(data))])
    with pytest.raises(UnreadableError):
      decode(tmp_path / "b.jpg", 1)


# --- what cannot be read ---------------------------------------------------------------------


def test_reasons_are_words(tmp_path):
  cases = {
    "missing": (lambda path: None, "No such file or directory"),
    "empty": (lambda path: path.write_bytes(b""), "it holds no image in a format that is read"),
    "page": (lambda path: path.write_text("<html>404</html>"), "it holds no image in a format"),
  }
  for name, (make, words) in cases.items():
    make(tmp_path / name)
    with pytest.raises(UnreadableError, match=f"^{words}") as caught:
      decode(tmp_path / name)
    assert str(tmp_path) not in str(caught.value)


def test_an_image_above_pillows_limit_says_so(tmp_path, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000_000)
  Image.new("L", (2001, 2000)).save(tmp_path / "a.png")
  with pytest.raises(
    UnreadableError, match=r"more than 4 million pixels, Pillow's limit .*; scale it down"
  ):
    decode(tmp_path / "a.png")


def test_running_out_of_memory_is_no_fault_of_the_image(tmp_path, monkeypatch):
  Image.fromarray(noise(0)).save(tmp_path / "a.png")

  def exhausted(*_):
    raise MemoryError

  monkeypatch.setattr(image_files, "_to_rgb", exhausted)
  with pytest.raises(MemoryError):
    decode(tmp_path / "a.png")


FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "TGA", "PPM", "JPEG2000", "ICO", "PCX",
           "SGI", "DDS", "QOI", "XBM", "MPO")  # fmt: skip


def encoded(format):
  data = io.BytesIO()
  Image.fromarray(noise(7, (16, 16))).convert("1" if format == "XBM" else "RGB").save(data, format)
  return data.getvalue()


FILES = {format: encoded(format) for format in FORMATS}


def read_or_reason(path):
  """The image, or the words of its UnreadableError."""
  try:
    return decode(path), None
  except UnreadableError as error:
    return None, str(error)


@pytest.mark.filterwarnings("ignore")
@given(
  st.sampled_from(FORMATS),
  st.floats(0, 1),
  st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
)
def test_damaged_files_are_read_or_refused_with_a_reason(tmp_path_factory, format, cut, changes):
  data = bytearray(FILES[format])
  for place, value in changes:
    data[int(place * (len(data) - 1))] = value
  path = tmp_path_factory.mktemp("damaged") / "a"
  path.write_bytes(data[: max(int(cut * len(data)), 1)])
  image, reason = read_or_reason(path)
  assert (image is None) != (reason is None)
  assert image is None or image.mode == "RGB"
  assert reason is None or (reason and "\n" not in reason)
