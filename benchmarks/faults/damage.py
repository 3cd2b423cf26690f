"""Damaged files: of killed runs that then go on, and of checkpoints that are read alone."""

import itertools
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.faults import evidence
from benchmarks.faults.campaign import Campaign


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
  return workdir / stage / "checkpoints" / str(evidence.saved_steps(workdir)[stage])


def files_in(folder: pathlib.Path) -> list[pathlib.Path]:
  """All files below `folder`, the largest first."""
  files = [path for path in folder.rglob("*") if path.is_file()]
  return sorted(files, key=lambda path: (-path.stat().st_size, path))


def to_remove(sentence: str) -> list[pathlib.Path]:
  """What a sentence says to remove, so that the same command can go on."""
  named = re.findall(r"(?:remove|and) (?:the folder )?(/\S+)", sentence)
  if "remove that folder" in sentence or "remove that file" in sentence:
    named = re.findall(r"(?:in|of|read) (/\S+)", sentence)[:1]
  if "damaged; remove it" in sentence:
    named = re.findall(r"^(/\S+)", sentence)
  return [pathlib.Path(name.rstrip(";,.")) for name in named]


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
  saved = evidence.saved_steps(workdir)
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


def runs(campaign: Campaign, partial: dict[str, pathlib.Path]) -> None:
  """Damages files in workdirs of runs that were killed, and goes on."""
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
    fault = "last line of metrics.jsonl cut"
    try_damage(campaign, fault, partial[phase], cut_line(stage), stage=stage)
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


def checkpoints(campaign: Campaign) -> None:
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
