"""No room, no right, no turn: full disks, forbidden folders, two runs at once, signals to stop."""

import contextlib
import itertools
import os
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.faults.campaign import LIMIT, POLL, Campaign, Ended
from benchmarks.faults.kills import Moment, wait_for


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
  file.write_bytes(b"")
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
  while first.poll() is None and "joint]" not in log.read_text(encoding="utf-8"):
    time.sleep(POLL)
  campaign.go_on(row, workdir)
  code = first.wait(LIMIT)
  if code != 0:
    campaign.failed(row, Ended(code, log.read_text(encoding="utf-8")))
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
