"""Exported classifiers: they work where memdiff is not, and say what they are."""

import json
import subprocess
import sys

import numpy as np
import pytest

from input_pipeline.new_inputs import ArrayInputs
from memdiff import export
from memdiff.prediction import finished, methods, predict
from memdiff.runtime import mesh as mesh_lib
from tests import support

# What the model card tells its readers to do, in a process that has no memdiff.
ELSEWHERE = """
import sys
for name in ("memdiff", "input_pipeline", "flax"):
  sys.modules[name] = None  # importing it fails
import jax, jax.export
import numpy as np
import safetensors.numpy
program = jax.export.deserialize(open(sys.argv[1] + "/classifier.stablehlo", "rb").read())
weights = safetensors.numpy.load_file(sys.argv[1] + "/weights.safetensors")
inputs = np.load(sys.argv[2])
np.save(sys.argv[3], program.call(weights, inputs))
"""


@pytest.mark.parametrize("kind", ["of_features", pytest.param("of_images", marks=pytest.mark.slow)])
def test_the_program_agrees_with_predict_where_memdiff_is_not(kind, request, tmp_path):
  workdir, inputs, _ = request.getfixturevalue(kind)
  arguments = [f"--workdir={workdir}", f"--output={tmp_path / 'model'}", "--average"]
  assert export.main(arguments) == 0
  for number in (1, 33):  # batches of any size
    np.save(tmp_path / "inputs.npy", inputs[:number])
    subprocess.run(
      [sys.executable, "-c", ELSEWHERE, tmp_path / "model", tmp_path / "inputs.npy",
       tmp_path / "said.npy"],
      check=True, cwd=tmp_path, timeout=support.HANG, env={"JAX_PLATFORMS": "cpu", "PATH": ""},
    )  # fmt: skip
    said = np.load(tmp_path / "said.npy")
    run, mesh = finished.open_run(str(workdir)), mesh_lib.make_mesh()
    classifier = methods.load(run, run.method(), [0, 1], mesh)
    classes = len(run.class_names)
    found = predict.predict(classifier, ArrayInputs(inputs[:number]), mesh, top=classes)
    ours = np.zeros_like(said)
    np.put_along_axis(ours, found.classes, found.probabilities, axis=1)
    assert said.shape == (number, classes)
    np.testing.assert_allclose(np.exp(said), ours, atol=1e-5)


def test_the_description_and_the_card_say_what_it_is(of_images, tmp_path):
  workdir, *_ = of_images
  folder = tmp_path / "model"
  assert export.main([f"--workdir={workdir}", f"--output={folder}", "--method=ldam_drw"]) == 0
  assert sorted(path.name for path in folder.iterdir()) == [
    "README.md", "classifier.stablehlo", "model.json", "weights.safetensors",
  ]  # fmt: skip
  about = json.loads((folder / "model.json").read_text())
  assert about["classes"] == [str(digit) for digit in range(10)]
  assert about["inputs"]["shape"] == ["batch", 8, 8, 1] and about["method"] == "ldam_drw"
  report = json.loads((workdir / "report.json").read_text())
  card = (folder / "README.md").read_text()
  for words in (
    "# digits_lt: ldam_drw", "## Use", "## Limits", report["dataset"]["split_sha256"],
    "| 9 | 2 |", "expected calibration error",
  ):  # fmt: skip
    assert words in card


def test_a_folder_with_other_files_is_left_alone(of_images, tmp_path, capsys):
  workdir, *_ = of_images
  (tmp_path / "thesis.tex").write_text("ten years")
  assert export.main([f"--workdir={workdir}", f"--output={tmp_path}"]) == 2
  assert "holds other files (thesis.tex)" in capsys.readouterr().err
  assert export.main([f"--workdir={workdir}", f"--output={tmp_path / 'thesis.tex'}"]) == 2
  for _ in range(2):  # its own files it writes anew
    assert export.main([f"--workdir={workdir}", f"--output={tmp_path / 'model'}"]) == 0
