"""What TensorBoard shows first: the answer, few scores and columns, the features."""

from types import SimpleNamespace

import numpy as np
import pytest

from configs import digits_lt, features
from memdiff import config as config_lib
from memdiff.evaluation import plots
from memdiff.experiments import summaries
from memdiff.runtime.writers import TensorBoard
from tests.evaluation.sample_report import SHOWN, make_report


class Board:
  """Keeps what it is told."""

  enabled = True

  def __init__(self):
    self.told = {"texts": {}, "scalars": {}, "pictures": {}}

  def texts(self, step, texts):
    self.told["texts"] |= texts

  def scalars(self, step, values, stage=""):
    self.told["scalars"] |= values

  def pictures(self, step, pictures):
    self.told["pictures"] |= pictures

  def hparams(self, values, metrics):
    self.told |= {"hparams": values, "metrics": list(metrics)}

  def projector(self, name, points, metadata):
    self.told |= {"points": points, "metadata": metadata}


def experiment(board, class_names=("cat", "dog")):
  return SimpleNamespace(
    run=SimpleNamespace(tensorboard=board),
    dataset=SimpleNamespace(class_names=class_names),
  )


def written(report, figures=()) -> dict:
  board = Board()
  picture = plots.to_png(plots.gap_closed([("real", 0.0, (0.0, 0.0))]))
  result = report | {"config": digits_lt.get_config().to_dict()}
  summaries.write(experiment(board), result, dict.fromkeys(figures, picture))
  return board.told


def test_the_answer_and_its_scores_stand_first():
  told = written(make_report(), ("gap_closed",))
  assert told["texts"]["1_result/answer"].startswith("Use memdiff+csl. ")
  assert told["scalars"]["1_result/few"] == pytest.approx(0.82)
  assert told["scalars"]["1_result/balanced_accuracy"] == pytest.approx(0.86)
  tags = [tag for kind in ("texts", "scalars", "pictures") for tag in told[kind]]
  drawn = told["pictures"]["1_result/gap_closed"]
  assert drawn.dtype == np.uint8 and drawn.shape[2] == 3 and drawn.std() > 0
  assert all(tag < "a" for tag in tags)


def test_only_the_short_table_is_written():
  told = written(make_report())["scalars"]
  assert {tag.split("/")[1] for tag in told if tag.startswith("2_")} == set(SHOWN)
  assert told["2_methods/own_head/top1"] == pytest.approx(0.8)


def test_a_score_that_is_unknown_is_no_scalar():
  report = make_report()
  for row in report["classification"]:
    row["few"] = {"mean": None, "std": None}
  assert not [tag for tag in written(report)["scalars"] if tag.endswith("/few")]


def test_an_empty_result_writes_hyper_parameters_alone():
  told = written({"classification": [], "dataset": make_report()["dataset"]})
  assert told["texts"] == told["scalars"] == {} and told["hparams"]["dataset"] == "digits"


def test_columns_are_few_and_every_metric_is_a_scalar():
  told = written(make_report())
  assert len(told["hparams"]) <= 12
  assert set(told["metrics"]) <= set(told["scalars"])


def test_every_column_is_a_field_of_some_config():
  known = {
    name
    for config in (digits_lt.get_config(), features.get_config())
    for name in config_lib.flatten(config.to_dict())
  }
  assert set(summaries.FIELDS.values()) <= known


def test_kinds_of_experiment_have_the_same_columns():
  given = make_report()
  configs = (digits_lt.get_config("classification"), features.get_config(), digits_lt.get_config())
  found = [summaries.hyper_parameters(given | {"config": c.to_dict()}) for c in configs]
  assert found[0].keys() == found[1].keys() == found[2].keys()
  assert [values["folds"] for values in found] == [None, 5, 3]
  assert [values["backbone"] for values in found] == ["resnet8", None, "resnet8"]
  assert found[0]["seeds"] == "0, 1, 2, 3, 4"
  assert {(values["dataset"], values["imbalance"]) for values in found} == {("digits", 24.0)}


def test_switched_off_nothing_is_drawn(tmp_path):
  e = experiment(TensorBoard(tmp_path / "tb", enabled=False))
  summaries.write(e, make_report(), {"not decoded": None})
  summaries.project(e, {"real": (None, None)})
  assert not (tmp_path / "tb").exists()


# --- features --------------------------------------------------------------------------------


def projected(kinds) -> dict:
  board = Board()
  summaries.project(experiment(board), kinds)
  return board.told


def blob(number, dim, value=0.0):
  rng = np.random.default_rng(number)
  return rng.normal(size=(number, dim)).astype(np.float32) + value, rng.integers(0, 2, number)


def test_all_kinds_stand_together_with_class_and_kind():
  real, made = blob(5, 3), blob(4, 3)
  told = projected({"real": real, "synthetic": made})
  np.testing.assert_array_equal(told["points"], np.concatenate([real[0], made[0]]))
  labels = np.concatenate([real[1], made[1]])
  assert told["metadata"]["class"] == [("cat", "dog")[c] for c in labels]
  assert told["metadata"]["kind"] == ["real"] * 5 + ["synthetic"] * 4


def test_many_features_are_thinned_the_same_way_every_time(monkeypatch):
  monkeypatch.setattr(summaries, "MAX_POINTS", 10)
  real = blob(50, 3)
  first, second = (projected({"real": real, "left out": blob(4, 3)}) for _ in range(2))
  assert len(first["points"]) == 14
  np.testing.assert_array_equal(first["points"], second["points"])
  place = [int(np.flatnonzero((real[0] == row).all(axis=1))[0]) for row in first["points"][:10]]
  assert len(set(place)) == 10
  assert first["metadata"]["class"][:10] == [("cat", "dog")[c] for c in real[1][place]]


def test_wide_features_keep_their_distances_as_far_as_64_numbers_can():
  rng = np.random.default_rng(0)
  wide = (rng.normal(size=(80, 8)) @ rng.normal(size=(8, 300)), np.zeros(80, int))
  told = projected({"real": wide})
  assert told["points"].shape == (80, 64)
  before, after = (np.linalg.norm(x[0] - x, axis=1) for x in (wide[0], told["points"]))
  np.testing.assert_allclose(after, before, rtol=1e-4)


def test_features_that_are_not_finite_and_kinds_without_any_are_left_out():
  x, y = blob(4, 3)
  x[2, 1] = np.nan
  none = (np.zeros((0, 3)), np.zeros(0, int))
  told = projected({"real": (x, y), "left out": none})
  np.testing.assert_array_equal(told["points"], x[[0, 1, 3]])
  assert projected({"left out": none}).keys() == Board().told.keys()
