"""The curves of a report, read back from the metrics of stages."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from memdiff.evaluation import wording
from memdiff.experiments import record


def curves(folder, records):
  (folder / "stage").mkdir()
  lines = "".join(json.dumps(record) + "\n" for record in records)
  (folder / "stage" / "metrics.jsonl").write_text(lines)
  e = SimpleNamespace(workdir=SimpleNamespace(path=folder))
  return {curve["metric"]: curve for curve in record.training_curves(e, ["stage", "missing"])}


def test_mean_and_sample_deviation_over_seeds(tmp_path):
  found = curves(tmp_path, [
    {"step": 5, "kind": "train", "metrics": {"loss": [1.0, 3.0]}},
    {"step": 5, "kind": "eval", "metrics": {"top1": [0.5, 0.9]}},
    {"step": 9, "kind": "train", "metrics": {"loss": [2.0, 2.0]}},
  ])  # fmt: skip
  assert found.keys() == {"loss", "test top1"}
  assert found["loss"]["step"] == (5, 9)
  np.testing.assert_allclose(found["loss"]["mean"], [2, 2])
  np.testing.assert_allclose(found["loss"]["std"], [2**0.5, 0])
  assert found["test top1"]["std"][0] == pytest.approx(0.4 / 2**0.5)


def test_one_seed_has_no_deviation(tmp_path):
  found = curves(tmp_path, [{"step": 5, "kind": "train", "metrics": {"loss": [1.0]}}])
  assert found["loss"]["std"].tolist() == [0]


@dataclasses.dataclass(frozen=True)
class Settings:
  experiment: str = "features"
  name: str = "pets"


@pytest.mark.parametrize(
  ("tested", "missing"),
  [([0, 1, 2, 2], []), ([0, 0, 2], ["dog"]), ([1], ["cat", "eel"])],
)
def test_classes_without_test_rows_are_recorded_by_name(tested, missing):
  none = np.zeros(0, int)
  data = SimpleNamespace(
    name="pets", class_names=("cat", "dog", "eel"), num_classes=3,
    train_counts=np.array([9, 5, 2]), test_labels=np.array(tested), left_out_labels=none,
    holdout_labels=none, split_sha256="ab", profile="as is", imbalance=4.5,
  )  # fmt: skip
  e = SimpleNamespace(dataset=data, config=Settings(), command="", data_digests={})
  recorded = record.record(e, [])
  assert recorded["dataset"]["classes_without_test_rows"] == missing
  said = wording.untested(json.loads(json.dumps(recorded)))
  assert all(name in said for name in missing) and bool(said) == bool(missing)
