"""Captions by models that describe images: tiny ones that have learned three captions by heart."""

import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from input_pipeline import captions
from memdiff.synthesis.text_to_image import captioner
from tests.synthesis.text_to_image import tiny_captioners

pytestmark = [
  pytest.mark.skipif(
    importlib.util.find_spec("keras_hub") is None,
    reason="keras-hub is not installed (requirements-text-to-image.txt)",
  ),
  pytest.mark.filterwarnings("ignore"),  # of Keras and TensorFlow
]
TEXTS = {(255, 0, 0): "a red bird", (0, 0, 255): "blue cat", (0, 255, 0): "the green dog"}


@pytest.fixture(scope="module", autouse=True)
def as_keras_computes():
  """Also in the threads that feed its training."""
  before = jax.config.jax_numpy_rank_promotion
  jax.config.update("jax_numpy_rank_promotion", "allow")
  yield
  jax.config.update("jax_numpy_rank_promotion", before)


@pytest.fixture(scope="module", params=["BLIP2CausalLM", "PaliGemmaCausalLM"])
def model(request, tmp_path_factory):
  """The folder of a model that knows three images."""
  import keras

  keras.utils.set_random_seed(0)
  side, texts = tiny_captioners.SIDE, list(TEXTS.values())
  images = np.stack([np.full((side, side, 3), colour, np.uint8) for colour in TEXTS])
  if request.param == "BLIP2CausalLM":
    task, inputs = tiny_captioners.blip2(texts), {"text": texts}
  else:
    task = tiny_captioners.pali_gemma(texts)
    inputs = {"prompts": [captioner.MODELS[request.param][1]] * 3, "responses": texts}
  folder = tmp_path_factory.mktemp("model") / "preset"
  return tiny_captioners.learn(task, {"images": images} | inputs, folder)


@pytest.fixture
def folder(tmp_path):
  for number, colour in enumerate(TEXTS):
    place = tmp_path / "train" / f"class_{number % 2}"
    place.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20), colour).save(place / f"{number}.png")
  return tmp_path / "train"


EXPECTED = dict(
  zip(("class_0/0.png", "class_1/1.png", "class_0/2.png"), TEXTS.values(), strict=True)
)


def run(folder, model, *flags):
  common = [f"--images={folder}", f"--model={model}", "--dtype=float32", *flags]
  return captioner.main(common)


def test_a_model_that_learned_three_captions_says_them(folder, model, capsys):
  assert run(folder, model, "--batch_size=2") == 0
  assert captions.known(folder) == EXPECTED
  assert "3 images captioned, 0 had a caption" in capsys.readouterr().out


def test_what_has_a_caption_keeps_it_and_is_not_asked_again(folder, model, capsys, monkeypatch):
  (folder / "metadata.csv").write_text("source,file_name,text\nme,class_0/0.png,mine")
  assert run(folder, model) == 0
  assert captions.known(folder) == EXPECTED | {"class_0/0.png": "mine"}
  lines = (folder / "metadata.csv").read_text().splitlines()
  assert lines[:2] == ["source,file_name,text", "me,class_0/0.png,mine"] and len(lines) == 4
  monkeypatch.setattr(captioner.Captioner, "describe", None)
  assert run(folder, model) == 0
  assert "0 images captioned, 3 had a caption" in capsys.readouterr().out


def test_what_was_said_before_an_interruption_is_kept(folder, model, monkeypatch):
  class Interrupted(Exception):
    pass

  describe, calls = captioner.Captioner.describe, []

  def fails_late(self, images):
    if calls:
      raise Interrupted
    calls.append(len(images))
    return describe(self, images)

  monkeypatch.setattr(captioner.Captioner, "describe", fails_late)
  with pytest.raises(Interrupted):
    run(folder, model, "--batch_size=1")
  assert len(captions.known(folder)) == 1
  monkeypatch.undo()
  assert run(folder, model) == 0 and captions.known(folder) == EXPECTED


def test_images_that_cannot_be_read_are_named_and_left_out(folder, model, capsys):
  (folder / "class_1" / "torn.png").write_bytes(b"no image")
  assert run(folder, model) == 0
  said = capsys.readouterr()
  assert "without one: 1 unreadable" in said.out and "torn.png gets no caption" in said.err
  assert captions.known(folder) == EXPECTED


def test_lines_of_json_are_added_to_lines_of_json(folder, model):
  (folder / "metadata.jsonl").write_text('{"file_name": "class_0/0.png", "text": "mine"}\n')
  assert run(folder, model) == 0
  assert captions.known(folder) == EXPECTED | {"class_0/0.png": "mine"}
  assert not (folder / "metadata.csv").exists()


def test_what_cannot_be_used_is_one_sentence(folder, model, tmp_path, capsys):
  def refused(images, place, *flags):
    assert run(images, place, *flags) != 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1 or "Cannot read" in said
    return said

  assert "There is no folder" in refused(tmp_path / "none", model)
  assert "holds no task.json" in refused(folder, tmp_path)
  assert "--batch_size must be at least 1" in refused(folder, model, "--batch_size=0")
  other = tmp_path / "other"
  shutil.copytree(model, other)
  kind = json.loads((other / "task.json").read_text())
  (other / "model.weights.h5").write_bytes(b"torn")
  assert "Cannot read the captioner in" in refused(folder, other)
  (other / "task.json").write_text(json.dumps(kind | {"class_name": "GemmaCausalLM"}))
  assert "is a GemmaCausalLM, but must be BLIP2CausalLM or Pali" in refused(folder, other)
  (tmp_path / "empty").mkdir()
  assert "There is no image in" in refused(tmp_path / "empty", model)
  (folder / "metadata.csv").write_text("path,text\n")
  assert "needs the columns file_name and text or caption" in refused(folder, model)
