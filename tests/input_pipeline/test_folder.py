"""Folders of images that the tests make: what is read, in which order, and what is refused."""

import shutil

import numpy as np
import pytest
from PIL import Image

from configs import folder as folder_config
from input_pipeline import dataset, folder
from input_pipeline.dataset import DatasetConfig
from input_pipeline.lazy_images import LazyImages, resize_and_crop
from memdiff.config import build
from memdiff.errors import DataError

SHAPE = (6, 6)


def noise(seed, shape=SHAPE, channels=3):
  pixels = np.random.default_rng(seed).integers(0, 256, (*shape, channels), np.uint8)
  return pixels if channels > 1 else pixels[..., 0]


def save(path, pixels, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def root(tmp_path):
  """Two classes; cat has 3 training images, dog 2; one test image each; seeds 0, 1, ..."""
  names = ("train/dog/a.png", "train/dog/b.png", "train/cat/3.png", "train/cat/1.png",
           "train/cat/2.png", "test/cat/x.png", "test/dog/y.png")  # fmt: skip
  for seed, name in enumerate(names):
    save(tmp_path / name, noise(seed))
  return tmp_path


def load(root, image_size=0, skip=False):
  return folder.load(str(root), image_size, skip)


# --- what is read ----------------------------------------------------------------------------


def test_classes_and_images_come_in_alphabetical_order(root):
  source = load(root)
  assert source.class_names == ("cat", "dog")
  np.testing.assert_array_equal(source.train_images, [noise(seed) for seed in (3, 4, 2, 0, 1)])
  assert source.train_labels.tolist() == [0, 0, 0, 1, 1]
  np.testing.assert_array_equal(source.test_images, [noise(5), noise(6)])
  assert source.test_labels.tolist() == [0, 1]
  assert source.train_images.dtype == np.uint8 and source.train_names is None
  dataset.check(source, "folder")


def test_val_takes_the_place_of_a_missing_test(root):
  (root / "test").rename(root / "val")
  np.testing.assert_array_equal(load(root).test_images, [noise(5), noise(6)])


def test_test_comes_before_val(root):
  save(root / "val/cat/z.png", noise(9))
  np.testing.assert_array_equal(load(root).test_images, [noise(5), noise(6)])


def test_images_may_lie_deeper_and_other_files_beside_them(root):
  save(root / "train/dog/old/2019/c.PNG", noise(7))
  save(root / "train/cat/0.bmp", noise(8))
  (root / "train/dog/notes.txt").write_text("good dogs")
  (root / "train/readme.png").write_text("no class")
  (root / "train/cat/photos.jpg").mkdir()
  source = load(root)
  seeds = (8, 3, 4, 2, 0, 1, 7)
  np.testing.assert_array_equal(source.train_images, [noise(seed) for seed in seeds])
  assert source.train_labels.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_the_home_folder_may_be_abbreviated(root, monkeypatch):
  monkeypatch.setenv("HOME", str(root.parent))
  assert len(load(f"~/{root.name}").train_images) == 5


@pytest.mark.parametrize(("suffix", "options", "tolerance"), [
  ("bmp", {}, 0), ("webp", {"lossless": True}, 0), ("jpg", {"quality": 95}, 30),
  ("jpeg", {"quality": 95}, 30),
])  # fmt: skip
def test_other_formats_are_read(root, suffix, options, tolerance):
  smooth = np.linspace(0, 255, 6 * 6 * 3).reshape(6, 6, 3).astype(np.uint8)
  save(root / f"train/cat/0.{suffix}", smooth, **options)
  image = load(root).train_images[0].astype(int)
  assert np.abs(image - smooth).max() <= tolerance


@pytest.mark.parametrize(("pixels", "expected"), [
  (noise(20, channels=1), np.repeat(noise(20, channels=1)[..., None], 3, axis=-1)),
  (noise(21, channels=4), noise(21, channels=4)[..., :3]),
  (noise(22, channels=2), np.repeat(noise(22, channels=2)[..., :1], 3, axis=-1)),
  (noise(23, channels=1) > 99, np.repeat(255 * (noise(23, channels=1) > 99)[..., None], 3, -1)),
  (np.arange(36, dtype=np.uint16).reshape(6, 6) * 1800,
   np.repeat(np.arange(36).reshape(6, 6, 1) * 1800 // 256, 3, axis=-1)),
], ids=["grey", "RGBA", "grey and alpha", "black and white", "16 bits"])  # fmt: skip
def test_every_image_becomes_rgb(root, pixels, expected):
  save(root / "train/cat/0.png", pixels)
  np.testing.assert_array_equal(load(root).train_images[0], expected)


@pytest.mark.parametrize("options", [{}, {"transparency": 0}, {"transparency": bytes([0, 128])}])
def test_palettes_become_their_colours(root, options):
  palette = Image.new("P", SHAPE)
  palette.putpalette([10, 20, 30, 40, 50, 60])
  palette.putpixel((1, 0), 1)
  palette.save(root / "train/cat/0.png", **options)
  image = load(root).train_images[0]
  assert image[0, 0].tolist() == [10, 20, 30] and image[0, 1].tolist() == [40, 50, 60]


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
  stored = pixels if mode == "RGB" else np.repeat(pixels[..., None], 3, axis=-1)
  shown = folder.FolderImages([tmp_path / "a.png"])[0]
  np.testing.assert_array_equal(shown, UPRIGHT.get(orientation, UPRIGHT[1])(stored))


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_other_formats_are_turned_too(tmp_path, suffix):
  pixels = np.zeros((8, 16, 3), np.uint8)
  pixels[:, :8] = 255
  save(tmp_path / f"a.{suffix}", pixels, exif=exif_of(6), quality=95)
  image = np.asarray(folder.FolderImages([tmp_path / f"a.{suffix}"])[0])
  assert image.shape == (16, 8, 3) and image[:6].min() > 230 and image[10:].max() < 25


@pytest.mark.filterwarnings("ignore:.*EXIF")
@pytest.mark.parametrize("exif", [
  b"Exif\0\0nonsense", b"Exif\0\0MM\0*", b"Exif\0\0II*\0\x08\0\0\0\x09\0\x12\x01", b"?" * 40,
])  # fmt: skip
def test_damaged_exif_does_not_spoil_the_pixels(root, exif):
  save(root / "train/cat/0.png", noise(41), exif=exif)
  np.testing.assert_array_equal(load(root).train_images[0], noise(41))


# --- sizes -----------------------------------------------------------------------------------


def test_images_of_different_sizes_need_a_size(root):
  save(root / "train/cat/1.png", noise(3, (6, 9)))
  advice = r"\); give one with --config\.dataset\.image_size"
  with pytest.raises(DataError, match=rf"different sizes \(6 x 6, 9 x 6 pixels{advice}"):
    load(root)
  for height, end in ((7, ""), (8, r", \.\.\.")):
    save(root / f"train/cat/{height}.png", noise(0, (height, 6)))
    with pytest.raises(DataError, match=rf"\(6 x 6, 9 x 6, 6 x 7{end} pixels{advice}"):
      load(root)


def test_a_size_makes_squares_of_all(root):
  save(root / "train/cat/1.png", noise(3, (30, 12)))
  save(root / "test/cat/x.png", noise(5, (4, 3)))
  source = load(root, image_size=5)
  originals = [noise(3, (30, 12)), *(noise(seed) for seed in (4, 2, 0, 1))]
  expected = [resize_and_crop(Image.fromarray(image), 5) for image in originals]
  np.testing.assert_array_equal(source.train_images, expected)
  np.testing.assert_array_equal(
    source.test_images[0], resize_and_crop(Image.fromarray(noise(5, (4, 3))), 5)
  )


def test_whole_photographs_are_not_held_all_at_once(root, monkeypatch):
  """Each is shrunk before the next is read."""
  order = []
  read, shrink = folder.FolderImages.__getitem__, folder.resize_and_crop

  def reading(self, index):
    order.append("read")
    return read(self, index)

  def shrinking(image, size):
    order.append("shrink")
    return shrink(image, size)

  monkeypatch.setattr(folder.FolderImages, "__getitem__", reading)
  monkeypatch.setattr(folder, "resize_and_crop", shrinking)
  load(root, image_size=4)
  assert order == ["read", "shrink"] * 7


# --- on disk ---------------------------------------------------------------------------------

BYTES = 7 * 4 * 4 * 3  # of the seven images of `root` with image_size 4


def test_above_the_limit_images_stay_on_disk(root, monkeypatch):
  monkeypatch.setattr(folder, "_IN_MEMORY", BYTES)
  assert isinstance(load(root, image_size=4).train_images, np.ndarray)
  monkeypatch.setattr(folder, "_IN_MEMORY", BYTES - 1)
  source = load(root, image_size=4)
  for images, seeds in ((source.train_images, (3, 4, 2, 0, 1)), (source.test_images, (5, 6))):
    assert isinstance(images, LazyImages)
    assert images.shape == (len(seeds), 4, 4, 3)
    for i, seed in enumerate(seeds):
      np.testing.assert_array_equal(images.read(i), noise(seed))
    views = [resize_and_crop(Image.fromarray(noise(seed)), 4, 256 / 224) for seed in seeds]
    np.testing.assert_array_equal(images[:], views)
  assert source.train_labels.tolist() == [0, 0, 0, 1, 1]
  dataset.check(source, "folder")


def test_an_image_that_is_spoilt_while_training_is_named(root, monkeypatch):
  monkeypatch.setattr(folder, "_IN_MEMORY", 0)
  images = load(root, image_size=4).train_images
  (root / "train/cat/2.png").write_bytes(b"no longer")
  np.testing.assert_array_equal(images.read(0), noise(3))
  with pytest.raises(DataError, match=r"Cannot read the image .*train/cat/2\.png \(.*\)"):
    images[:]
  (root / "train/dog/a.png").unlink()
  with pytest.raises(DataError, match=r"Cannot read the image .*train/dog/a\.png"):
    images.read(3)


# --- images that cannot be read --------------------------------------------------------------


def cut_short(path):
  path.write_bytes(path.read_bytes()[:-40])


def too_large(path):
  """A header that promises 400 million pixels."""
  data = bytearray(path.read_bytes())
  data[18:26] = (20_000).to_bytes(4, "little") * 2
  path.write_bytes(data)


SPOIL = {
  "text": lambda path: path.write_text("no image"),
  "empty": lambda path: path.write_bytes(b""),
  "cut short": cut_short,
  "too large": too_large,
}


@pytest.mark.parametrize("how", SPOIL)
def test_an_image_that_cannot_be_read_is_named(root, how):
  save(root / "train/cat/0.bmp", noise(8))
  SPOIL[how](root / "train/cat/0.bmp")
  with pytest.raises(
    DataError, match=r"Cannot read the image .*train/cat/0\.bmp; repair.*skip_unreadable=True"
  ):
    load(root)


def test_several_are_counted(root):
  for name in ("cat/1", "cat/3", "dog/b"):
    SPOIL["cut short"](root / f"train/{name}.png")
  with pytest.raises(DataError, match=r"Cannot read the image .*train/cat/1\.png and 2 more;"):
    load(root)


@pytest.mark.parametrize("how", SPOIL)
def test_unreadable_images_are_left_out_when_asked(root, how, capsys):
  for name in ("train/cat/0.bmp", "test/dog/z.bmp"):
    save(root / name, noise(8))
    SPOIL[how](root / name)
  source = load(root, skip=True)
  np.testing.assert_array_equal(source.train_images, [noise(seed) for seed in (3, 4, 2, 0, 1)])
  assert source.train_labels.tolist() == [0, 0, 0, 1, 1]
  assert source.test_labels.tolist() == [0, 1]
  lines = capsys.readouterr().err.splitlines()
  assert lines == [f"memdiff: left out 1 unreadable images: {root}/{name}"
                   for name in ("train/cat/0.bmp", "test/dog/z.bmp")]  # fmt: skip


def test_only_the_first_five_of_many_are_listed(root, capsys):
  for i in range(7):
    (root / f"train/cat/9{i}.png").write_text("no image")
  load(root, skip=True)
  message = capsys.readouterr().err
  assert "left out 7 unreadable" in message and message.endswith("94.png, ...\n")
  assert "95.png" not in message


def test_nothing_is_said_where_all_can_be_read(root, capsys):
  load(root, skip=True)
  assert capsys.readouterr() == ("", "")


def test_a_class_whose_images_are_all_left_out_is_named(root):
  SPOIL["text"](root / "test/dog/y.png")
  config = make_config(root, skip_unreadable=True)
  with pytest.raises(DataError, match="The test set of folder has no image of class 'dog'"):
    dataset.load(config)


def test_a_folder_without_one_readable_image_is_named(root):
  for name in ("cat/x", "dog/y"):
    SPOIL["text"](root / f"test/{name}.png")
  with pytest.raises(DataError, match=r"None of the 2 images in .*test can be read"):
    load(root, skip=True)


# --- folders that do not fit -----------------------------------------------------------------


@pytest.mark.parametrize(("spoil", "words"), [
  (lambda root: shutil.rmtree(root / "train"), "data_dir is .*, which has no folder train; it"),
  (lambda root: shutil.rmtree(root / "test"), r"which has no folder test \(or val\); it needs"),
  (lambda root: [shutil.rmtree(root / "train" / name) for name in ("cat", "dog")],
   "train has no folders; it needs one per class"),
  (lambda root: (root / "train/cow").mkdir(),
   r"The class 'cow' has no image in .*train/cow; every class needs at least one \(.png, .jpg"),
  (lambda root: shutil.rmtree(root / "test/dog"), "The class 'dog' has no image in .*test/dog"),
  (lambda root: (root / "test/dog/y.png").rename(root / "test/dog/y.tiff"),
   "The class 'dog' has no image in .*test/dog"),
  (lambda root: save(root / "test/wolf/w.png", noise(0)),
   "test has a folder 'wolf' for a class that .*train does not have"),
], ids=["no train", "no test", "no class", "empty class", "class not in test", "other suffix",
        "unknown class"])  # fmt: skip
def test_folders_that_do_not_fit_are_one_sentence(root, spoil, words):
  spoil(root)
  with pytest.raises(DataError, match=words):
    load(root)


def test_no_folder_at_all_is_a_sentence(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(DataError, match="data_dir is '', which has no folder train"):
    load("")
  with pytest.raises(DataError, match="data_dir is nowhere, which has no folder train"):
    load("nowhere")


# --- a whole config --------------------------------------------------------------------------


def make_config(root, **changes):
  """The settings of configs/folder.py."""
  values = folder_config.get_config().dataset.to_dict()
  return build(DatasetConfig, values | {"data_dir": str(root)} | changes)


def test_the_shipped_config_loads_a_folder(root):
  data = dataset.load(make_config(root))
  assert data.name == "folder" and data.class_names == ("cat", "dog")
  assert data.profile == "natural" and data.imbalance == 1.5 and not data.streamed
  assert data.train_images.shape == (5, 32, 32, 3) and data.train_counts.tolist() == [3, 2]
  assert len(data.left_out_labels) == len(data.holdout_labels) == 0
  expected = [resize_and_crop(Image.fromarray(noise(seed)), 32) for seed in (5, 6)]
  np.testing.assert_array_equal(data.test_images, expected)


@pytest.mark.parametrize("limit", [0, 2**31], ids=["on disk", "in memory"])
def test_a_folder_is_cut_and_held_out_like_any_other_set(root, limit, monkeypatch):
  monkeypatch.setattr(folder, "_IN_MEMORY", limit)
  for i in range(2):
    save(root / f"train/dog/z{i}.png", noise(30 + i))
  data = dataset.load(make_config(root, profile="step", imbalance=3.0, image_size=8, holdout=0.4))
  assert data.streamed == (limit == 0)
  assert data.train_counts.tolist() == [2, 1]
  assert data.holdout_labels.tolist() == [0] and data.left_out_labels.tolist() == [1, 1, 1]
  margin = 256 / 224 if data.streamed else 1.0
  cat, dog = (3, 4, 2), (0, 1, 30, 31)
  views = {
    seed: resize_and_crop(Image.fromarray(noise(seed)), 8, margin).tobytes()
    for seed in (*cat, *dog)
  }
  seen = [np.asarray(getattr(data, f"{part}_images")[:]) for part in ("train", "holdout")]
  seen.append(data.left_out_images[:])
  assert {image.tobytes() for images in seen for image in images} == set(views.values())
  cats = {views[seed] for seed in cat}
  labels = [*data.train_labels, *data.holdout_labels, *data.left_out_labels]
  assert [image.tobytes() not in cats for images in seen for image in images] == labels


def test_a_folder_is_cut_by_indices_and_has_no_official_names(root):
  np.savez(root / "list.npz", [4, 0])
  config = make_config(root, profile="list", list_path=f"{root}/list.npz", image_size=0)
  np.testing.assert_array_equal(dataset.load(config).train_images, [noise(1), noise(3)])
  (root / "list.txt").write_text("cat/1.png 0\n")
  with pytest.raises(DataError, match=r"list\.txt lists file names, but this data set has none"):
    dataset.load(make_config(root, profile="list", list_path=f"{root}/list.txt"))


def test_train_and_test_images_of_different_size_are_refused(root):
  for name in ("cat/x", "dog/y"):
    save(root / f"test/{name}.png", noise(0, (5, 6)))
  with pytest.raises(DataError, match=r"folder differ in shape: \(6, 6, 3\) and \(5, 6, 3\)"):
    dataset.load(make_config(root, image_size=0))
