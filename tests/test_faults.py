"""The campaign of faults: it must see what it looks for."""

import json
import os
import random

import numpy as np
import pytest

from benchmarks.faults import damage, evidence, kills

SAID = """[1/8 classifier] finished earlier
[2/8 memory_bank] encoding all images, filling the bank
[3/8 diffusion] diffusion/memdiff resumes at step 25/40
[3/8 diffusion] diffusion/memdiff  step 30/40  75%  0:01 left  loss 0.5
[3/8 diffusion] diffusion/other  step 5/40  12%  0:03 left  loss 0.5
"""


def write_run(folder):
  (folder / "heads" / "real").mkdir(parents=True)
  report = {part: {"top1": 0.1} for part in evidence.EXACT} | {"timing": folder.name}
  (folder / "report.json").write_text(json.dumps(report))
  (folder / "heads" / "real" / "metrics.jsonl").write_text('{"loss": 0.123456789}\n')
  np.savez(folder / "heads" / "logits.npz", a=np.arange(3.0), b=np.zeros(2, np.int32))
  return folder


@pytest.fixture
def runs(tmp_path):
  return write_run(tmp_path / "undisturbed"), write_run(tmp_path / "run")


def test_equal_runs_do_not_differ(runs):
  assert evidence.differences(*runs) == []


def test_a_changed_last_digit_is_a_difference(runs):
  undisturbed, run = runs
  report = json.loads((run / "report.json").read_text())
  for part in evidence.EXACT:
    changed = report | {part: {"top1": np.nextafter(0.1, 1)}}
    (run / "report.json").write_text(json.dumps(changed))
    assert evidence.differences(undisturbed, run) == [f"report.json: {part}"]
  (run / "report.json").unlink()
  assert len(evidence.differences(undisturbed, run)) == len(evidence.EXACT)


def test_a_changed_curve_or_array_is_a_difference(runs):
  undisturbed, run = runs
  curve, arrays = run / "heads/real/metrics.jsonl", run / "heads/logits.npz"
  curve.write_text(curve.read_text().replace("9}", "8}"))
  assert evidence.differences(undisturbed, run) == ["heads/real/metrics.jsonl"]
  curve.unlink()
  assert evidence.differences(undisturbed, run) == ["heads/real/metrics.jsonl"]
  curve.write_text((undisturbed / "heads/real/metrics.jsonl").read_text())
  for change in (
    {"a": np.nextafter(np.arange(3.0), 9)}, {"a": np.arange(3)}, {"c": np.zeros(1)},
  ):  # fmt: skip
    np.savez(arrays, **({"a": np.arange(3.0), "b": np.zeros(2, np.int32)} | change))
    assert evidence.differences(undisturbed, run) == ["heads/logits.npz"]
  damage.cut(arrays)
  assert evidence.differences(undisturbed, run) == ["heads/logits.npz"]


def test_a_phase_that_is_done_again_or_gone_is_lost(tmp_path):
  for phase in ("classifier", "memory_bank"):
    (tmp_path / phase).mkdir()
    (tmp_path / phase / "manifest.json").write_text('{"finished": true}')
  before = evidence.finished_phases(tmp_path)
  assert set(before) == {"classifier", "memory_bank"}
  assert evidence.lost_phases(before, before, SAID) == ["memory_bank"]
  (tmp_path / "classifier" / "manifest.json").write_text('{"finished": false}')
  after = evidence.finished_phases(tmp_path)
  assert evidence.lost_phases(before, after, "") == ["classifier"]
  os.utime(tmp_path / "memory_bank" / "manifest.json", ns=(1, 1))
  assert evidence.lost_phases(before, evidence.finished_phases(tmp_path), "") == list(before)


def test_a_saved_step_that_is_trained_again_is_lost(tmp_path):
  for stage, step in (("diffusion/memdiff", 25), ("diffusion/other", 5)):
    for name in (str(step), str(step - 5), f"{step + 5}.orbax-checkpoint-tmp"):
      (tmp_path / stage / "checkpoints" / name).mkdir(parents=True)
  saved = evidence.saved_steps(tmp_path)
  assert saved == {"diffusion/memdiff": 25, "diffusion/other": 5}
  assert evidence.lost_steps(saved, SAID) == ["diffusion/other"]
  assert evidence.lost_steps(saved | {"diffusion/memdiff": 30}, SAID) == [
    *("diffusion/memdiff", "diffusion/other")
  ]
  assert len(evidence.writes(tmp_path)) == 2


def test_only_one_sentence_is_a_refusal():
  sentence = "memdiff: x is damaged; remove the folder /a/b to run the phase again."
  assert evidence.sentence_of(SAID + sentence + "\n") == sentence
  for said in (
    SAID,
    "Traceback\n" + sentence,
    sentence + "\nmore",
    sentence[:-1],
    2 * f"{sentence}\n",
  ):
    assert evidence.sentence_of(said) is None


@pytest.mark.parametrize(
  ("sentence", "paths"),
  [
    ("No checkpoint in /a/b can be read (x); remove that folder to train.", ["/a/b"]),
    ("/a/m.json is damaged; remove it to run the phase again.", ["/a/m.json"]),
    (
      "Cannot read /a/b/f.npz (x); remove /a/b/f.npz and /a/m.json and run.",
      ["/a/b/f.npz", "/a/m.json"],
    ),
  ],
)
def test_what_a_sentence_says_to_remove(sentence, paths):
  assert [str(path) for path in damage.to_remove(sentence)] == paths


def test_where_a_run_ended():
  assert (
    evidence.phase_of("") == evidence.phase_of("[1/8 classifier] finished earlier\n") == "startup"
  )
  assert evidence.phase_of(SAID) == "diffusion"
  assert evidence.phase_of("[8/8 evaluation] drawing\n") == "evaluation"
  for last in ("finished in 8.2 s, of which", "finished earlier"):
    assert evidence.phase_of(f"[8/8 evaluation] {last}\n") == "report"


def test_every_phase_is_killed_and_every_one_that_saves_in_a_write():
  seconds = dict.fromkeys((*evidence.PHASES, "startup", "report"), 2.0)
  chains = [kills.plan(number, seconds, random.Random(0)) for number in range(2)]
  for chain in chains:
    assert [m.phase for m in chain] == ["startup", *evidence.PHASES, "report"]
    assert all(0 <= m.seconds < 2 for m in chain)
  in_write = {m.phase for chain in chains for m in chain if m.write is not None}
  assert in_write == {*("classifier", "memory_bank", "diffusion", "selection", "heads", "joint")}
