"""What a run survives: kills at any moment, damaged files, a full disk, forbidden folders.

  python -m benchmarks.faults [--kills=30] [--json FILE] [--seed 0] [--workdir DIR]

One short run of the whole experiment is left alone. Every other run is disturbed, then started
again with the same command until it ends, and must end with the same report, curves and arrays to
the last digit, without repeating a finished phase or a saved step. Where a file cannot be made good
again, the run must stop with one sentence that names what to remove; that is done as it says. The
exit code is 1 where anything else happened.
"""

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_ROOT = pathlib.Path(__file__).parent.parent
# Two seeds and a few steps of everything, joint training included, saved at every dispatch.
_ARGUMENTS = (
  "--config=configs/digits_lt.py:smoke",
  "--notensorboard",
  "--config.loop.checkpoint_every=5",
  "--config.loop.keep_checkpoints=3",
  "--config.joint.generators=('kernel_jitter',)",
  "--config.joint.num_rounds=2",
)
# Of report.json, what must be equal to the last digit; the rest are times, paths and versions.
EXACT = (
  "classification", "features", "generators", "comparison", "recommendation", "choices", "dataset",
  "synthetic_counts", "config",
)  # fmt: skip
PHASES = (
  "classifier", "memory_bank", "diffusion", "selection", "hallucination", "heads", "joint",
  "evaluation",
)  # fmt: skip
_SAVING = ("classifier", "memory_bank", "diffusion", "selection", "heads", "joint")
_STARTUP, _REPORT = "startup", "report"  # before the first phase's work, after the last one's
_WRITING = "orbax-checkpoint-tmp"  # in the name of a checkpoint's folder until it is whole
_LIMIT = 900.0  # seconds after which a run counts as hung
_POLL = 0.002  # seconds


# --- what must be equal, kept and said ---------------------------------------------------------


def differences(undisturbed: pathlib.Path, workdir: pathlib.Path) -> list[str]:
  """Names of the results in `workdir` that are not those of `undisturbed` to the last digit."""
  reports = []
  for folder in (undisturbed, workdir):
    path = folder / "report.json"
    reports.append(json.loads(path.read_text()) if path.exists() else {})
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
  return a.read_text() == b.read_text()


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
      if json.loads(path.read_text())["finished"]:
        found[phase] = path.stat().st_mtime_ns, path.read_text()
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
  anew = dict.fromkeys(re.findall(r"\] compiling (\S+) initial state", said), 0)
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
    return _STARTUP if not lines or lines[-1][0] != PHASES[-1] else _REPORT
  phase, text = lines[-1]
  return _REPORT if phase == PHASES[-1] and text.startswith("finished in") else phase


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


# --- runs --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
  """One kind of fault: how often it was tried and what came of it."""

  fault: str
  times: int = 0
  refused: int = 0  # one sentence and an exit code other than 0
  equal: int = 0  # ended as the undisturbed run
  lost_phases: int = 0  # finished, and done again or gone
  lost_steps: int = 0  # saved and whole, and trained again
  divergences: int = 0  # ended otherwise than the undisturbed run
  failures: int = 0  # tracebacks, hangs, exit codes other than 0 without a sentence
  notes: list[str] = dataclasses.field(default_factory=list)

  @property
  def good(self) -> bool:
    bad = self.lost_phases + self.lost_steps + self.divergences + self.failures
    return bad == 0 and self.equal == self.times


@dataclasses.dataclass(frozen=True)
class Ended:
  """A run that is over."""

  code: int | None  # None: it hung
  said: str


class Campaign:
  """Runs the experiment in folders below `base`; holds the undisturbed run and the rows."""

  def __init__(self, base: pathlib.Path, seed: int):
    self.base = base
    self.random = random.Random(seed)
    self.rows: dict[str, Row] = {}
    self.undisturbed = base / "undisturbed"
    self.cache = base / "cache"
    self._log = base / "log"

  def row(self, fault: str) -> Row:
    return self.rows.setdefault(fault, Row(fault))

  def folder(self, name: str, start: pathlib.Path | None = None) -> pathlib.Path:
    """A new workdir, a copy of `start` where one is given."""
    folder = self.base / name
    shutil.rmtree(folder, ignore_errors=True)
    if start is not None:
      shutil.copytree(start, folder)
    return folder

  def start(
    self,
    workdir: pathlib.Path,
    *,
    log: pathlib.Path | None = None,
    before: tuple[str, ...] = (),
    limit: int | None = None,
    cache: pathlib.Path | None = None,
  ) -> subprocess.Popen:
    """Starts a run.

    Args:
      workdir: of the run.
      log: file for its standard error; the campaign's own by default.
      before: command that runs it.
      limit: bytes that any of its files may have.
      cache: folder of compiled programs; the campaign's own by default.
    """
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "MPLBACKEND": "Agg",
      "JAX_COMPILATION_CACHE_DIR": str(cache or self.cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with (log or self._log).open("wb") as file:
      return subprocess.Popen(
        [*before, sys.executable, "main.py", *_ARGUMENTS, f"--workdir={workdir}"],
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=file,
        preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
      )

  def said(self) -> str:
    return self._log.read_text(errors="replace")

  def wait(self, process: subprocess.Popen) -> Ended:
    try:
      code = process.wait(_LIMIT)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
      code = None
    return Ended(code, self.said())

  def check_kept(self, row: Row, workdir: pathlib.Path, before: dict, saved: dict) -> None:
    """Counts what the last run in `workdir` did again although it was there before."""
    said = self.said()
    for phase in lost_phases(before, finished_phases(workdir), said):
      row.lost_phases += 1
      self.note(row, f"lost phase {phase}")
    for stage in lost_steps(saved, said):
      row.lost_steps += 1
      self.note(row, f"lost steps of {stage}")

  def note(self, row: Row, text: str) -> None:
    row.notes.append(text.replace(str(self.base), "WORKDIR"))
    print(f"  {row.fault}: {row.notes[-1]}", flush=True)

  def failed(self, row: Row, ended: Ended) -> None:
    """Notes a run that neither ended well nor was refused."""
    row.failures += 1
    lines = ended.said.strip().splitlines() or ["nothing said"]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    how = "hung" if ended.code is None else f"exit code {ended.code}"
    self.note(row, f"{how}: {(raised or lines)[-1][:300]}")

  def go_on(
    self, row: Row, workdir: pathlib.Path, *, saved: dict[str, int] | None = None, **options
  ) -> Ended:
    """Runs to the end, and counts what happened.

    Args:
      row: gets the counts.
      workdir: of the run.
      saved: the steps that must not be trained again; by default all that lie in `workdir`.
      **options: of `start`.
    """
    before, saved = finished_phases(workdir), saved_steps(workdir) if saved is None else saved
    ended = self.wait(self.start(workdir, **options))
    if ended.code == 0 and "Traceback" not in ended.said:
      self.check_kept(row, workdir, before, saved)
      unlike = differences(self.undisturbed, workdir)
      row.divergences += bool(unlike)
      row.equal += not unlike
      if unlike:
        self.note(row, f"differs in {', '.join(unlike)}")
    elif ended.code == 1 and sentence_of(ended.said):
      row.refused += 1
      self.note(row, sentence_of(ended.said))
    else:
      self.failed(row, ended)
    return ended


# --- kills -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Moment:
  """When to kill: `seconds` after a phase began, or in its checkpoint write number `write`."""

  phase: str
  seconds: float = 0.0
  write: int | None = None


def plan(number: int, seconds: dict[str, float], draw: random.Random) -> list[Moment]:
  """One kill in every phase, before the first and after the last.

  Args:
    number: of the chain of kills; every phase that saves is killed in a write in every other.
    seconds: how long each phase takes.
    draw: of the moments.
  """
  moments = []
  for position, phase in enumerate((_STARTUP, *PHASES, _REPORT)):
    if phase in _SAVING and (number + position) % 2:
      moments.append(Moment(phase, write=0 if phase == "memory_bank" else draw.randrange(6)))
    else:
      moments.append(Moment(phase, seconds=draw.uniform(0, seconds[phase])))
  return moments


def wait_for(campaign: Campaign, process: subprocess.Popen, moment: Moment, workdir) -> bool:
  """Waits until `moment`; False where the process ends before."""
  deadline = time.monotonic() + _LIMIT

  def until(happened: Callable[[], bool]) -> bool:
    while not happened():
      if process.poll() is not None or time.monotonic() > deadline:
        return False
      time.sleep(_POLL)
    return process.poll() is None

  def begun() -> bool:
    if moment.phase == _REPORT:
      return phase_of(campaign.said()) == _REPORT
    pattern = rf"^\[\d+/\d+ {moment.phase}\] (?!finished earlier)"
    return re.search(pattern, campaign.said(), re.M) is not None

  old, seen = writes(workdir), set()

  def writing() -> bool:
    now = writes(workdir / moment.phase) - old
    seen.update(now)
    return bool(now) and len(seen) > moment.write

  if moment.phase != _STARTUP and not until(begun):
    return False
  if moment.write is not None:
    return until(writing)
  end = time.monotonic() + moment.seconds
  return until(lambda: time.monotonic() >= end)


def kill_campaign(campaign: Campaign, kills: int, seconds: dict[str, float]) -> list[dict]:
  """Chains of kills, each in one workdir that is then run to the end.

  Returns:
    of every kill: the phase it hit, whether it left a checkpoint half written, what was planned.
  """
  done, numbers = [], itertools.count()
  row = campaign.row("killed (SIGKILL), every chain of kills in one workdir")
  while len(done) < kills:
    number = next(numbers)
    workdir = campaign.folder(f"chain_{number}")
    for moment in plan(number, seconds, campaign.random):
      before, saved, old = finished_phases(workdir), saved_steps(workdir), writes(workdir)
      process = campaign.start(workdir)
      if wait_for(campaign, process, moment, workdir):
        process.kill()
      ended = campaign.wait(process)
      campaign.check_kept(row, workdir, before, saved)
      if ended.code == -signal.SIGKILL:
        half = bool(writes(workdir) - old)
        done.append(
          {"chain": number, "phase": phase_of(ended.said), "in_checkpoint_write": half}
          | {"planned": dataclasses.asdict(moment)}
        )
        print(f"  kill {len(done)}: {done[-1]}", flush=True)
      elif ended.code != 0:
        campaign.failed(row, ended)
    row.times += 1
    ended = campaign.go_on(row, workdir)
    if campaign.rows[row.fault].good:
      shutil.rmtree(workdir)
  return done


# --- damage ------------------------------------------------------------------------------------


def cut(path: pathlib.Path) -> None:
  os.truncate(path, path.stat().st_size // 2)


def empty(path: pathlib.Path) -> None:
  os.truncate(path, 0)


def zero(path: pathlib.Path) -> None:
  path.write_bytes(bytes(path.stat().st_size))


def flip(path: pathlib.Path) -> None:
  """Changes one bit in the middle."""
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 16
  path.write_bytes(data)


def newest(workdir: pathlib.Path, stage: str) -> pathlib.Path:
  """The folder of the newest whole checkpoint."""
  return workdir / stage / "checkpoints" / str(saved_steps(workdir)[stage])


def files_in(folder: pathlib.Path) -> list[pathlib.Path]:
  """All files below `folder`, the largest first."""
  files = [path for path in folder.rglob("*") if path.is_file()]
  return sorted(files, key=lambda path: (-path.stat().st_size, path))


def to_remove(sentence: str) -> list[pathlib.Path]:
  """What a sentence says to remove, so that the same command can go on."""
  named = re.findall(r"remove (?:the folder )?(/\S+)", sentence)
  if "remove that folder" in sentence or "remove that file" in sentence:
    named = re.findall(r"(?:in|of|read) (/\S+)", sentence)[:1]
  paths = [pathlib.Path(name.rstrip(";,.")) for name in named]
  if "manifest.json beside or in it" in sentence:
    paths += [p / "manifest.json" for path in paths for p in (path, path.parent)]
  return paths


def snapshots(campaign: Campaign) -> dict[str, pathlib.Path]:
  """Workdirs of one run, killed in the diffusion, in joint training and in the evaluation."""
  moments = {
    "diffusion": "diffusion/memdiff/checkpoints/15",
    "joint": "joint/kernel_jitter/round_1/checkpoints/10",
    "evaluation": "evaluation/manifest.json",
  }
  workdir, found = campaign.folder("partial"), {}
  for phase, path in moments.items():
    process = campaign.start(workdir)
    while process.poll() is None and not (workdir / path).exists():
      time.sleep(_POLL)
    process.kill()
    process.wait()
    found[phase] = campaign.folder(f"at_{phase}", workdir)
    if phase in finished_phases(workdir):
      raise RuntimeError(f"The phase {phase} was over before it could be stopped; run it again.")
  return found


def try_damage(
  campaign: Campaign,
  fault: str,
  start: pathlib.Path,
  damage: Callable[[pathlib.Path], Any],
  *,
  stage: str | None = None,
  **options,
) -> None:
  """Damages a copy of `start`, runs it, and does once what it says where it is refused.

  Args:
    campaign: gets the counts.
    fault: name of the row.
    start: the workdir to copy.
    damage: called with the copy.
    stage: whose newest checkpoint is damaged: its step may be trained again, older ones not.
    **options: of `Campaign.start`.
  """
  workdir, row = campaign.folder("damaged", start), campaign.row(fault)
  row.times += 1
  damage(workdir)
  saved = saved_steps(workdir)
  if stage is not None:
    names = [path.name for path in (workdir / stage / "checkpoints").iterdir()]
    older = {int(name) for name in names if name.isdigit()} - {saved[stage]}
    saved[stage] = max(older, default=0)
  if campaign.go_on(row, workdir, saved=saved, **options).code != 1:
    return
  for path in to_remove(row.notes[-1].replace("WORKDIR", str(campaign.base))):
    if path.is_dir():
      shutil.rmtree(path)
    else:
      path.unlink(missing_ok=True)
  # What has gone is not lost; phases of which it was said that they must run again, neither.
  campaign.go_on(row, workdir, saved={})


def damage_campaign(campaign: Campaign, partial: dict[str, pathlib.Path]) -> None:
  """Damaged files in workdirs of runs that were killed."""
  diffusion, joint = "diffusion/memdiff", "joint/kernel_jitter/round_1"

  def whole(change, stage):
    return lambda workdir: [change(path) for path in files_in(newest(workdir, stage))]

  def largest(change, stage):
    return lambda workdir: change(files_in(newest(workdir, stage))[0])

  checkpoint = "newest checkpoint: "
  for phase, stage in (("diffusion", diffusion), ("joint", joint)):
    start = partial[phase]
    for name, change in (("cut to half", cut), ("zeroed", zero)):
      fault = f"{checkpoint}every file {name}"
      try_damage(campaign, fault, start, whole(change, stage), stage=stage)
  changes = {
    "cut to half": cut, "zeroed": zero, "deleted": pathlib.Path.unlink, "one bit changed": flip,
  }  # fmt: skip
  for name, change in changes.items():
    fault = f"{checkpoint}largest file {name}"
    try_damage(campaign, fault, partial["joint"], largest(change, joint), stage=joint)

  def all_checkpoints(workdir):
    for path in files_in(workdir / joint / "checkpoints"):
      cut(path)

  try_damage(
    campaign, "all checkpoints of a stage cut", partial["joint"], all_checkpoints, stage=joint
  )
  at_end = partial["evaluation"]
  fault = "last checkpoint of a finished stage cut"
  try_damage(campaign, fault, at_end, whole(cut, "heads/memdiff"), stage="heads/memdiff")

  def cut_line(stage):
    def cut(workdir):
      path = workdir / stage / "metrics.jsonl"
      os.truncate(path, path.stat().st_size - 20)

    return cut

  for phase, stage in (("diffusion", diffusion), ("joint", joint)):
    try_damage(campaign, "last line of metrics.jsonl cut", partial[phase], cut_line(stage))
  files = (
    ("joint", "joint/manifest.json", cut),
    ("evaluation", "heads/manifest.json", cut),
    ("evaluation", "heads/manifest.json", empty),
    ("evaluation", "memory_bank/features.npz", cut),
    ("evaluation", "memory_bank/features.npz", empty),
    ("evaluation", "hallucination/memdiff.npz", cut),
    ("evaluation", "joint/logits.npz", cut),
    ("evaluation", "selection/choices.json", cut),
  )
  for phase, file, change in files:
    how = "cut to half" if change is cut else "emptied"
    fault = f"{pathlib.PurePath(file).name if 'manifest' in file else file} {how}"
    try_damage(campaign, fault, partial[phase], lambda w, f=file, c=change: c(w / f))
  fault = "report.json of a finished run cut"
  try_damage(campaign, fault, campaign.undisturbed, lambda w: cut(w / "report.json"))

  cache = campaign.folder("torn_cache", campaign.cache)
  entries = sorted(path for path in cache.iterdir() if path.name.endswith("-cache"))
  for path in campaign.random.sample(entries, 20):
    cut(path)
  fault = "20 compiled programs in the cache cut"
  try_damage(campaign, fault, partial["joint"], lambda _: None, cache=cache)
  shutil.rmtree(cache)


# --- no room, no right, no turn ----------------------------------------------------------------


def no_room(campaign: Campaign, partial: dict[str, pathlib.Path]) -> None:
  """Files that may not grow, and a disk that is full; then there is room again."""
  row = campaign.row("files may have so many KiB (EFBIG): 16, 512")
  for phase, kib in itertools.product(partial, (16, 512)):
    workdir = campaign.folder("full", partial[phase])
    row.times += 1
    if campaign.go_on(row, workdir, limit=kib * 1024).code != 0:
      campaign.go_on(row, workdir)
  row = campaign.row("the disk has so many KiB left (ENOSPC): 0, 2000")
  mount = campaign.folder("disk")
  for phase, kib in itertools.product(partial, (0, 2000)):
    with small_disk(mount, partial[phase], kib) as grow:
      if grow is None:
        return campaign.note(row, "not tried: mounting a disk is not permitted here")
      row.times += 1
      if campaign.go_on(row, mount / "run").code != 0:
        grow()
        campaign.go_on(row, mount / "run")
  return None


@contextlib.contextmanager
def small_disk(
  mount: pathlib.Path, start: pathlib.Path, kib: int
) -> Iterator[Callable[[], Any] | None]:
  """A disk at `mount` with a copy of `start` as run/ and `kib` KiB left; yields what makes room.

  Yields None where mounting is not permitted.
  """
  mount.mkdir(exist_ok=True)
  command = ["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(mount)]
  if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
    yield None
    return
  try:
    shutil.copytree(start, mount / "run")
    used = shutil.disk_usage(mount).used // 1024

    def resize(size: int) -> None:
      options = f"remount,size={size}k"
      subprocess.run(["mount", "-o", options, str(mount)], check=True)

    resize(used + kib)
    yield lambda: resize(1 << 20)
  finally:
    subprocess.run(["umount", str(mount)], check=True)


def no_right(campaign: Campaign, partial: dict[str, pathlib.Path]) -> None:
  """Workdirs that cannot be written."""
  row = campaign.row("workdir below a file")
  row.times += 1
  file = campaign.base / "file"
  file.write_text("")
  campaign.go_on(row, file / "run")
  file.unlink()
  campaign.go_on(row, campaign.folder("below_file", campaign.undisturbed))
  before = ()
  if os.getuid() == 0:  # whom permissions do not bind
    before = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
  row = campaign.row("read-only: the workdir, all folders in it")
  if before and shutil.which("setpriv") is None:
    return campaign.note(row, "not tried: it needs setpriv, or a user other than root")
  for start, within in itertools.product(partial.values(), (False, True)):
    workdir = campaign.folder("forbidden", start)
    folders = [path for path in workdir.rglob("*") if path.is_dir()] if within else [workdir]
    row.times += 1
    for path in folders:
      path.chmod(0o555)
    campaign.go_on(row, workdir, before=before)
    for path in folders:
      path.chmod(0o755)
    campaign.go_on(row, workdir)
  return None


def no_turn(campaign: Campaign, partial: dict[str, pathlib.Path]) -> None:
  """A second run in a workdir where one is working; signals that ask a run to stop."""
  row = campaign.row("a second run in the same workdir")
  workdir = campaign.folder("shared", partial["joint"])
  row.times += 1
  log = campaign.base / "first_log"
  first = campaign.start(workdir, log=log)
  while first.poll() is None and "joint]" not in log.read_text():
    time.sleep(_POLL)
  campaign.go_on(row, workdir)
  code = first.wait(_LIMIT)
  if code != 0:
    campaign.failed(row, Ended(code, log.read_text()))
  campaign.go_on(row, workdir)
  for number in (signal.SIGINT, signal.SIGTERM):
    row = campaign.row(f"asked to stop ({number.name})")
    workdir = campaign.folder("stopped", partial["diffusion"])
    for phase in ("selection", "joint"):
      process = campaign.start(workdir)
      if wait_for(campaign, process, Moment(phase, campaign.random.uniform(0.5, 2)), workdir):
        process.send_signal(number)
      ended = campaign.wait(process)
      if ended.code in (None, 0) or "Traceback" in ended.said:
        campaign.failed(row, ended)
    row.times += 1
    campaign.go_on(row, workdir)


# --- checkpoints, file by file -----------------------------------------------------------------


def every_file(campaign: Campaign) -> None:
  """Reads checkpoints of which one file is damaged: the newest must come whole, or the one before.

  Needs no run: the checkpoints are of a small tree, written and read by `Checkpointer`.
  """
  import jax

  from memdiff.runtime.checkpoint import Checkpointer, abstract, keep_quiet
  from memdiff.runtime.mesh import make_mesh, replicate, replicated

  keep_quiet()
  draw, mesh = np.random.RandomState(0), make_mesh()
  states = {}
  intact = campaign.folder("checkpoints")
  checkpointer = Checkpointer(intact, keep=2)
  for step in (1, 2):
    kernel = draw.standard_normal((2, 256, 256)).astype(np.float32)
    bias = draw.standard_normal((2, 10)).astype(np.float32)
    tree = {"kernel": kernel, "bias": bias, "step": np.full(2, step, np.int32)}
    states[step] = tree
    checkpointer.save(step, replicate(mesh, tree))
  checkpointer.close()
  shapes = abstract(tree, jax.tree.map(lambda _: replicated(mesh), tree))
  names = [path.relative_to(intact) for path in files_in(intact / "2")]
  changes = {
    "cut to half": cut, "emptied": empty, "zeroed": zero, "deleted": pathlib.Path.unlink,
    "one bit changed": flip,
  }  # fmt: skip
  for (how, change), name in itertools.product(changes.items(), names):
    row = campaign.row(f"any one file of the newest checkpoint {how}, read without a run")
    row.times += 1
    folder = campaign.folder("checkpoints_damaged", intact)
    change(folder / name)
    checkpointer = Checkpointer(folder, keep=2)
    step, state = checkpointer.restore(shapes)
    checkpointer.close()
    same = all(np.array_equal(state[name], array) for name, array in states[step].items())
    row.equal += same
    row.divergences += not same
    if not same:
      campaign.note(row, f"step {step} read from a damaged {name.name[:20]}")


# --- the table ---------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
  """The rows as text, columns aligned."""
  names = ("times", "refused", "ended equal", "lost phases", "lost steps", "divergences")
  cells = [("fault", *names, "failures")]
  for r in rows:
    numbers = (r.times, r.refused, r.equal, r.lost_phases, r.lost_steps, r.divergences, r.failures)
    cells.append((r.fault, *map(str, numbers)))
  widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
  lines = [
    "  ".join(
      [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
    )
    for row in cells
  ]
  return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def run_undisturbed(campaign: Campaign) -> dict[str, float]:
  """Runs twice, the second time with all programs compiled.

  Returns:
    phase -> seconds of the second run, those before the first phase and after the last included.
  """
  for name in ("warm_up", "undisturbed"):
    workdir = campaign.folder(name)
    process, start, begun = campaign.start(workdir), time.time(), None
    while process.poll() is None:
      time.sleep(_POLL)
      if begun is None and phase_of(campaign.said()) != _STARTUP:
        begun = time.time()
    end = time.time()
    if process.returncode != 0:
      raise RuntimeError(f"The undisturbed run failed: {campaign.said()[-2000:]}")
  unlike = differences(campaign.undisturbed, campaign.base / "warm_up")
  if unlike:
    raise RuntimeError(f"Two undisturbed runs differ in {unlike}; nothing can be said of others.")
  manifests = {p: campaign.undisturbed / p / "manifest.json" for p in PHASES}
  seconds = {p: json.loads(m.read_text())["seconds"] for p, m in manifests.items()}
  last = manifests[PHASES[-1]].stat().st_mtime
  return {_STARTUP: begun - start} | seconds | {_REPORT: end - last}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=30, help="at least so many")
  parser.add_argument("--json", type=pathlib.Path, help="write versions, hardware and all figures")
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  parser.add_argument("--workdir", type=pathlib.Path, help="for the runs; removed where not given")
  arguments = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  from benchmarks import timing

  start = time.monotonic()
  with contextlib.ExitStack() as stack:
    base = arguments.workdir or stack.enter_context(tempfile.TemporaryDirectory())
    base = pathlib.Path(base).absolute()
    base.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(base, arguments.seed)
    seconds = run_undisturbed(campaign)
    print("undisturbed:", {phase: round(s, 1) for phase, s in seconds.items()}, flush=True)
    kills = kill_campaign(campaign, arguments.kills, seconds)
    partial = snapshots(campaign)
    damage_campaign(campaign, partial)
    no_room(campaign, partial)
    no_right(campaign, partial)
    no_turn(campaign, partial)
    every_file(campaign)
  rows = list(campaign.rows.values())
  by_phase = collections.Counter(kill["phase"] for kill in kills)
  half = sum(kill["in_checkpoint_write"] for kill in kills)
  print(f"\n{len(kills)} kills, {half} of them in a checkpoint write; by phase: {dict(by_phase)}")
  print(table(rows))
  if arguments.json:
    result = {
      "seconds": round(time.monotonic() - start),
      "seconds_of_phases_undisturbed": seconds,
      "kills": len(kills),
      "kills_by_phase": dict(by_phase),
      "kills_in_checkpoint_writes": half,
      "rows": [dataclasses.asdict(row) for row in rows],
      "every_kill": kills,
    }
    arguments.json.write_text(json.dumps(result | timing.environment(), indent=2) + "\n")
  sys.exit(not all(row.good for row in rows))


if __name__ == "__main__":
  main()
