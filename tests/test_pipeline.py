"""Whole runs: kill and resume, one device and eight, without TensorFlow."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from memdiff import feature_space, memory_bank
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.checkpoint import Checkpointer, abstract

ROOT = pathlib.Path(__file__).parent.parent
# Everything a resumed run must reproduce to the last digit.
EXACT = ("classification", "features", "comparison", "dataset", "synthetic_counts", "config")

# Refuses TensorFlow and all that needs it, as an environment without them would.
WITHOUT_TENSORFLOW = """
import importlib.machinery, runpy, sys
find = importlib.machinery.PathFinder.find_spec
absent = ("tensorflow", "tensorboard", "clu")
importlib.machinery.PathFinder.find_spec = classmethod(
  lambda cls, name, *rest: None if name.split(".")[0] in absent else find(name, *rest))
sys.argv = ["main.py", *sys.argv[1:]]
runpy.run_path("main.py", run_name="__main__")
"""


def command(workdir, *arguments):
  return [
    *(sys.executable, "-c", WITHOUT_TENSORFLOW),
    *("--config=configs/digits_lt.py:smoke", f"--workdir={workdir}", "--notensorboard"),
    *arguments,
  ]


def environment(devices=1):
  flags = f"--xla_force_host_platform_device_count={devices}"
  return os.environ | {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg", "XLA_FLAGS": flags}


def run(workdir, devices=1):
  result = subprocess.run(
    command(workdir),
    cwd=ROOT,
    env=environment(devices),
    capture_output=True,
    text=True,
    timeout=500,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  return json.loads((workdir / "report.json").read_text()), result


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("undisturbed") / "run"
  report, result = run(workdir)
  return workdir, report, result


def test_the_report_holds_what_it_promises(undisturbed):
  _, report, _ = undisturbed
  assert report["schema"] == 1
  assert set(report["dataset"]) >= {
    *("name", "num_classes", "train_counts", "test_count", "split_sha256")
  }
  methods = [row["method"] for row in report["classification"]]
  assert set(methods) >= {"cross_entropy", "csl", "csl_retrain", "memdiff", "oracle"}
  for row in report["classification"]:
    assert row["seeds"] == [0, 1]
    for score in ("top1", "many", "medium", "few", "macro_f1"):
      assert 0 <= row[score]["mean"] <= 1
      assert row[score]["std"] >= 0
    assert len(row["per_class_top1"]["mean"]) == len(row["per_class_f1"]["mean"]) == 10
  assert set(report["features"]) == {
    *("diversity", "kl_gaussian", "mmd", "separation", "memorization_ratio", "truth_test")
  }
  assert set(report["timing"]["phases"]) == {
    *("classifier", "memory_bank", "diffusion", "hallucination", "heads", "evaluation")
  }
  assert all(p["compile_seconds"] <= p["seconds"] for p in report["timing"]["phases"].values())
  json.dumps(report, allow_nan=False)


def test_the_table_is_what_the_saved_arrays_say(undisturbed):
  from sklearn.metrics import f1_score

  from input_pipeline import digits

  workdir, report, _ = undisturbed
  with np.load(workdir / "memory_bank" / "features.npz") as arrays:
    predictions = arrays["predictions_csl"]
  labels = digits.load().test_labels
  row = next(r for r in report["classification"] if r["method"] == "csl")
  np.testing.assert_allclose(row["top1"]["mean"], (predictions == labels).mean())
  f1 = [f1_score(labels, p, average="macro", zero_division=0) for p in predictions]
  np.testing.assert_allclose(row["macro_f1"]["mean"], np.mean(f1))


def test_the_run_tells_what_it_does(undisturbed):
  _, _, result = undisturbed
  for number, phase in enumerate(
    ("classifier", "memory_bank", "diffusion", "hallucination", "heads", "evaluation"), 1
  ):
    assert f"[{number}/6 {phase}]" in result.stderr
  assert re.search(r"step 30/30 +100% +0:00 left +accuracy", result.stderr)
  assert re.search(r"compiling classifier/csl step .* \.\.\.", result.stderr)
  assert "Traceback" not in result.stderr


def test_synthetic_features_say_where_they_come_from(undisturbed):
  workdir, report, _ = undisturbed
  with np.load(workdir / "hallucination" / "synthetic_features.npz") as file:
    arrays = dict(file)
  number = sum(report["synthetic_counts"])
  assert arrays["features"].shape == (2, number, 64)
  assert (arrays["features"] >= 0).all()
  for name in ("labels", "number", "num_exemplars"):
    assert arrays[name].shape == (number,)
  for name in ("confidence", "nearest_index", "nearest_distance"):
    assert arrays[name].shape == (2, number)
  counts = np.array(report["dataset"]["train_counts"])
  np.testing.assert_array_equal(arrays["num_exemplars"], np.minimum(counts, 32)[arrays["labels"]])
  np.testing.assert_array_equal(np.bincount(arrays["labels"], minlength=10) + counts, 122)


def test_hallucination_leaves_the_bank_as_it_was(undisturbed):
  # The bank was saved before anything was hallucinated; its manifest's count and the training
  # counts say that it holds training features alone.
  workdir, report, _ = undisturbed
  manifest = json.loads((workdir / "memory_bank" / "manifest.json").read_text())
  stored = np.minimum(report["dataset"]["train_counts"], 32).sum()
  assert manifest["metrics"]["stored_features"] == 2 * stored


MOMENTS = {
  "classifier": "classifier/csl/checkpoints/10",
  "memory_bank": "memory_bank/manifest.json",
  "diffusion": "diffusion/checkpoints/20",
  "hallucination": "hallucination/manifest.json",
  "heads": "heads/memdiff/checkpoints/10",
  "evaluation": "evaluation/manifest.json",
}


def test_a_run_killed_in_every_phase_ends_with_the_same_numbers(undisturbed, tmp_path):
  workdir = tmp_path / "run"
  for phase, moment in MOMENTS.items():
    process = subprocess.Popen(
      command(workdir),
      cwd=ROOT,
      env=environment(),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not (workdir / moment).exists():
      assert process.poll() is None, f"the run ended before {moment} was there"
      assert time.monotonic() < deadline
      time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    manifest = json.loads((workdir / phase / "manifest.json").read_text())
    assert not manifest["finished"], f"{phase} was over before the kill"
  report, _ = run(workdir)
  _, expected, _ = undisturbed
  for part in EXACT:
    assert report[part] == expected[part], part
  for path in ("classifier/csl", "diffusion", "heads/memdiff"):
    killed = (workdir / path / "metrics.jsonl").read_text()
    assert killed == (undisturbed[0] / path / "metrics.jsonl").read_text()


def test_eight_devices_give_the_same_bank_split_and_curves(undisturbed, tmp_path):
  workdir = tmp_path / "run"
  report, _ = run(workdir, devices=8)
  one, expected, _ = undisturbed
  assert report["hardware"]["devices"] == 8
  assert report["dataset"] == expected["dataset"]

  def curve(folder, stage):
    lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]

  for stage in ("classifier/csl", "diffusion"):
    for a, b in zip(curve(workdir, stage), curve(one, stage), strict=True):
      assert (a["step"], a["kind"]) == (b["step"], b["kind"])
      # Sums over devices round differently, and training amplifies that step by step.
      rtol = 5e-3 if a["step"] <= 10 else 5e-2
      np.testing.assert_allclose(a["metrics"]["loss"], b["metrics"]["loss"], rtol=rtol)
  counts = np.array(report["dataset"]["train_counts"])
  ours, theirs = (stored_exemplars(folder, counts) for folder in (workdir, one))
  np.testing.assert_array_equal(ours, theirs)
  assert (ours >= 0).sum() == 2 * np.minimum(counts, 32).sum()


def stored_exemplars(workdir, counts):
  """Which training example each slot holds, [S, C, K], -1 where it is empty.

  Also checks that the prototypes are the class means of that run's own features.
  """
  bank = load_bank(workdir / "memory_bank" / "bank")
  with np.load(workdir / "memory_bank" / "features.npz") as arrays:
    features = arrays["train"]
  labels = np.repeat(np.arange(len(counts)), counts)
  held = np.full(bank["slots"].shape[:3], -1)
  for seed, label in np.ndindex(len(features), len(counts)):
    assert bank["seen"][seed, label] == counts[label]
    mean = features[seed][labels == label].mean(axis=0)
    np.testing.assert_allclose(bank["prototype"][seed, label], mean, atol=1e-4)
    for slot in range(min(counts[label], held.shape[2])):
      same = (features[seed] == bank["slots"][seed, label, slot]).all(axis=1)
      assert same.any()
      held[seed, label, slot] = same.argmax()
      assert labels[same.argmax()] == label
  return held


def load_bank(folder):
  """The bank on this process's one device, whatever it was saved from."""
  mesh = mesh_lib.make_mesh()
  shapes = jax.eval_shape(
    jax.vmap(lambda _: memory_bank.create(10, 32, 64)), jax.ShapeDtypeStruct((2,), np.int32)
  )
  sharding = feature_space.bank_sharding(10, mesh)
  checkpointer = Checkpointer(folder, keep=1)
  _, bank = checkpointer.restore(abstract(shapes, jax.tree.map(lambda _: sharding, shapes)))
  checkpointer.close()
  return {name: np.asarray(value) for name, value in vars(bank).items()}
