"""`LongTailClassifier` with generators: what they cost is said, and they are used if they help."""

import numpy as np
import pytest

from memdiff import LongTailClassifier
from memdiff.estimators import generated
from memdiff.fitting import heads, selection
from memdiff.fitting.heads import FAMILIES, Family


def tailed(seed=0, counts=(60, 25, 9, 4), dim=6):
  rng = np.random.default_rng(seed)
  means = np.random.default_rng(9).normal(size=(len(counts), dim))
  labels = np.repeat(np.arange(len(counts)), counts)
  return means[labels] + rng.normal(size=(len(labels), dim)), labels


def test_what_generators_make_takes_part_only_if_it_clearly_helps(capsys):
  X, y = tailed()
  methods = ["balanced_logistic", "lda", "gaussian_shared", "kernel_jitter"]
  model = LongTailClassifier(methods=methods, cv=3, random_state=0).fit(X, y)
  extra = model.recommendation_["extra"]
  assert set(extra) == {"score", "gain", "interval", "used"}
  assert extra["used"] == (extra["interval"][0] > 0)
  assert ("gaussian_shared" in model.weights_) == extra["used"]
  assert set(methods) < set(model.recommendation_["scores"])
  said = capsys.readouterr().err
  assert "2 generators make features for all rows, and then for 3 folds" in said
  assert "seconds for the folds" in said
  without = LongTailClassifier(methods=methods[:2], cv=3, random_state=0).fit(X, y)
  assert "extra" not in without.recommendation_
  assert not capsys.readouterr().err
  if not extra["used"]:  # then nothing else has changed
    np.testing.assert_allclose(model.predict_proba(X), without.predict_proba(X), rtol=1e-5)


def test_a_generator_alone_is_used_and_saved(tmp_path):
  X, y = tailed()
  model = LongTailClassifier(methods=["gaussian_shared"], cv=3, random_state=0).fit(X, y)
  assert list(model.weights_) == ["gaussian_shared"] and "extra" not in model.recommendation_
  model.save(tmp_path / "model.npz")
  loaded = LongTailClassifier.load(tmp_path / "model.npz")
  np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))


def test_auto_is_all_families_and_three_generators():
  model = LongTailClassifier(methods="auto")
  assert model._families() == [*FAMILIES, *generated.AUTO]
  assert "memdiff" in generated.AUTO


def test_heads_learn_from_the_filled_classes_and_rows_are_made_once(monkeypatch):
  X, y = tailed()
  training = selection.training(X.astype(np.float32), y, 4, "balanced_accuracy")
  given, one = [], generated.Generated("kernel_jitter", 0)
  monkeypatch.setattr(
    generated, "balanced_regressions",
    lambda t, s, fit=generated.balanced_regressions: given.append(t) or fit(t, s),
  )  # fmt: skip
  one.prepare(training)
  one.fit(training, (0.1,))
  one.fit(training, (0.1,))
  assert given[0] is given[1]
  filled = np.bincount(given[0].labels)
  assert filled.min() == round(len(y) / 4) and (filled >= training.counts).all()
  np.testing.assert_array_equal(given[0].features[: len(y)], training.features)
  np.testing.assert_array_equal(given[0].shares, training.shares)


@pytest.mark.parametrize("helps", [True, False])
def test_extra_families_are_judged_by_paired_examples(helps):
  """A family that knows the answer is used, one that guesses is not."""
  rng = np.random.default_rng(0)
  labels = np.repeat(np.arange(3), 40)
  # The first column tells nothing, the second the class to those who look at it.
  X = np.stack([rng.normal(size=120), labels + 0.2 * rng.normal(size=120)], axis=1)

  def looks_at(column):
    def fit(training, settings):
      alone = np.zeros_like(training.features)
      alone[:, column] = training.features[:, column]
      changed = heads.Training(alone, training.labels, training.shares)
      return FAMILIES["lda"].fit(changed, settings)

    return Family("", "", (0.1,), fit)

  families = {"blind": looks_at(0), "extra": looks_at(1 if helps else 0)}
  fold = np.arange(120) % 3
  rows = [np.flatnonzero(fold == k) for k in range(3)]
  judged = selection.cross_validation.judged_examples(
    selection.cross_validation.padded(rows), labels, "balanced_accuracy", 3
  )

  def make(held):
    trains = np.setdiff1d(np.arange(120), held)
    training = selection.training(
      X[trains].astype(np.float32), labels[trains], 3, "balanced_accuracy"
    )
    return selection.Fold(training, X[held].astype(np.float32))

  folds = [lambda held=held: make(held) for held in rows]
  found = selection.select(folds, judged, families, lambda words: None, ["extra"])
  assert found.recommendation["extra"]["used"] == helps
  assert list(found.recommendation["weights"]) == (["blind", "extra"] if helps else ["blind"])
  assert list(found.weights) == ["blind", "extra"] and (found.weights["extra"] > 0) == helps
