"""The CLIP score by its formula, and by a tiny CLIP with random weights on disk."""

import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest

from configs.images import prompted_emoji
from memdiff import pipeline
from memdiff.errors import DataError
from memdiff.evaluation import clip_score
from memdiff.runtime import keras_library
from memdiff.runtime.workdir import write_arrays
from tests.experiments import test_prompted_run

SIDE = 16
needs_keras = [
  pytest.mark.skipif(
    importlib.util.find_spec("keras_hub") is None,
    reason="keras-hub is not installed (requirements-text-to-image.txt)",
  ),
  pytest.mark.filterwarnings("ignore"),  # of Keras and TensorFlow
]


def with_keras(test):
  for mark in needs_keras:
    test = mark(test)
  return test


@pytest.fixture(scope="module", autouse=True)
def as_keras_computes():
  with jax.numpy_rank_promotion("allow"):
    yield


def test_the_score_is_its_formula():
  rng = np.random.default_rng(0)
  images, captions = rng.normal(size=(2, 50, 8))
  expected = [
    2.5 * max(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)), 0)
    for a, b in zip(images, captions, strict=True)
  ]
  np.testing.assert_allclose(clip_score.scores(images, captions), expected, rtol=1e-12)
  np.testing.assert_allclose(clip_score.scores(images, 3 * images), 2.5)
  np.testing.assert_array_equal(clip_score.scores(images, -images), 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  keras_hub = keras_library.keras_hub("this test")
  import keras

  from tests.synthesis.text_to_image import tiny_sd3

  keras.utils.set_random_seed(0)
  words, merges = tiny_sd3.vocabulary()
  tokenizer = keras_hub.tokenizers.CLIPTokenizer(
    vocabulary=words, merges=merges, pad_with_end_token=True
  )
  backbone = keras_hub.models.CLIPBackbone(
    vision_encoder=keras_hub.models.CLIPVisionEncoder(
      patch_size=8, hidden_dim=16, num_layers=2, num_heads=2, intermediate_dim=32,
      intermediate_activation="quick_gelu", intermediate_output_index=None,
      image_shape=(SIDE, SIDE, 3),
    ),
    text_encoder=keras_hub.models.CLIPTextEncoder(
      vocabulary_size=len(words), embedding_dim=16, hidden_dim=16, num_layers=2, num_heads=2,
      intermediate_dim=32, intermediate_activation="quick_gelu", intermediate_output_index=None,
      max_sequence_length=24,
    ),
    projection_dim=8,
  )  # fmt: skip
  folder = tmp_path_factory.mktemp("clip") / "model"
  backbone.save_to_preset(str(folder))
  keras_hub.models.CLIPPreprocessor(tokenizer, sequence_length=24).save_to_preset(str(folder))
  return str(folder)


def write_images(path, number=5, channels=3):
  rng = np.random.default_rng(1)
  images = rng.integers(0, 256, (number, 8, 8, channels)).astype(np.uint8)
  prompts = np.array(["a red bird", "a cat", "a cat", "a bird", "red"][:number])
  write_arrays(path, {"images": images, "prompt": prompts})
  return images, prompts


@with_keras
@pytest.mark.parametrize("channels", [1, 3])
def test_images_and_prompts_go_through_the_clip_on_disk(model, tmp_path, capsys, channels):
  images, prompts = write_images(tmp_path / "images.npz", channels=channels)
  arguments = [f"--images={tmp_path / 'images.npz'}", f"--model={model}"]
  assert clip_score.main([*arguments, f"--json={tmp_path / 'out.json'}"]) == 0
  said = capsys.readouterr().out
  result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
  clip = clip_score.load(model)
  texts = clip.of_texts([f"A photo depicts {prompt}" for prompt in prompts])
  expected = clip_score.scores(clip.of_images(images), texts).mean()
  assert result["clip_score"] == pytest.approx(expected, rel=1e-6) and result["number"] == 5
  assert "2.5 max(cos, 0), 'A photo depicts ' before the prompt" in said and "16 px" in said
  np.testing.assert_array_equal(texts[1], texts[2])
  assert not np.allclose(texts[0], texts[1])
  # A folder of files is the same images.
  (tmp_path / "parts").mkdir()
  write_arrays(tmp_path / "parts" / "a.npz", {"images": images[:2], "prompt": prompts[:2]})
  write_arrays(tmp_path / "parts" / "b.npz", {"images": images[2:], "prompt": prompts[2:]})
  again = clip_score.evaluate(str(tmp_path / "parts"), model)
  assert again["clip_score"] == pytest.approx(result["clip_score"], rel=1e-5)


@with_keras
def test_a_clip_that_cannot_be_read_is_one_sentence(model, tmp_path, capsys):
  write_images(tmp_path / "images.npz")
  shutil.copytree(model, tmp_path / "torn")
  (tmp_path / "torn" / "model.weights.h5").write_bytes(b"torn")
  for place, words in (("none", "holds no config.json"), ("torn", "Cannot read the CLIP in")):
    flags = [f"--images={tmp_path / 'images.npz'}", f"--model={tmp_path / place}"]
    assert clip_score.main(flags) > 0
    said = capsys.readouterr().err
    assert words in said and said.startswith("memdiff: ") and said.count("\n") == 1


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
  root = tmp_path_factory.mktemp("captioned")
  return test_prompted_run.make_data(root)


def small_run(captioned, workdir, clip):
  config = prompted_emoji.get_config("quality")
  config.update_from_flattened_dict(captioned)
  config.update_from_flattened_dict({
    "methods": ("balanced", "balanced+prompted+by_name"), "seeds": (0,), "evaluation.clip": clip,
    "evaluation.kid_size": 10, "dataset.image_size": 8, "diffusion.num_steps": 5,
    "diffusion.unet.channels": 8, "diffusion.unet.multipliers": (1,), "sampling.num_steps": 2,
    "diffusion.unet.attention": (), "encoder.backbone.name": "resnet8", "sampling.per_class": 7,
    "classifier.num_epochs": 1.0, "loop.steps_per_dispatch": 5,
  })  # fmt: skip
  return pipeline.run(config.to_dict(), str(workdir), tensorboard=False, command="")


@with_keras
def test_a_run_with_a_clip_scores_all_its_methods(captioned, model, tmp_path):
  report = small_run(captioned, tmp_path / "run", model)
  clip = clip_score.load(model)
  for row in report["images"]["rows"]:
    folder = tmp_path / "run" / "sampling" / row["method"] / "scale_1" / "seed_0"
    arrays = np.load(folder / "000000.npz")
    names = [report["dataset"]["class_names"][c].replace("-", " ") for c in arrays["labels"]]
    assert "prompt" not in arrays or arrays["prompt"].tolist() == names
    expected = clip.score(arrays["images"], names)
    assert row["clip"]["mean"] == pytest.approx(expected.mean(), rel=1e-5)
    rare = arrays["labels"] == report["dataset"]["train_counts"].index(3)
    assert row["clip_few"]["mean"] == pytest.approx(expected[rare].mean(), rel=1e-5)
  page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
  assert "CLIP score, 2.5 max(cos, 0)" in page


def test_a_clip_that_is_not_there_is_said_before_anything_is_trained(
  captioned, tmp_path, monkeypatch
):
  monkeypatch.setattr(keras_library, "check", lambda needed_by: None)
  with pytest.raises(DataError, match=r"holds no config\.json; give the folder of a CLIP"):
    small_run(captioned, tmp_path / "run", str(tmp_path))


def test_images_without_prompts_are_refused(tmp_path, capsys):
  write_arrays(tmp_path / "images.npz", {"images": np.zeros((1, 8, 8, 3), np.uint8)})
  (tmp_path / "empty").mkdir()
  for place, words in (
    ("images.npz", "needs the arrays images and prompt"),
    ("empty", "There is no .npz file"),
    ("none.npz", "Cannot read"),
  ):
    assert clip_score.main([f"--images={tmp_path / place}", "--model=none"]) > 0
    assert words in capsys.readouterr().err
