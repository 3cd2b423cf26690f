"""Runs that ask a text-to-image model for images: what is said, what is kept, what is asked anew.

The model is a stand-in that paints the colours of its prompts; those of libraries have tests of
their own.
"""

import importlib.util

import numpy as np
import pytest

from configs.images import prompted_folder
from memdiff import pipeline
from memdiff.classifier import backbones
from memdiff.errors import ConfigError, DataError, MemdiffError
from memdiff.synthesis.text_to_image import backends
from tests import support
from tests.experiments.test_prompted_run import COLOURS, COUNTS, make_data

SIDE = 16
WORDS = {name.split("-")[0]: colour for name, colour in COLOURS.items()}


class Painter:
  """Paints the colour in a prompt, with noise of the seed."""

  def __init__(self, config, fails_after=None):
    self.config, self.fails_after, self.asked = config, fails_after, []

  def generate(self, prompts, negative, seeds, guidance):
    if self.fails_after is not None and len(self.asked) >= self.fails_after:
      raise MemdiffError("the power fails")
    self.asked += prompts
    images = []
    for prompt, seed in zip(prompts, seeds, strict=True):
      colour = next(colour for word, colour in WORDS.items() if word in prompt)
      noise = np.random.default_rng(seed).integers(-25, 25, (SIDE, SIDE, 3))
      images.append(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))
    return np.stack(images)

  def tune(self, config, real, prior, run, folder):
    self.tuned = config, real, prior, run.seeds

  def words(self, number, avoid):
    return [f"word{letter}" for letter in "abcdefgh"[:number]]

  def too_long(self, prompts):
    return [prompt for prompt in prompts if len(prompt) > 40]


@pytest.fixture
def painters(monkeypatch):
  """The models that were loaded, in order; `painters.fails_after` makes the next one fail."""
  architecture = backbones.Architecture((1,), (16,), for_small_images=True)
  monkeypatch.setitem(backbones.BACKBONES, "resnet8", architecture)

  class Loaded(list):
    fails_after = None

    def load(self, config):
      self.append(Painter(config, self.fails_after))
      return self[-1]

  loaded = Loaded()
  monkeypatch.setattr(backends, "check", lambda config: None)
  monkeypatch.setattr(backends, "load", loaded.load)
  return loaded


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  root = tmp_path_factory.mktemp("captioned")
  make_data(root)
  return root


def run(data, workdir, **changes):
  config = prompted_folder.get_config("smoke")
  fixed = {"dataset.data_dir": str(data), "text_to_image.model": str(data / "texts.npz")}
  config.update_from_flattened_dict(fixed | changes)
  return pipeline.run(config.to_dict(), str(workdir), tensorboard=False, command="")


def asked_for(workdir):
  files = sorted((workdir / "text_to_image").glob("*.npz"))
  parts = [dict(np.load(path)) for path in files]
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.slow
def test_rare_classes_are_asked_for_by_their_names(data, painters, tmp_path, capsys):
  report = run(data, tmp_path / "run")
  names = report["dataset"]["class_names"]
  found = asked_for(tmp_path / "run")
  expected = {names.index(name): max(COUNTS.values()) - n for name, n in COUNTS.items() if n < 50}
  numbers = np.bincount(found["labels"], minlength=3)
  assert {c: n for c, n in enumerate(numbers) if n} == expected
  assert found["images"].shape[1:] == (8, 8, 3)
  for prompt, label in zip(found["prompt"], found["labels"], strict=True):
    assert names[label].replace("-", " ") in prompt and prompt.startswith("a photo of a")
  assert len(set(found["prompt"])) == 8 and len(set(found["seed"])) == len(found["seed"])
  pool = np.load(tmp_path / "run" / "pool" / "final" / "text_to_image" / "run_0.npz")
  assert len(pool["learned_from"]) == 0 and pool["prompt"].tolist() == found["prompt"].tolist()
  assert {m.split("+")[0] for m in report["recommendation"]["scores"]} > {"text_to_image:none"}
  assert (tmp_path / "run" / "evaluation" / "prompts_text_to_image.png").exists()
  assert len(painters) == 1 and len(painters[0].asked) == len(found["prompt"])
  # The same command again asks for nothing.
  run(data, tmp_path / "run")
  assert len(painters) == 1


@pytest.mark.slow
def test_what_was_drawn_before_an_interruption_is_kept(data, painters, tmp_path):
  painters.fails_after = 32
  with pytest.raises(MemdiffError, match="the power fails"):
    run(data, tmp_path / "run")
  painters.fails_after = None
  run(data, tmp_path / "run")
  whole = run(data, tmp_path / "whole")
  assert [len(painter.asked) for painter in painters] == [32, 49, 81]
  assert whole["classification"]
  ours, theirs = asked_for(tmp_path / "run"), asked_for(tmp_path / "whole")
  for name in ours:
    np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.slow
def test_captions_tell_of_training_images_so_that_folds_do_not_judge(data, painters, tmp_path):
  changes = {"text_to_image.prompts.source": "captions"}
  report = run(data, tmp_path / "run", **changes)
  found = asked_for(tmp_path / "run")
  assert any("number" in prompt for prompt in found["prompt"])
  judged = {method.split("+")[0] for method in report["recommendation"]["scores"]}
  assert not any(name.startswith("text_to_image") for name in judged)
  rows = {row["method"] for row in report["classification"]}
  assert "text_to_image:none+balanced_softmax" in rows
  pool = np.load(tmp_path / "run" / "pool" / "final" / "text_to_image" / "run_0.npz")
  assert len(pool["learned_from"]) == sum(COUNTS.values())


@pytest.mark.slow
def test_a_tuned_model_has_seen_the_real_images_and_its_own(data, painters, tmp_path):
  report = run(data, tmp_path / "run", **{"text_to_image.tuning.method": "lora"})
  _, real, prior, seeds = painters[0].tuned
  assert real.images.shape == (69, 8, 8, 3) and len(seeds) == 1
  names = report["dataset"]["class_names"]
  for prompt, label in zip(real.prompts, real.labels, strict=True):
    assert names[label].split("-")[0] in prompt
  assert sum("number" in prompt for prompt in real.prompts) == 68  # captions, but for one image
  assert len(prior.images) == 3 * 8 and set(prior.prompts) == {
    f"a photo of a {name.replace('-', ' ')}" for name in names
  }
  assert not any("text_to_image" in method for method in report["recommendation"]["scores"])


@pytest.mark.slow
@pytest.mark.parametrize(
  ("method", "says_name", "has_prior"),
  [("dreambooth", True, True), ("textual_inversion", False, False)],
)
def test_classes_are_called_by_words_of_their_own(
  data, painters, tmp_path, monkeypatch, method, says_name, has_prior
):
  monkeypatch.setitem(WORDS, "word", (90, 90, 90))  # a colour for prompts without a name
  changes = {"text_to_image.tuning.method": method, "text_to_image.prompts.contexts": ("", "here")}
  report = run(data, tmp_path / "run", **changes)
  names = [name.replace("-", " ") for name in report["dataset"]["class_names"]]
  words = {f"word{letter}": name for letter, name in zip("abc", names, strict=True)}
  _, real, prior, _ = painters[0].tuned
  assert real.words == words and (prior is not None) == has_prior
  found = asked_for(tmp_path / "run")
  for prompts, labels in ((real.prompts, real.labels), (found["prompt"], found["labels"])):
    for prompt, label in zip(prompts, labels, strict=True):
      assert list(words)[label] in prompt and (names[label] in prompt) == says_name
  assert len(set(real.prompts)) == 6  # both contexts of each class


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    (
      {"text_to_image.prompts.source": "captions", "text_to_image.tuning.method": "dreambooth"},
      "names classes by words of their own",
    ),
    ({"text_to_image.model": ""}, "Images must come from somewhere"),
    ({"text_to_image.prompts.source": "mapped"}, "which no text-to-image model reads"),
  ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(
  data, painters, tmp_path, changes, words
):
  with pytest.raises(ConfigError, match=words):
    run(data, tmp_path / "run", **changes)
  assert not painters


def test_a_class_without_a_name_in_words_is_refused(painters, tmp_path):
  make_data(tmp_path / "data")
  for part in ("train", "test"):
    (tmp_path / "data" / part / "blue-thing").rename(tmp_path / "data" / part / "007")
  with pytest.raises(ConfigError, match="The class '007' has no name in words"):
    run(tmp_path / "data", tmp_path / "run")


def test_captions_that_are_not_there_are_asked_for(painters, tmp_path):
  make_data(tmp_path / "data")
  (tmp_path / "data" / "train" / "metadata.csv").unlink()
  with pytest.raises(ConfigError, match=r"add a metadata\.csv"):
    run(tmp_path / "data", tmp_path / "run", **{"text_to_image.prompts.source": "captions"})


@pytest.mark.parametrize(
  ("mark", "name", "requirements"),
  [
    ("task.json", "keras_hub", "requirements-text-to-image.txt"),
    ("model_index.json", "diffusers", "requirements-text-to-image-torch.txt"),
    ("model_index.json", "torch", "requirements-text-to-image-torch.txt"),
  ],
)
def test_a_model_needs_its_library(data, tmp_path, monkeypatch, mark, name, requirements):
  """Before anything is trained, one sentence says what to install."""
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda asked: None if asked == name else find("json")
  )
  (tmp_path / mark).write_text("{}")
  with pytest.raises(ConfigError, match=rf"needs .*: pip install .*-r {requirements}\.$"):
    run(data, tmp_path / "run", **{"text_to_image.model": str(tmp_path)})
  assert support.ROOT.joinpath(requirements).exists()


def test_a_folder_without_a_model_is_refused(data, tmp_path):
  with pytest.raises(DataError, match=r"holds no task\.json of KerasHub and no model_index\.json"):
    run(data, tmp_path / "run", **{"text_to_image.model": str(tmp_path)})
