"""Whole runs: kill and resume, one device and two, without TensorFlow."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import confidence, isolating, timing
from benchmarks.faults.evidence import EXACT
from memdiff import pipeline
from memdiff.fitting.heads import FAMILIES
from memdiff.memory import feature_space, memory_bank
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.checkpoint import Checkpointer, abstract
from tests import support

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parent.parent
PHASES = (  # no joint one: the config names nothing to train jointly
  "classifier", "memory_bank", "diffusion", "selection", "hallucination", "heads", "evaluation",
)  # fmt: skip
FITTED = [f"real+{name}" for name in (*FAMILIES, "blend")]
LOSSES = ("cross_entropy", "logit_adjustment", "balanced_softmax", "csl")

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


def run(workdir, devices=1):
  result = subprocess.run(
    command(workdir),
    cwd=ROOT,
    env=support.environment_of_children(devices),
    capture_output=True,
    text=True,
    timeout=support.HANG,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  return json.loads((workdir / "report.json").read_text()), result


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("undisturbed") / "run"
  report, result = run(workdir)
  return workdir, report, result


def arrays_of(path):
  with np.load(path) as file:
    return dict(file)


def rows_of(report):
  return {row["method"]: row for row in report["classification"]}


def test_the_report_holds_what_it_promises(undisturbed):
  _, report, _ = undisturbed
  assert report["schema"] == 1
  assert set(report["dataset"]) >= {
    *("name", "num_classes", "train_counts", "test_count", "split_sha256")
  }
  trained = ("real", "kernel_jitter", "memdiff", "oracle", "unseen_exemplars")
  assert [row["method"] for row in report["classification"]] == [
    *("own_head", "own_head+logit_adjustment"),
    *FITTED,
    *(f"{name}+{loss}" for name in trained for loss in LOSSES),
  ]
  for row in report["classification"]:
    assert row["seeds"] == [0, 1]
    assert row["reference"] == (row["method"].split("+")[0] in trained[-2:])
    for score in ("top1", "many", "medium", "few", "macro_f1"):
      assert 0 <= row[score]["mean"] <= 1
      assert row[score]["std"] >= 0
    assert len(row["per_class_top1"]["mean"]) == len(row["per_class_f1"]["mean"]) == 10
  assert set(report["generators"]) == {"kernel_jitter", "memdiff"}
  for measured in report["generators"].values():
    assert set(measured) == {
      *("diversity", "kl_gaussian", "mmd", "separation", "memorization_ratio", "truth_test")
    }
  assert report["features"] == report["generators"]["memdiff"]
  assert tuple(report["timing"]["phases"]) == PHASES
  assert all(p["compile_seconds"] <= p["seconds"] for p in report["timing"]["phases"].values())
  json.dumps(report, allow_nan=False)


def test_phases_without_work_are_left_out(undisturbed):
  workdir, report, result = undisturbed
  assert report["config"]["joint"]["generators"] == []
  assert not (workdir / "joint").exists()
  assert "joint" not in result.stderr
  assert {path.parent.name for path in workdir.glob("*/manifest.json")} == set(PHASES)


def test_manifests_tell_what_processors_worked(undisturbed):
  workdir, report, _ = undisturbed
  timing = report["timing"]
  for phase in PHASES:
    manifest = json.loads((workdir / phase / "manifest.json").read_text())
    assert manifest["killed"] == 0
    assert 0 < manifest["cpu_seconds"] <= manifest["seconds"] * os.cpu_count() + 0.1
    assert timing["phases"][phase] == {
      key: manifest[key] for key in ("seconds", "compile_seconds", "cpu_seconds", "killed")
    }
  for key in ("seconds", "cpu_seconds"):
    total = sum(phase[key] for phase in timing["phases"].values())
    assert timing[f"total_{key}"] == pytest.approx(total)


def test_the_table_is_what_the_saved_arrays_say(undisturbed):
  from sklearn.metrics import f1_score

  from input_pipeline import digits

  workdir, report, _ = undisturbed
  arrays, rows = arrays_of(workdir / "memory_bank" / "features.npz"), rows_of(report)
  labels, counts = digits.load().test_labels, np.array(report["dataset"]["train_counts"])
  own_logits = arrays["test"] @ arrays["kernel"] + arrays["bias"][:, None]
  np.testing.assert_allclose(arrays["logits_csl"], own_logits, rtol=1e-4, atol=1e-4)
  logits = arrays["logits_csl"]
  for suffix, used in (("", logits), ("+logit_adjustment", logits - np.log(counts))):
    predictions, row = used.argmax(axis=-1), rows[f"own_head{suffix}"]
    np.testing.assert_allclose(row["top1"]["mean"], (predictions == labels).mean())
    f1 = [f1_score(labels, p, average="macro", zero_division=0) for p in predictions]
    np.testing.assert_allclose(row["macro_f1"]["mean"], np.mean(f1))


def test_classifiers_of_every_method_predict_what_the_report_says(undisturbed):
  from input_pipeline import digits

  workdir, report, _ = undisturbed
  data, methods = digits.load(), [row["method"] for row in report["classification"]]
  support.check_that_predictions_are_those_of_the_report(
    workdir, data.test_images, data.test_labels, methods
  )


def test_the_recommendation_is_what_the_held_out_examples_say(undisturbed):
  workdir, report, _ = undisturbed
  found, rows = report["recommendation"], rows_of(report)
  predictions = arrays_of(workdir / "selection" / "predictions.npz")
  label, example = predictions.pop("label"), predictions.pop("example")
  del predictions["run"]
  counts = np.array(report["dataset"]["train_counts"])
  assert sorted(example) == list(range(counts.sum()))  # each once, none of a class of one
  assert counts.min() > 1
  np.testing.assert_array_equal(label, np.repeat(np.arange(10), counts)[example])
  methods = {f"{name}+{loss}" for name in ("real", "kernel_jitter", "memdiff") for loss in LOSSES}
  assert set(report["choices"]) == methods
  methods |= set(FITTED)
  assert set(predictions) == set(found["scores"]) == methods
  scores = {
    m: np.mean([(p[label == c] == c).mean() for c in range(10)]) for m, p in predictions.items()
  }
  assert found["criterion"] == "balanced_accuracy"
  for method, entry in found["scores"].items():
    assert entry["score"] == pytest.approx(scores[method])
    assert entry["gain"] == pytest.approx(scores[method] - scores[found["control"]])
  controls = [m for m in methods if m.startswith("real+")]
  best_control = max(scores[m] for m in controls)
  assert found["control"] == "real+blend" or scores[found["control"]] == best_control
  others = [found["control"], *(methods - set(controls))]
  assert scores[found["best"]] == max(scores[m] for m in others)
  low, high = found["interval"]
  assert (low + high) / 2 == pytest.approx(found["expected_gain"]) == found["scores"][
    found["best"]
  ]["gain"]  # fmt: skip
  sure = found["best"] not in controls and low > 0
  assert found["method"] == (found["best"] if sure else found["control"])
  assert found["basis"] == {"folds": 2, "repeats": 1, "encoder": "frozen"}
  agreement = found["agreement"]
  test = {m: rows[m]["balanced_accuracy"]["mean"] for m in methods}
  assert agreement["methods"] == 12 + len(FITTED)
  assert agreement["regret_of_recommended"] == pytest.approx(
    max(test.values()) - test[found["method"]]
  )
  assert agreement["test_gain"]["mean"] == pytest.approx(
    test[found["best"]] - test[found["control"]]
  )


def test_the_comparison_is_of_methods_that_cross_validation_chose(undisturbed):
  _, report, _ = undisturbed
  comparison, rows = report["comparison"], rows_of(report)
  scores = report["recommendation"]["scores"]
  ours = [f"memdiff+{loss}" for loss in LOSSES]
  assert comparison["method"] == max(ours, key=lambda m: scores[m]["score"])
  assert comparison["control"] == report["recommendation"]["control"]
  assert comparison["reference"] == comparison["method"].replace("memdiff", "oracle")
  test = {
    m: rows[comparison[m]]["balanced_accuracy"]["mean"] for m in ("method", "control", "reference")
  }
  assert comparison["gain"]["mean"] == pytest.approx(test["method"] - test["control"])
  assert comparison["headroom"]["mean"] == pytest.approx(test["reference"] - test["control"])
  assert ("gap_closed" in rows["own_head"]) == (comparison["gap_closed"] is not None)


def test_the_run_tells_what_it_does(undisturbed):
  _, _, result = undisturbed
  for number, phase in enumerate(PHASES, 1):
    assert f"[{number}/{len(PHASES)} {phase}]" in result.stderr
  assert re.search(r"step 30/30 +100% +0:00 left +accuracy", result.stderr)
  assert re.search(r"compiling classifier/csl \(5 steps per dispatch\) \.\.\.", result.stderr)
  assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["kernel_jitter", "memdiff"])
def test_synthetic_features_say_where_they_come_from(undisturbed, name):
  workdir, report, _ = undisturbed
  arrays = arrays_of(workdir / "hallucination" / f"{name}.npz")
  counts = np.array(report["dataset"]["train_counts"])
  strengths = {c["strength"] for m, c in report["choices"].items() if m.startswith(f"{name}+")}
  assert arrays["strengths"].tolist() == sorted(strengths)
  assert arrays["seeds"].tolist() == [0, 1]
  np.testing.assert_array_equal(arrays["numbers"], 122 - counts)
  np.testing.assert_array_equal(arrays["labels"], np.repeat(np.arange(10), 122 - counts))
  made, num_strengths = (122 - counts).sum(), len(strengths)
  assert arrays["features"].shape == (2, num_strengths, made, 64)
  assert (arrays["features"] >= 0).all()
  for key in ("confidence", "nearest_index", "nearest_distance"):
    assert arrays[key].shape == (2, num_strengths, made)
  assert report["synthetic_counts"] == (122 - counts).tolist()
  train = arrays_of(workdir / "memory_bank" / "features.npz")["train"]
  train_labels = np.repeat(np.arange(10), counts)
  mean, scale = train.mean(axis=1), train.std(axis=1)
  scale = np.where(scale < 1e-6 * train.max(axis=(1, 2))[:, None], 1.0, scale)
  for seed in (0, 1):
    exemplars = (train[seed] - mean[seed]) / scale[seed]
    features = (arrays["features"][seed, 0] - mean[seed]) / scale[seed]
    for row in range(0, made, 40):
      label = arrays["labels"][row]
      index = arrays["nearest_index"][seed, 0, row]
      assert train_labels[index] == label
      distance = np.linalg.norm(exemplars[train_labels == label] - features[row], axis=1).min()
      assert arrays["nearest_distance"][seed, 0, row] == pytest.approx(distance, rel=1e-3, abs=1e-3)
    for label in np.unique(arrays["labels"]):  # normalised: a class counts as its size says
      own = arrays["confidence"][seed, 0][arrays["labels"] == label]
      assert own.mean() == pytest.approx(1, abs=1e-4)


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
  "diffusion": "diffusion/memdiff/checkpoints/20",
  "selection": "selection/memdiff/checkpoints/20",
  "hallucination": "hallucination/manifest.json",
  "heads": "heads/memdiff/checkpoints/10",
  "evaluation": "evaluation/manifest.json",
}


def test_a_run_killed_in_every_phase_ends_with_the_same_numbers(undisturbed, tmp_path):
  workdir = tmp_path / "run"
  for phase, moment in MOMENTS.items():
    support.kill_in_phase(command(workdir), workdir, phase, moment)
  report, _ = run(workdir)
  _, expected, _ = undisturbed
  for part in EXACT:
    assert report[part] == expected[part], part
  whole = undisturbed[0]
  curves = sorted(path.relative_to(whole) for path in whole.rglob("metrics.jsonl"))
  assert len(curves) == 11  # a classifier, two denoisers, three and five trainings of heads
  for path in curves:
    assert (workdir / path).read_text() == (whole / path).read_text(), path
  for path in ("heads/fitted", "selection/predictions", "hallucination/memdiff"):
    ours, theirs = (arrays_of(folder / f"{path}.npz") for folder in (workdir, whole))
    assert set(ours) == set(theirs)
    for name, array in ours.items():
      np.testing.assert_array_equal(array, theirs[name], err_msg=f"{path} {name}")


def test_two_devices_give_the_same_bank_split_and_curves(undisturbed, tmp_path):
  workdir = tmp_path / "run"
  report, _ = run(workdir, devices=2)
  one, expected, _ = undisturbed
  assert report["hardware"]["devices"] == 2
  assert report["dataset"] == expected["dataset"]

  def curve(folder, stage):
    lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]

  for stage in ("classifier/csl", "diffusion/memdiff"):
    for a, b in zip(curve(workdir, stage), curve(one, stage), strict=True):
      assert (a["step"], a["kind"]) == (b["step"], b["kind"])
      # Sums over devices round differently, and training amplifies that step by step.
      rtol = 5e-3 if a["step"] <= 5 else 5e-2
      np.testing.assert_allclose(a["metrics"]["loss"], b["metrics"]["loss"], rtol=rtol)
  counts = np.array(report["dataset"]["train_counts"])
  ours, theirs = (stored_exemplars(folder, counts) for folder in (workdir, one))
  np.testing.assert_array_equal(ours, theirs)
  assert (ours >= 0).sum() == 2 * np.minimum(counts, 32).sum()


def test_pieces_of_the_loss_are_compared_to_the_heads_of_the_run(undisturbed):
  """With nothing changed the heads are those of the run; every other row changes something."""
  workdir, report, _ = undisturbed
  _, e = pipeline.open_experiment(report["config"], str(workdir), tensorboard=False, command="")
  try:
    found = confidence.outcomes(e, "memdiff")
    labels = e.dataset.test_labels
  finally:
    e.workdir.close()
  assert list(found) == [variant.title for variant in confidence.VARIANTS]
  rows = {row["variant"]: row for row in confidence.summarise(found, labels)}
  own = rows[confidence.AS_RUN.title]
  assert own["top1"]["mean"] == pytest.approx(rows_of(report)["memdiff+csl"]["top1"]["mean"])
  assert own["difference"] == {"mean": 0.0, "std": 0.0}
  for row in rows.values():
    by_seed = np.subtract(row["top1_by_seed"], own["top1_by_seed"])
    assert row["difference"]["mean"] == pytest.approx(by_seed.mean())
    assert row["difference"]["std"] == pytest.approx(by_seed.std(ddof=1))
  for name in ("weights", "logits", "predictions"):
    assert own[f"{name}_moved"] == {"mean": 0.0, "std": 0.0}
  entropy = rows["its entropy, the letter of the design"]
  assert entropy["weights_moved"]["mean"] > 0.1 and entropy["logits_moved"]["mean"] > 0.01
  assert "weights_moved" not in rows["no synthetic features"]
  result = {"name": "digits", "generator": "memdiff", "num_seeds": 2, "rows": list(rows.values())}
  page = confidence.markdown(result | timing.environment())
  assert f"| as in the run |  |  |  | {isolating.percent(own['top1'], 2)} |  |" in page
  assert all(f"| {title} |" in page for title in found)


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
