"""A run whose data changed behind their paths is refused before any work, whatever its kind."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from configs import digits_lt, features
from configs import folder as folder_config
from input_pipeline import digits, folder
from memdiff import pipeline
from memdiff.errors import WorkdirError

HOW_FAR = (1, 3, None)  # phases that have begun; None: all of them, and they have finished


def begin(config, workdir, how_far):
  """Leaves a workdir as a run that was stopped would; of a run that is over where None."""
  kind, e = open_run(config, workdir)
  try:
    for number, phase in enumerate(kind.phases[:how_far], 1):
      assert not e.workdir.begin(phase.name, pipeline.phase_config(e, kind.phases, phase))
      if how_far is None or number < how_far:
        e.workdir.finish(phase.name, {})
  finally:
    e.workdir.close()


def open_run(config, workdir):
  return pipeline.open_experiment(config.to_dict(), str(workdir), tensorboard=False, command="")


def accepts(config, workdir, how_far):
  """Whether every phase that has begun may go on, or is over."""
  kind, e = open_run(config, workdir)
  try:
    over = [
      e.workdir.begin(phase.name, pipeline.phase_config(e, kind.phases, phase))
      for phase in kind.phases[:how_far]
    ]
  finally:
    e.workdir.close()
  return over == [how_far is None or n < how_far for n in range(1, len(over) + 1)]


def refusal(config, workdir):
  """The sentence of a run that is called again; nothing in its workdir may change."""
  before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
  with pytest.raises(WorkdirError) as caught:
    pipeline.run(config.to_dict(), str(workdir), tensorboard=False, command="")
  assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before
  message = str(caught.value)
  assert "was run with other data" in message
  assert message.endswith("put the data back, or use a new --workdir.")
  return message.split("changed since: ")[1].split(")")[0].split(", ")


# --- embeddings ------------------------------------------------------------------------------


def rows(seed, counts, centres=4.0):
  rng, labels = np.random.default_rng(seed), np.repeat(np.arange(len(counts)), counts)
  means = np.random.default_rng(9).normal(size=(len(counts), 6)) * centres
  return {"features": means[labels] + rng.normal(size=(len(labels), 6)), "labels": labels}


@pytest.fixture
def embeddings(tmp_path):
  """(config, folder) of train.npz and test.npz."""
  np.savez(tmp_path / "train.npz", **rows(0, (30, 12, 6)))
  np.savez(tmp_path / "test.npz", **rows(1, (9, 9, 9)))
  config = features.get_config()
  config.seeds = (0,)
  config.dataset.train_path = str(tmp_path / "train.npz")
  config.dataset.test_path = str(tmp_path / "test.npz")
  config.dataset.test_share = 0.0
  return config, tmp_path


@pytest.mark.parametrize("how_far", HOW_FAR)
@pytest.mark.parametrize(
  ("file", "expected"),
  [
    ("train", ["the training features"]),
    ("test", ["the test features", "the test labels"]),
  ],
)
def test_changed_embeddings_are_refused(embeddings, how_far, file, expected):
  config, place = embeddings
  begin(config, place / "run", how_far)
  shutil.copy(place / f"{file}.npz", place / "kept.npz")
  if file == "train":
    np.savez(place / "train.npz", **rows(5, (30, 12, 6)))
  else:  # the same rows in another order
    order = np.random.default_rng(0).permutation(27)
    np.savez(place / "test.npz", **{n: x[order] for n, x in rows(1, (9, 9, 9)).items()})
  assert refusal(config, place / "run") == expected
  shutil.copy(place / "kept.npz", place / f"{file}.npz")  # put back, written at another time
  assert accepts(config, place / "run", how_far)


def test_a_workdir_without_digests_is_refused_in_a_sentence(embeddings):
  config, place = embeddings
  begin(config, place / "run", 2)
  for path in place.glob("run/*/manifest.json"):
    manifest = json.loads(path.read_text())
    kept = {n: v for n, v in manifest["config"].items() if not n.startswith("data/")}
    path.write_text(json.dumps(manifest | {"config": kept | {"split_sha256": "ab"}}))
  with pytest.raises(WorkdirError, match=r"an older memdiff, .* use a new --workdir\.$"):
    pipeline.run(config.to_dict(), str(place / "run"), tensorboard=False, command="")


def test_a_change_of_config_and_of_data_names_both(embeddings):
  config, place = embeddings
  begin(config, place / "run", None)
  np.savez(place / "test.npz", **rows(2, (9, 9, 9)))
  config.seeds = (0, 1)
  with pytest.raises(WorkdirError, match=r"seeds was \[0\] and is now \[0, 1\].*the test features"):
    pipeline.run(config.to_dict(), str(place / "run"), tensorboard=False, command="")


def test_digests_are_read_once_per_run(embeddings, monkeypatch):
  config, place = embeddings
  kind, e = open_run(config, place / "run")
  e.workdir.close()
  first = [pipeline.phase_config(e, kind.phases, phase) for phase in kind.phases]
  monkeypatch.setattr("input_pipeline.identity.digest", None)
  assert [pipeline.phase_config(e, kind.phases, phase) for phase in kind.phases] == first


# --- images ----------------------------------------------------------------------------------


@pytest.fixture(params=["in memory", "streamed"])
def images(request, tmp_path, monkeypatch):
  """(config of a classification, folder with data/)."""
  if request.param == "streamed":
    monkeypatch.setattr(folder, "_IN_MEMORY", 0)
  rng = np.random.default_rng(0)
  for part, each in (("train", 8), ("test", 3)):
    for name in ("cat", "dog"):
      (tmp_path / "data" / part / name).mkdir(parents=True)
      for i in range(each):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / part / name / f"{i}.bmp")
  config = folder_config.get_config()
  config.dataset.data_dir, config.dataset.image_size = str(tmp_path / "data"), 16
  config.dataset.holdout = 0.3
  config.encoder.input.mean = config.encoder.input.std = (0.5, 0.5, 0.5)
  config.encoder.backbone.name, config.classifier.batch_size = "resnet8", 4
  return config, tmp_path


def test_changed_images_are_refused(images):
  config, place = images
  begin(config, place / "run", None)
  data = place / "data"
  shutil.copytree(data, place / "kept")
  (data / "test" / "dog" / "0.bmp").rename(data / "test" / "dog" / "9.bmp")  # another order
  assert refusal(config, place / "run") == ["the test images"]
  shutil.rmtree(data)
  shutil.copytree(place / "kept", data, copy_function=shutil.copyfile)
  assert accepts(config, place / "run", None)
  (data / "train" / "cat").rename(data / "train" / "catfish")
  (data / "test" / "cat").rename(data / "test" / "catfish")
  assert "the class names" in refusal(config, place / "run")


def test_other_weights_to_start_from_are_refused(images):
  config, place = images
  weights = place / "weights.npz"
  config.encoder.init_from = str(weights)
  weights.write_bytes(b"some weights")
  begin(config, place / "run", 2)
  weights.write_bytes(b"more weights")
  assert refusal(config, place / "run") == ["the initial weights"]
  weights.write_bytes(b"some weights")
  assert accepts(config, place / "run", 2)


def test_digits_that_another_version_of_their_package_brings_are_refused(tmp_path, monkeypatch):
  config, original = digits_lt.get_config("smoke"), digits.load()
  begin(config, tmp_path / "run", 1)
  original.train_images[0, 4, 4, 0] ^= 1
  monkeypatch.setattr(digits, "load", lambda: original)
  (found,) = refusal(config, tmp_path / "run")
  assert found in ("the training images", "the left-out images")
