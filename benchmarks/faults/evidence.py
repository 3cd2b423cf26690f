"""What two runs must have in common, what a run kept of an earlier one, and what it said."""

import contextlib
import json
import os
import pathlib
import re
import zipfile
import zlib

import numpy as np

# Of report.json, what must be equal to the last digit; the rest are times, paths and versions.
EXACT = (
  "classification", "features", "generators", "comparison", "recommendation", "choices", "dataset",
  "synthetic_counts", "config",
)  # fmt: skip
PHASES = (
  "classifier", "memory_bank", "diffusion", "selection", "hallucination", "heads", "joint",
  "evaluation",
)  # fmt: skip
STARTUP, REPORT = "startup", "report"  # before the first phase's work, after the last one's
_WRITING = "orbax-checkpoint-tmp"  # in the name of a checkpoint's folder until it is whole


def differences(undisturbed: pathlib.Path, workdir: pathlib.Path) -> list[str]:
  """Names of the results in `workdir` that are not those of `undisturbed` to the last digit."""
  reports = []
  for folder in (undisturbed, workdir):
    path = folder / "report.json"
    reports.append(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
  found = [f"report.json: {part}" for part in EXACT if reports[0][part] != reports[1].get(part)]
  for pattern, same in (("metrics.jsonl", _same_text), ("*.npz", _same_arrays)):
    ours, theirs = (
      {path.relative_to(folder) for path in folder.rglob(pattern)}
      for folder in (workdir, undisturbed)
    )
    unlike = {p for p in ours & theirs if not same(undisturbed / p, workdir / p)}
    found += sorted(map(str, unlike | (ours ^ theirs)))
  return found


def _same_text(a: pathlib.Path, b: pathlib.Path) -> bool:
  return a.read_text(encoding="utf-8") == b.read_text(encoding="utf-8")


def _same_arrays(a: pathlib.Path, b: pathlib.Path) -> bool:
  try:
    with a.open("rb") as of_one, b.open("rb") as of_other:
      one, other = (dict(np.load(file, allow_pickle=False)) for file in (of_one, of_other))
  except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):  # one is torn
    return False
  return set(one) == set(other) and all(
    one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name]) for name in one
  )


def finished_phases(workdir: pathlib.Path) -> dict[str, tuple[int, str]]:
  """phase -> (time, text) of its manifest, of the phases that say they have finished."""
  found = {}
  for phase in PHASES:
    path = workdir / phase / "manifest.json"
    with contextlib.suppress(OSError, ValueError):
      if json.loads(path.read_text(encoding="utf-8"))["finished"]:
        found[phase] = path.stat().st_mtime_ns, path.read_text(encoding="utf-8")
  return found


def lost_phases(before: dict, after: dict, said: str) -> list[str]:
  """Phases that had finished before a run and were not left as they were by it.

  Args:
    before, after: of `finished_phases`.
    said: standard error of the run.
  """
  again = {p for p in before if re.search(rf"^\[\d+/\d+ {p}\] (?!finished earlier)", said, re.M)}
  return [p for p in before if p in again or after.get(p) != before[p]]


def saved_steps(workdir: pathlib.Path) -> dict[str, int]:
  """stage -> step of its newest whole checkpoint."""
  found = {}
  for folder in workdir.glob("*/**/checkpoints"):
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    if steps:
      found[str(folder.parent.relative_to(workdir))] = max(steps)
  return found


def lost_steps(saved: dict[str, int], said: str) -> list[str]:
  """Stages that a run trained from an earlier step than had been saved, from what it said."""
  resumed = {s: int(n) for s, n in re.findall(r"\] (\S+) resumes at step (\d+)/", said)}
  anew = dict.fromkeys(re.findall(r"\] (\S+)  step \d+/", said), 0)  # if nothing was resumed
  return [s for s, step in (anew | resumed).items() if step < saved.get(s, 0)]


def sentence_of(said: str) -> str | None:
  """The one sentence with which a run stopped; None where it said more or less than that."""
  lines = [line for line in said.splitlines() if line and not re.match(r"\[\d+/\d+ \w+\]", line)]
  if len(lines) == 1 and lines[0].startswith("memdiff: ") and lines[0].endswith("."):
    return lines[0]
  return None


def phase_of(said: str) -> str:
  """Where a run was when it ended, from what it had said."""
  lines = re.findall(r"^\[\d+/\d+ (\w+)\] (.*)$", said, re.M)
  if not lines or lines[-1][1] == "finished earlier":
    return STARTUP if not lines or lines[-1][0] != PHASES[-1] else REPORT
  phase, text = lines[-1]
  return REPORT if phase == PHASES[-1] and text.startswith("finished in") else phase


def writes(folder: pathlib.Path) -> set[tuple[str, int]]:
  """(path, inode) of every checkpoint below `folder` that is not whole yet."""
  found = set()
  for path, folders, _ in os.walk(folder):
    for name in folders:
      if _WRITING in name:
        with contextlib.suppress(OSError):
          found.add((f"{path}/{name}", os.stat(f"{path}/{name}").st_ino))
    folders[:] = [name for name in folders if not name.isdigit() and _WRITING not in name]
  return found
