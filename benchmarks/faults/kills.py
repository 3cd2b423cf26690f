"""Kills at chosen moments, in every phase and in the writing of checkpoints."""

import dataclasses
import itertools
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

from benchmarks.faults import evidence
from benchmarks.faults.campaign import LIMIT, POLL, Campaign

_SAVING = ("classifier", "memory_bank", "diffusion", "selection", "heads", "joint")


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
  for position, phase in enumerate((evidence.STARTUP, *evidence.PHASES, evidence.REPORT)):
    if phase in _SAVING and (number + position) % 2:
      moments.append(Moment(phase, write=0 if phase == "memory_bank" else draw.randrange(6)))
    else:
      moments.append(Moment(phase, seconds=draw.uniform(0, seconds[phase])))
  return moments


def wait_for(campaign: Campaign, process: subprocess.Popen, moment: Moment, workdir) -> bool:
  """Waits until `moment`; False where the process ends before."""
  deadline = time.monotonic() + LIMIT

  def until(happened: Callable[[], bool]) -> bool:
    while not happened():
      if process.poll() is not None or time.monotonic() > deadline:
        return False
      time.sleep(POLL)
    return process.poll() is None

  def begun() -> bool:
    if moment.phase == evidence.REPORT:
      return evidence.phase_of(campaign.said()) == evidence.REPORT
    pattern = rf"^\[\d+/\d+ {moment.phase}\] (?!finished earlier)"
    return re.search(pattern, campaign.said(), re.M) is not None

  old, seen = evidence.writes(workdir), set()

  def writing() -> bool:
    now = evidence.writes(workdir / moment.phase) - old
    seen.update(now)
    return bool(now) and len(seen) > moment.write

  if moment.phase != evidence.STARTUP and not until(begun):
    return False
  if moment.write is not None:
    return until(writing)
  end = time.monotonic() + moment.seconds
  return until(lambda: time.monotonic() >= end)


def chains(campaign: Campaign, kills: int, seconds: dict[str, float]) -> list[dict]:
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
      before, saved = evidence.finished_phases(workdir), evidence.saved_steps(workdir)
      old = evidence.writes(workdir)
      process = campaign.start(workdir)
      if wait_for(campaign, process, moment, workdir):
        process.kill()
      ended = campaign.wait(process)
      campaign.check_kept(row, workdir, before, saved)
      if ended.code == -signal.SIGKILL:
        half = bool(evidence.writes(workdir) - old)
        done.append(
          {"chain": number, "phase": evidence.phase_of(ended.said), "in_checkpoint_write": half}
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
      time.sleep(POLL)
    process.kill()
    process.wait()
    found[phase] = campaign.folder(f"at_{phase}", workdir)
    if phase in evidence.finished_phases(workdir):
      raise RuntimeError(f"The phase {phase} was over before it could be stopped; run it again.")
  return found
