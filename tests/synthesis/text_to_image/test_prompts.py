"""Prompts of classes, embeddings from files, and the map from features to sentences."""

import numpy as np
import pytest

from memdiff.errors import ConfigError, DataError
from memdiff.runtime.workdir import write_arrays
from memdiff.synthesis.text_to_image import caption_map, prompts, sentences
from memdiff.synthesis.text_to_image.prompts import PromptConfig, Prompts

# --- words -----------------------------------------------------------------------------------


def test_templates_hold_the_name_in_words_and_each_context():
  config = PromptConfig(
    templates=("a photo of a {class} {context}", "{class}"), contexts=("", "at night")
  )
  assert prompts.from_name(config, "animal-bird_red") == [
    "a photo of a animal bird red",
    "animal bird red",
    "a photo of a animal bird red at night",
  ]
  assert len(prompts.from_name(PromptConfig(per_class=1), "cat")) == 1
  many = PromptConfig(
    templates=("a {class} {context}", "the {class} {context}"),
    contexts=tuple("abcdefgh"), per_class=4,
  )  # fmt: skip
  assert prompts.from_name(many, "cat") == ["a cat a", "the cat b", "a cat b", "the cat c"]


def test_a_class_without_a_name_in_words_is_named():
  with pytest.raises(ConfigError, match="The class '0012' has no name in words"):
    prompts.words_of("0012")


def test_contexts_that_no_template_shows_are_refused():
  with pytest.raises(ValueError, match="no template has"):
    PromptConfig(contexts=("at night",))


def test_the_captions_nearest_to_the_prototype_come_first_and_each_once():
  features = np.array([[0.0], [10.0], [4.0], [5.0], [6.0], [5.5]])
  captions = ["far", "farther", "near", "nearest", "near", ""]
  # Their mean is 5.08.
  assert prompts.typical_captions(features, captions, 3) == ["nearest", "near", "farther"]
  assert prompts.typical_captions(features, captions, 1) == ["nearest"]
  assert prompts.typical_captions(features[:1], [""], 2) == []


def test_images_of_a_class_take_its_prompts_in_turn():
  vectors = [np.eye(3, dtype=np.float32), np.full((1, 3), 0.5, np.float32)]
  of_classes = Prompts([["a", "b", "c"], ["d"]], vectors)
  texts, told = of_classes.of(np.array([0, 1, 0, 1, 0, 0]), np.array([0, 0, 1, 1, 2, 3]))
  assert texts == ["a", "d", "b", "d", "c", "a"]
  np.testing.assert_array_equal(told[[0, 2, 4, 5]], np.eye(3)[[0, 1, 2, 0]])
  np.testing.assert_array_equal(told[1], vectors[1][0])


# --- embeddings ------------------------------------------------------------------------------


def write_table(path, **changes):
  table = {"sentences": np.array(["a", "b"]), "embeddings": np.array([[3.0, 4.0], [0.0, -2.0]])}
  write_arrays(path, table | changes)
  return str(path)


def test_embeddings_from_a_file_are_of_length_one_and_of_nothing_zero(tmp_path):
  encoder = sentences.load("table", write_table(tmp_path / "texts.npz"))
  found = sentences.embed(encoder, ["b", "", "a", "b"])
  np.testing.assert_allclose(found, [[0, -1], [0, 0], [0.6, 0.8], [0, -1]], atol=1e-7)
  assert found.dtype == np.float32 and encoder.too_long(["a" * 1000]) == []


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"embeddings": np.zeros((3, 2))}, r"they are \[2\] and \[3, 2\]"),
    ({"embeddings": np.array([[np.nan, 0], [0, 1]])}, "finite"),
    ({"embeddings": np.zeros(2)}, r"\[2\] and \[2\]"),
  ],
)
def test_a_file_of_embeddings_that_do_not_fit_is_refused(tmp_path, changes, words):
  path = write_table(tmp_path / "texts.npz", **changes)
  with pytest.raises(DataError, match=words):
    sentences.load("table", path)


def test_a_missing_file_or_sentence_is_named(tmp_path):
  with pytest.raises(DataError, match="weights is empty"):
    sentences.load("table", "")
  with pytest.raises(DataError, match=r"Cannot read the embeddings in .*none\.npz"):
    sentences.load("table", str(tmp_path / "none.npz"))
  encoder = sentences.load("table", write_table(tmp_path / "texts.npz"))
  with pytest.raises(DataError, match="no embedding of 'c' and of 1 more"):
    sentences.embed(encoder, ["a", "c", "d"])


# --- from features to sentences --------------------------------------------------------------


def embedded(rng, number, width):
  vectors = rng.normal(size=(number, width)).astype(np.float32)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_map_returns_the_captions_that_it_learned_from():
  rng = np.random.default_rng(0)
  vectors = embedded(rng, 8, 5)
  features = vectors @ rng.normal(size=(5, 20))
  captions = [f"caption {i}" for i in range(8)]
  mapped = caption_map.fit(features, vectors, captions)
  assert mapped.words(mapped.soft(features)) == captions
  np.testing.assert_allclose(np.linalg.norm(mapped.soft(features), axis=1), 1, atol=1e-6)


def test_the_map_finds_a_linear_relation_in_noise_and_holds_back_without_one():
  rng = np.random.default_rng(0)
  kernel, features = rng.normal(size=(6, 4)), rng.normal(size=(200, 6))
  vectors = features @ kernel
  lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
  mapped = caption_map.fit(features, vectors / lengths, ["same"] * 200)
  cosine = (mapped.soft(features) * vectors / lengths).sum(axis=1).mean()
  assert cosine > 0.9
  unrelated = caption_map.fit(rng.normal(size=(200, 6)), vectors / lengths, ["same"] * 200)
  assert np.abs(unrelated.kernel).max() < 0.2 * np.abs(mapped.kernel).max()
