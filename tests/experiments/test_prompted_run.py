"""Runs with prompts from the command line: what is said of which image, and what is kept of it."""

import csv
import pathlib

import numpy as np
import pytest
from PIL import Image

from memdiff.experiments import draw
from memdiff.runtime.workdir import write_arrays
from tests import support

COLOURS = {"red-thing": (200, 30, 30), "green-thing": (30, 200, 30), "blue-thing": (30, 30, 200)}
COUNTS = {"red-thing": 50, "green-thing": 16, "blue-thing": 3}
PER_CLASS = 8  # prompts
METHODS = (
  "balanced+prompted", "balanced+prompted+by_name", "balanced+prompted+by_map",
  "balanced+prompted+contrastive", "balanced+prompted+seed_select", "balanced+prompted+lora",
  "balanced+prompted+inverted",
)  # fmt: skip
CHOSEN = METHODS[4]
OF_CAPTIONS = (METHODS[0], *METHODS[3:6])
UNCAPTIONED = "blue-thing/2.png"
CONFIG = "configs/images/prompted_emoji.py"
PHASES = 8


def caption_of(name: str, number: int) -> str:
  return f"{name.split('-')[0]} thing number {number}"


def all_sentences() -> list[str]:
  captions = [caption_of(name, i) for name, count in COUNTS.items() for i in range(count)]
  return [*captions, *(name.replace("-", " ") for name in COLOURS)]


def make_data(root: pathlib.Path) -> dict:
  """A folder of images with captions, and their embeddings; the settings that read them."""
  rng = np.random.default_rng(0)
  for part, share in (("train", 1), ("test", 0.5)):
    rows = [("file_name", "text")]
    for name, colour in COLOURS.items():
      (root / part / name).mkdir(parents=True)
      for i in range(max(int(share * COUNTS[name]), 1)):
        pixels = np.clip(np.array(colour) + rng.integers(-25, 25, (8, 8, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i}.png")
        if f"{name}/{i}.png" != UNCAPTIONED:
          rows.append((f"{name}/{i}.png", caption_of(name, i)))
    with open(root / part / "metadata.csv", "w", newline="") as file:
      csv.writer(file).writerows(rows)
  sentences = all_sentences()
  vectors = rng.normal(size=(len(sentences), 6))
  write_arrays(root / "texts.npz", {"sentences": np.array(sentences), "embeddings": vectors})
  return {
    "dataset.data_dir": str(root),
    "diffusion.text.encoder": "table",
    "diffusion.text.weights": str(root / "texts.npz"),
    "methods": METHODS,
  }


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
  return make_data(tmp_path_factory.mktemp("captioned"))


@pytest.fixture(scope="module")
def run(settings):
  return support.SmallRuns(f"{CONFIG}:smoke", settings)


@pytest.fixture(scope="module", params=support.SLOW)
def undisturbed(tmp_path_factory, run):
  workdir = tmp_path_factory.mktemp("prompted") / "run"
  return workdir, *run(workdir)


def pool(workdir, method, part="final", number=0):
  return dict(np.load(workdir / "pool" / part / method / f"run_{number}.npz"))


def test_every_image_is_kept_with_its_prompt_and_of_its_class(undisturbed):
  workdir, report, _ = undisturbed
  names = report["dataset"]["class_names"]
  for method in METHODS:
    arrays = pool(workdir, method)
    assert len(arrays["prompt"]) == len(arrays["images"]) > 20
    for prompt, label in zip(arrays["prompt"], arrays["labels"], strict=True):
      if method in OF_CAPTIONS:
        assert "number" in prompt or prompt == "blue thing"  # of the image without caption
        assert prompt.split()[0] == names[label].split("-")[0]
      elif method.endswith("by_name"):
        assert prompt == names[label].replace("-", " ")
      else:
        assert prompt in all_sentences()


def test_prompts_of_a_class_differ_and_come_in_turn(undisturbed):
  workdir, report, _ = undisturbed
  arrays = pool(workdir, "balanced+prompted")
  rare = report["dataset"]["class_names"].index("green-thing")
  of_class = arrays["prompt"][arrays["labels"] == rare]
  assert len(set(of_class)) == PER_CLASS
  np.testing.assert_array_equal(of_class[:PER_CLASS], of_class[PER_CLASS : 2 * PER_CLASS])


def test_folds_know_only_the_captions_of_their_own_images(undisturbed):
  workdir, report, _ = undisturbed
  rare = report["dataset"]["class_names"].index("blue-thing")
  held = np.load(workdir / "selection" / "predictions.npz")
  names = sorted(COUNTS)  # images in the order of the classes and of their files
  files = [(name, i) for name in names for i in sorted(range(COUNTS[name]), key=str)]
  for number in range(2):
    arrays = pool(workdir, "balanced+prompted", "folds", number)
    prompts = set(arrays["prompt"][arrays["labels"] == rare])
    others = {files[row] for row in held["example"][held["run"] == number]}
    own = {
      "blue thing" if f"{name}/{i}.png" == UNCAPTIONED else caption_of(name, i)
      for name, i in files
      if name == "blue-thing" and (name, i) not in others
    }
    assert 0 < len(own) < COUNTS["blue-thing"] and prompts == own


def test_all_prompts_share_one_training(undisturbed):
  workdir, _, _ = undisturbed
  trained = {path.name for path in (workdir / "diffusion" / "final").iterdir()}
  assert trained == {METHODS[0], *METHODS[5:]}
  images = [pool(workdir, method)["images"] for method in METHODS[:2]]
  assert images[0].shape == images[1].shape and not np.array_equal(*images)


def test_chosen_noise_draws_images_nearer_to_their_class(undisturbed):
  workdir, _, _ = undisturbed
  drawn, chosen = (pool(workdir, method) for method in (METHODS[0], CHOSEN))
  np.testing.assert_array_equal(drawn["labels"], chosen["labels"])
  assert chosen["distance"].mean() < 0.95 * drawn["distance"].mean()


def test_tuning_changes_what_is_drawn_from_the_same_noise(undisturbed):
  workdir, _, _ = undisturbed
  plain, *tuned = (pool(workdir, method) for method in (METHODS[0], *METHODS[5:]))
  for arrays in tuned:
    np.testing.assert_array_equal(arrays["labels"], plain["labels"])
    assert not np.array_equal(arrays["images"], plain["images"])
  assert len(set(tuned[1]["prompt"])) <= len(COLOURS)  # one learned sentence of each class


def test_what_has_no_caption_is_said_and_told_by_its_class(undisturbed):
  _, _, text = undisturbed
  assert "1 of 69 training images have no caption" in text and "'blue thing'" in text


def test_the_page_shows_images_over_their_prompts(undisturbed):
  workdir, _, _ = undisturbed
  for method in METHODS:
    assert (workdir / "evaluation" / f"prompts_{method}.png").exists()


def test_a_finished_run_draws_nothing_again(undisturbed, run):
  workdir, report, _ = undisturbed
  before = {path: path.stat().st_mtime_ns for path in (workdir / "sampling").rglob("*.npz")}
  again, text = run(workdir)
  assert text.count("finished earlier") == PHASES and len(before) > 5
  assert before == {path: path.stat().st_mtime_ns for path in before}
  assert again["classification"] == report["classification"]


def test_other_embeddings_of_the_same_captions_are_other_data(undisturbed, run, settings):
  workdir, path = undisturbed[0], pathlib.Path(settings["diffusion.text.weights"])
  before, arrays = path.read_bytes(), dict(np.load(path))
  try:
    write_arrays(path, arrays | {"embeddings": -arrays["embeddings"]})
    done = run.start(workdir)
  finally:
    path.write_bytes(before)
  assert done.returncode != 0 and "changed since: the sentence encoder)" in done.stderr


@pytest.mark.slow
def test_a_run_killed_while_it_draws_ends_with_the_same_images(undisturbed, run, tmp_path):
  whole, workdir = undisturbed[0], tmp_path / "run"
  moment = "sampling/folds/balanced+prompted/run_0/000000.npz"
  support.kill_in_phase(run.command(workdir), workdir, "sampling", moment)
  run(workdir)
  for method in METHODS:
    first, second = (pool(place, method) for place in (whole, workdir))
    for name in first:
      np.testing.assert_array_equal(first[name], second[name])


# --- quality, and prompts of one's own -------------------------------------------------------

QUALITY = (
  "balanced+prompted+by_name", "memdiff+prompted", "memdiff+prompted+negative",
  "memdiff+prompted+contrastive", "memdiff+prompted+annealed", "memdiff+prompted+custom",
  "balanced+prompted+inverted+annealed",
)  # fmt: skip


@pytest.fixture(scope="module", params=support.SLOW)
def quality(settings, tmp_path_factory):
  small = {
    "methods": QUALITY, "seeds": (0,), "dataset.image_size": 8, "diffusion.num_steps": 10,
    "diffusion.unet.channels": 8, "diffusion.unet.multipliers": (1, 2),
    "diffusion.unet.attention": (), "encoder.backbone.name": "resnet8",
    "classifier.num_epochs": 2.0, "sampling.num_steps": 3, "sampling.per_class": 7,
    "evaluation.kid_size": 10, "loop.steps_per_dispatch": 5, "sampling.guidance": (1.0, 2.0),
    "diffusion.tuning.num_steps": 5,
  }  # fmt: skip
  run = support.SmallRuns(f"{CONFIG}:quality", settings | small)
  workdir = tmp_path_factory.mktemp("quality") / "run"
  return workdir, run(workdir)[0]


def test_the_quality_of_images_from_prompts_is_measured(quality):
  workdir, report = quality
  assert [row["method"] for row in report["images"]["rows"]] == list(QUALITY)
  for row in report["images"]["rows"]:
    assert 0 <= row["caption"]["mean"] <= 1 and 0 <= row["caption_few"]["mean"] <= 1
  assert 0 <= report["images"]["caption_of_real"] <= 1
  for scale in ("1", "2"):
    folder = workdir / "sampling" / QUALITY[0] / f"scale_{scale}" / "seed_0"
    arrays = np.load(folder / "000000.npz")
    assert len(arrays["images"]) == 21 and set(arrays["prompt"]) == set(all_sentences()[-3:])
  assert (workdir / "evaluation" / f"prompts_{QUALITY[1]}.png").exists()


def test_other_guidance_draws_other_images_from_the_same_weights(quality):
  workdir, _ = quality

  def drawn(method, scale):
    folder = workdir / "sampling" / method / f"scale_{scale}" / "seed_0"
    return np.load(folder / "000000.npz")["images"]

  trained = {path.name for path in (workdir / "diffusion").iterdir() if path.is_dir()}
  assert trained == {
    "balanced+prompted", "memdiff+prompted", "memdiff+prompted+custom",
    "balanced+prompted+inverted",
  }  # fmt: skip
  plain, negative, contrastive, annealed, tuned, _ = QUALITY[1:]
  assert not np.array_equal(drawn(tuned, 1), drawn(plain, 1))
  np.testing.assert_array_equal(drawn(negative, 1), drawn(plain, 1))  # no guidance at all
  for method in (negative, contrastive, annealed):
    assert not np.array_equal(drawn(method, 2), drawn(plain, 2)), method
  assert not np.array_equal(drawn(annealed, 1), drawn(plain, 1))


def test_anything_the_encoder_knows_is_drawn_by_its_words(quality, tmp_path, capsys):
  workdir, _ = quality
  exemplars = workdir.parent / "exemplars"
  exemplars.mkdir(exist_ok=True)
  Image.new("RGB", (8, 8), (0, 90, 0)).save(exemplars / "0.png")

  def drawn(name, *flags):
    common = [f"--workdir={workdir}", f"--out={tmp_path / name}", "--number=2", *flags]
    assert draw.main(common) == 0
    return dict(np.load(tmp_path / name / "images.npz"))

  words = ("--prompts", "red thing", "blue thing")
  first = drawn("a", *words)
  assert first["images"].shape == (4, 8, 8, 3)
  assert first["prompt"].tolist() == ["red thing"] * 2 + ["blue thing"] * 2
  assert "4 images drawn from 2 prompts" in capsys.readouterr().out
  others = [
    drawn("b", "--prompts", "green thing", "blue thing"),
    drawn("c", f"--method={QUALITY[1]}", *words),
    drawn("d", f"--method={QUALITY[1]}", f"--exemplars={exemplars}", *words),
  ]
  np.testing.assert_array_equal(others[0]["images"][2:], first["images"][2:])
  for other in others:
    assert not np.array_equal(other["images"][:2], first["images"][:2])
  assert not np.array_equal(others[1]["images"], others[2]["images"])
  alone = drawn("e", f"--method={QUALITY[1]}", f"--exemplars={exemplars}")
  assert alone["images"].shape == (2, 8, 8, 3) and "prompt" not in alone


def test_prompts_that_nothing_reads_are_refused(quality, tmp_path, capsys):
  common = [f"--workdir={quality[0]}", f"--out={tmp_path}"]
  assert draw.main(common) == 2
  assert draw.main([*common, "--prompts", "a unicorn"]) > 0
  negative = f"--method={QUALITY[2]}"
  assert draw.main([*common, negative, "--prompts", "red thing"]) == 2
  said = capsys.readouterr().err
  assert "what is drawn here is of none" in said
  assert "give --exemplars, --prompts, or both" in said and "no embedding of 'a unicorn'" in said


# --- bad input -------------------------------------------------------------------------------


def refused(run, workdir, **changes):
  done = run.start(workdir, **changes)
  assert done.returncode != 0 and "Traceback" not in done.stderr
  return " ".join(done.stderr.split())


@pytest.mark.slow
def test_what_prompts_lack_is_said_before_anything_is_trained(run, settings, tmp_path):
  words = refused(run, tmp_path / "a", **{"diffusion.text.weights": str(tmp_path / "none.npz")})
  assert "Cannot read the embeddings in" in words
  words = refused(run, tmp_path / "b", **{"sampling.prompts.templates": ("a {class} at sea",)})
  assert "has no embedding of 'a blue thing at sea'" in words
  words = refused(run, tmp_path / "c", methods=("by_name",))
  assert "methods" in words
  words = refused(run, tmp_path / "e", methods=("balanced+prompted+negative",))
  assert "config.pool.guidance is 1, which is none" in words
  small = {"evaluation.kid_size": 10, "dataset.image_size": 8}
  quality = support.SmallRuns(f"{CONFIG}:quality", settings | small)
  words = refused(quality, tmp_path / "d", methods=METHODS[2:3])
  assert "Prompts by_map come from the features of a classifier" in words
  words = refused(quality, tmp_path / "f", methods=("contrastive",))
  assert "which captions tell, or a classifier" in words
  words = refused(quality, tmp_path / "g", methods=("seed_select",))
  assert "chooses noise by the features of a classifier" in words
  assert not (tmp_path / "a" / "critics").exists()
