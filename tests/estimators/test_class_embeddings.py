"""What is known of classes: how it may be given, and that it is used if it clearly helps."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score

from memdiff import LongTailClassifier
from memdiff.fitting import heads, knowledge, selection
from memdiff.synthesis import class_embeddings

CLASSES, DIM = 30, 8


@pytest.fixture(scope="module")
def data():
  """Classes whose means follow from their embeddings, most of them of three examples."""
  rng = np.random.default_rng(0)
  embeddings = rng.normal(size=(CLASSES, 4))
  means = embeddings @ rng.normal(size=(4, DIM)) + 0.1 * rng.normal(size=(CLASSES, DIM))
  counts = np.where(np.arange(CLASSES) < 5, 60, 3)

  def draw(numbers):
    labels = np.repeat(np.arange(CLASSES), numbers)
    return means[labels] + 1.5 * rng.normal(size=(len(labels), DIM)), labels

  return embeddings, *draw(counts), *draw(np.full(CLASSES, 40))


def fitted(data, embeddings):
  model = LongTailClassifier(["plda"], class_embeddings=embeddings, cv=2, random_state=0)
  return model.fit(data[1], data[2])


def test_true_knowledge_is_used_and_helps(data):
  without, model = fitted(data, None), fitted(data, data[0])
  assert model.recommendation_["extra"]["used"] and knowledge.NAME in model.weights_
  scores = [balanced_accuracy_score(data[4], m.predict(data[3])) for m in (without, model)]
  assert scores[1] > scores[0] + 0.05


def test_knowledge_that_tells_nothing_is_left_out(data):
  noise = np.random.default_rng(1).normal(size=(CLASSES, 4))
  without, model = fitted(data, None), fitted(data, noise)
  assert not model.recommendation_["extra"]["used"] and list(model.weights_) == ["plda"]
  np.testing.assert_allclose(model.predict_proba(data[3]), without.predict_proba(data[3]))


def test_the_penalty_is_chosen_by_what_the_map_says_of_classes_that_it_has_not_seen(data):
  rng = np.random.default_rng(2)
  embeddings, counts = data[0], np.array([3] * 29 + [0])
  means = embeddings @ rng.normal(size=(4, DIM))
  told = knowledge._Regression.of(embeddings, counts).map(means)
  np.testing.assert_allclose(told.expected[-1], means[-1], atol=0.3)  # of a class without examples


def test_the_shortcut_for_leaving_a_class_out_is_exact(monkeypatch):
  """Against scikit-learn's ridge regression, refitted without each class."""
  rng = np.random.default_rng(3)
  embeddings, counts = rng.normal(size=(12, 20)), rng.integers(1, 9, 12)
  means = rng.normal(size=(12, 5))
  monkeypatch.setattr(knowledge, "_RIDGES", (0.7,))
  regression = knowledge._Regression.of(embeddings, counts)
  missed = regression.map(means).missed
  strength = 0.7 * np.trace(regression.products) / 12
  for c in range(12):
    rest = np.arange(12) != c
    ridge = Ridge(strength).fit(embeddings[rest], means[rest], regression.weights[rest])
    told = ridge.predict(embeddings[c : c + 1])[0]
    np.testing.assert_allclose(missed[c], means[c] - told, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("size", [3, 100])
def test_zero_shot_learns_nothing_from_embeddings_that_tell_nothing(data, size):
  """With more numbers than classes, too, where a map may tell every mean by heart."""
  noise = np.random.default_rng(4).normal(size=(CLASSES, size))
  training = selection.training(data[1].astype(np.float32), data[2], CLASSES, "balanced_accuracy")
  (head,) = knowledge.zero_shot(noise).fit(training, (0.3,))
  score = balanced_accuracy_score(data[4], head.logits(data[3]).argmax(axis=1))
  assert score < 2.5 / CLASSES


def test_where_all_classes_are_alike_in_embedding_it_is_plain_plda(data):
  X, y = data[1].astype(np.float32), data[2]
  training = selection.training(X, y, CLASSES, "balanced_accuracy")
  (plain,) = heads.FAMILIES["plda"].fit(training, (0.1,))
  (same,) = knowledge.family(np.zeros((CLASSES, 3))).fit(training, (0.1,))
  agree = plain.logits(X).argmax(axis=1) == same.logits(X).argmax(axis=1)
  assert agree.mean() > 0.9


def test_zero_shot_tells_classes_without_their_examples(data):
  """A class whose examples are moved away is still expected where the others let it."""
  X, y = data[1].astype(np.float32), data[2]
  family = knowledge.zero_shot(data[0])
  (head,) = family.fit(selection.training(X, y, CLASSES, "balanced_accuracy"), (0.3,))
  score = balanced_accuracy_score(data[4], head.logits(data[3]).argmax(axis=1))
  assert score > 4 / CLASSES
  moved = np.where((y == 2)[:, None], X + 30, X)
  training = selection.training(moved, y, CLASSES, "balanced_accuracy")
  shares = [
    (of_family.fit(training, (0.3,))[0].logits(moved[y == 2]).argmax(axis=1) == 2).mean()
    for of_family in (family, knowledge.family(data[0]))
  ]
  assert shares == [0, 1]


def test_components_are_those_of_the_classes():
  rng = np.random.default_rng(0)
  embeddings = rng.normal(size=(50, 3)) @ rng.normal(size=(3, 200)) + 7
  told = class_embeddings.components(embeddings)
  assert told.shape == (50, 33) and told.dtype == np.float32
  np.testing.assert_array_equal(told[:, -1], 1)
  np.testing.assert_allclose(np.square(told[:, :-1]).mean(), 1, rtol=1e-5)
  away = embeddings - embeddings.mean(axis=0)
  scale = np.linalg.norm(away) / np.linalg.norm(told[:, :-1])
  np.testing.assert_allclose(
    scale**2 * told[:, :-1] @ told[:, :-1].T, away @ away.T, atol=1e-2 * np.square(away).max()
  )
  assert not class_embeddings.components(np.ones((4, 3)))[:, :-1].any()


def test_embeddings_may_be_given_in_several_ways(tmp_path):
  classes = np.array(["ant", "bee"])
  rows = np.array([[1.0, 2.0], [3.0, 4.0]])
  np.savez(tmp_path / "known.npz", names=np.array(["bee", "ant", "cow"]),
           embeddings=np.array([rows[1], rows[0], [9, 9]]))  # fmt: skip
  for given in (
    rows, rows.tolist(), {"bee": rows[1], "ant": rows[0], "cow": [9, 9]},
    str(tmp_path / "known.npz"), tmp_path / "known.npz",
  ):  # fmt: skip
    np.testing.assert_array_equal(class_embeddings.of_classes(given, classes), rows)


@pytest.mark.parametrize(
  ("names", "embeddings", "words"),
  [
    (["ant", "bee", "cow"], np.ones((4, 2)), r"names \[3\] and embeddings \[4, 2\]"),
    (["ant", "bee"], np.ones(2), "one name and one row"),
    ([["ant", "bee"]], np.ones((1, 2)), "one name and one row"),
    (["ant", "bee", "ant"], np.ones((3, 2)), "names 'ant' 2 times"),
  ],
)
def test_files_that_are_not_a_row_for_each_name_are_refused(tmp_path, names, embeddings, words):
  np.savez(tmp_path / "known.npz", names=np.array(names), embeddings=embeddings)
  with pytest.raises(ValueError, match=words):
    class_embeddings.of_classes(str(tmp_path / "known.npz"), np.array(["ant", "bee"]))


def test_numbers_as_names_are_read_as_texts_if_classes_are(tmp_path):
  np.savez(tmp_path / "known.npz", names=np.arange(3), embeddings=np.eye(3))
  for classes in (np.array([2, 0]), np.array(["2", "0"])):
    found = class_embeddings.of_classes(str(tmp_path / "known.npz"), classes)
    np.testing.assert_array_equal(found, np.eye(3)[[2, 0]])


@pytest.mark.parametrize(
  ("given", "words"),
  [
    ({"ant": [1.0]}, "has none for 1 classes, for example 'bee'"),
    ([[1.0, 2.0]], "must be one row of numbers for each of the 2 classes"),
    ({"ant": [1.0], "bee": [1.0, 2.0]}, "all of one length"),
    ([[1.0], [np.nan]], "NaN or an infinity"),
    ("nothing.npz", "nothing.npz, which cannot be read"),
    (5, "must be one row of numbers"),
  ],
)
def test_embeddings_that_do_not_fit_are_refused(given, words):
  with pytest.raises(ValueError, match=words):
    class_embeddings.of_classes(given, np.array(["ant", "bee"]))
  with pytest.raises(ValueError, match="not all classes have words"):
    class_embeddings.of_classes("names", np.array([0, 1]))


def test_a_classifier_that_knows_its_classes_is_saved(data, tmp_path):
  model = fitted(data, data[0])
  model.save(tmp_path / "model.npz")
  loaded = LongTailClassifier.load(tmp_path / "model.npz")
  np.testing.assert_array_equal(loaded.predict_proba(data[3]), model.predict_proba(data[3]))
