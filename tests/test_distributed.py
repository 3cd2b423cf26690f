"""Two processes on one machine, two devices each: one run, also after a kill and a SIGTERM."""

import json
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from memdiff.errors import ConfigError
from memdiff.runtime.distributed import Cluster, from_environment
from tests import support

ROOT = pathlib.Path(__file__).parent.parent
PATIENCE = 45  # seconds until a silent process is given up
# Every phase once, and little to compile: only process 0 may write to the cache of programs.
SMALL = (
  "--config.classifier.num_epochs=3.8",  # 20 steps
  "--config.generators.names=('memdiff',)", "--config.diffusion.num_steps=20",
  "--config.head.losses=('csl',)", "--config.head.training.num_steps=10",
  "--config.selection.folds=0",
)  # fmt: skip

DIGITS = ("configs/digits_lt.py:smoke", SMALL)
IMAGES = (
  "configs/images/digits_lt.py:smoke",
  ("--config.methods=('memdiff+coral',)", "--config.sampling.guidance=(1.0,)"),
)

AUGMENTED = (
  "configs/augmented/digits_lt.py:smoke",
  (
    "--config.methods=('memdiff+balanced',)", "--config.controls=('real',)",
    "--config.losses=('cross_entropy',)", "--config.pool.filters=('none','agreeing')",
    "--config.selection.folds=0", "--config.head_only=False", "--config.classifier.num_epochs=2.0",
  ),
)  # fmt: skip

# --- how processes find each other -----------------------------------------------------------


def test_flags_come_before_the_environment():
  environment = {
    "JAX_COORDINATOR_ADDRESS": "there:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3",
  }  # fmt: skip
  assert from_environment(Cluster(), environment) == Cluster("there:1", 4, 3)
  flags = Cluster("here:2", 2, 0)
  assert from_environment(flags, environment) == flags
  assert from_environment(Cluster(), {}) == Cluster()


@pytest.mark.parametrize(
  ("make", "words"),
  [
    (lambda: Cluster("a:1", 0, 0), "--num_processes is 0"),
    (lambda: Cluster("a:1", 2, 2), "--process_id is 2, but must be from 0 to 2 - 1"),
    (lambda: Cluster("a:1", 2, -1), "--process_id is -1"),
    (lambda: Cluster(timeout=1), "--cluster_timeout is 1"),
    (lambda: from_environment(Cluster(), {"JAX_NUM_PROCESSES": "two"}), "JAX_NUM_PROCESSES"),
    (lambda: from_environment(Cluster(), {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "5"}), "5"),
  ],
)
def test_clusters_that_cannot_be_are_refused(make, words):
  with pytest.raises(ConfigError, match=words):
    make()


def start(workdir, number=None, count=2, port=0, *arguments, settings=DIGITS):
  """A process of a run: alone with four devices, or `number` of `count` with two."""
  config, changes = settings
  command = [
    *(sys.executable, "main.py", f"--config={config}"),
    *(f"--workdir={workdir}", "--notensorboard", f"--cluster_timeout={PATIENCE}", *changes),
    *arguments,
  ]
  if number is not None:
    command += [
      *(f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={number}"),
    ]
  return subprocess.Popen(
    command, cwd=ROOT, env=support.environment_of_children(4 if number is None else 2), text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


def start_both(workdir, settings=DIGITS, *of_second):
  """Two processes; the second one with more arguments."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  return [
    start(workdir, number, 2, port, *more, settings=settings)
    for number, more in ((0, ()), (1, of_second))
  ]


def end(processes):
  """(exit codes, what they said) of processes that must end by themselves."""
  try:
    outputs = [process.communicate(timeout=support.HANG) for process in processes]
  except subprocess.TimeoutExpired:
    support.kill(processes)
    raise
  return [p.returncode for p in processes], [err for _, err in outputs]


def ends_of(texts):
  return "\n".join(text[-2000:] for text in texts)


def said(text):
  return [line for line in text.splitlines() if line.startswith("memdiff: ")]


def test_a_process_that_stays_alone_says_so_and_does_not_run_alone(tmp_path):
  (code,), (text,) = end([start(tmp_path / "run", 0, 2, 29_517)])
  assert code == 2
  assert f"Not all processes joined within {PATIENCE} s" in said(text)[-1]
  assert "Traceback" not in text and not (tmp_path / "run").exists()


def test_without_a_cluster_distributed_is_an_error(tmp_path):
  (code,), (text,) = end([start(tmp_path / "run", None, 2, 0, "--distributed")])
  assert code == 2 and "Traceback" not in text
  assert "no cluster was found" in said(text)[-1] and "--coordinator=HOST:PORT" in said(text)[-1]
  assert not (tmp_path / "run").exists()


# --- whole runs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
  """The same run in one process with as many devices."""
  workdir = tmp_path_factory.mktemp("one") / "run"
  codes, texts = end([start(workdir)])
  assert codes == [0], ends_of(texts)
  return workdir


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("two") / "run"
  codes, texts = end(start_both(workdir))
  assert codes == [0, 0], ends_of(texts)
  for number, text in enumerate(texts):
    assert f"memdiff: process {number} of 2, with 2 of 4 devices (cpu)" in text
  assert "[1/7 classifier]" in texts[0] and "[1/7 classifier]" not in texts[1]
  return workdir


def check_same(workdir, expected):
  """Reports, curves and arrays, to the last digit."""
  reports = [json.loads((w / "report.json").read_text()) for w in (workdir, expected)]
  for part in ("classification", "generators", "choices", "config"):
    assert reports[0][part] == reports[1][part], part
  for path in sorted(p.relative_to(expected) for p in expected.rglob("metrics.jsonl")):
    assert (workdir / path).read_text() == (expected / path).read_text(), path
  for name in ("memory_bank/features", "hallucination/memdiff"):
    with np.load(workdir / f"{name}.npz") as ours, np.load(expected / f"{name}.npz") as theirs:
      for key in theirs:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=f"{name} {key}")


@pytest.mark.slow
def test_two_processes_train_as_one_does(undisturbed, one_process):
  report = json.loads((undisturbed / "report.json").read_text())
  assert (report["hardware"]["processes"], report["hardware"]["devices"]) == (2, 4)
  for stage in ("classifier/csl", "diffusion/memdiff"):
    curves = [
      [json.loads(line) for line in (w / stage / "metrics.jsonl").read_text().splitlines()]
      for w in (undisturbed, one_process)
    ]
    for ours, theirs in zip(*curves, strict=True):
      assert (ours["step"], ours["kind"]) == (theirs["step"], theirs["kind"])
      np.testing.assert_allclose(ours["metrics"]["loss"], theirs["metrics"]["loss"], rtol=0.05)
  tables = [json.loads((w / "report.json").read_text()) for w in (undisturbed, one_process)]
  methods = [[row["method"] for row in table["classification"]] for table in tables]
  assert methods[0] == methods[1]


@pytest.mark.slow
def test_a_run_killed_and_stopped_again_and_again_ends_with_the_same_numbers(undisturbed, tmp_path):
  """Each process is killed once, in two phases; then SIGTERM reaches one of them, and both."""
  workdir = tmp_path / "run"
  stopped_after = (
    (kill, 1, "classifier/csl/checkpoints/10"),
    (kill, 0, "classifier/csl/checkpoints/20"),
    (stop, (1,), "diffusion/memdiff/checkpoints/10"),
    (stop, (0, 1), "heads/real/metrics.jsonl"),
  )
  for end_early, whom, moment in stopped_after:
    processes = start_both(workdir)
    support.wait_for(workdir / moment, processes)
    end_early(processes, whom)
  codes, texts = end(start_both(workdir))
  assert codes == [0, 0], ends_of(texts)
  check_same(workdir, undisturbed)


def kill(processes, victim):
  """Kills one process; the other ends with a sentence."""
  processes[victim].send_signal(signal.SIGKILL)
  codes, texts = end(processes)
  assert codes[victim] == -signal.SIGKILL and codes[1 - victim] != 0
  other = texts[1 - victim]
  # If the coordinator is gone, JAX itself may be faster to say so.
  assert said(other)[-1].endswith("to resume from the last checkpoint.") or (
    victim == 0 and "another task died" in other
  )


def stop(processes, receivers):
  """Sends SIGTERM to some; all end with a sentence."""
  for number in receivers:
    processes[number].send_signal(signal.SIGTERM)
  codes, texts = end(processes)
  assert codes == [143, 143], ends_of(texts)
  for text in texts:
    assert "Stopped by SIGTERM" in said(text)[-1] and "Traceback" not in text


@pytest.mark.slow
def test_a_process_with_another_config_ends_the_run_before_it_trains(tmp_path):
  workdir = tmp_path / "run"
  codes, texts = end(start_both(workdir, DIGITS, "--config.encoder.backbone.scale=20.0"))
  assert codes[1] == 1 and codes[0] == 75, ends_of(texts)
  assert "Process 1 was started with another config than process 0" in said(texts[1])[-1]
  assert not any(workdir.rglob("metrics.jsonl"))


@pytest.mark.slow
def test_two_processes_generate_images_as_one_does(tmp_path):
  """Training differs by the order of sums over devices; the samples of both are of one noise."""
  codes, texts = end(start_both(tmp_path / "two", IMAGES))
  assert codes == [0, 0], ends_of(texts)
  codes, texts = end([start(tmp_path / "one", settings=IMAGES)])
  assert codes == [0], ends_of(texts)
  files = [sorted((tmp_path / name / "sampling").rglob("*.npz")) for name in ("one", "two")]
  assert len(files[0]) == len(files[1]) == 3
  for one, two in zip(*files, strict=True):
    with np.load(one) as ours, np.load(two) as theirs:
      np.testing.assert_array_equal(ours["labels"], theirs["labels"])
      apart = np.abs(ours["images"].astype(int) - theirs["images"].astype(int))
      assert apart.mean() < 2


@pytest.mark.slow
def test_two_processes_train_on_generated_images_after_a_kill_too(tmp_path):
  """Process 0 writes what both read: the pool, and what classifiers say."""
  workdir = tmp_path / "run"
  processes = start_both(workdir, AUGMENTED)
  support.wait_for(workdir / "pool/final/memdiff+balanced/run_0.npz", processes)
  kill(processes, 1)
  codes, texts = end(start_both(workdir, AUGMENTED))
  assert codes == [0, 0], ends_of(texts)
  report = json.loads((workdir / "report.json").read_text())
  assert report["hardware"]["processes"] == 2
  rows = ("real", "memdiff+balanced:none", "memdiff+balanced:agreeing", "oracle")
  assert [r["method"] for r in report["classification"]] == [f"{x}+cross_entropy" for x in rows]
