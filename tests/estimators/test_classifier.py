"""The classifier as its users meet it: scikit-learn's checks, labels of any kind, files."""

import subprocess
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import memdiff
from memdiff import LongTailClassifier
from memdiff.errors import DataError
from memdiff.estimators.scale import Scale, ScaledRows
from memdiff.fitting.heads import FAMILIES
from tests import support


@pytest.fixture(scope="module")
def digits():
  """Ten classes of 120 to 1 training examples, and a balanced test set."""
  data, rng = load_digits(), np.random.default_rng(0)
  train, test = [], []
  for c, number in enumerate(np.round(np.geomspace(120, 1, 10)).astype(int)):
    rows = rng.permutation(np.flatnonzero(data.target == c))
    train += rows[:number].tolist()
    test += rows[-50:].tolist()
  return data.data[train], data.target[train], data.data[test], data.target[test]


@pytest.fixture(scope="module")
def model(digits):
  return LongTailClassifier(random_state=0).fit(*digits[:2])


def test_the_checks_of_scikit_learn():
  """All of them that can run here, with one exception."""
  exceptions = {
    "check_sample_weight_equivalence_on_dense_data": "repeats fall into different folds, and a"
    " weight of 2 is not two independent examples"
  }
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    found = check_estimator(
      LongTailClassifier(random_state=0),
      expected_failed_checks=exceptions,
      on_fail=None,
      on_skip=None,
    )
  failed = {r["check_name"] for r in found if r["status"] not in ("passed", "skipped")}
  assert len(found) > 40 and failed == set(exceptions)


def test_it_is_better_than_plain_regression_and_says_so_beforehand(digits, model):
  _, _, X, y = digits
  plain = LongTailClassifier(["plain_logistic"], random_state=0).fit(*digits[:2])
  ours, theirs = (balanced_accuracy_score(y, m.predict(X)) for m in (model, plain))
  found = model.recommendation_
  assert ours > theirs + 0.02 and ours > 0.75
  assert found["gain"] == pytest.approx(found["score"] - found["plain"])
  assert found["interval"][0] < found["gain"] < found["interval"][1]
  assert found["scores"].keys() == FAMILIES.keys() and found["method"] == "blend"
  assert found["weights"] == model.weights_ and sum(w > 0 for w in model.weights_.values()) > 1


def test_probabilities_are_calibrated_and_agree_with_predictions(digits, model):
  _, _, X, y = digits
  found = model.predict_proba(X)
  np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
  np.testing.assert_array_equal(model.classes_[found.argmax(axis=1)], model.predict(X))
  confidence, right = found.max(axis=1), model.predict(X) == y
  assert abs(confidence.mean() - right.mean()) < 0.12
  assert confidence[right].mean() > confidence[~right].mean() + 0.1


def test_labels_may_be_words_and_seeds_decide_everything(digits, model):
  X, y, X_new, _ = digits
  names = np.array([f"digit {c}" for c in range(10)])
  first, again = (LongTailClassifier(random_state=0).fit(X, names[y]) for _ in range(2))
  np.testing.assert_array_equal(first.predict(X_new), names[model.predict(X_new)])
  np.testing.assert_array_equal(first.predict_proba(X_new), again.predict_proba(X_new))
  other = LongTailClassifier(random_state=1).fit(X, y)
  assert not np.array_equal(other.predict_proba(X_new), model.predict_proba(X_new))


@pytest.mark.parametrize("kind", [str, object, int])
def test_a_file_holds_all_of_it(digits, tmp_path, kind):
  X, y, X_new, _ = digits
  y = y.astype(str).astype(object) if kind is object else y.astype(kind)
  model = LongTailClassifier(criterion="macro_f1", cv=3, random_state=4).fit(X, y)
  model.save(tmp_path / "model.npz")
  again = LongTailClassifier.load(tmp_path / "model.npz")
  np.testing.assert_array_equal(again.predict_proba(X_new), model.predict_proba(X_new))
  assert again.classes_.dtype == model.classes_.dtype
  assert again.get_params() == model.get_params()
  assert again.recommendation_ == model.recommendation_ and again.settings_ == model.settings_
  np.load(tmp_path / "model.npz", allow_pickle=False)


def test_other_files_are_refused(tmp_path):
  np.savez(tmp_path / "other.npz", a=np.zeros(3))
  (tmp_path / "torn.npz").write_bytes(b"no")
  for name in ("other.npz", "torn.npz", "none.npz"):
    with pytest.raises(DataError, match=r"holds no LongTailClassifier"):
      LongTailClassifier.load(tmp_path / name)


def test_it_works_in_pipelines_searches_and_clones(digits):
  X, y, X_new, y_new = digits
  line = make_pipeline(StandardScaler(), LongTailClassifier(["lda", "plda"], random_state=0))
  search = GridSearchCV(line, {"longtailclassifier__cv": [2, 3]}, cv=2, scoring="balanced_accuracy")
  rows = np.isin(y, range(8))  # classes that both folds have
  search.fit(X[rows], y[rows])
  assert search.score(X_new[y_new < 8], y_new[y_new < 8]) > 0.7
  assert clone(search.best_estimator_)[-1].methods == ["lda", "plda"]


def test_accuracy_as_criterion_favours_common_classes(digits, model):
  X, y, X_new, _ = digits
  common = LongTailClassifier(criterion="accuracy", random_state=0).fit(X, y)
  few = model.predict_proba(X_new)[:, 7:].sum(), common.predict_proba(X_new)[:, 7:].sum()
  assert few[1] < 0.7 * few[0]


def test_classes_of_one_example_each_are_learned_without_selection():
  X, y = np.eye(4) * 3, np.arange(4)
  model = LongTailClassifier(random_state=0).fit(X, y)
  assert model.recommendation_ is None and model.score(X, y) == 1


@pytest.fixture(scope="module")
def mislabelled(digits):
  """Some examples of common classes, a third of all, have random labels, and little weight."""
  X, y, X_new, y_new = digits
  rng = np.random.default_rng(3)
  rows = rng.permutation(np.flatnonzero(y < 5))[: len(y) // 3]
  wrong, weights = y.copy(), np.ones(len(y))
  wrong[rows], weights[rows] = rng.integers(0, 10, len(rows)), 0.01
  return X, wrong, weights, X_new, y_new


def test_examples_of_little_weight_do_little_harm(mislabelled):
  X, y, weights, X_new, y_new = mislabelled
  fits = [LongTailClassifier(random_state=0).fit(X, y, w) for w in (None, weights)]
  plain, weighted = (balanced_accuracy_score(y_new, m.predict(X_new)) for m in fits)
  assert weighted > plain + 0.02


@pytest.fixture(scope="module")
def near():
  """Three classes that overlap."""
  rng = np.random.default_rng(0)
  y = np.repeat([0, 1, 2], [60, 20, 10])
  return rng.normal(size=(90, 5)) + 1.5 * np.eye(3, 5)[y], y


def probabilities(X, y, weights=None):
  return LongTailClassifier(random_state=0).fit(X, y, weights).predict_proba(X)


def test_only_ratios_of_weights_matter(near):
  X, y = near
  weights = np.random.default_rng(0).exponential(size=len(y))
  alike, weighted = probabilities(X, y), probabilities(X, y, weights)
  assert np.abs(alike - weighted).max() > 0.02
  np.testing.assert_allclose(probabilities(X, y, np.full(len(y), 7.0)), alike, atol=2e-3)
  for factor in (1e-300, 1e300):
    np.testing.assert_allclose(probabilities(X, y, factor * weights), weighted, atol=2e-3)


@pytest.mark.parametrize("weight", [0, 1e-30, 1e-320])
def test_an_example_with_next_to_no_weight_might_as_well_not_be_there(near, weight):
  """To heads; cross-validation judges it if it has any. It may lie anywhere."""
  X, y = near
  weights = np.where(np.arange(len(y)) % 6 == 1, weight, 2)
  X = np.where(weights[:, None] > 1, X, 1e6)
  for family in FAMILIES:
    found = LongTailClassifier([family], random_state=0).fit(X, y, weights)
    kept = LongTailClassifier([family], random_state=0).fit(X[weights > 1], y[weights > 1])
    expected = kept.predict(X[weights > 1])
    assert np.mean(found.predict(X[weights > 1]) == expected) > 0.8, family


@pytest.mark.parametrize("weight", [1e-9, 1e-30, 1e-320])
def test_a_class_of_next_to_no_weight_is_still_learned(near, weight):
  X, y = near
  model = LongTailClassifier(random_state=0).fit(X, y, np.where(y == 1, weight, 1))
  found = model.predict(X)
  assert np.mean(found[y == 1] == 1) > 0.4 and balanced_accuracy_score(y, found) > 0.6


@pytest.mark.parametrize(
  ("weights", "methods", "words"),
  [
    (
      lambda n: np.ones(n - 1),
      "fast",
      r"shape \[89\], but must have one .* each of the 90",
    ),
    (lambda n: np.ones((n, 1)), "fast", r"shape \[90, 1\], but must have one"),
    (lambda n: -np.ones(n), "fast", r"must not contain negative numbers"),
    (np.zeros, "fast", r"at least one weight must be above zero"),
    (
      lambda n: (np.arange(n) < 80) * 1.0,
      "fast",
      r"of the class .*2.* have a sample_weight of zero",
    ),
    (lambda n: np.full(n, np.nan), "fast", r"sample_weight contains NaN"),
    (np.ones, ["lda", "fasa"], r"generators cannot use it; set methods to 'fast' or"),
  ],
)
def test_weights_that_do_not_fit_are_refused(easy, weights, methods, words):
  X, y = easy
  with pytest.raises(ValueError, match=words):
    LongTailClassifier(methods).fit(X, y, weights(len(y)))


@pytest.fixture(scope="module")
def easy():
  rng = np.random.default_rng(0)
  y = np.repeat([0, 1, 2], [60, 20, 10])
  return rng.normal(size=(90, 5)) + 6 * np.eye(3, 5)[y], y


@pytest.mark.parametrize(
  "change",
  [
    lambda X: np.column_stack([X, np.full(len(X), 1.7e18)]),
    lambda X: np.column_stack([X, np.full(len(X), 1e12) + np.arange(len(X)) % 7]),
    lambda X: X * 1e40,
    lambda X: X * 1e-40,
    lambda X: X + 1e9,
    lambda X: X.astype(np.float16),
  ],
)
def test_columns_of_any_size_do_no_harm(easy, change):
  X, y = easy
  model = LongTailClassifier(random_state=0).fit(change(X), y)
  assert balanced_accuracy_score(y, model.predict(change(X))) > 0.95


def test_examples_from_far_away_have_probabilities(easy):
  model = LongTailClassifier(random_state=0).fit(*easy)
  found = model.predict_proba(np.full((1, 5), 1e30))
  assert np.isfinite(found).all() and found.sum() == pytest.approx(1)


def test_a_lone_family_gains_nothing_over_itself(digits):
  model = LongTailClassifier(["plain_logistic"], random_state=0).fit(*digits[:2])
  found = model.recommendation_
  assert found["gain"] == 0 and found["score"] == found["plain"]


def test_noise_is_not_expected_to_be_told_apart():
  """Everything that is chosen for a fold is chosen without it."""
  rng, scores = np.random.default_rng(0), []
  for seed in range(12):
    X, y = rng.normal(size=(80, 10)), np.repeat([0, 1], [50, 30])
    scores.append(LongTailClassifier(cv=4, random_state=seed).fit(X, y).recommendation_["score"])
  assert abs(np.mean(scores) - 0.5) < 3 * np.std(scores) / np.sqrt(12) + 0.01


def test_for_accuracy_regressions_that_are_the_same_are_fitted_once(digits):
  model = LongTailClassifier(criterion="accuracy", cv=2, random_state=0).fit(*digits[:2])
  assert sum("logistic" in name for name in model.weights_) == 1


def test_verbose_says_what_is_done(digits, capsys):
  LongTailClassifier(["lda"], cv=2, random_state=0, verbose=1).fit(*digits[:2])
  said = capsys.readouterr().out
  assert "fold 2 of 2" in said and "plain logistic regression" in said


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"methods": "magic"}, "methods is 'magic', but must be 'fast', 'auto' or names out of"),
    ({"methods": ["lda", "magic"]}, "must be 'fast', 'auto' or names"),
    ({"methods": []}, "must be 'fast', 'auto' or names"),
    ({"methods": 5}, "must be 'fast', 'auto' or names"),
    ({"criterion": "luck"}, "criterion is 'luck', but must be one of"),
    ({"cv": 1}, "cv is 1, but must be a whole number from 2"),
  ],
)
def test_parameters_that_mean_nothing_are_refused(digits, changes, words):
  with pytest.raises(ValueError, match=words):
    LongTailClassifier(**changes).fit(*digits[:2])


def test_parameters_may_be_of_numpy_and_are_saved_as_plain_ones(digits, tmp_path):
  names = np.array(["lda", "plda", "lda"])
  model = LongTailClassifier(names, cv=np.int64(2), verbose=np.int64(0), random_state=0)
  model.fit(*digits[:2]).save(tmp_path / "model.npz")
  assert list(model.weights_) == ["lda", "plda"]
  assert LongTailClassifier.load(tmp_path / "model.npz").get_params()["cv"] == 2


def test_embeddings_of_classes_are_not_among_the_saved_parameters(digits, tmp_path):
  X, y, _, _ = digits
  words = np.array([f"digit {label}" for label in y])
  table = {word: np.eye(10)[i] for i, word in enumerate(np.unique(words))}
  model = LongTailClassifier(["lda"], class_embeddings=table, random_state=0).fit(X, words)
  model.save(tmp_path / "model.npz")
  assert LongTailClassifier.load(tmp_path / "model.npz").class_embeddings is None


def test_a_file_that_cannot_be_written_is_named(model, tmp_path):
  with pytest.raises(DataError, match=r"Cannot write .*nowhere"):
    model.save(tmp_path / "nowhere" / "model.npz")


def test_labels_and_features_that_do_not_fit_are_refused(digits, model):
  X, y, _, _ = digits
  with pytest.raises(ValueError, match="Only one class is in y"):
    LongTailClassifier().fit(X, np.zeros(len(y), int))
  with pytest.raises(ValueError, match="NaN"):
    LongTailClassifier().fit(np.where(X > 15, np.nan, X), y)
  with pytest.raises(ValueError, match="63 features, but LongTailClassifier is expecting 64"):
    model.predict(X[:, 1:])


def test_importing_memdiff_imports_no_library():
  """Names are there, and their libraries are loaded when they are used."""
  script = "import sys, memdiff; print(sorted({'jax', 'sklearn', 'numpy'} & set(sys.modules)))"
  done = subprocess.run(
    [sys.executable, "-c", script],
    cwd=support.ROOT,
    capture_output=True,
    text=True,
    check=True,
    timeout=support.HANG,
  )
  assert done.stdout.strip() == "[]"
  assert set(memdiff.__all__) == {"FeatureHallucinator", "LongTailClassifier"}
  with pytest.raises(AttributeError, match="no attribute 'Magic'"):
    _ = memdiff.Magic


def test_regressions_that_would_take_hours_are_left_out_unless_they_are_named(
  digits, monkeypatch, capsys
):
  monkeypatch.setattr("memdiff.estimators.classifier._REGRESSED", 1)
  model = LongTailClassifier(cv=2, random_state=0).fit(*digits[:2])
  assert list(model.settings_) == ["plda", "lda", "centroid"]
  assert model.recommendation_["plain"] is None is model.recommendation_["interval"]
  assert "regressions are left out" in capsys.readouterr().err
  named = LongTailClassifier(["lda", "weighted_logistic"], cv=2, random_state=0)
  assert list(named.fit(*digits[:2]).settings_) == ["lda", "weighted_logistic"]
  assert not capsys.readouterr().err


def test_the_scale_of_some_rows_is_that_of_these_alone(monkeypatch):
  monkeypatch.setattr("memdiff.estimators.scale._ROWS", 7)
  rng = np.random.default_rng(0)
  features, rows = rng.normal(5, 3, size=(40, 3)), rng.permutation(40)[:17]
  some, alone = Scale.of(features, rows), Scale.of(features[rows])
  for name in ("peak", "mean", "deviation", "lowest"):
    np.testing.assert_allclose(getattr(some, name), getattr(alone, name), rtol=1e-12)
  np.testing.assert_array_equal(some.forward(features, rows), some.forward(features[rows]))


def test_rows_in_a_scale_are_made_as_they_are_asked_for():
  rng = np.random.default_rng(0)
  features, rows = rng.normal(size=(50, 3)), rng.permutation(50)[:20]
  scale = Scale.of(features)
  made = ScaledRows(scale, features, rows)
  assert len(made) == 20
  for picked in (slice(3, 9), np.array([5, 0, 19])):
    np.testing.assert_array_equal(made[picked], scale.forward(features, rows)[picked])


def test_fitting_takes_about_as_much_memory_as_the_features_once_more():
  rng = np.random.default_rng(0)
  y = np.repeat(np.arange(3), 8000)
  X = rng.normal(size=(len(y), 64)).astype(np.float32) + y[:, None]
  LongTailClassifier(["lda"], cv=2, random_state=0).fit(X[::100], y[::100])  # imports
  tracemalloc.start()
  LongTailClassifier(["lda"], cv=2, random_state=0).fit(X, y)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2 * X.nbytes


def test_half_precision_is_read_as_single(digits):
  X, y = digits[0].astype(np.float16), digits[1]
  half, single = (
    LongTailClassifier(["lda"], random_state=0).fit(x, y) for x in (X, X.astype("f4"))
  )
  np.testing.assert_array_equal(half.predict_proba(X), single.predict_proba(X.astype("f4")))
