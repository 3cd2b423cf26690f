"""Runs that are disturbed and started again, and the count of what came of it."""

import dataclasses
import os
import pathlib
import random
import re
import resource
import shutil
import subprocess
import sys

from benchmarks.faults import evidence

_ROOT = pathlib.Path(__file__).parent.parent.parent
# Two seeds and a few steps of everything, joint training included, saved at every dispatch.
_ARGUMENTS = (
  "--config=configs/digits_lt.py:smoke",
  "--notensorboard",
  "--config.loop.checkpoint_every=5",
  "--config.loop.keep_checkpoints=3",
  "--config.joint.generators=('kernel_jitter',)",
  "--config.joint.num_rounds=2",
)
LIMIT = 900.0  # seconds after which a run counts as hung
POLL = 0.002  # seconds


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
    return self._log.read_text(encoding="utf-8", errors="replace")

  def wait(self, process: subprocess.Popen) -> Ended:
    try:
      code = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
      code = None
    return Ended(code, self.said())

  def check_kept(self, row: Row, workdir: pathlib.Path, before: dict, saved: dict) -> None:
    """Counts what the last run in `workdir` did again although it was there before."""
    said = self.said()
    for phase in evidence.lost_phases(before, evidence.finished_phases(workdir), said):
      row.lost_phases += 1
      self.note(row, f"lost phase {phase}")
    for stage in evidence.lost_steps(saved, said):
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
    before, saved = (
      evidence.finished_phases(workdir),
      evidence.saved_steps(workdir) if saved is None else saved,
    )
    ended = self.wait(self.start(workdir, **options))
    if ended.code == 0 and "Traceback" not in ended.said:
      self.check_kept(row, workdir, before, saved)
      unlike = evidence.differences(self.undisturbed, workdir)
      row.divergences += bool(unlike)
      row.equal += not unlike
      if unlike:
        self.note(row, f"differs in {', '.join(unlike)}")
    elif ended.code == 1 and evidence.sentence_of(ended.said):
      row.refused += 1
      self.note(row, evidence.sentence_of(ended.said))
    else:
      self.failed(row, ended)
    return ended
