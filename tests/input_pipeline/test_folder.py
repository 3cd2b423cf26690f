"""Folders of images that the tests make: what is read, in which order, and what is refused.

test_class_folders.py has which files are taken, test_image_files.py how each becomes pixels.
"""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from configs import folder as folder_config
from input_pipeline import dataset, folder, image_files
from input_pipeline.dataset import DatasetConfig
from input_pipeline.lazy_images import LazyImages, resize_and_crop
from memdiff.config import build
from memdiff.errors import ConfigError, DataError

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


def load(root, image_size=0, skip=False, **split):
  return folder.load(str(root), image_size, skip, **split)


def said(capsys):
  """The one line on stderr."""
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("memdiff: ") and line.endswith(".")
  return line


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


# --- sizes -----------------------------------------------------------------------------------


def test_images_of_different_sizes_need_a_size(root):
  save(root / "train/cat/1.png", noise(3, (6, 9)))
  advice = r"\); give one with --config\.dataset\.image_size"
  with pytest.raises(DataError, match=rf"different sizes \(such as 6 x 6 and 9 x 6 pixels{advice}"):
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


def test_each_file_is_decoded_once_and_shrunk_before_the_next(root, monkeypatch):
  """Whole photographs take a thousand times what is kept: only so many at a time as threads."""
  order = []
  decode, shrink = image_files.decode, folder.resize_and_crop

  def decoding(path, least):
    order.append(path.relative_to(root).as_posix())
    return decode(path, least)

  def shrinking(image, size):
    order.append("shrink")
    return shrink(image, size)

  monkeypatch.setattr(folder, "_THREADS", 1)
  monkeypatch.setattr(image_files, "decode", decoding)
  monkeypatch.setattr(folder, "resize_and_crop", shrinking)
  load(root, image_size=4)
  assert order[1::2] == ["shrink"] * 7
  assert order[::2] == [
    *(f"train/{name}.png" for name in ("cat/1", "cat/2", "cat/3", "dog/a", "dog/b")),
    "test/cat/x.png",
    "test/dog/y.png",
  ]


@pytest.mark.parametrize("lazy", [False, True])
def test_photographs_are_decoded_near_the_size_that_is_needed(root, monkeypatch, lazy):
  """In memory, to see whether they can be read, and for every crop."""
  sizes, decode = [], image_files.decode

  def decoding(path, least):
    image = decode(path, least)
    if path.suffix == ".jpg":
      sizes.append(image.size)
    return image

  Image.new("RGB", (800, 640), (9, 99, 199)).save(root / "train/cat/0.jpg")
  monkeypatch.setattr(image_files, "decode", decoding)
  if lazy:
    monkeypatch.setattr(folder, "_IN_MEMORY", 0)
  images = load(root, image_size=16).train_images
  first = images[0]
  assert sizes == ([(100, 80), (100, 80)] if lazy else [(100, 80)])
  assert first.shape == (16, 16, 3) and np.abs(first.astype(int) - (9, 99, 199)).max() <= 2
  if lazy:
    assert images.read(0).size == (100, 80)


@pytest.mark.parametrize("size", [16, 32, 100])
def test_the_smallest_random_crop_of_a_reduced_photograph_has_enough_pixels(tmp_path, size):
  """Crops have at least 8 % of the area and a ratio of at least 3/4."""
  Image.new("RGB", (2000, 1500)).save(tmp_path / "a.jpg")
  width, height = folder.FolderImages([tmp_path / "a.jpg"], image_files.DECODED * size)[0].size
  smallest = min((0.08 * width * height * ratio) ** 0.5 for ratio in (3 / 4, 1.0))
  assert smallest >= size


# --- on disk ---------------------------------------------------------------------------------


def test_images_are_made_grey_on_request(root):
  source = load(root, image_size=6, grey=True)
  expected = [np.asarray(Image.fromarray(noise(seed)).convert("L"))[..., None] for seed in (3, 4)]
  assert source.train_images.shape == (5, 6, 6, 1)
  np.testing.assert_array_equal(source.train_images[:2], expected)


BYTES = 7 * 4 * 4 * 3  # of the seven images of `root` with image_size 4


def test_images_that_stay_on_disk_cannot_be_made_grey(root, monkeypatch):
  monkeypatch.setattr(folder, "_IN_MEMORY", BYTES // 3)
  assert load(root, image_size=4, grey=True).test_images.shape == (2, 4, 4, 1)
  monkeypatch.setattr(folder, "_IN_MEMORY", BYTES // 3 - 1)
  with pytest.raises(ConfigError, match=r"too many to be kept in memory.*leave config"):
    load(root, image_size=4, grey=True)


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


def test_a_reader_tells_its_files_in_order(root):
  paths = [root / "train/dog/b.png", root / "train/cat/1.png"]
  reader = folder.FolderImages(paths)
  assert reader.paths == paths and len(reader) == 2
  np.testing.assert_array_equal(reader[0], noise(1))


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


REASON = {
  "text": "it holds no image in a format that is read",
  "empty": "it holds no image in a format that is read",
  "cut short": "image file is truncated",
  "too large": "it has more than 178 million pixels, Pillow's limit .*; scale it down",
}
SPOIL = {
  "text": lambda path: path.write_text("no image"),
  "empty": lambda path: path.write_bytes(b""),
  "cut short": cut_short,
  "too large": too_large,
}


@pytest.mark.parametrize("how", SPOIL)
@pytest.mark.parametrize("limit", [0, 2**31], ids=["on disk", "in memory"])
def test_an_image_that_cannot_be_read_is_named_with_the_reason(root, how, limit, monkeypatch):
  monkeypatch.setattr(folder, "_IN_MEMORY", limit)
  save(root / "train/cat/0.bmp", noise(8))
  SPOIL[how](root / "train/cat/0.bmp")
  words = rf"Cannot read the image .*train/cat/0\.bmp \({REASON[how]}.*\); repair"
  with pytest.raises(DataError, match=rf"{words}.*skip_unreadable=True"):
    load(root, image_size=4)


def test_several_are_counted(root):
  for name in ("cat/1", "cat/3", "dog/b"):
    SPOIL["cut short"](root / f"train/{name}.png")
  with pytest.raises(DataError, match=r"Cannot read the image .*cat/1\.png \(.*\) and 2 more; rep"):
    load(root)


@pytest.mark.parametrize("how", SPOIL)
@pytest.mark.parametrize("limit", [0, 2**31], ids=["on disk", "in memory"])
def test_unreadable_images_are_left_out_when_asked(root, how, limit, monkeypatch, capsys):
  monkeypatch.setattr(folder, "_IN_MEMORY", limit)
  for name in ("train/cat/0.bmp", "test/dog/z.bmp"):
    save(root / name, noise(8))
    SPOIL[how](root / name)
  source = load(root, image_size=6, skip=True)
  images = [source.train_images.read(i) for i in range(5)] if limit == 0 else source.train_images
  np.testing.assert_array_equal(images, [noise(seed) for seed in (3, 4, 2, 0, 1)])
  assert source.train_labels.tolist() == [0, 0, 0, 1, 1]
  assert source.test_labels.tolist() == [0, 1]
  line = said(capsys)
  assert "7 images of 2 classes" in line and "5 train, 2 test;" in line
  words = r"2 files left out: 2 unreadable \(train/cat/0\.bmp: "
  assert re.search(words + REASON[how], line)


def test_a_class_whose_training_images_are_all_left_out_is_named(root):
  for name in "ab":
    SPOIL["text"](root / f"train/dog/{name}.png")
  config = make_config(root, skip_unreadable=True)
  with pytest.raises(DataError, match="The train set of folder has no image of class 'dog'"):
    dataset.load(config)


def test_a_folder_without_one_readable_image_is_named(root):
  for name in ("cat/x", "dog/y"):
    SPOIL["text"](root / f"test/{name}.png")
  with pytest.raises(DataError, match=r"None of the 2 images beside .*test/cat/x\.png can be read"):
    load(root, skip=True)


# --- what is said ----------------------------------------------------------------------------


def test_one_line_says_what_was_taken_and_what_was_not(root, capsys):
  load(root)
  assert said(capsys) == (
    f"memdiff: 7 images of 2 classes taken from {root}: 5 train, 2 test; 0 files left out."
  )
  for name in ("train/cat/a.txt", "train/dog/b.TXT", "test/dog/readme", "train/labels.csv"):
    (root / name).write_text("words")
  (root / "test/dog/w.png").symlink_to(root / "nowhere.png")
  (root / "train/dog/.hidden.png").write_text("nothing")
  SPOIL["text"](root / "train/cat/1.png")
  load(root, skip=True)
  line = said(capsys)
  assert (
    "6 images of 2 classes taken" in line and "4 train, 2 test; 6 files left out: 2 .txt" in line
  )
  for part in ("2 .txt (train/cat/a.txt)", "1 without a suffix (test/dog/readme)",
               "1 outside the folders of classes (train/labels.csv)",
               "1 broken link (test/dog/w.png)", "1 unreadable (train/cat/1.png: "):  # fmt: skip
    assert part in line
  assert "hidden" not in line


def test_images_as_they_are_must_fit_into_memory(root, monkeypatch):
  monkeypatch.setattr(folder, "_IN_MEMORY", 5 * noise(0).nbytes)
  assert len(dataset.load(make_config(root, image_size=0)).train_images) == 5
  monkeypatch.setattr(folder, "_IN_MEMORY", 5 * noise(0).nbytes - 1)
  with pytest.raises(ConfigError, match=r"The 5 images beside .* would take .*\.image_size"):
    dataset.load(make_config(root, image_size=0))


def test_nothing_is_said_of_a_folder_that_is_refused(root, capsys):
  (root / "train/cow").mkdir()
  with pytest.raises(DataError):
    load(root)
  assert capsys.readouterr() == ("", "")


def test_classes_without_test_images_are_allowed_and_said(root, capsys):
  shutil.rmtree(root / "test/dog")
  (root / "test/dog").mkdir()
  for name in ("ant", "bee", "cow", "elk"):
    save(root / f"train/{name}/1.png", noise(50))
  data = dataset.load(make_config(root))
  assert data.class_names == ("ant", "bee", "cat", "cow", "dog", "elk")
  assert data.test_labels.tolist() == [2]
  assert "not scored, for lack of test images: 'ant', 'bee', 'cow' and 2 more." in said(capsys)


# --- held-out images, and tests that are split off -------------------------------------------


@pytest.mark.parametrize("name", ["val", "valid", "validation", "VAL"])
def test_val_beside_test_is_the_held_out_part(root, name, capsys):
  save(root / f"{name}/dog/z.png", noise(9))
  save(root / f"{name}/cat/z.png", noise(10))
  data = dataset.load(make_config(root, image_size=0))
  np.testing.assert_array_equal(data.train_images, [noise(seed) for seed in (3, 4, 2, 0, 1)])
  np.testing.assert_array_equal(data.test_images, [noise(5), noise(6)])
  np.testing.assert_array_equal(data.holdout_images, [noise(10), noise(9)])
  assert data.holdout_labels.tolist() == [0, 1] and data.holdout_labels.dtype == np.int32
  assert f"5 train, 2 test, 2 held out ({name});" in said(capsys)
  with pytest.raises(ConfigError, match=r"holdout is 0\.4, but this folder has held-out images"):
    dataset.load(make_config(root, image_size=0, holdout=0.4))


def test_val_may_lack_classes_and_be_empty_but_has_no_others(root):
  (root / "val/dog").mkdir(parents=True)
  assert len(dataset.load(make_config(root)).holdout_labels) == 0
  save(root / "val/dog/z.png", noise(9))
  assert dataset.load(make_config(root)).holdout_labels.tolist() == [1]
  save(root / "val/wolf/z.png", noise(9))
  with pytest.raises(DataError, match=r"val has a folder 'wolf' for a class that .*train does not"):
    dataset.load(make_config(root))


def test_held_out_images_of_another_size_are_refused(root):
  save(root / "val/dog/z.png", noise(9, (5, 5)))
  with pytest.raises(DataError, match=r"train and holdout images of folder differ in shape"):
    dataset.load(make_config(root, image_size=0))


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_val_takes_the_place_of_a_missing_test(root, name, capsys):
  (root / "test").rename(root / name)
  data = dataset.load(make_config(root, image_size=0))
  np.testing.assert_array_equal(data.test_images, [noise(5), noise(6)])
  assert len(data.holdout_labels) == 0
  assert f"5 train, 2 test ({name});" in said(capsys)


def test_names_of_parts_may_have_capitals_but_not_two_spellings(root):
  (root / "train").rename(root / "Train")
  (root / "test").rename(root / "TEST")
  assert len(load(root).train_labels) == 5
  (root / "val").mkdir()
  (root / "valid").mkdir()
  with pytest.raises(DataError, match="has both val and valid; keep one of them"):
    load(root)


def make_classes(folder, counts):
  """One even colour per image: its class and its number."""
  for label, (name, count) in enumerate(counts.items()):
    for i in range(count):
      save(folder / name / f"{i:02}.png", np.full((4, 4, 3), (label, i, 7), np.uint8))
  return folder


COUNTS = {"ant": 20, "bee": 5, "cow": 2, "dog": 1}


@pytest.mark.parametrize("below", [".", "train"], ids=["classes alone", "train alone"])
@pytest.mark.parametrize("limit", [0, 2**31], ids=["on disk", "in memory"])
def test_a_test_set_is_split_off(tmp_path, below, limit, monkeypatch, capsys):
  monkeypatch.setattr(folder, "_IN_MEMORY", limit)
  make_classes(tmp_path / below, COUNTS)
  config = make_config(tmp_path, image_size=4, test_share=0.3)
  data = dataset.load(config)
  assert data.class_names == tuple(COUNTS)
  assert np.bincount(data.test_labels, minlength=4).tolist() == [6, 1, 1, 0]
  assert data.train_counts.tolist() == [14, 4, 1, 1]
  line = said(capsys)
  assert "28 images of 4 classes" in line and "20 train, 8 test (split off); 0 files" in line
  assert "; not scored, for lack of test images: 'dog'." in line
  parts = [(data.train_images[:], data.train_labels), (data.test_images[:], data.test_labels)]
  seen = [{tuple(image[0, 0]) for image in images} for images, _ in parts]
  assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 28
  for images, labels in parts:
    np.testing.assert_array_equal(images[:, 0, 0, 0], labels)
  again = dataset.load(config)
  np.testing.assert_array_equal(again.test_images[:], data.test_images[:])
  other = dataset.load(make_config(tmp_path, image_size=4, test_share=0.3, test_seed=1))
  assert {tuple(image[0, 0]) for image in other.test_images[:]} != seen[1]
  np.testing.assert_array_equal(other.train_counts, data.train_counts)


def test_unreadable_images_do_not_count_in_the_split(tmp_path):
  make_classes(tmp_path, {"ant": 3, "bee": 3})
  SPOIL["text"](tmp_path / "bee/00.png")
  source = load(tmp_path, skip=True, test_share=0.4)
  assert source.train_labels.tolist() == [0, 0, 1] and source.test_labels.tolist() == [0, 1]


def test_a_split_needs_a_class_of_two(tmp_path):
  make_classes(tmp_path, {"ant": 1, "bee": 1})
  with pytest.raises(DataError, match=r"No class in .* has two images, so that no test set"):
    load(tmp_path, test_share=0.5)


@pytest.mark.parametrize("name", ["test", "val", "valid"])
def test_a_split_and_a_test_set_exclude_each_other(root, name):
  (root / "test").rename(root / name)
  with pytest.raises(ConfigError, match=rf"test_share is 0\.2, but .* has a test set, {name}; set"):
    load(root, test_share=0.2)


def test_a_folder_of_classes_alone_needs_a_share(tmp_path):
  make_classes(tmp_path, COUNTS)
  with pytest.raises(DataError, match=r"has no folder train; it needs .*CLASS/ alone .*test_share"):
    load(tmp_path)


# --- folders that do not fit -----------------------------------------------------------------


@pytest.mark.parametrize(("spoil", "words"), [
  (lambda root: shutil.rmtree(root / "train"), "data_dir is .*, which has no folder train; it"),
  (lambda root: shutil.rmtree(root / "test"), r"which has no folder test \(or val\); it needs"),
  (lambda root: [shutil.rmtree(root / "train" / name) for name in ("cat", "dog")],
   "train has no folders; it needs one per class"),
  (lambda root: (root / "train/cow").mkdir(),
   r"The class 'cow' has no image in .*train/cow; every class needs at least one, in a format"),
  (lambda root: (save(root / "train/cow/x.png", noise(0)),
                 (root / "train/cow/x.png").rename(root / "train/cow/x.heic")),
   r"'cow' has no image in .*train/cow \(1 file left out: 1 \.heic \(x\.heic\)\); every class"),
  (lambda root: [shutil.rmtree(root / "test" / name) for name in ("cat", "dog")],
   "test has no folders; it needs one per class"),
  (lambda root: [path.unlink() for path in root.glob("test/*/*.png")],
   r"test has no image of any class; it needs test/CLASS/\*\.jpg"),
  (lambda root: save(root / "test/wolf/w.png", noise(0)),
   "test has a folder 'wolf' for a class that .*train does not have"),
], ids=["no train", "no test", "no class", "empty class", "other suffix", "no test class",
        "no test image", "unknown class"])  # fmt: skip
def test_folders_that_do_not_fit_are_one_sentence(root, spoil, words):
  spoil(root)
  with pytest.raises(DataError, match=words):
    load(root)


def test_no_folder_at_all_is_a_sentence(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(DataError, match=r"data_dir is empty; give the folder"):
    load("", test_share=0.2)
  with pytest.raises(DataError, match="data_dir is nowhere, but there is no such folder"):
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
