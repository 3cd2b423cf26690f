"""The experiment on images from the command line: its files, its report, kill and resume."""

import importlib
import pathlib

import numpy as np
import pytest
from PIL import Image

from configs.images import digits_lt
from input_pipeline import dataset, folder
from memdiff import config as config_lib
from memdiff import pipeline
from memdiff.errors import ConfigError, MemdiffError
from memdiff.evaluation import image_sets
from memdiff.experiments import draw
from tests import support
from tests.support import ROOT

OVERRIDES = {
  "methods": ("ddpm", "cbdm+t2h"), "diffusion.unet.attention": (), "sampling.png": True,
}  # fmt: skip
run = support.SmallRuns("configs/images/digits_lt.py:smoke", OVERRIDES)
PHASES = ("diffusion", "sampling", "network", "evaluation")
PER_CLASS, CHUNK = 5, 20


@pytest.fixture(scope="module", params=support.SLOW)
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("images") / "run"
  return workdir, *run(workdir)


def samples(workdir):
  """{path: images} of all files of samples."""
  folder = workdir / "sampling"
  return {
    path.relative_to(folder): np.load(path)["images"] for path in sorted(folder.rglob("*.npz"))
  }


# --- a run -----------------------------------------------------------------------------------


def test_the_files_hold_every_class_alike(undisturbed):
  workdir, _, _ = undisturbed
  for method in OVERRIDES["methods"]:
    for scale in ("1", "2"):
      files = sorted((workdir / "sampling" / method / f"scale_{scale}" / "seed_0").glob("*.npz"))
      assert [path.stem for path in files] == ["000000", "000020", "000040"]
      labels = np.concatenate([np.load(path)["labels"] for path in files])
      np.testing.assert_array_equal(np.bincount(labels), np.full(10, PER_CLASS))


def test_images_are_there_as_png_files_too(undisturbed):
  workdir, _, _ = undisturbed
  folder = workdir / "sampling" / "ddpm" / "scale_1" / "seed_0"
  pictures = sorted((folder / "png").rglob("*.png"))
  assert len(pictures) == 10 * PER_CLASS
  file = np.load(folder / "000020.npz")
  picture = np.asarray(Image.open(folder / "png" / f"{file['labels'][3]:04d}" / "000023.png"))
  np.testing.assert_array_equal(picture, file["images"][3, :, :, 0])


def test_the_evaluator_reads_the_files_of_a_run(undisturbed):
  workdir, _, _ = undisturbed
  folder = workdir / "sampling" / "ddpm" / "scale_1" / "seed_0"
  for place in (folder, folder / "png"):
    assert len(image_sets.read(str(place))) == 10 * PER_CLASS


def test_methods_draw_from_the_same_noise_but_differ(undisturbed):
  of_file = samples(undisturbed[0])
  first, second = (
    of_file[pathlib.Path(method, "scale_1", "seed_0", "000000.npz")]
    for method in OVERRIDES["methods"]
  )
  assert not np.array_equal(first, second)
  gap = np.abs(first.astype(int) - second).mean()
  unrelated = np.abs(first.astype(int) - np.roll(second, 1, axis=0)).mean()
  assert gap < 0.7 * unrelated  # hardly trained, but of one start


def test_the_report_has_every_metric_of_every_method_and_scale(undisturbed):
  _, report, text = undisturbed
  found = report["images"]
  assert [row["method"] for row in found["rows"]] == list(OVERRIDES["methods"])
  assert [(row["method"], row["scale"]) for row in found["sweep"]] == [
    (method, scale) for method in OVERRIDES["methods"] for scale in (1.0, 2.0)
  ]
  for row in found["sweep"]:
    for name in ("fd", "kid", "fd_many", "fd_medium", "fd_few", "kid_few", "precision", "recall",
                 "density", "coverage", "f8", "f1_8", "right", "right_few", "copied", "diversity",
                 "nearness", "intra_cosine", "inter_cosine"):  # fmt: skip
      assert np.isfinite(row[name]["mean"]), name
    assert len(row["per_class_kid"]["mean"]) == 10
  assert found["reference_number"] == 1257 and found["generated_number"] == 10 * PER_CLASS
  assert "guidance scale 1 (ω = 0)" in " ".join(text.split()) and "FD-classifier" in text


def test_the_page_shows_grids_of_every_method(undisturbed):
  workdir, _, _ = undisturbed
  html = (workdir / "report.html").read_text()
  for method in OVERRIDES["methods"]:
    assert (workdir / "evaluation" / f"samples_{method}.png").exists()
    assert f"{method.replace('+', '+<wbr>')}" in html
  assert (workdir / "evaluation" / "class_cosines.png").exists()
  assert html.count("<img") == 9 and "nearest in pixels" in html


def test_a_finished_run_is_not_run_again(undisturbed):
  workdir, report, _ = undisturbed
  again, text = run(workdir)
  assert text.count("finished earlier") == len(PHASES) and again["images"] == report["images"]


def test_a_changed_config_is_refused(undisturbed):
  workdir, _, _ = undisturbed
  done = run.start(workdir, **{"sampling.num_steps": 4})
  assert done.returncode != 0 and "sampling.num_steps was 3 and is now 4" in done.stderr


# --- kill and resume -------------------------------------------------------------------------

MOMENTS = {
  "diffusion": "diffusion/cbdm+t2h/checkpoints/10",
  "sampling": "sampling/ddpm/scale_2/seed_0/000000.npz",
  "network": "network/checkpoints/10",
  "evaluation": "evaluation/manifest.json",
}


@pytest.mark.slow
def test_a_run_killed_in_every_phase_ends_with_the_same_images(undisturbed, tmp_path):
  workdir = tmp_path / "run"
  for phase, moment in MOMENTS.items():
    support.kill_in_phase(run.command(workdir), workdir, phase, moment)
  report, _ = run(workdir)
  whole, expected, _ = undisturbed
  assert report["images"] == expected["images"]
  ours, theirs = samples(workdir), samples(whole)
  assert set(ours) == set(theirs) and len(ours) == 12
  for path, images in ours.items():
    np.testing.assert_array_equal(images, theirs[path], err_msg=str(path))


@pytest.mark.slow
def test_two_devices_share_the_work(undisturbed, tmp_path):
  report, _ = run(tmp_path / "run", devices=2, methods=("ddpm",))
  whole, expected, _ = undisturbed
  assert report["hardware"]["devices"] == 2
  ours, theirs = samples(tmp_path / "run"), samples(whole)
  for path, images in ours.items():
    gap = np.abs(images.astype(int) - theirs[path])
    assert np.mean(gap <= 2) > 0.95, path  # sums in another order
  assert report["dataset"] == expected["dataset"]


# --- bad input -------------------------------------------------------------------------------


def settings(**changes):
  config = digits_lt.get_config("smoke")
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config.to_dict()


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"diffusion.unet.multipliers": (1, 1, 1, 1, 1)}, "need a multiple of 16"),
    ({"sampling.num_steps": 1001}, "the diffusion has only 1000 steps"),
    ({"evaluation.kid_size": 51}, "there are 50 generated and 1257 real images"),
    ({"evaluation.reference": "test", "evaluation.kid_size": 600, "sampling.per_class": 100},
     "1000 generated and 540 real"),
    ({"sampling.per_class": 1, "evaluation.kid_size": 5}, "F_8 needs 20 images"),
    ({"evaluation.neighbours": 50}, "look at 50 neighbours"),
    ({"classifier.batch_size": 2000}, "batch_size is 2000"),
    ({"evaluation.network": "efficientnet_lite0", "evaluation.weights": "/nowhere.pth"},
     "/nowhere.pth"),
  ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_one_sentence(changes, words):
  with pytest.raises(MemdiffError) as caught:
    pipeline.prepare(settings(**changes))
  assert words in str(caught.value) and "\n" not in str(caught.value)


def write_folder(root, classes, per_class, size=(8, 8), mode="L"):
  draw = np.random.default_rng(0)
  for part in ("train", "test"):
    for c in range(classes):
      (root / part / f"class_{c}").mkdir(parents=True)
      for number in range(per_class):
        shape = size[::-1] + ((3,) if mode == "RGB" else ())
        Image.fromarray(draw.integers(0, 256, shape).astype(np.uint8)).save(
          root / part / f"class_{c}" / f"{number}.png"
        )


def folder_settings(root, **changes):
  fixed = {"dataset.name": "folder", "dataset.profile": "natural", "dataset.data_dir": str(root)}
  return settings(
    **fixed
    | {"sampling.per_class": 10, "evaluation.kid_size": 10, "classifier.batch_size": 8}
    | changes
  )


def test_one_class_is_refused(tmp_path):
  write_folder(tmp_path, 1, 4)
  with pytest.raises(MemdiffError, match="at least two"):
    pipeline.prepare(folder_settings(tmp_path, **{"dataset.image_size": 8}))


def test_few_images_per_class_are_refused_with_what_to_do(tmp_path):
  write_folder(tmp_path, 3, 1)
  with pytest.raises(ConfigError, match="batch_size is 8, but the training set has only 3"):
    pipeline.prepare(folder_settings(tmp_path, **{"dataset.image_size": 8}))


def test_images_on_disk_are_read_unless_they_are_too_many(tmp_path, monkeypatch):
  write_folder(tmp_path, 2, 10, (12, 9))
  changes = {"dataset.image_size": 8}
  _, _, expected = pipeline.prepare(folder_settings(tmp_path, **changes))
  monkeypatch.setattr(folder, "_IN_MEMORY", 0)
  assert dataset.load(
    dataset.DatasetConfig("folder", str(tmp_path), "natural", image_size=8)
  ).streamed
  _, _, data = pipeline.prepare(folder_settings(tmp_path, **changes))
  assert not data.streamed
  for part in ("train", "test"):
    np.testing.assert_array_equal(
      getattr(data, f"{part}_images"), getattr(expected, f"{part}_images")
    )
  monkeypatch.setattr(dataset, "_IN_MEMORY", 100)
  with pytest.raises(ConfigError, match=r"folder would take 0 GiB of memory.*lower config"):
    pipeline.prepare(folder_settings(tmp_path, **changes))


def test_grey_and_colour_are_one_set(tmp_path):
  write_folder(tmp_path, 2, 10)
  Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "train" / "class_0" / "red.png")
  _, _, data = pipeline.prepare(folder_settings(tmp_path, **{"dataset.image_size": 8}))
  assert data.train_images.shape[1:] == (8, 8, 3)


# --- configs ---------------------------------------------------------------------------------

MODULES = sorted(p.stem for p in (ROOT / "configs" / "images").glob("*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_every_config_is_valid(name):
  module = importlib.import_module(f"configs.images.{name}")
  with pytest.raises(ValueError, match="unknown variant 'none'") as caught:
    module.get_config("none")
  variants = str(caught.value).split("the variants are ")[1].rstrip(".").removesuffix(
    ", or joined by +"
  )  # fmt: skip
  for variant in variants.split(", "):
    config = module.get_config(variant).to_dict()
    config_lib.build(pipeline.KINDS[config["experiment"]].settings, config)
    assert f"configs/images/{name}.py" in module.__doc__
    assert config["diffusion"]["num_steps"] >= config["loop"]["checkpoint_every"]
    assert config["experiment"] == "images" or name.startswith("prompted")


def test_the_uncut_set_is_all_that_was_there_before():
  data = dataset.load(dataset.DatasetConfig(name="digits", imbalance=50.0, holdout=0.2))
  whole = dataset.uncut(data)
  assert len(whole.train_labels) == 1257 and len(whole.train_images) == 1257
  assert len(whole.left_out_labels) == len(whole.holdout_labels) == 0
  assert whole.train_counts.min() > 100 > 2 >= data.train_counts.min()


# --- classes that training never saw ----------------------------------------------------------


@pytest.fixture(scope="module", params=support.SLOW)
def with_memory(tmp_path_factory):
  """A run of memdiff, and exemplars of one class."""
  folder = tmp_path_factory.mktemp("memory")
  run(folder / "run", methods=("memdiff",), **{"sampling.guidance": (1.0,)})
  write_folder(folder / "data", 2, 3)
  return folder / "run", folder / "data" / "train" / "class_0"


def test_a_new_class_is_drawn_from_its_exemplars(with_memory, tmp_path, capsys):
  workdir, exemplars = with_memory
  common = [f"--workdir={workdir}", "--number=7"]
  assert draw.main([*common, f"--exemplars={exemplars}", f"--out={tmp_path / 'a'}"]) == 0
  assert "7 images drawn from 3 exemplars" in capsys.readouterr().out
  images = np.load(tmp_path / "a" / "images.npz")["images"]
  assert images.shape == (7, 8, 8, 1) and images.dtype == np.uint8
  assert len(list((tmp_path / "a").glob("*.png"))) == 7
  again = [*common, f"--exemplars={exemplars}", f"--out={tmp_path / 'b'}", "--method=memdiff"]
  assert draw.main(again) == 0
  np.testing.assert_array_equal(np.load(tmp_path / "b" / "images.npz")["images"], images)
  other = [*common, f"--exemplars={exemplars.parent}", f"--out={tmp_path / 'c'}", "--scale=2"]
  assert draw.main(other) == 0
  assert not np.array_equal(np.load(tmp_path / "c" / "images.npz")["images"], images)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"workdir": "nowhere"}, "holds no finished run"),
    ({"exemplars": "nowhere"}, "no image in nowhere"),
    ({"method": "ddpm"}, "looks at exemplars: memdiff"),
    ({"number": 0}, "--number must be at least 1"),
  ],
)
def test_what_cannot_be_drawn_is_one_sentence(with_memory, tmp_path, capsys, changes, words):
  workdir, exemplars = with_memory
  flags = {"workdir": workdir, "exemplars": exemplars, "out": tmp_path} | changes
  assert draw.main([f"--{name}={value}" for name, value in flags.items()]) > 0
  said = capsys.readouterr().err
  assert words in said and said.startswith("memdiff: ") and said.count("\n") == 1


def test_a_run_without_exemplars_says_what_to_train(undisturbed, tmp_path, capsys):
  flags = [f"--workdir={undisturbed[0]}", f"--exemplars={tmp_path}", f"--out={tmp_path}"]
  write_folder(tmp_path, 2, 1)
  assert draw.main(flags) == 2
  assert "No method of this run looks at exemplars" in capsys.readouterr().err
