"""Fitted heads as methods of a run: they are those of a notebook, on the folds of the run."""

import json

import numpy as np
import pytest

from configs import features
from memdiff import LongTailClassifier, pipeline
from memdiff.estimators import classifier
from memdiff.evaluation import cross_validation
from memdiff.experiments import fitted
from memdiff.experiments.fitted import Fitted

DIM, COUNTS = 6, (60, 25, 9, 4)


@pytest.fixture(scope="module")
def data():
  """(training features, labels, test features, labels)."""
  rng = np.random.default_rng(0)
  means = rng.normal(size=(len(COUNTS), DIM))

  def draw(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    return (means[labels] + rng.normal(size=(len(labels), DIM))).astype(np.float32), labels

  return *draw(COUNTS), *draw((50,) * len(COUNTS))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
  folder = tmp_path_factory.mktemp("fitted")
  names = ("features", "labels", "test_features", "test_labels")
  np.savez(folder / "data.npz", **dict(zip(names, data, strict=True)))
  config = features.get_config()
  config.seeds = (0, 1)
  config.dataset.train_path = str(folder / "data.npz")
  config.generators.update(names=("kernel_jitter",), fill_to=(20,))
  config.head.update(losses=("cross_entropy",), exponents=(1.0,), l2=(1e-3,))
  config.head.training.update(num_steps=20, batch_size=16)
  config.selection.folds = 3
  config.loop.steps_per_dispatch = 10
  report = pipeline.run(config.to_dict(), str(folder / "run"), tensorboard=False, command="")
  return folder / "run", report


def test_the_blend_of_a_run_is_that_of_a_notebook_on_the_same_folds(data, finished, monkeypatch):
  _, report = finished
  monkeypatch.setattr(
    classifier.cross_validation, "deal",
    lambda labels, folds, seed, deal=cross_validation.deal: deal(labels, folds, 0),
  )  # fmt: skip
  model = LongTailClassifier(cv=3, random_state=0).fit(data[0], data[1])
  assert report["fitted"]["settings"] == model.settings_
  np.testing.assert_allclose(
    list(report["fitted"]["weights"].values()), list(model.weights_.values()), atol=0.02
  )
  row = next(r for r in report["classification"] if r["method"] == "real+blend")
  accuracy = (model.predict(data[2]) == data[3]).mean()
  assert abs(row["top1"]["mean"] - accuracy) < 0.011 and row["top1"]["std"] == 0
  scores = report["recommendation"]["scores"]
  assert abs(scores["real+blend"]["score"] - model.recommendation_["score"]) < 0.02
  for name, score in model.recommendation_["scores"].items():
    assert abs(scores[f"real+{name}"]["score"] - score) < 0.02


def test_the_blend_is_recommended_unless_another_is_clearly_better(finished):
  _, report = finished
  found = report["recommendation"]
  assert found["control"] == "real+blend" == report["comparison"]["control"]
  is_better = found["method"] != "real+blend"
  assert is_better == (found["interval"][0] > 0)
  assert not is_better or found["method"] == found["best"]


def test_what_was_fitted_is_said_and_kept(finished):
  workdir, report = finished
  chosen = Fitted(**json.loads((workdir / "selection" / "choices.json").read_text())["fitted"])
  rows = {row["method"]: row["description"] for row in report["classification"]}
  assert set(chosen.methods) < set(rows)
  assert "Gaussian classes with one covariance (shrinkage" in rows["real+lda"]
  assert rows["real+blend"].startswith("real features only; a blend of ")
  (heads,) = fitted.load_heads(workdir / "heads")  # the features of all seeds are the same
  assert list(heads) == list(chosen.settings)


def test_one_family_alone_has_no_blend():
  assert Fitted({"lda": 0.1}, {"lda": 1.0}).methods == ["real+lda"]
  assert Fitted({}, {}).methods == []
  assert Fitted({"lda": 0.1, "plda": 0.1}, {}).methods == ["real+lda", "real+plda", "real+blend"]
