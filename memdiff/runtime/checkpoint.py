"""Checkpoints: the only file that knows Orbax.

It is imported when a checkpoint is first looked for: the import takes half a second.
"""

import errno
import glob
import inspect
import logging
import os
import pathlib
import shutil
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from memdiff.errors import WorkdirError
from memdiff.runtime import distributed

_UNREADABLE = ".unreadable"  # behind the name of a checkpoint's folder
_ITEM = "default"  # Orbax's name for the one tree that a checkpoint holds


class _Folder(type(epath.Path("."))):
  """A path under which Orbax finds its files, whatever brackets and stars the path has.

  Orbax looks for files by `folder.glob(pattern)`; etils' version reads the folder as a pattern too.
  """

  def glob(self, pattern: str) -> Iterator["_Folder"]:
    return map(type(self), glob.glob(os.path.join(glob.escape(os.fspath(self)), pattern)))


def in_background() -> bool:
  """Whether training goes on while a state is written.

  Not if one process trains on a CPU: that would gain 15 ms a save, and such a process once crashed
  in native code meanwhile. Several processes wait for each other while they save, so that a save
  would meet one that is gone before training does, and would not know why.
  """
  return jax.default_backend() != "cpu" or jax.process_count() > 1


class Checkpointer:
  """Saves and restores the train state of one stage; on accelerators, saving runs beside training.

  The newest `keep` steps stay, and every step that is a multiple of `keep_every` (0: none).
  """

  def __init__(self, directory: pathlib.Path, keep: int, keep_every: int = 0):
    import orbax.checkpoint as ocp

    self._directory = directory
    self._unreadable = _set_aside(directory)
    self._manager = ocp.CheckpointManager(
      _Folder(directory.absolute()),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        keep_period=keep_every or None,
        enable_async_checkpointing=in_background(),
      ),
    )

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: Any, records: int = 0) -> None:
    """Starts saving `state`; a step that is already there is left as it is.

    Args:
      step: its number.
      state: arrays on the devices.
      records: how many records of metrics the stage had written by then; kept for `records`.
    """
    import orbax.checkpoint as ocp

    if step == self._manager.latest_step():
      return
    self._check_room(state)
    try:
      self._manager.save(
        step,
        args=ocp.args.StandardSave(state),
        custom_metadata={"checksums": _checksums(state), "records": records},
      )
    except Exception as error:  # of this save, or of the last one, which ran in the background
      raise WorkdirError(_cannot_write(self._directory, error)) from error

  def _check_room(self, state: Any) -> None:
    """Raises before a save that cannot succeed: a full disk is said at once and in one sentence."""
    needed = 2 * sum(x.nbytes for x in jax.tree.leaves(state)) + 2**20
    free = shutil.disk_usage(self._directory).free
    if free < needed:
      reason = f"{free / 2**20:.1f} MiB are free, {needed / 2**20:.1f} MiB are needed"
      raise WorkdirError(_cannot_write(self._directory, OSError(reason)))

  def records(self) -> dict[int, int]:
    """Step of every checkpoint -> the `records` it was saved with; 0 if that is not known."""
    found = {}
    for step in self._manager.all_steps():
      try:
        found[step] = (self._manager.metadata(step).custom_metadata or {}).get("records", 0)
      except Exception:  # torn; `restore` tells
        found[step] = 0
    return found

  def restore(self, abstract_state: Any, newest: int | None = None) -> tuple[int, Any] | None:
    """The newest checkpoint that every process can read as (step, state), or None if none is there.

    Args:
      abstract_state: the state's shapes, dtypes and shardings on the present devices, which need
        not be those it was saved from.
      newest: later steps are passed over, since the metrics up to them are not all there.

    Raises:
      WorkdirError: if checkpoints exist and none can be read.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    failures = []
    for step in steps:
      if newest is not None and step > newest:
        failures.append(f"step {step}: metrics.jsonl beside it has lost records")
        continue
      failure = ""
      try:
        state = self._read(step, abstract_state)
        self._check_sums(step, state)
      except Exception as error:  # Orbax raises many types for torn files
        failure = _words(error).splitlines()[0][:160]
      if not distributed.everywhere(not failure):
        failures.append(f"step {step}: {failure or 'another process cannot read it'}")
        continue
      for newer in steps[: len(failures)]:  # torn, and in the way of saving that step anew
        self._manager.delete(newer)
      if distributed.is_main():
        for path in self._unreadable:
          shutil.rmtree(path, ignore_errors=True)
      return step, state
    failures += [f"step {path.stem}: its metadata cannot be read" for path in self._unreadable]
    if failures:
      raise WorkdirError(
        f"No checkpoint in {self._directory} can be read ({'; '.join(failures)}); remove that"
        " folder to train this stage again."
      )
    return None

  def _read(self, step: int, abstract_state: Any) -> Any:
    """The state of a step; of several processes each reads alone, since another one may fail to."""
    import orbax.checkpoint as ocp

    args = ocp.args.StandardRestore(abstract_state)
    if jax.process_count() == 1:
      return self._manager.restore(step, args=args)
    alone = ocp.options.MultiprocessingOptions(
      primary_host=jax.process_index(),
      active_processes={jax.process_index()},
      barrier_sync_key_prefix=f"process_{jax.process_index()}",
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
      return reader.restore(_Folder(self._directory.absolute()) / str(step) / _ITEM, args=args)

  def _check_sums(self, step: int, state: Any) -> None:
    """Raises if `state` is not what was saved: TensorStore notices torn files, not changed bits.

    Older checkpoints have no checksums and are taken as they are.
    """
    saved = (self._manager.metadata(step).custom_metadata or {}).get("checksums", [])
    found = _checksums(state) if saved else []
    if any(a != b for a, b in zip(saved, found, strict=True) if None not in (a, b)):
      raise ValueError("its numbers are not those that were saved")

  def wait(self) -> None:
    """Waits for the last save."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # Orbax passes on what its storage layer raised
      raise WorkdirError(_cannot_write(self._directory, error)) from error

  def close(self) -> None:
    """Waits for the last save and stops the background threads."""
    try:
      self.wait()
    finally:
      self._manager.close()


def _set_aside(directory: pathlib.Path) -> list[pathlib.Path]:
  """Renames checkpoints whose metadata are damaged, which Orbax would not pass over by itself.

  Returns:
    their folders, those of earlier runs included.
  """
  import orbax.checkpoint as ocp

  if distributed.is_main() and directory.is_dir():
    for step in ocp.path.step.standard_name_format().find_all(directory.absolute()):
      try:
        _ = step.commit_timestamp_nsecs
      except Exception:  # whatever a parser raises
        path = pathlib.Path(step.path)
        path.rename(path.with_name(path.name + _UNREADABLE))
  distributed.barrier("checkpoints set aside")
  return sorted(directory.glob("*" + _UNREADABLE))


def _checksums(state: Any) -> list[int | None]:
  """CRC-32 of every array of `state`; None of those whose parts other processes hold."""

  def of_array(x):
    if not (x.is_fully_addressable or x.is_fully_replicated):
      return None
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    return zlib.crc32(np.ascontiguousarray(x).view(np.uint8))

  return [of_array(jnp.asarray(x)) for x in jax.tree.leaves(state)]


def _words(error: Exception) -> str:
  return str(error).strip() or repr(error)


def keep_quiet() -> None:
  """Keeps off standard error what Orbax and TensorStore print of a failed read or write.

  The failure itself is raised to whoever waits for it; memdiff has no coroutines of its own.
  """
  for logger in ("absl", "asyncio"):
    logging.getLogger(logger).setLevel(logging.CRITICAL)
  hook = sys.unraisablehook

  def without_coroutines(unraisable) -> None:  # left behind when another has failed
    of_loop = str(unraisable.exc_value) == "Event loop is closed"
    if not (of_loop or inspect.iscoroutine(unraisable.object)):
      hook(unraisable)

  sys.unraisablehook = without_coroutines


def _cannot_write(directory: pathlib.Path, error: Exception) -> str:
  words = _words(error)  # TensorStore's go on for lines; the reason is somewhere in them
  reasons = map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES))
  reason = next((r for r in reasons if r in words), words.splitlines()[-1][-160:])
  return (
    f"Cannot write a checkpoint to {directory} ({reason}); make room there and run the same"
    " command again, which resumes at the last saved step."
  )


def abstract(tree: Any, shardings: Any) -> Any:
  """Shapes and dtypes of `tree` with `shardings`, as `Checkpointer.restore` wants them."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
  )
