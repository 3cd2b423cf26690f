"""The experiment with generated images: what is trained on what, its files, kill and resume."""

import dataclasses
import importlib
import json
import pathlib

import numpy as np
import pytest

from benchmarks import augmented, pages
from configs.augmented import digits_lt
from input_pipeline import identity
from memdiff import config as config_lib
from memdiff import pipeline
from memdiff.classifier import backbones
from memdiff.errors import MemdiffError
from memdiff.evaluation import image_quality
from memdiff.evaluation.method import Method
from memdiff.experiments import augmented_pool, augmented_runs, augmented_settings
from memdiff.experiments.augmented_settings import PoolConfig, Row
from memdiff.experiments.base import Experiment
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.workdir import Workdir
from memdiff.synthesis import image_filters, image_pool
from tests import support
from tests.support import ROOT

OVERRIDES = {
  "methods": ("memdiff+balanced",), "diffusion.unet.attention": (),
  "pool.filters": ("none", "confident", "agreeing&new"),
}  # fmt: skip
run = support.SmallRuns("configs/augmented/digits_lt.py:smoke", OVERRIDES)
PHASES = ("critics", "diffusion", "sampling", "pool", "classifiers", "selection", "evaluation")
LOSSES = ("cross_entropy", "logit_adjustment")
ROWS = (
  "real", "oversampling", "affine", "elastic", "mixup", "real:head", "memdiff+balanced:none",
  "memdiff+balanced:confident", "memdiff+balanced:agreeing&new", "memdiff+balanced:none:head",
  "oracle",
)  # fmt: skip


@pytest.fixture(scope="module", params=support.SLOW)
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("augmented") / "run"
  return workdir, *run(workdir)


def test_classifiers_of_every_row_predict_what_the_report_says(undisturbed, monkeypatch):
  small = backbones.Architecture((1,), (16,), for_small_images=True)  # as `run` has it
  monkeypatch.setitem(backbones.BACKBONES, "resnet8", small)
  workdir, report, _ = undisturbed
  data, methods = data_of(), [f"{row}+{loss}" for row in ROWS for loss in LOSSES]
  assert [row["method"] for row in report["classification"]] == methods
  support.check_that_predictions_are_those_of_the_report(
    workdir, data.test_images, data.test_labels, methods
  )


def pools(workdir):
  """{path: arrays} of every generated pool."""
  folder = workdir / "pool"
  return {
    path.relative_to(folder): dict(np.load(path)) for path in sorted(folder.rglob("run_*.npz"))
  }


def data_of():
  return pipeline.prepare(settings())[2]


def test_a_filter_may_say_what_its_images_weigh():
  changes = {"added.weight": 0.5, "pool.filters": ("none", "diffult@0.3")}
  config = config_lib.build(augmented_settings.AugmentedConfig, settings(**changes))
  weights = {
    row.name: augmented_settings.added_of(config, row).weight
    for row in augmented_settings.rows_of(config, data_of())
  }
  assert weights["ddpm:diffult@0.3"] == 0.15
  assert {weights[name] for name in ("ddpm:none", "ddpm:none:head", "oracle")} == {0.5}


# --- a run -----------------------------------------------------------------------------------


def test_the_table_has_every_row_under_every_loss(undisturbed):
  _, report, text = undisturbed
  rows = {row["method"]: row for row in report["classification"]}
  assert list(rows) == [f"{row}+{loss}" for row in ROWS for loss in LOSSES]
  assert [m for m, row in rows.items() if row["reference"]] == [f"oracle+{x}" for x in LOSSES]
  for row in rows.values():
    assert 0 <= row["balanced_accuracy"]["mean"] <= 1 and row["description"]
  assert "Use " in text and "generated images" in text.lower()


def test_the_advice_comes_from_folds_and_knows_no_reference(undisturbed):
  workdir, report, _ = undisturbed
  advice = report["recommendation"]
  judged = set(advice["scores"])
  assert judged == {f"{row}+{loss}" for row in ROWS[:-1] for loss in LOSSES}
  assert Method(advice["control"]).generator.split(":")[0] in augmented_settings.CONTROLS
  assert advice["scores"]["real+logit_adjustment"]["settings"] == 3
  saved = np.load(workdir / "selection" / "predictions.npz")
  assert np.unique(saved["example"]).size == saved["example"].size  # each is held out once
  assert not (workdir / "classifiers" / "folds" / "oracle").exists()


def test_gains_are_held_against_a_control_of_the_same_loss(undisturbed):
  _, report, _ = undisturbed
  gains = report["same_loss"]
  assert len(gains) == 5 * len(LOSSES)
  for gain in gains:
    control = Method(gain["control"])
    assert control.loss == Method(gain["method"]).loss
    assert control.generator.split(":")[0] in augmented_settings.CONTROLS


def test_every_image_says_where_it_comes_from(undisturbed):
  workdir, report, _ = undisturbed
  data = data_of()
  for path, arrays in pools(workdir).items():
    if {"affine", "elastic"} & {*path.parts}:
      continue
    images, labels = arrays["images"], arrays["labels"]
    assert len(images) == len(labels) == len(arrays["confidence"]) == len(arrays["distance"])
    assert str(arrays["method"]) == "memdiff+balanced" and float(arrays["guidance"]) == 1.0
    assert str(arrays["train_sha256"]) == report["dataset"]["split_sha256"]
    gap = images.reshape(len(images), -1).astype(float) - data.train_images[
      arrays["nearest_index"]
    ].reshape(len(images), -1)
    np.testing.assert_allclose(np.linalg.norm(gap, axis=1), arrays["nearest_distance"], rtol=1e-3)


def test_folds_learn_from_all_images_but_those_that_they_are_judged_on(undisturbed):
  workdir, report, _ = undisturbed
  every = np.arange(sum(report["dataset"]["train_counts"]))
  held = np.load(workdir / "selection" / "predictions.npz")
  for path, arrays in pools(workdir).items():
    if path.parts[0] == "folds" and not {"affine", "elastic"} & {*path.parts}:
      of_fold = held["example"][held["run"] == int(path.stem.removeprefix("run_"))]
      assert len(of_fold) > 100
      assert not np.isin(arrays["nearest_index"], of_fold).any()
      np.testing.assert_array_equal(arrays["learned_from"], np.setdiff1d(every, of_fold))


def test_a_new_head_stands_on_the_encoder_of_real_images(undisturbed):
  workdir, _, _ = undisturbed
  for part in ("final", "folds"):
    folder = workdir / "classifiers" / part
    head = np.load(folder / "memdiff+balanced:none:head" / "cross_entropy" / "result.npz")
    whole = np.load(folder / "real" / "cross_entropy" / "result.npz")
    assert sorted(head.files) == ["params/bias", "params/kernel"]
    assert head["params/kernel"].shape == whole["params/head/kernel"].shape
    assert not np.array_equal(head["params/kernel"], whole["params/head/kernel"])


def test_the_pool_is_drawn_with_a_surplus_and_used_up_to_the_largest_class(undisturbed):
  _, report, _ = undisturbed
  counts = np.array(report["dataset"]["train_counts"])
  lacking = counts.max() - counts
  for row in report["pools"]:
    assert row["drawn"] == (2 * lacking).tolist()
    assert (np.array(row["used"]) <= lacking).all()
  unfiltered = next(row for row in report["pools"] if row["filter"] == "none")
  assert unfiltered["used"] == lacking.tolist()


def test_the_page_shows_what_is_used_and_what_is_not(undisturbed):
  workdir, _, _ = undisturbed
  html = (workdir / "report.html").read_text()
  for name in OVERRIDES["pool.filters"]:
    assert (workdir / "evaluation" / f"pool_memdiff+balanced:{name}.png").exists()
  assert "The generated images" in html and "synthetic features" not in html.lower()


def test_the_page_of_results_is_made_from_what_is_kept(undisturbed):
  """Every row under every loss, the gains, the pools, and no folder of this machine."""
  workdir, report, _ = undisturbed
  kept = json.loads(json.dumps(augmented.reduced(report)))
  text = augmented.page({"digits": kept}, pages.load("added_images"))
  for row in ROWS:
    assert f"| `{row}` |" in text
  assert "Use " in text and "| `memdiff+balanced` | `confident` |" in text
  assert str(workdir.parent) not in text + json.dumps(kept)
  assert len(json.dumps(kept)) < 100_000


def test_moved_copies_lie_as_far_as_generated_images(undisturbed):
  workdir, _, _ = undisturbed
  found, data = pools(workdir), data_of()
  for path, arrays in found.items():
    if {"affine", "elastic"} & {*path.parts} and path.parts[0] == "final":
      other = found[path.parent.parent / "memdiff+balanced" / path.name]["nearest_distance"].mean()
      ours = image_quality.nearest(arrays["images"], data.train_images).distance.mean()
      assert ours == pytest.approx(other, rel=0.15) or arrays["strength"] > 3.9


def test_a_finished_run_is_not_run_again(undisturbed):
  workdir, report, _ = undisturbed
  again, text = run(workdir)
  assert text.count("finished earlier") == len(PHASES)
  assert again["classification"] == report["classification"]


MOMENTS = {
  "critics": "critics/folds/real/balanced_softmax/checkpoints/10",
  "diffusion": "diffusion/folds/memdiff+balanced/checkpoints/10",
  "sampling": "sampling/folds/memdiff+balanced/run_1/000000.npz",
  "pool": "pool/folds/memdiff+balanced/run_0.npz",
  "classifiers": "classifiers/folds/affine/cross_entropy/checkpoints/10",
}


@pytest.mark.slow
def test_a_run_killed_in_every_phase_ends_with_the_same_numbers(undisturbed, tmp_path):
  workdir = tmp_path / "run"
  for phase, moment in MOMENTS.items():
    support.kill_in_phase(run.command(workdir), workdir, phase, moment)
  report, _ = run(workdir)
  whole, expected, _ = undisturbed
  for name in ("classification", "recommendation", "pools", "same_loss"):
    assert report[name] == expected[name]
  ours, theirs = pools(workdir), pools(whole)
  assert set(ours) == set(theirs)
  for path, arrays in ours.items():
    for name, values in arrays.items():
      np.testing.assert_array_equal(values, theirs[path][name], err_msg=f"{path} {name}")


# --- images of files -------------------------------------------------------------------------


@pytest.mark.slow
def test_images_of_files_are_rows_that_are_judged_beforehand_only_if_they_know_nothing(
  undisturbed, tmp_path
):
  """One file holds unseen images of other hands, the other what a run has learned from all."""
  data, elsewhere = data_of(), tmp_path / "elsewhere.npz"
  image_pool.write(elsewhere, data.left_out_images, data.left_out_labels, data.class_names)
  own = undisturbed[0] / "pool" / "final" / "memdiff+balanced" / "run_0.npz"
  changes = {
    "methods": (), "pool.files": (str(elsewhere), str(own)), "pool.filters": ("none", "new"),
    "losses": ("cross_entropy",), "controls": ("real",), "head_only": False,
  }  # fmt: skip
  report, text = run(tmp_path / "run", **changes)
  rows = {row["method"]: row for row in report["classification"]}
  files = ["elsewhere:none", "elsewhere:new", "run_0:none", "run_0:new"]
  assert list(rows) == [f"{name}+cross_entropy" for name in ("real", *files, "oracle")]
  judged = {f"{name}+cross_entropy" for name in ("real", *files[:2])}
  assert set(report["recommendation"]["scores"]) == judged
  assert not (tmp_path / "run" / "classifiers" / "folds" / "run_0:none").exists()
  assert report["dataset"]["sha256"]["images of run_0"] == identity.of_file(own)
  assert "diffusion" not in text
  ours = pools(tmp_path / "run")[pathlib.Path("final", "run_0", "run_0.npz")]
  np.testing.assert_array_equal(ours["images"], np.load(own)["images"])
  np.testing.assert_array_equal(ours["learned_from"], np.arange(len(data.train_labels)))
  image_pool.write(elsewhere, data.left_out_images[1:], data.left_out_labels[1:], data.class_names)
  again = run.start(tmp_path / "run", **changes)
  assert again.returncode != 0 and "changed since: the images of elsewhere" in again.stderr


# --- settings and bad input ------------------------------------------------------------------


def settings(**changes):
  config = digits_lt.get_config("smoke")
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return config.to_dict()


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"controls": ("affine",)}, "has to have real in it"),
    ({"losses": ()}, "must be trained by one"),
    ({"selection.folds": 0}, "set it to 2 or more, or the filters to none"),
    ({"selection.encoder": "frozen"}, "set it to retrained"),
    ({"added.way": "merged", "added.ramp": 0.5}, "set warm_up and ramp to 0 and"),
    ({"classifier.num_epochs": 0.0}, "not one step"),
    ({"classifier.loss": "csl"}, "name the losses in config.losses"),
    ({"encoder.backbone.head": "cosine"}, "set it to linear or auto"),
    ({"pool.fill_to": 2}, "Every class has 2 images or more"),
    ({"losses": ("csl",), "controls": ("real", "mixup")}, ""),
    ({"diffusion.unet.multipliers": (1, 1, 1, 1, 1)}, "need a multiple of 16"),
    ({"sampling.num_steps": 1001}, "the diffusion has only 1000 steps"),
    ({"methods": ("real",)}, "config.methods is ('real',)"),
    ({"pool.filters": ("sure",)}, "such joined by &"),
    ({"methods": ()}, "Images must come from somewhere"),
    ({"pool.files": ("/nowhere/mine.npz",)}, "Cannot read the images in /nowhere/mine.npz"),
    ({"pool.files": ("/nowhere/ddpm.npz",)}, "names ddpm, which is no good name of a row"),
    ({"pool.files": ("/nowhere/a b.npz",)}, "rename the file to letters, digits"),
    ({"pool.files": ("/a/mine.npz", "/b/mine.npz")}, "each needs a name of its own"),
  ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_one_sentence(changes, words):
  if not words:
    pipeline.prepare(settings(**changes))
    return
  with pytest.raises(MemdiffError) as caught:
    pipeline.prepare(settings(**changes))
  assert words in str(caught.value) and "\n" not in str(caught.value)


def test_rows_of_the_table():
  config = config_lib.build(augmented_settings.AugmentedConfig, settings(**OVERRIDES))
  rows = augmented_settings.rows_of(config, data_of())
  assert tuple(row.name for row in rows) == ROWS
  assert [row.name for row in rows if not row.has_pool] == ["real", "mixup", "real:head"]
  without = dataclasses.replace(data_of(), left_out_labels=np.zeros(0, int))
  assert augmented_settings.rows_of(config, without) == rows[:-1]
  filled = {"pool.fill_to": 50}
  config = config_lib.build(augmented_settings.AugmentedConfig, settings(**OVERRIDES, **filled))
  names = [row.name for row in augmented_settings.rows_of(config, data_of())]
  assert names == [*ROWS[:-1], "unseen", "oracle"]
  assert Row("ddpm", "new").describe().endswith("that are no copies of training images)")


def test_filters_ask_for_what_they_need():
  assert not PoolConfig(filters=("none", "new")).needs_limits
  assert PoolConfig(filters=("new&near",)).needs_limits
  assert PoolConfig(filters=("none", "new&agreeing")).needs_second
  assert not PoolConfig(filters=("confident",)).needs_second


def test_the_first_of_each_class_are_used():
  labels, passed = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 1, 0], bool)
  chosen = augmented_pool.first_of_class(labels, passed, np.array([1, 5, 3]))
  assert chosen.tolist() == [1, 3, 4]
  assert augmented_pool.first_of_class(labels, passed, np.array([0, 0, 9])).tolist() == []


def test_methods_with_a_plus_in_their_name():
  method = Method.of("memdiff+balanced:new", "balanced_softmax")
  assert (method.generator, method.loss) == ("memdiff+balanced:new", "balanced_softmax")
  assert (Method("own_head").generator, Method("own_head").loss) == ("own_head", "")


def test_a_filter_that_keeps_nothing_is_said(tmp_path):
  """Limits that nothing reaches: the pool weighs nothing, and a line says so."""
  said, data = [], data_of()
  arrays = {
    "images": np.zeros((5, 8, 8, 1), np.uint8), "labels": np.full(5, 9), "copied": np.ones(5, bool),
    "confidence": np.ones(5), "predicted": np.full(5, 9), "distance": np.zeros(5),
  }  # fmt: skip
  config = config_lib.build(
    augmented_settings.AugmentedConfig, settings(**{"methods": ("ddpm",), "pool.filters": ("new",)})
  )
  progress = type("Progress", (), {"say": lambda self, line: said.append(line)})()
  run = support.make_run(mesh_lib.make_mesh(), (0,), 1, progress=progress)
  experiment = Experiment(config, data, Workdir(str(tmp_path / "run")), run, "")
  final = augmented_runs.part_of(experiment, "final")
  (seed,) = augmented_runs.members(experiment, final)
  augmented_runs.save(seed.pool_path("ddpm"), arrays)
  pool = augmented_pool.pools(experiment, final, Row("ddpm", "new"))
  experiment.workdir.close()
  assert not np.asarray(pool.trust).any()
  assert np.unique(pool.union).tolist() == list(range(len(data.train_labels)))
  assert said == [
    "ddpm:new: the filter keeps none of 5 images, so that this row trains on real ones alone"
  ]


def test_a_fold_is_filled_to_its_share_of_the_largest_class():
  part = augmented_runs.Part("folds", None, np.array([[0, 1, 2, 3, -1, -1]]), None)
  data = dataclasses.make_dataclass("Data", ["train_labels", "train_counts", "num_classes"])(
    np.array([0, 0, 0, 1, 0, 1]), np.array([4, 2]), 2
  )
  experiment = dataclasses.make_dataclass("Experiment", ["dataset", "config"])(
    data, dataclasses.make_dataclass("Config", ["pool"])(PoolConfig(fill_to=6))
  )
  assert augmented_pool.wanted(experiment, part).tolist() == [[1, 3]]  # to 6 * 4 / 6


MODULES = sorted(p.stem for p in (ROOT / "configs" / "augmented").glob("*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_every_config_is_valid(name):
  module = importlib.import_module(f"configs.augmented.{name}")
  with pytest.raises(ValueError, match="unknown variant 'none'") as caught:
    module.get_config("none")
  for variant in str(caught.value).split("the variants are ")[1].rstrip(".").split(", "):
    built = config_lib.build(
      augmented_settings.AugmentedConfig, module.get_config(variant).to_dict()
    )
    assert f"configs/augmented/{name}.py" in module.__doc__
    assert all(image_filters.is_known(f) for f in built.pool.filters)
