"""The prepare command, with TFDS's real builders on tiny downloads."""

import io
import pathlib
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from input_pipeline import prepare, tfds_sources
from input_pipeline.tfds_sources import INDEX_FILE
from memdiff.errors import DataError

ROOT = pathlib.Path(__file__).parents[2]
CIFAR10 = (
  "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def run(name, folder):
  return prepare.main([f"--dataset={name}", f"--data_dir={folder}"])


def place(name, folder) -> pathlib.Path:
  return pathlib.Path(tfds_sources.make_builder(name, str(folder)).data_path)


def stamps(name, folder):
  return {path.name: path.stat().st_mtime_ns for path in place(name, folder).iterdir()}


def on_download(monkeypatch, answer):
  """`answer` in place of TFDS's download, which gives a folder or raises."""
  from tensorflow_datasets.core.download import download_manager

  manager = download_manager.DownloadManager
  monkeypatch.setattr(manager, "download_and_extract", lambda self, urls: answer(urls))


def cifar10_files(folder):
  """The five training files and the test file of CIFAR-10, with two images each."""
  from etils import epath

  batches = folder / "cifar-10-batches-bin"
  batches.mkdir(parents=True)
  rows = np.random.default_rng(0).integers(0, 256, (12, 1 + 3072), np.uint8)
  rows[:, 0] = np.arange(12) % 10
  for i, file in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
    rows[2 * i : 2 * i + 2].tofile(batches / f"{file}.bin")
  (batches / "batches.meta.txt").write_text("\n".join(CIFAR10) + "\n")
  return rows, lambda _: epath.Path(folder)


def add(tar, name, data):
  info = tarfile.TarInfo(name)
  info.size = len(data)
  tar.addfile(info, io.BytesIO(data))


def jpeg(seed):
  data = io.BytesIO()
  image = np.random.default_rng(seed).integers(0, 256, (16, 20, 3), np.uint8)
  Image.fromarray(image).save(data, "JPEG")
  return data.getvalue()


def imagenet_archives(folder):
  """The two archives that people download themselves: two classes of two, and three to test."""
  manual = folder / "downloads" / "manual"
  manual.mkdir(parents=True)
  with tarfile.open(manual / "ILSVRC2012_img_train.tar", "w") as train:
    for label in ("n01443537", "n01440764"):
      inner = io.BytesIO()
      with tarfile.open(fileobj=inner, mode="w") as tar:
        for i in (11, 2):
          add(tar, f"{label}_{i}.JPEG", jpeg(i))
      add(train, f"{label}.tar", inner.getvalue())
  with tarfile.open(manual / "ILSVRC2012_img_val.tar", "w") as tar:
    for i in (3, 1, 2):
      add(tar, f"ILSVRC2012_val_{i:08d}.JPEG", jpeg(100 + i))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
  """A folder where ImageNet was prepared."""
  folder = tmp_path_factory.mktemp("imagenet")
  imagenet_archives(folder)
  prepare.prepare("imagenet2012", str(folder))
  return folder


# --- what it does ----------------------------------------------------------------------------


def test_a_small_set_is_downloaded_and_ready_to_read(tmp_path, monkeypatch, capsys):
  rows, answer = cifar10_files(tmp_path / "files")
  on_download(monkeypatch, answer)
  assert run("cifar10", tmp_path) == 0
  lines = capsys.readouterr().out.splitlines()
  assert f"downloading cifar10 to {place('cifar10', tmp_path)}" in lines
  assert lines[-3:] == [
    "train: 10 examples",
    "test: 2 examples",
    f"ready; train with --config.dataset.name=cifar10 --config.dataset.data_dir={tmp_path}",
  ]
  assert not (place("cifar10", tmp_path) / INDEX_FILE).exists()
  source = tfds_sources.load("cifar10", str(tmp_path), 0)
  np.testing.assert_array_equal(source.train_labels, rows[:10, 0])
  images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  np.testing.assert_array_equal(source.train_images, images[:10])
  np.testing.assert_array_equal(source.test_images, images[10:])
  assert source.class_names == CIFAR10


def test_a_prepared_set_is_not_downloaded_again(tmp_path, monkeypatch, capsys):
  on_download(monkeypatch, cifar10_files(tmp_path / "files")[1])
  assert run("cifar10", tmp_path) == 0
  before = stamps("cifar10", tmp_path)
  on_download(monkeypatch, lambda _: pytest.fail("downloads again"))
  capsys.readouterr()
  assert run("cifar10", tmp_path) == 0
  assert stamps("cifar10", tmp_path) == before
  output = capsys.readouterr().out
  assert output.startswith(f"cifar10 is already in {place('cifar10', tmp_path)}\n")
  assert "downloading" not in output and "index" not in output


def test_a_large_set_gets_its_index(imagenet):
  source = tfds_sources.load("imagenet2012", str(imagenet), 8)
  names = [f"n0144{x}.JPEG" for x in ("0764_11", "0764_2", "3537_11", "3537_2")]
  assert source.train_names.tolist() == names
  assert source.train_labels.tolist() == [0, 0, 1, 1]
  assert len(source.test_labels) == 3
  written = np.asarray(Image.open(io.BytesIO(jpeg(2))))
  np.testing.assert_array_equal(source.train_images.read(1), written)


def test_a_second_call_does_nothing_where_nothing_is_missing(imagenet, capsys):
  before = stamps("imagenet2012", imagenet)
  assert run("imagenet2012", imagenet) == 0
  assert stamps("imagenet2012", imagenet) == before
  output = capsys.readouterr().out
  assert "is already in" in output and "writing the index" not in output


@pytest.mark.parametrize("damage", [pathlib.Path.unlink, lambda path: path.write_bytes(b"PK")])
def test_only_a_missing_or_damaged_index_is_made_anew(imagenet, capsys, damage):
  before = stamps("imagenet2012", imagenet)
  expected = tfds_sources.load("imagenet2012", str(imagenet), 8).train_names
  damage(place("imagenet2012", imagenet) / INDEX_FILE)
  assert run("imagenet2012", imagenet) == 0
  after = stamps("imagenet2012", imagenet)
  assert {name for name in before if before[name] != after[name]} == {INDEX_FILE}
  output = capsys.readouterr().out
  assert "writing the index of labels and names\n" in output
  assert "  train: 4 of 4\n" in output and "  validation: 3 of 3\n" in output
  assert "train: 4 examples\ntest: 3 examples\nready;" in output
  np.testing.assert_array_equal(
    tfds_sources.load("imagenet2012", str(imagenet), 8).train_names, expected
  )


def test_it_runs_as_a_module(imagenet):
  process = subprocess.run(
    [sys.executable, "-m", "input_pipeline.prepare", "--dataset=imagenet2012",
     f"--data_dir={imagenet}"], cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert process.returncode == 0, process.stderr
  assert process.stdout.splitlines()[-1].startswith("ready; train with")


# --- what goes wrong -------------------------------------------------------------------------


def failure(capsys):
  """The one sentence on stderr."""
  errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("memdiff: ")]
  assert len(errors) == 1
  return errors[0]


def test_a_failing_download_is_one_sentence(tmp_path, monkeypatch, capsys):
  def answer(urls):
    raise ConnectionError("Cannot reach\n  the host\n\n" + "of " * 1000)

  on_download(monkeypatch, answer)
  assert run("cifar10", tmp_path) == 1
  message = failure(capsys)
  assert message.startswith("memdiff: Cannot prepare cifar10: Cannot reach the host of of ")
  assert len(message) < 700
  with pytest.raises(DataError, match="The data set cifar10 is not in"):
    tfds_sources.load("cifar10", str(tmp_path), 0)


def test_an_error_without_words_is_named(tmp_path, monkeypatch, capsys):
  def answer(urls):
    raise TimeoutError

  on_download(monkeypatch, answer)
  assert run("cifar10", tmp_path) == 1
  assert failure(capsys) == "memdiff: Cannot prepare cifar10: TimeoutError()"


def test_archives_that_people_must_get_themselves_are_named(tmp_path, capsys):
  assert run("imagenet2012", tmp_path) == 1
  message = failure(capsys)
  assert message.startswith("memdiff: Cannot prepare imagenet2012: ")
  assert "ILSVRC2012_img_train.tar" in message and str(tmp_path / "downloads/manual") in message


def test_a_set_stored_as_tfrecord_is_refused_with_the_way_out(tmp_path, monkeypatch, capsys):
  on_download(monkeypatch, cifar10_files(tmp_path / "files")[1])
  builder = tfds_sources.make_builder("cifar10", str(tmp_path))
  builder.download_and_prepare(file_format="tfrecord")
  assert run("cifar10", tmp_path) == 1
  message = failure(capsys)
  assert "is stored as tfrecord" in message and message.endswith("--data_dir=OTHER")


WITHOUT_TENSORFLOW = """
import importlib.machinery, sys

find = importlib.machinery.PathFinder.find_spec
def find_others(name, path=None, target=None):
  return None if name.split(".")[0] == "tensorflow" else find(name, path, target)
importlib.machinery.PathFinder.find_spec = find_others

from input_pipeline import prepare
sys.exit(prepare.main(sys.argv[1:]))
"""


def without_tensorflow(name, folder):
  arguments = [f"--dataset={name}", f"--data_dir={folder}"]
  return subprocess.run(
    [sys.executable, "-c", WITHOUT_TENSORFLOW, *arguments], cwd=ROOT, capture_output=True, text=True
  )


def test_missing_tensorflow_is_one_sentence(tmp_path):
  process = without_tensorflow("cifar10", tmp_path)
  assert process.returncode == 1 and "Traceback" not in process.stderr
  assert process.stderr.splitlines()[-1] == (
    "memdiff: Preparing a data set needs TensorFlow, which TFDS writes through; install"
    " tensorflow-cpu (training does not need it)."
  )
  assert "downloading" not in process.stdout


def test_an_index_needs_no_tensorflow(imagenet):
  (place("imagenet2012", imagenet) / INDEX_FILE).unlink()
  process = without_tensorflow("imagenet2012", imagenet)
  assert process.returncode == 0, process.stderr
  assert len(tfds_sources.load("imagenet2012", str(imagenet), 8).train_labels) == 4


@pytest.mark.parametrize("arguments", [[], ["--dataset=mnist"]])
def test_no_set_or_an_unknown_one_is_refused_with_the_known_ones(arguments, capsys):
  with pytest.raises(SystemExit) as stop:
    prepare.main(arguments)
  assert stop.value.code == 2
  words = capsys.readouterr().err
  assert "--dataset" in words
  assert all(re.search(rf"\b{name}\b", words) for name in tfds_sources.SETS)
