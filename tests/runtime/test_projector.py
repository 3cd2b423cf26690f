"""Features in TensorBoard's projector, read back by its own plugin."""

import numpy as np
import pytest

from memdiff.runtime import projector
from memdiff.runtime.writers import TensorBoard

plugin = pytest.importorskip("tensorboard.plugins.projector.projector_plugin")


def shown(folder):
  """(name, features, lines of metadata) as the plugin finds them for a run's folder."""
  context = type("Context", (), {"logdir": str(folder), "data_provider": None})
  found = plugin.ProjectorPlugin(context)
  pairs = [("run", str(folder))]
  found._run_paths = dict(pairs)
  found._append_plugin_asset_directories(pairs)
  configs, paths = found._read_latest_config_files(pairs)
  (embedding,) = configs["run"].embeddings
  read = [
    plugin._rel_to_abs_asset_path(path, paths["run"])
    for path in (embedding.tensor_path, embedding.metadata_path)
  ]
  features = np.array(plugin._read_tensor_tsv_file(read[0]), float)
  with open(read[1], encoding="utf-8") as file:
    return embedding.tensor_name, features, file.read().splitlines()


def test_features_and_metadata_are_found_by_the_plugin(tmp_path):
  features = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
  metadata = {"class": ["cat", "a\tb\nc", "猫"], "kind": ["real", "real", "synthetic"]}
  projector.write(tmp_path, 'of "memdiff"', features, metadata)
  name, found, lines = shown(tmp_path)
  assert name == 'of "memdiff"'
  np.testing.assert_allclose(found, features, rtol=1e-4)
  assert lines == ["class\tkind", "cat\treal", "a b c\treal", "猫\tsynthetic"]


def test_a_repeated_phase_replaces_what_it_wrote(tmp_path):
  for number in (5, 2):
    columns = {"class": range(number), "kind": range(number)}
    projector.write(tmp_path, "features", np.ones((number, 2)), columns)
  _, found, lines = shown(tmp_path)
  assert found.shape == (2, 2) and len(lines) == 3


def test_metadata_of_another_length_is_refused(tmp_path):
  with pytest.raises(ValueError, match="argument"):
    projector.write(tmp_path, "features", np.ones((2, 2)), {"class": [1, 2], "kind": [1]})


def test_switched_off_nothing_is_written(tmp_path):
  board = TensorBoard(tmp_path / "tb", enabled=False)
  board.projector("features", np.ones((2, 2)), {"class": [1, 2], "kind": [1, 1]})
  board.texts(0, {"a": "b"})
  assert not (tmp_path / "tb").exists()
