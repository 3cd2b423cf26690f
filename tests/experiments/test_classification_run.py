"""The classification experiment from the command line: its table, its heads, kill and resume."""

import ast
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from configs import digits_lt
from input_pipeline import dataset
from memdiff import config as config_lib
from memdiff import pipeline
from memdiff.classifier import decoupled, posthoc
from memdiff.errors import ConfigError, WorkdirError
from memdiff.experiments import classification
from tests import support
from tests.support import ROOT

OVERRIDES = {
  "seeds": (0, 1), "dataset.holdout": 0.2, "classifier.references": ("ldam_drw",),
  "classifier.batch_size": 32, "classifier.num_epochs": 4.7, "decoupled.num_epochs": 3.53,
  "loop.steps_per_dispatch": 10, "loop.eval_every": 20, "loop.checkpoint_every": 10,
}  # fmt: skip
STEPS, HEAD_STEPS = 40, 30
# A network of one block; the rest is main.py as it is.
SMALL = """
import runpy, sys
from memdiff.classifier import backbones
backbones.BACKBONES["resnet8"] = backbones.Architecture((1,), (16,), for_small_images=True)
sys.argv = ["main.py", *sys.argv[1:]]
runpy.run_path("main.py", run_name="__main__")
"""
HEADS = ("logit_adjustment", "tau_norm", "ncm", "crt", "lws")
PHASES = ("classifier", "features", "heads", "evaluation")
EXACT = ("classification", "dataset", "groups", "config", "parameters", "num_steps")


def settings_of(**changes):
  """What main.py makes of the overrides, as plain values."""
  config = digits_lt.get_config("classification")
  with config.unlocked():
    config.update_from_flattened_dict(OVERRIDES | changes)
  return config.to_dict()


def command(workdir):
  overrides = [f"--config.{name}={value!r}" for name, value in OVERRIDES.items()]
  return [
    *(sys.executable, "-c", SMALL, "--config=configs/digits_lt.py:classification"),
    *(f"--workdir={workdir}", "--notensorboard", *overrides),
  ]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  """Compiles quickly, and once for all runs of this file."""
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "MPLBACKEND": "Agg",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
  }


def run(workdir, environment):
  result = subprocess.run(
    command(workdir), cwd=ROOT, env=environment, capture_output=True, text=True,
    timeout=support.HANG, check=False,
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  return json.loads((workdir / "report.json").read_text()), result


@pytest.fixture(scope="module", params=support.SLOW)
def undisturbed(tmp_path_factory, environment):
  workdir = tmp_path_factory.mktemp("classification") / "run"
  return workdir, *run(workdir, environment)


@pytest.fixture(scope="module")
def data():
  return dataset.load(config_lib.build(dataset.DatasetConfig, settings_of()["dataset"]))


def row_of(report, method):
  return next(row for row in report["classification"] if row["method"] == method)


def arrays_of(workdir, loss):
  with np.load(workdir / "features" / f"{loss}.npz") as file:
    return {name: value.astype(np.float64) for name, value in file.items()}


# --- the report ------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_loss_and_each_head(undisturbed, data):
  _, report, _ = undisturbed
  methods = [row["method"] for row in report["classification"]]
  assert methods == ["cross_entropy", "ldam_drw", *(f"cross_entropy+{head}" for head in HEADS)]
  for row in report["classification"]:
    assert row["seeds"] == [0, 1] and row["description"]
    for score in ("top1", "many", "medium", "few", "macro_f1", "holdout_top1"):
      assert 0 <= row[score]["mean"] <= 1 and row[score]["std"] >= 0
    assert len(row["per_class_top1"]["mean"]) == 10
    assert row["top1"]["mean"] > 0.2  # chance is .1
  for head in HEADS:
    assert row_of(report, f"cross_entropy+{head}")["description"].startswith(
      decoupled.METHODS[head]
    )
  assert report["dataset"]["train_counts"] == data.train_counts.tolist()
  assert report["dataset"]["holdout_counts"] == np.bincount(
    data.holdout_labels, minlength=10
  ).tolist()  # fmt: skip
  assert report["num_steps"] == STEPS
  # Three 3x3 convolutions, batch norm after each, and the head.
  assert report["parameters"] == 9 * 16 * (1 + 16 + 16) + 3 * 2 * 16 + 16 * 10 + 10
  json.dumps(report, allow_nan=False)


def heads_written_out(arrays, counts, tau, part=""):
  """Logits [S, N, C] of the heads that need no training."""
  features, logits = arrays[f"{part}features"], arrays[f"{part}logits"]
  kernel, means = arrays["kernel"], arrays["class_means"]
  lengths = np.linalg.norm(kernel, axis=1, keepdims=True)
  return {
    "logit_adjustment": logits - np.log(counts / counts.sum()),
    "tau_norm": np.einsum("snd,sdc->snc", features, kernel / lengths**tau),
    "ncm": np.einsum(
      "snd,scd->snc", features, means / np.linalg.norm(means, axis=2, keepdims=True)
    ),
  }


def test_rows_are_what_the_saved_arrays_say(undisturbed, data):
  workdir, report, _ = undisturbed
  arrays = arrays_of(workdir, "cross_entropy")
  own = np.einsum("snd,sdc->snc", arrays["features"], arrays["kernel"]) + arrays["bias"][:, None]
  np.testing.assert_allclose(own, arrays["logits"], atol=1e-3)
  tau = float(
    re.search(r"tau = ([\d.]+) ", row_of(report, "cross_entropy+tau_norm")["description"])[1]
  )
  for part, labels, score in (
    ("", data.test_labels, "top1"),
    ("holdout_", data.holdout_labels, "holdout_top1"),
  ):
    rows = {"cross_entropy": arrays[f"{part}logits"]} | {
      f"cross_entropy+{head}": logits
      for head, logits in heads_written_out(arrays, data.train_counts, tau, part).items()
    }
    rows["ldam_drw"] = arrays_of(workdir, "ldam_drw")[f"{part}logits"]
    for method, logits in rows.items():
      hits = (logits.argmax(axis=2) == labels).mean(axis=1)
      assert row_of(report, method)[score]["mean"] == pytest.approx(hits.mean(), abs=1e-9), method
      assert row_of(report, method)[score]["std"] == pytest.approx(hits.std(ddof=1), abs=1e-9)


def test_tau_is_chosen_on_held_out_images_and_the_report_says_so(undisturbed, data):
  workdir, report, _ = undisturbed
  arrays = arrays_of(workdir, "cross_entropy")
  scores = {
    tau: (
      heads_written_out(arrays, data.train_counts, tau, "holdout_")["tau_norm"].argmax(axis=2)
      == data.holdout_labels
    ).mean()
    for tau in posthoc.TAUS
  }
  best = min(tau for tau in scores if scores[tau] == max(scores.values()))
  description = row_of(report, "cross_entropy+tau_norm")["description"]
  assert description.endswith(f"tau = {best:g} (the best on the held-out images)")
  assert row_of(report, "cross_entropy+tau_norm")["holdout_top1"]["mean"] == pytest.approx(
    max(scores.values())
  )
  assert row_of(report, "cross_entropy+logit_adjustment")["description"].endswith("tau = 1")


def test_trained_heads_learn_and_differ_from_the_own_one(undisturbed):
  workdir, report, _ = undisturbed
  own = row_of(report, "cross_entropy")["per_class_top1"]["mean"]
  for method in decoupled.TRAINED:
    assert row_of(report, f"cross_entropy+{method}")["per_class_top1"]["mean"] != own
    lines = (workdir / "heads" / method / "metrics.jsonl").read_text().splitlines()
    losses = [np.mean(json.loads(line)["metrics"]["loss"]) for line in lines]
    assert losses[-1] < losses[0]


def test_the_page_and_the_pictures_are_written(undisturbed):
  workdir, report, result = undisturbed
  page = (workdir / "report.html").read_text()
  for row in report["classification"]:
    assert row["method"] in page and row["method"] in result.stdout
  assert "the best on the held-out images" in page
  pictures = {path.stem for path in (workdir / "evaluation").glob("*.png")}
  assert pictures == {"long_tail_profile", "per_class_accuracy", "training_curves"}
  assert page.count("data:image/png") == 3
  for number, phase in enumerate(PHASES, 1):
    assert f"[{number}/4 {phase}]" in result.stderr
    assert json.loads((workdir / phase / "manifest.json").read_text())["finished"]
  assert "Traceback" not in result.stderr and "Warning" not in result.stderr


# --- kill, resume, repeat --------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_while_it_trains_a_head_ends_with_the_same_numbers(
  undisturbed, environment, tmp_path
):
  workdir = tmp_path / "run"
  moment = "heads/lws/checkpoints/10"
  support.kill_in_phase(command(workdir), workdir, "heads", moment, environment)
  report, result = run(workdir, environment)
  assert result.stderr.count("finished earlier") == 2
  assert re.search(rf"heads/lws resumes at step \d+/{HEAD_STEPS}", result.stderr)
  for part in EXACT:
    assert report[part] == undisturbed[1][part], part
  for stage in ("classifier/cross_entropy", "heads/crt", "heads/lws"):
    ours, theirs = ((w / stage / "metrics.jsonl").read_text() for w in (workdir, undisturbed[0]))
    assert ours == theirs


def call(values, workdir):
  return pipeline.run(values, str(workdir), tensorboard=False, command="")


def test_a_second_call_repeats_nothing_and_other_settings_are_refused(undisturbed, capfd):
  workdir, report, _ = undisturbed
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*.npz")}
  again = call(settings_of(), workdir)
  assert capfd.readouterr().err.count("finished earlier") == 4
  assert all(again[part] == report[part] for part in EXACT)
  assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*.npz")}
  for name, value, words in (
    ("decoupled.tau", 0.5, r"Phase features .*decoupled\.tau was 1\.0 and is now 0\.5"),
    ("dataset.holdout", 0.1, r"Phase classifier .*dataset\.holdout was 0\.2 and is now 0\.1"),
    ("classifier.loss_parameters.beta", 0.9, r"beta was 0\.9999 and is now 0\.9"),
  ):
    with pytest.raises(WorkdirError, match=words):
      call(settings_of(**{name: value}), workdir)


# --- what does not go together ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"decoupled.methods": ("ncm", "lws")}, "names lws, which scales the weights of a linear head"),
    ({"decoupled.methods": ("tau_norm",)}, "names tau_norm, which scales"),
    ({}, "ldam_drw trains a cosine head"),
  ],
)
def test_heads_that_scale_weights_are_refused_on_cosines(changes, words, tmp_path):
  values = settings_of(**{"classifier.loss": "ldam_drw", "classifier.references": (), **changes})
  with pytest.raises(ConfigError, match=words) as caught:
    call(values, tmp_path / "run")
  assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "changes",
  [
    {"classifier.references": ("ldam",)},  # heads build on the first loss alone
    {"classifier.loss": "ldam", "encoder.backbone.head": "auto",
     "decoupled.methods": ("logit_adjustment", "ncm", "crt")},
  ],
)  # fmt: skip
def test_other_heads_go_with_every_loss(changes, data):
  settings = config_lib.build(classification.ClassificationConfig, settings_of(**changes))
  classification.check(settings, data)


def test_an_untrained_encoder_is_not_scored(tmp_path):
  with pytest.raises(ConfigError, match=r"num_epochs is 0, not one step, and .*init_from is empty"):
    call(settings_of(**{"classifier.num_epochs": 0.0}), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_class_means_are_those_of_each_seed(data):
  number = len(data.train_labels)
  features = np.random.default_rng(0).normal(size=(2, number, 5)).astype(np.float32)
  means = classification.class_means(features, data)
  assert means.shape == (2, 10, 5)
  for seed, label in np.ndindex(2, 10):
    own = features[seed][data.train_labels == label]
    np.testing.assert_allclose(means[seed, label], own.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_overrides_on_the_command_line_are_those_of_the_tests():
  """What `settings_of` gives in process is what the command passes."""
  for argument in command("x"):
    if argument.startswith("--config."):
      name, value = argument.removeprefix("--config.").split("=", 1)
      assert ast.literal_eval(value) == OVERRIDES[name]
