"""The table of networks that judge images: names, files that are missing, sides, whole commands."""

import json

import jax
import numpy as np
import pytest

from memdiff.errors import ConfigError, DataError
from memdiff.evaluation import images, networks
from memdiff.experiments import image_settings
from tests.evaluation import test_dinov2, test_inception

NAMES = ["efficientnet_lite0", "inception_fid", "dinov2"]


def test_an_experiment_knows_every_network():
  assert list(networks.NETWORKS) == NAMES
  assert ("classifier", *NAMES) == image_settings.NETWORKS


@pytest.mark.parametrize(
  ("name", "distance", "title", "score"),
  [
    ("efficientnet_lite0", "fd_efficientnet_lite0", "FD-efficientnet_lite0",
     "is_efficientnet_lite0"),
    ("inception_fid", "fid", "FID", "is"),
    ("dinov2", "fd_dinov2", "FD-dinov2", "is_dinov2"),
    ("classifier", "fd_classifier", "FD-classifier", "is_classifier"),
    ("given_features", "fd_given_features", "FD-given_features", "is_given_features"),
  ],
)  # fmt: skip
def test_the_distance_of_the_inception_alone_is_called_fid(name, distance, title, score):
  assert networks.distance_name(name) == distance and networks.score_name(name) == score
  assert networks.distance_title(name) == title


@pytest.mark.parametrize(
  ("name", "file"),
  [("inception_fid", "pt_inception-2015-12-05-6726825d"), ("dinov2", "dinov2_vitl14_pretrain")],
)
def test_without_a_file_it_says_which_one_is_needed_and_how_to_give_it(name, file, tmp_path):
  with pytest.raises(DataError, match=f"{file}.*with --weights or config.evaluation.weights"):
    networks.make_network(name, "")
  with pytest.raises(DataError, match=f"There is no file .*none.safetensors.*{file}"):
    networks.make_network(name, str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize("name", NAMES)
def test_a_network_does_not_take_the_weights_of_another(name, tmp_path):
  arrays = {"conv.weight": np.zeros((2, 2), np.float32)}
  path = test_inception.save(tmp_path / "other.safetensors", arrays)
  with pytest.raises(DataError, match=r"other.safetensors"):
    networks.make_network(name, path)


@pytest.mark.parametrize(
  ("name", "side", "found"),
  [
    ("efficientnet_lite0", 0, 64),
    ("efficientnet_lite0", 48, 48),
    ("efficientnet_lite0", 31, "needs 32 pixels at least"),
    ("inception_fid", 0, 0),
    ("inception_fid", 299, 299),
    ("dinov2", 0, 224),
    ("dinov2", 518, 518),
    ("dinov2", 64, "needs 224 pixels at least"),
    ("dinov2", 256, "needs a multiple of 14"),
    ("dinov2", -1, "needs 224 pixels at least"),
  ],
)
def test_a_network_takes_its_own_side_or_one_that_fits(name, side, found):
  if isinstance(found, int):
    assert networks.checked_side(name, side, "--side") == found
  else:
    with pytest.raises(ConfigError, match=rf"--side is {side}, but {name} {found}; 0 takes"):
      networks.checked_side(name, side, "--side")


def test_how_images_are_resized_is_said():
  assert networks.describe_resize("dinov2", 224) == "Pillow, bicubic, 224 px"
  own = networks.describe_resize("inception_fid", 0)
  assert own == "as they are; then TensorFlow 1, bilinear, 299 px"


# --- whole commands ----------------------------------------------------------------------------


def run(tmp_path, monkeypatch, network, weights, *options):
  """(exit code, result) of small sets of images of one size."""
  monkeypatch.setattr(images.image_sets, "BLOCK", 16)
  rng, paths = np.random.default_rng(0), {}
  for name in ("reference", "generated"):
    paths[name] = tmp_path / f"{name}.npz"
    np.savez(paths[name], images=rng.integers(0, 256, (30, 12, 12, 3)).astype(np.uint8))
  sets = [f"--{name}={path}" for name, path in paths.items()]
  monkeypatch.setattr(
    images.image_quality, "compare_sets", lambda real, made, **options: {"fd": 1.0, "kid": 2.0}
  )
  out = tmp_path / "result.json"
  small = [f"--network={network}", f"--weights={weights}", "--kid_size=20", f"--json={out}"]
  code = images.main([*sets, *small, *options])
  return code, json.loads(out.read_text()) if out.exists() else None


def with_few_features(monkeypatch, name, features):
  """The row of a network with features that cost nothing; the arrays are read as ever."""
  row = networks.NETWORKS[name]
  changed = {**row.__dict__, "features": features, "load": lambda path: {}}
  if row.probabilities is not None:
    changed["probabilities"] = lambda weights, rows: jax.nn.softmax(rows[:, :4])
  monkeypatch.setitem(networks.NETWORKS, name, networks.Row(**changed))


def corner(weights, rows):
  return np.asarray(rows, np.float32)[:, :3, :4].reshape(len(rows), -1) / 100


@pytest.mark.parametrize(
  ("name", "keys", "resize"),
  [
    ("inception_fid", {"fid", "is", "is_std"}, "as they are; then TensorFlow 1, bilinear, 299 px"),
    ("dinov2", {"fd_dinov2"}, "Pillow, bicubic, 224 px"),
  ],
)
def test_the_result_names_the_distance_and_how_images_were_resized(
  name, keys, resize, tmp_path, monkeypatch
):
  with_few_features(monkeypatch, name, corner)
  (tmp_path / "net.safetensors").touch()
  code, result = run(tmp_path, monkeypatch, name, tmp_path / "net.safetensors")
  assert code == 0 and result["resize"] == resize
  assert set(result["metrics"]) == keys | {"kid"}


def test_images_of_several_sizes_need_a_side(tmp_path, monkeypatch, capsys):
  with_few_features(monkeypatch, "inception_fid", corner)
  (tmp_path / "net.safetensors").touch()
  (tmp_path / "set").mkdir()
  for i in range(30):
    noise = np.random.default_rng(i).integers(0, 256, (8 + i % 2, 8, 3)).astype(np.uint8)
    images.image_sets.Image.fromarray(noise).save(tmp_path / "set" / f"{i}.png")
  options = [f"--generated={tmp_path / 'set'}"]
  path = tmp_path / "net.safetensors"
  assert run(tmp_path, monkeypatch, "inception_fid", path, *options) == (1, None)
  assert "set differ in size; give the side they should have." in capsys.readouterr().err
  assert run(tmp_path, monkeypatch, "inception_fid", path, *options, "--side=32")[0] == 0


def test_a_network_is_loaded_and_judges_batch_by_batch(tmp_path, monkeypatch):
  row = networks.NETWORKS["dinov2"]
  monkeypatch.setitem(networks.NETWORKS, "dinov2", networks.Row(**{**row.__dict__, "batch": 2}))
  arrays = test_dinov2.random_state_dict()
  network, classify = networks.make_network(
    "dinov2", test_dinov2.save(tmp_path / "net.safetensors", arrays)
  )
  assert classify is None
  rows = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 3)).astype(np.uint8)
  expected = [test_dinov2.numpy_features(arrays, image) for image in rows]
  np.testing.assert_allclose(network(rows), expected, rtol=1e-3, atol=1e-3)
