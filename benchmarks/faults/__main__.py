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
import json
import os
import pathlib
import sys
import tempfile
import time

from benchmarks.faults import damage, evidence, kills, surroundings
from benchmarks.faults.campaign import POLL, Campaign, Row


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
      time.sleep(POLL)
      if begun is None and evidence.phase_of(campaign.said()) != evidence.STARTUP:
        begun = time.time()
    end = time.time()
    if process.returncode != 0:
      raise RuntimeError(f"The undisturbed run failed: {campaign.said()[-2000:]}")
  unlike = evidence.differences(campaign.undisturbed, campaign.base / "warm_up")
  if unlike:
    raise RuntimeError(f"Two undisturbed runs differ in {unlike}; nothing can be said of others.")
  manifests = {p: campaign.undisturbed / p / "manifest.json" for p in evidence.PHASES}
  seconds = {p: json.loads(m.read_text(encoding="utf-8"))["seconds"] for p, m in manifests.items()}
  last = manifests[evidence.PHASES[-1]].stat().st_mtime
  return {evidence.STARTUP: begun - start} | seconds | {evidence.REPORT: end - last}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=30, help="at least so many")
  parser.add_argument("--json", type=pathlib.Path, help="write versions, hardware and all figures")
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  parser.add_argument("--workdir", type=pathlib.Path, help="for the runs; removed if not given")
  arguments = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  from benchmarks import timing

  start = time.monotonic()
  with contextlib.ExitStack() as stack:
    base = arguments.workdir or stack.enter_context(tempfile.TemporaryDirectory())
    base = pathlib.Path(base).expanduser().absolute()
    base.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(base, arguments.seed)
    seconds = run_undisturbed(campaign)
    print("undisturbed:", {phase: round(s, 1) for phase, s in seconds.items()}, flush=True)
    every_kill = kills.chains(campaign, arguments.kills, seconds)
    partial = kills.snapshots(campaign)
    damage.runs(campaign, partial)
    surroundings.no_room(campaign, partial)
    surroundings.no_right(campaign, partial)
    surroundings.no_turn(campaign, partial)
    damage.checkpoints(campaign)
  rows = list(campaign.rows.values())
  by_phase = collections.Counter(kill["phase"] for kill in every_kill)
  half = sum(kill["in_checkpoint_write"] for kill in every_kill)
  print(
    f"\n{len(every_kill)} kills, {half} of them in a checkpoint write; by phase: {dict(by_phase)}"
  )
  print(table(rows))
  if arguments.json:
    result = {
      "seconds": round(time.monotonic() - start),
      "seconds_of_phases_undisturbed": seconds,
      "kills": len(every_kill),
      "kills_by_phase": dict(by_phase),
      "kills_in_checkpoint_writes": half,
      "rows": [dataclasses.asdict(row) for row in rows],
      "every_kill": every_kill,
    }
    arguments.json.write_text(
      json.dumps(result | timing.environment(), indent=2) + "\n", encoding="utf-8"
    )
  sys.exit(not all(row.good for row in rows))


if __name__ == "__main__":
  main()
