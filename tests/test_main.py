"""The command line: every wrong input ends in one sentence and an exit code."""

import fcntl
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from configs import digits_lt
from memdiff import pipeline
from memdiff.errors import ConfigError
from tests import support

ROOT = pathlib.Path(__file__).parent.parent
SMOKE = "--config=configs/digits_lt.py:smoke"


def call(*arguments, environment=None, **kwargs):
  environment = support.environment_of_children() | (environment or {})
  return subprocess.run(
    [sys.executable, "main.py", *arguments],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=support.HANG,
    check=False,
    **kwargs,
  )


def expect_sentence(result, code, *parts):
  assert result.returncode == code, result.stderr
  assert "Traceback" not in result.stderr
  said = [line for line in result.stderr.splitlines() if line.startswith("memdiff: ")]
  assert len(said) == 1, result.stderr
  for part in parts:
    assert part in said[0]


@pytest.mark.parametrize(
  ("arguments", "parts"),
  [
    ([], ["--config", "--workdir"]),
    (["--config=configs/nope.py", "--workdir=x"], ["configs/nope.py", "Cannot read"]),
    (["--config=configs/digits_lt.py:huge", "--workdir=x"], ["huge", "default", "smoke"]),
    ([SMOKE, "--workdir=x", "stray"], ["stray"]),
    ([SMOKE, "--workdir=x", "--stray"], ["stray"]),
    ([SMOKE, "--workdir=x", "--config.encoder.stray=1"], ["config.encoder.stray"]),
    ([SMOKE, "--workdir=x", "--config.stray.field=1"], ["config.stray.field"]),
    ([SMOKE, "--workdir=x", "--config.encoder.backbone.scale=many"], ["backbone.scale", "many"]),
    ([SMOKE, "--workdir=gs://bucket/run"], ["gs://bucket/run", "a folder of this machine"]),
    ([SMOKE, "--workdir="], ["--workdir is empty"]),
    (["--config=~nobody-has-this-name/c.py", "--workdir=x"], ["--config", "home folder"]),
    (["--config", "configs/nope.py", "--workdir=x"], ["config file configs/nope.py"]),
  ],
)
def test_wrong_command_lines_are_usage_errors(arguments, parts, tmp_path):
  expect_sentence(call(*[a.replace("=x", f"={tmp_path}/x") for a in arguments]), 2, *parts)
  assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
  ("override", "parts"),
  [
    ("--config.hallucination.sampler=euler", ["hallucination.sampler", "'euler'", "ddim"]),
    ("--config.classifier.batch_size=4096", ["classifier.batch_size", "4096"]),
    ("--config.generators.fill_to=(1,)", ["fill_to=1", "no class with fewer than"]),
    ("--config.loop.eval_every=7", ["eval_every", "multiple of steps_per_dispatch"]),
  ],
)
def test_wrong_values_are_refused_before_any_work(override, parts, tmp_path):
  result = call(SMOKE, f"--workdir={tmp_path / 'run'}", override, "--notensorboard")
  expect_sentence(result, 2, *parts)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("override", "parts"),
  [
    ({"dataset.name": "cifar"}, ["dataset.name", "digits"]),
    ({"hallucination.num_steps": 2000}, ["hallucination.num_steps", "2000"]),
    ({"generators.names": ("memdiff", "gan")}, ["generators.names", "'gan'", "memdiff"]),
    ({"head.training.start": "nowhere"}, ["head.training.start", "encoder, zeros"]),
  ],
)
def test_more_wrong_values_are_refused(override, parts):
  config = digits_lt.get_config("smoke")
  config.update_from_flattened_dict(override)
  with pytest.raises(ConfigError) as refused:
    pipeline.prepare(config.to_dict())
  for part in parts:
    assert part in str(refused.value)


def test_an_imbalance_that_empties_a_class_is_named_with_its_limit(tmp_path):
  result = call(SMOKE, f"--workdir={tmp_path / 'run'}", "--config.dataset.imbalance=500")
  expect_sentence(result, 1, "imbalance", "122")


def test_a_workdir_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  result = call(SMOKE, f"--workdir={tmp_path / 'file' / 'run'}", "--notensorboard")
  expect_sentence(result, 1, "file/run", "another --workdir")


def test_a_device_that_is_not_there_is_one_sentence(tmp_path):
  result = call(SMOKE, f"--workdir={tmp_path / 'run'}", environment={"JAX_PLATFORMS": "cuda"})
  expect_sentence(result, 2, "JAX_PLATFORMS is cuda", 'pip install "jax[cuda13]==')
  assert not (tmp_path / "run").exists()


def test_an_argument_in_another_encoding_is_one_sentence(tmp_path):
  ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
  result = call(SMOKE, f"--workdir={tmp_path / 'läuft'}", environment=ascii_locale)
  expect_sentence(result, 2, "l\\udcc3\\udca4uft", "PYTHONUTF8=1")
  assert not list(tmp_path.iterdir())


def test_two_runs_in_one_workdir_are_refused(tmp_path):
  with (tmp_path / ".lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    expect_sentence(call(SMOKE, f"--workdir={tmp_path}", "--notensorboard"), 1, "Another run")


def test_debug_shows_the_traceback(tmp_path):
  result = call(SMOKE, f"--workdir={tmp_path}", "--config.dataset.imbalance=500", "--debug")
  assert result.returncode == 1
  assert "Traceback" in result.stderr


def call_patched(patch, workdir, *arguments):
  """Runs main.py in a process in which the statements of `patch` were executed first."""
  argv = ["main.py", SMOKE, f"--workdir={workdir}", *arguments]
  code = f"import runpy, sys\n{patch}\nsys.argv = {argv!r}\n"
  code += "runpy.run_path('main.py', run_name='__main__')"
  return subprocess.run(
    [sys.executable, "-c", code], env=support.environment_of_children(), cwd=ROOT,
    capture_output=True, text=True, timeout=support.HANG, check=False,
  )  # fmt: skip


def test_a_missing_tensorflow_is_said_before_any_work(tmp_path):
  patch = (
    "import importlib.util as u; find = u.find_spec\n"
    "u.find_spec = lambda name, *a: None if name == 'tensorflow' else find(name, *a)"
  )
  expect_sentence(call_patched(patch, tmp_path / "run"), 2, "tensorflow", "--notensorboard")
  assert not (tmp_path / "run" / "classifier").exists()


@pytest.fixture(scope="module")
def interrupted_run(tmp_path_factory):
  """A run that meets a full disk at its first checkpoint and is called again: (folder, results)."""
  run = tmp_path_factory.mktemp("smoke") / "run"
  patch = (
    "import collections, shutil\n"
    "Usage = collections.namedtuple('Usage', 'total used free')\n"
    "shutil.disk_usage = lambda path: Usage(1, 1, 0)"
  )
  first = call_patched(patch, run, "--notensorboard")
  return run, first, call(SMOKE, f"--workdir={run}", "--notensorboard")


@pytest.fixture
def smoke_run(interrupted_run):
  run, _, result = interrupted_run
  assert result.returncode == 0, result.stderr
  return run


@pytest.mark.slow
def test_a_full_disk_is_said_at_once_and_the_run_goes_on_when_there_is_room(interrupted_run):
  run, first, second = interrupted_run
  expect_sentence(first, 1, "0.0 MiB are free", "make room there", str(run))
  assert second.returncode == 0, second.stderr
  assert (run / "report.html").exists()


@pytest.mark.slow
def test_a_second_call_repeats_nothing(smoke_run):
  before = {p: p.stat().st_mtime_ns for p in smoke_run.rglob("*.npz")}
  result = call(SMOKE, f"--workdir={smoke_run}", "--notensorboard")
  assert result.returncode == 0
  assert (
    result.stderr.count("finished earlier") == len(pipeline.KINDS["memdiff"].phases) - 1
  )  # no joint one
  assert "memdiff" in result.stdout
  assert "report.html" in result.stdout
  assert before == {p: p.stat().st_mtime_ns for p in smoke_run.rglob("*.npz")}


@pytest.mark.slow
def test_a_changed_config_for_a_finished_phase_is_refused_with_the_field_named(smoke_run):
  override = "--config.head.training.num_steps=31"
  result = call(SMOKE, f"--workdir={smoke_run}", "--notensorboard", override)
  expect_sentence(result, 1, "Phase selection", "head.training.num_steps was 30 and is now 31")


@pytest.mark.slow
def test_damaged_files_of_finished_phases_are_named(smoke_run):
  run = smoke_run
  damaged = run / "hallucination" / "memdiff.npz"
  damaged.write_bytes(damaged.read_bytes()[:1000])
  (run / "heads" / "manifest.json").unlink()
  result = call(SMOKE, f"--workdir={run}", "--notensorboard")
  expect_sentence(result, 1, "memdiff.npz and", "manifest.json and run the same command")
  np.savez(damaged, features=np.array([{}], dtype=object))
  result = call(SMOKE, f"--workdir={run}", "--notensorboard")
  expect_sentence(result, 1, "memdiff.npz and", "manifest.json and run the same command")


@pytest.mark.slow
def test_a_run_in_poor_surroundings(tmp_path):
  """No home folder, an ASCII locale, brackets in the workdir, a tuple given twice, no clipping."""
  environment = {
    "HOME": "/nonexistent", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii",
  }  # fmt: skip
  command = [
    SMOKE, f"--workdir={tmp_path}/[lr=*] {{a?}}", "--notensorboard",
    "--config.seeds=(5,6,7)", "--config.seeds", "(1,2)", "--config.hallucination.x0_limit=0",
    "--config.generators.names=('memdiff',)",
  ]  # fmt: skip
  first = call(*command, environment=environment)
  assert first.returncode == 0, first.stderr[-3000:]
  assert "running on 1 x CPU" in first.stderr and "+-" in first.stdout and first.stdout.isascii()
  (run,) = tmp_path.iterdir()
  report = json.loads((run / "report.json").read_text(encoding="utf-8"))
  assert report["config"]["seeds"] == [1, 2]
  for folder in (run / "heads", run / "evaluation"):  # and from checkpoints
    shutil.rmtree(folder)
  second = call(*command, environment=environment)
  assert second.returncode == 0, second.stderr[-3000:]
  assert second.stdout == first.stdout
