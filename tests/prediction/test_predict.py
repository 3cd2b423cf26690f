"""Predictions of finished runs: what the report says, from files, without the training data."""

import csv
import json
import shutil

import jax
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from memdiff import config as config_lib
from memdiff import predict
from memdiff.evaluation import calibration
from memdiff.prediction import finished, methods
from memdiff.runtime import mesh as mesh_lib
from tests import support


def called(*arguments):
  return predict.main([str(argument) for argument in arguments])


def lines_of(path):
  with path.open(encoding="utf-8", newline="") as file:
    return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_method_and_seed_scores_what_the_report_says(of_features, of_images):
  for workdir, inputs, labels in (of_features, of_images):
    run = finished.open_run(str(workdir))
    numbers = [run.class_names.index(str(label)) for label in labels]
    assert len(run.methods) > 6
    support.check_that_predictions_are_those_of_the_report(
      workdir, inputs, np.array(numbers), run.methods
    )


def test_seeds_are_averaged_by_their_probabilities(of_features):
  workdir, inputs, _ = of_features
  run, mesh = finished.open_run(str(workdir)), mesh_lib.make_mesh()
  said = [
    np.asarray(jax.jit(c.log_probabilities)(c.weights, inputs))
    for c in (methods.load(run, "real+csl", seeds, mesh) for seeds in ([0], [1], [0, 1]))
  ]
  assert np.abs(said[0] - said[1]).max() > 1e-3
  np.testing.assert_allclose(
    np.exp(said[2]), (np.exp(said[0]) + np.exp(said[1])) / 2, rtol=1e-4, atol=1e-6
  )


def test_the_temperature_of_cross_validation_divides_the_logits(of_features, monkeypatch):
  workdir, inputs, _ = of_features
  run, mesh = finished.open_run(str(workdir)), mesh_lib.make_mesh()
  assert run.calibration("real+csl")["temperature"] is not None

  def said(temperature):
    known = run.calibration("real+csl") | {"temperature": temperature}
    monkeypatch.setattr(finished.FinishedRun, "calibration", lambda *_: known)
    classifier = methods.load(run, "real+csl", [0], mesh)
    return np.asarray(classifier.log_probabilities(classifier.weights, inputs))

  cold, hot = said(1.0), said(2.0)
  expected = cold / 2 - np.log(np.exp(cold / 2).sum(axis=1, keepdims=True))
  np.testing.assert_allclose(hot, expected, atol=1e-4)


def test_a_folder_becomes_a_table_and_what_cannot_be_read_says_so(of_images, tmp_path, capsys):
  workdir, images, _ = of_images
  (tmp_path / "in" / "deeper").mkdir(parents=True)
  for number in range(5):
    path = tmp_path / "in" / "deeper" / f"{number}.png"
    Image.fromarray(images[number, ..., 0]).save(path)
  (tmp_path / "in" / "torn.png").write_bytes(b"\x89PNG torn")
  (tmp_path / "in" / "notes.txt").write_text("no image")
  Image.fromarray(np.full((24, 30, 3), 255, np.uint8)).save(tmp_path / "in" / "large.jpg")
  output = tmp_path / "out.csv"
  asked = ("--workdir", workdir, "--input", tmp_path / "in", "--top", 2)
  assert called(*asked, "--output", output) == 0
  lines = lines_of(output)
  assert [line["path"].rpartition("/")[2] for line in lines] == [
    *(f"{n}.png" for n in range(5)), "large.jpg", "torn.png",
  ]  # fmt: skip
  assert list(lines[0]) == ["path", "class", "probability", "class_2", "probability_2", "error"]
  for line in lines[:-1]:
    assert float(line["probability"]) >= float(line["probability_2"]) > 0 and not line["error"]
  assert lines[-1]["class"] == lines[-1]["probability_2"] == "" and "image" in lines[-1]["error"]
  shown = capsys.readouterr()
  assert "1 could not be used" in shown.out
  assert "7 images taken" in shown.err and "1 .txt" in shown.err and "seed 0" in shown.err

  np.savez(tmp_path / "some.npz", images=images[:5])
  of_array = ("--workdir", workdir, "--input", tmp_path / "some.npz", "--top", 2)
  assert called(*of_array, "--output", tmp_path / "out.parquet") == 0
  table = parquet.read_table(tmp_path / "out.parquet").to_pydict()
  assert table["row"] == list(range(5)) and table["error"] == [None] * 5
  assert table["class"] == [line["class"] for line in lines[:5]]
  np.testing.assert_allclose(
    table["probability"], [float(line["probability"]) for line in lines[:5]], rtol=1e-5
  )


def test_rows_of_numbers_may_have_gaps_and_come_in_every_format(of_features, tmp_path):
  workdir, inputs, labels = of_features
  inputs = inputs.copy()
  inputs[2, 1] = np.nan
  np.save(tmp_path / "rows.npy", inputs)
  np.savez(tmp_path / "rows.npz", features=inputs, other=np.zeros(3))
  (tmp_path / "parts").mkdir()
  for number, rows in enumerate((inputs[:50], inputs[50:])):
    part = pyarrow.table({"features": list(rows)})
    parquet.write_table(part, tmp_path / "parts" / f"part-{number}.parquet")
  found = []
  for name in ("rows.npy", "rows.npz", "parts"):
    output = tmp_path / f"{name}.csv"
    asked = ("--workdir", workdir, "--input", tmp_path / name, "--output", output, "--average")
    assert called(*asked, "--method", "real+balanced_softmax") == 0
    found.append(lines_of(output))
  assert found[0] == found[1] == found[2] and len(found[0]) == len(inputs)
  assert found[0][2]["error"] == "it has a NaN or an infinity" and not found[0][2]["class"]
  hits = [line["class"] == label for line, label in zip(found[0], labels, strict=True)]
  assert np.mean(hits) > 0.6


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"--method": "nothing"}, "--method is 'nothing', but must be a method of the run: real+"),
    ({"--seed": 1}, "--seed is 1, but the run has the seeds 0, 3."),
    ({"--seed": 3, "--average": None}, "exclude each other"),
    ({"--top": 0}, "--top must be at least 1."),
    ({"--output": "x.txt"}, "must end in one of .csv, .parquet"),
    ({"--output": "nowhere/x.csv"}, "there is no folder nowhere"),
    ({"--input": "wide.npy"}, "have 7 numbers, but the classifier takes 6"),
    ({"--input": "cube.npy"}, "must be [rows, numbers]"),
    ({"--input": "empty.npy"}, "holds no rows"),
    ({"--input": "objects.npy"}, "Python objects"),
    ({"--input": "none.npz"}, "There is no file"),
    ({"--input": "two.npz"}, "has no array 'features', but a, b"),
    ({"--input": "a.csv"}, "convert it with"),
    ({"--workdir": "nowhere"}, "There is no run in"),
  ],
)
def test_bad_input_is_one_sentence(of_features, tmp_path, monkeypatch, capsys, changes, words):
  monkeypatch.chdir(tmp_path)
  np.save("wide.npy", np.zeros((3, 7), np.float32))
  np.save("cube.npy", np.zeros((3, 2, 2), np.float32))
  np.save("empty.npy", np.zeros((0, 6), np.float32))
  np.save("objects.npy", np.array([None, 1]), allow_pickle=True)
  np.savez("two.npz", a=np.zeros(2), b=np.zeros(2))
  options = {"--workdir": of_features[0], "--input": "wide.npy", "--output": "x.csv"} | changes
  arguments = [a for name, value in options.items() for a in (name, value) if a is not None]
  assert called(*arguments) in (1, 2)
  shown = capsys.readouterr().err.splitlines()[-1]
  assert words in shown and shown.startswith("memdiff: ")


def test_images_of_another_shape_and_empty_folders_are_refused(of_images, tmp_path, capsys):
  workdir, images, _ = of_images
  np.savez(tmp_path / "large.npz", images=np.repeat(images[:2], 2, axis=1))
  np.savez(tmp_path / "none.npz", images=images[:0])
  (tmp_path / "empty").mkdir()
  for name, words in (
    ("large.npz", "takes images as uint8 [N, 8, 8, 1]"),
    ("none.npz", "holds no images"),
    ("empty", "There is no image in"),
    ("nothing.png", "There is no file or folder"),
  ):
    asked = ("--workdir", workdir, "--input", tmp_path / name, "--output", tmp_path / "x.csv")
    assert called(*asked) == 1
    assert words in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_named(of_features, tmp_path, monkeypatch, capsys):
  workdir, inputs, _ = of_features
  np.save(tmp_path / "x.npy", inputs[:2])

  def full(*_):
    raise OSError(28, "No space left on device", str(tmp_path / "x.csv.partial"))

  monkeypatch.setattr("memdiff.runtime.workdir.os.fsync", full)
  asked = ("--workdir", workdir, "--input", tmp_path / "x.npy", "--output", tmp_path / "x.csv")
  assert called(*asked) == 1
  said = capsys.readouterr().err.splitlines()[-1]
  assert "Cannot write" in said and "No space left on device" in said and "workdir" not in said


def test_a_run_that_is_unfinished_damaged_or_of_another_version_says_so(
  of_features, tmp_path, capsys
):
  copy = tmp_path / "run"
  shutil.copytree(of_features[0], copy)
  report = json.loads((copy / "report.json").read_text())
  np.save(tmp_path / "x.npy", np.zeros((1, 6), np.float32))

  def said(changed=None):
    (copy / "report.json").write_text(changed if changed is not None else json.dumps(report))
    asked = ("--workdir", copy, "--input", tmp_path / "x.npy", "--output", tmp_path / "x.csv")
    assert called(*asked) in (1, 2)
    return capsys.readouterr().err

  (copy / "report.json").unlink()
  assert called("--workdir", copy, "--input", "x.npy", "--output", tmp_path / "x.csv") == 1
  assert "is not finished; run its command again" in capsys.readouterr().err
  assert "Cannot read" in said("{")
  old = {name: value for name, value in report.items() if name != "input"}
  assert "is of another version of memdiff" in said(json.dumps(old))
  unknown = report | {"config": report["config"] | {"wings": 2}}
  assert "is of another version of memdiff" in said(json.dumps(unknown))
  assert "trained no classifier" in said(json.dumps(report | {"experiment": "images"}))
  for path in (copy / "heads").rglob("*.npz"):
    path.write_bytes(b"torn")
  assert "Cannot read" in said()


# --- calibration -----------------------------------------------------------------------------


def test_the_temperature_is_found_again_where_there_are_many_examples():
  rng = np.random.default_rng(0)
  logits = 2 * rng.normal(size=(4000, 5))
  labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
  for temperature in (0.5, 2.5):
    found = calibration.fit_temperature(logits * temperature, labels, "accuracy")
    assert abs(found / temperature - 1) < 0.1
    before = calibration.calibration_error(logits * temperature, labels, "accuracy")
    after = calibration.calibration_error(logits * temperature / found, labels, "accuracy")
    assert after < 0.03 < before
  assert calibration.fit_temperature(logits, labels, "accuracy") == 1.0


def test_a_few_examples_change_no_temperature():
  logits = np.array([[3.0, 0], [3, 0], [3, 0], [0, 3], [3, 0]])
  assert calibration.fit_temperature(logits, np.array([0, 0, 0, 1, 1]), "balanced_accuracy") == 1.0


def test_the_calibration_error_is_the_weighted_distance_of_confidence_and_accuracy():
  logits = np.log([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
  labels = np.array([0, 0, 1, 1])
  # Confidence .9: hits 2 of 3; confidence .6: a hit.
  by_examples = 3 / 4 * abs(0.9 - 2 / 3) + 1 / 4 * abs(0.6 - 1)
  assert abs(calibration.calibration_error(logits, labels, "accuracy") - by_examples) < 1e-6
  by_classes = abs((1 / 4 + 1 / 4) * 0.1 - 1 / 4 * 0.9) + 1 / 4 * 0.4
  assert abs(calibration.calibration_error(logits, labels, "balanced_accuracy") - by_classes) < 1e-6


def test_of_many_logits_some_that_are_spread_are_enough():
  assert calibration.enough(5, 3).tolist() == [0, 1, 2, 3, 4]
  some = calibration.enough(10**7, 1000)
  assert len(some) == 2**25 // 1000 and some[0] == 0 and some[-1] == 10**7 - 1


def test_the_names_of_rows_are_read_back():
  from memdiff.experiments.augmented_settings import Row

  for row in (
    Row("real"), Row("real", head_only=True), Row("ddpm", "diffult@0.3"),
    Row("memdiff+balanced", "near&new", head_only=True),
  ):  # fmt: skip
    assert Row.named(row.name) == row


def test_settings_of_reports_are_the_runs_own(of_features):
  run = finished.open_run(str(of_features[0]))
  assert config_lib.as_dict(run.settings) == run.report["config"]
