"""Sets that TFDS prepares, on tiny ones written where TFDS looks for the real ones."""

import hashlib
import io
import json
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from input_pipeline import tfds_sources
from input_pipeline.lazy_images import LazyImages, resize_and_crop
from input_pipeline.tfds_sources import CELEBA_5, INDEX_FILE, SETS
from memdiff.errors import ConfigError, DataError

ROOT = pathlib.Path(__file__).parents[2]
STREAMED = [name for name, spec in SETS.items() if spec.streamed]
IMAGENET_NAMES = ("n01443537_9", "n01440764_190", "n01440764_18", "n01443537_10", "n01440764_2")


def write(name, folder, features=None, file_format="array_record", shards=1, **splits):
  """Writes lists of (key, example) as the TFDS set `name`, with its real features by default."""
  import tensorflow_datasets as tfds

  real = tfds_sources.make_builder(name, str(folder))
  builder = tfds.dataset_builders.AdhocBuilder(
    name=SETS[name].name, version=str(real.version), features=features or real.info.features,
    split_datasets=splits, data_dir=folder, file_format=file_format,
  )  # fmt: skip
  config = tfds.download.DownloadConfig(num_shards=shards)
  builder.download_and_prepare(download_config=config)
  return builder


def pictures(number, shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (number, *shape), np.uint8)


def jpeg(height, width, seed, mode="RGB"):
  """The bytes of a JPEG."""
  data = io.BytesIO()
  Image.fromarray(pictures(1, (height, width, 3), seed)[0]).convert(mode).save(data, "JPEG")
  return data.getvalue()


def cifar_examples(split, images, labels):
  """Keys and ids are out of step, so that only the ids tell the official order."""
  order = np.random.default_rng(5).permutation(len(images))
  return [
    (key, {"id": f"{split}_{i:05d}", "image": images[i], "label": labels[i]})
    for key, i in enumerate(order)
  ]


def keyed(images, labels):
  return [(i, {"image": images[i], "label": labels[i]}) for i in range(len(images))]


IMAGES = {
  "cifar10": (pictures(60, (32, 32, 3)), pictures(15, (32, 32, 3), 1)),
  "fashion_mnist": (pictures(80, (28, 28, 1)), pictures(30, (28, 28, 1), 1)),
}
LABELS = {name: tuple(np.arange(len(x)) * 7 % 10 for x in parts) for name, parts in IMAGES.items()}
JPEGS = {
  "train": [jpeg(20 + 9 * i, 50 - 4 * i, i, "L" if i == 3 else "RGB") for i in range(5)],
  "validation": [jpeg(30, 40, 10 + i) for i in range(3)],
}


def imagenet_examples(names, data):
  return [
    (name, {"image": io.BytesIO(x), "label": name.split("_")[0], "file_name": f"{name}.JPEG"})
    for name, x in zip(names, data, strict=True)
  ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder of TFDS with three tiny sets."""
  folder = tmp_path_factory.mktemp("tfds")
  (train, test), (y_train, y_test) = IMAGES["cifar10"], LABELS["cifar10"]
  write("cifar10", folder, train=cifar_examples("train", train, y_train),
        test=cifar_examples("test", test, y_test))  # fmt: skip
  (train, test), (y_train, y_test) = IMAGES["fashion_mnist"], LABELS["fashion_mnist"]
  write("fashion_mnist", folder, shards=3, train=keyed(train, y_train), test=keyed(test, y_test))
  validation = [f"n01443537_{i}" for i in (3, 1, 2)]
  write("imagenet2012", folder, train=imagenet_examples(IMAGENET_NAMES, JPEGS["train"]),
        validation=imagenet_examples(validation, JPEGS["validation"]))  # fmt: skip
  index("imagenet2012", folder)
  return folder


@pytest.fixture
def copy(folder, tmp_path):
  """The same in a place where it may be broken."""
  return shutil.copytree(folder, tmp_path / "tfds")


def index(name, folder):
  """Writes the index, and returns what was told of the progress."""
  told = []
  builder = tfds_sources.prepared_builder(name, str(folder))
  tfds_sources.write_index(name, builder, lambda *progress: told.append(progress))
  return told


def load(name, folder, image_size=None):
  size = (24 if SETS[name].streamed else 0) if image_size is None else image_size
  return tfds_sources.load(name, str(folder), size)


def place(name, folder) -> pathlib.Path:
  return pathlib.Path(tfds_sources.make_builder(name, str(folder)).data_path)


# --- small sets ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_small_sets_come_in_their_official_order(folder, name):
  source = load(name, folder)
  for part, images, labels in zip(("train", "test"), IMAGES[name], LABELS[name], strict=True):
    got = getattr(source, f"{part}_images")
    assert got.dtype == np.uint8 and got.shape == images.shape
    np.testing.assert_array_equal(got, images)
    np.testing.assert_array_equal(getattr(source, f"{part}_labels"), labels)
    stored = tfds_sources.stored_examples(tfds_sources.make_builder(name, str(folder)), part)
    assert [int(stored[i]["label"]) for i in range(len(images))] != labels.tolist()
  assert source.train_names is None


def test_class_names_are_those_of_tfds(folder):
  assert load("fashion_mnist", folder).class_names[::9] == ("T-shirt/top", "Ankle boot")
  names = load("imagenet2012", folder).class_names
  assert len(names) == 1000 and names[:2] == ("n01440764", "n01443537")


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_grey_image_gets_one_channel(mode):
  image = Image.fromarray(pictures(1, (5, 7, 3))[0]).convert(mode)
  data = io.BytesIO()
  image.save(data, "PNG")
  decoded = tfds_sources.decode(data.getvalue())
  assert decoded.shape == (5, 7, len(mode)) and decoded.dtype == np.uint8
  np.testing.assert_array_equal(decoded.reshape(np.asarray(image).shape), np.asarray(image))


# --- streamed sets ---------------------------------------------------------------------------


def test_a_streamed_set_is_in_the_order_of_its_names(folder):
  source = load("imagenet2012", folder)
  order = np.argsort(IMAGENET_NAMES)
  assert source.train_names.tolist() == [f"{IMAGENET_NAMES[i]}.JPEG" for i in order]
  assert source.train_labels.tolist() == [0, 0, 0, 1, 1] and source.train_labels.dtype == np.int32
  assert source.test_labels.tolist() == [1, 1, 1]


@pytest.mark.parametrize("size", [16, 24])
def test_streamed_images_are_the_written_ones(folder, size):
  source = load("imagenet2012", folder, size)
  parts = {"train": (IMAGENET_NAMES, "train"), "test": ("312", "validation")}
  for part, (names, split) in parts.items():
    lazy = getattr(source, f"{part}_images")
    written = [JPEGS[split][i] for i in np.argsort(list(names))]
    written = [np.asarray(Image.open(io.BytesIO(x)).convert("RGB")) for x in written]
    assert isinstance(lazy, LazyImages) and lazy.shape == (len(written), size, size, 3)
    for i, image in enumerate(written):
      np.testing.assert_array_equal(lazy.read(i), image)
    views = [resize_and_crop(Image.fromarray(image), size, 256 / 224) for image in written]
    np.testing.assert_array_equal(lazy[:], views)


def test_images_are_read_after_pickling_too(folder):
  images = load("imagenet2012", folder).train_images
  before = images[:]
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(images))[:], before)


def test_a_set_without_names_keeps_the_order_it_is_stored_in(tmp_path):
  train = keyed([np.full((9, 9, 3), 20 * i, np.uint8) for i in range(12)], np.arange(12))
  write("food101", tmp_path, train=train, validation=train[:3])
  index("food101", tmp_path)
  source = load("food101", tmp_path)
  builder = tfds_sources.make_builder("food101", str(tmp_path))
  stored = tfds_sources.stored_examples(builder, "train")
  assert source.train_labels.tolist() == [int(stored[i]["label"]) for i in range(12)]
  assert source.train_names is None
  for i, label in enumerate(source.train_labels):
    assert np.round(np.mean(source.train_images.read(i)) / 20) == label  # JPEG is not exact


def test_the_fingerprint_tells_records_by_content_and_number(tmp_path):
  def written(place, data, shards=1):
    examples = imagenet_examples(IMAGENET_NAMES, data)
    write("imagenet2012", place, shards=shards, train=examples, validation=examples)
    index("imagenet2012", place)
    return load("imagenet2012", place).train_images

  data = JPEGS["train"]
  images = written(tmp_path / "a", data)
  before = images.fingerprint()
  assert written(tmp_path / "b", data, shards=2).fingerprint() == before
  assert written(tmp_path / "c", [*data[:4], jpeg(33, 44, 99)]).fingerprint() != before
  assert images.take([0, 1, 2]).fingerprint() != before
  assert images.take([1, 0, 2, 3, 4]).fingerprint() != before
  assert images.take(np.arange(5)).fingerprint() == before


def attributes(*shown):
  return {name: name in shown for name in (*CELEBA_5, "Smiling")}


@given(st.sets(st.sampled_from([*CELEBA_5, "Smiling"])))
def test_a_face_of_celeba_5_shows_one_hair_class_alone(shown):
  hair = [name for name in CELEBA_5 if name in shown]
  label = tfds_sources.celeba_5({"attributes": attributes(*shown)})
  assert label == (CELEBA_5.index(hair[0]) if len(hair) == 1 else None)


def test_faces_that_show_no_class_or_several_are_left_out(tmp_path):
  real = tfds_sources.make_builder("celeb_a", str(tmp_path)).info.features
  faces = [("Bald",), (), ("Black_Hair", "Smiling"), ("Bald", "Gray_Hair"), ("Blond_Hair",)]

  def example(i, shown):
    return {
      "image": io.BytesIO(jpeg(218, 178, i)),
      "attributes": {name: name in shown for name in real["attributes"]},
      "landmarks": dict.fromkeys(real["landmarks"], 0),
      "identity": dict.fromkeys(real["identity"], 0),
    }

  train = [(i, example(i, shown)) for i, shown in enumerate(faces)]
  write("celeb_a", tmp_path, train=train, test=train[::-1][:2])
  index("celeb_a", tmp_path)
  source = load("celeb_a", tmp_path)
  assert source.class_names == CELEBA_5 and source.train_names is None
  assert sorted(source.train_labels) == [0, 2, 4] and source.test_labels.tolist() == [2]
  for i, label in enumerate(source.train_labels):
    written = {0: 2, 2: 4, 4: 0}[int(label)]
    image = np.asarray(Image.open(io.BytesIO(jpeg(218, 178, written))))
    np.testing.assert_array_equal(source.train_images.read(i), image)


@pytest.mark.parametrize("name", SETS)
def test_every_row_reads_features_that_tfds_has(name, tmp_path):
  spec, features = SETS[name], tfds_sources.make_builder(name, str(tmp_path)).info.features
  assert "image" in features
  assert spec.name_feature is None or spec.name_feature in features
  if spec.label is None:
    assert len(features["label"].names or range(features["label"].num_classes)) >= 10
  else:
    assert set(CELEBA_5) <= set(features["attributes"])
  assert spec.streamed or spec.name_feature or spec.hashed_keys  # whose order the splits need


# --- the index -------------------------------------------------------------------------------


def test_the_progress_of_the_index_ends_with_all_records(copy):
  (place("imagenet2012", copy) / INDEX_FILE).unlink()
  told = index("imagenet2012", copy)
  assert told == [("train", 1, 5), ("train", 5, 5), ("validation", 1, 3), ("validation", 3, 3)]
  assert [path.name for path in place("imagenet2012", copy).glob("*.npz")] == [INDEX_FILE]
  assert load("imagenet2012", copy).train_labels.tolist() == [0, 0, 0, 1, 1]


def test_a_missing_index_says_how_it_is_made(copy):
  (place("imagenet2012", copy) / INDEX_FILE).unlink()
  with pytest.raises(DataError, match=f"no index at .*{INDEX_FILE}; make it once with:") as error:
    load("imagenet2012", copy)
  assert str(error.value).endswith(f"prepare --dataset=imagenet2012 --data_dir={copy}")


def change_a_name(path):
  old, new = (f"n01440764_{i}.JPEG".encode("utf-32-le") for i in (2, 3))
  path.write_bytes(path.read_bytes().replace(old, new))


def without_labels(path):
  np.savez(path, train_names=np.array(["a"]))


@pytest.mark.parametrize(
  ("damage", "words"),
  [
    (lambda path: path.write_bytes(path.read_bytes()[:-40]), ""),
    (change_a_name, "CRC"),
    (lambda path: path.write_bytes(b""), ""),
    (lambda path: path.write_bytes(b"nothing of NumPy's"), ""),
    (without_labels, "it has no test_labels, test_names, test_stored, train_labels, train_stored"),
  ],
)
def test_a_damaged_index_says_how_it_is_made_anew(copy, damage, words):
  damage(place("imagenet2012", copy) / INDEX_FILE)
  with pytest.raises(
    DataError, match=f"Cannot read .*{INDEX_FILE} .*{words}.*; make it anew with: .*=imagenet2012"
  ):
    load("imagenet2012", copy)


def test_an_index_that_cannot_be_written_leaves_the_old_one(copy):
  (place("imagenet2012", copy) / INDEX_FILE).with_suffix(".partial.npz").mkdir()
  with pytest.raises(DataError, match=f"Cannot write .*{INDEX_FILE} "):
    index("imagenet2012", copy)
  assert len(load("imagenet2012", copy).train_labels) == 5


# --- what goes wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_a_missing_set_says_how_to_get_it(name, tmp_path):
  with pytest.raises(DataError) as error:
    load(name, tmp_path)
  assert str(error.value) == (
    f"The data set {name} is not in {tmp_path}; get it once with:"
    f" python -m input_pipeline.prepare --dataset={name} --data_dir={tmp_path}"
  )


def test_a_set_missing_from_the_default_folder_is_asked_for_without_one(tmp_path, monkeypatch):
  monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
  with pytest.raises(DataError, match=r"not in the default folder of TFDS; .*--dataset=cifar10$"):
    load("cifar10", "")


def test_a_folder_with_a_space_is_quoted_in_the_command():
  command = tfds_sources.prepare_command("cifar10", "my sets")
  assert command == "python -m input_pipeline.prepare --dataset=cifar10 --data_dir='my sets'"


def test_a_set_stored_as_tfrecord_is_asked_for_in_another_folder(tmp_path):
  examples = keyed(*(x[0][:4] for x in (IMAGES["fashion_mnist"], LABELS["fashion_mnist"])))
  write("fashion_mnist", tmp_path, file_format="tfrecord", train=examples, test=examples)
  with pytest.raises(
    DataError, match=r"is stored as tfrecord, which needs .* in another folder: .*--data_dir=OTHER$"
  ):
    load("fashion_mnist", tmp_path)


@pytest.mark.parametrize(
  ("name", "image_size", "words"),
  [(name, 0, f"image_size is 0, but {name} has images of many sizes") for name in STREAMED]
  + [("cifar10", 32, "image_size is 32, but cifar10 is used as it is stored; set it to 0")],
)
def test_image_size_is_for_streamed_sets_alone(name, image_size, words, tmp_path):
  with pytest.raises(ConfigError, match=words):
    load(name, tmp_path, image_size)


def flip(data):
  return data[:1000] + bytes(255 - byte for byte in data[1000:1100]) + data[1100:]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], flip])
def test_damaged_records_are_one_sentence(copy, damage):
  (records,) = place("cifar10", copy).glob("*train.array_record*")
  records.write_bytes(damage(records.read_bytes()))
  with pytest.raises(
    DataError, match=r"The train split of cifar10 in .* is damaged \(.*remove this folder .*prepare"
  ):
    load("cifar10", copy)


def test_missing_records_are_one_sentence(copy):
  (records,) = place("imagenet2012", copy).glob("*validation.array_record*")
  records.unlink()
  with pytest.raises(DataError, match=r"The validation split of imagenet2012 in .* is damaged"):
    index("imagenet2012", copy)
  with pytest.raises(DataError, match="Image 2 of the validation split of imagenet2012 cannot be"):
    load("imagenet2012", copy).test_images.read(0)


def test_a_damaged_description_is_one_sentence(copy):
  description = place("cifar10", copy) / "dataset_info.json"
  description.write_text(json.dumps(json.loads(description.read_text()))[:50])
  with pytest.raises(DataError, match=r"TFDS cannot open the data set cifar10: .* load JSON"):
    load("cifar10", copy)


def test_an_image_that_is_none_is_named_when_it_is_read(tmp_path):
  data = [JPEGS["train"][0], b"no picture"]
  examples = imagenet_examples(IMAGENET_NAMES[:2], data)
  write("imagenet2012", tmp_path, train=examples, validation=examples[:1])
  index("imagenet2012", tmp_path)
  images = load("imagenet2012", tmp_path).train_images
  assert images.read(1).size == (50, 20)
  with pytest.raises(DataError, match=r"Image \d of the train split of imagenet2012 cannot be"):
    images.read(0)


def test_images_too_large_to_be_true_are_one_sentence(copy, monkeypatch):
  index("imagenet2012", copy)
  images = load("imagenet2012", copy).train_images
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
  with pytest.raises(DataError, match=r"Image \d of the train split of imagenet2012 .*800 pixels"):
    images.read(0)
  with pytest.raises(DataError, match=r"The train split of cifar10 in .* is damaged \(.*pixels"):
    load("cifar10", copy)


# --- without TensorFlow ----------------------------------------------------------------------

READER = """
import hashlib, importlib.machinery, importlib.util, sys

find = importlib.machinery.PathFinder.find_spec
def find_others(name, path=None, target=None):
  return None if name.split(".")[0] == "tensorflow" else find(name, path, target)
importlib.machinery.PathFinder.find_spec = find_others
assert importlib.util.find_spec("tensorflow") is None

from input_pipeline import tfds_sources
digest = hashlib.sha256()
for name, size in (("cifar10", 0), ("fashion_mnist", 0), ("imagenet2012", 24)):
  source = tfds_sources.load(name, sys.argv[1], size)
  digest.update(source.train_images[:].tobytes() + source.train_labels.tobytes())
assert "tensorflow" not in sys.modules
print(digest.hexdigest())
"""


def test_reading_needs_no_tensorflow(folder):
  digest = hashlib.sha256()
  for name in ("cifar10", "fashion_mnist", "imagenet2012"):
    source = load(name, folder)
    digest.update(source.train_images[:].tobytes() + source.train_labels.tobytes())
  process = subprocess.run(
    [sys.executable, "-c", READER, str(folder)], cwd=ROOT, capture_output=True, text=True
  )
  assert process.returncode == 0, process.stderr
  assert process.stdout.strip() == digest.hexdigest()


def test_names_of_places_are_those_of_its_official_lists():
  assert tfds_sources.places_name("data_256/a/airfield/00004851.jpg") == "airfield/00004851.jpg"
  assert tfds_sources.places_name("data_256/a/arena/hockey/1.jpg") == "arena-hockey/1.jpg"
