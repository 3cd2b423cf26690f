"""Where numbers and pictures of a run go: metrics.jsonl always, TensorBoard unless switched off.

The only file that knows clu's metric writers, and with them TensorFlow; both are imported when the
first TensorBoard writer is made.
"""

import collections
import functools
import importlib.util
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from memdiff.errors import ConfigError
from memdiff.runtime import distributed, projector
from memdiff.runtime.workdir import write_atomically, writing


class History:
  """metrics.jsonl: one line per record {"step", "kind", "metrics": {name: [per seed]}}."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self.number = 0  # of records

  def complete_until(self, saved: Mapping[int, int]) -> int:
    """The latest checkpoint whose records are all still in the file; -1 if there is none.

    A machine that loses power may keep a checkpoint and forget what was written before it.

    Args:
      saved: step -> records written by then.
    """
    steps = [record["step"] for record in read_history(self._path)]
    whole = [s for s, number in saved.items() if sum(step <= s for step in steps) >= number]
    return distributed.from_main(max(whole, default=-1))

  def rewind(self, step: int) -> list[dict]:
    """Drops what a killed process had written beyond the checkpoint of `step`; returns the rest."""
    kept = [record for record in read_history(self._path) if record["step"] <= step]
    distributed.barrier("read history")  # before the main process writes it anew
    write_atomically(self._path, "".join(json.dumps(record) + "\n" for record in kept).encode())
    self.number = len(kept)
    return kept

  def write(self, step: int, kind: str, metrics: Mapping[str, np.ndarray]) -> None:
    self.number += 1
    if not distributed.is_main():
      return
    values = {name: np.asarray(value, float).tolist() for name, value in metrics.items()}
    with writing(self._path), self._path.open("a", encoding="utf-8") as file:
      file.write(json.dumps({"step": step, "kind": kind, "metrics": values}) + "\n")


def read_history(path: pathlib.Path) -> list[dict]:
  """The records of a metrics.jsonl; a last line that a kill cut short is dropped."""
  if not path.exists():
    return []
  records = []
  for line in path.read_text(encoding="utf-8").splitlines():
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return records


class TensorBoard:
  """Curves, pictures and hyper-parameters of one run, or nothing if it is switched off.

  Every stage has a folder of its own, a run in TensorBoard's list, so that the curves of stages lie
  over each other and a resumed stage can take back its own. A thread writes, one call after the
  other, so that training waits neither for TensorFlow's import, which takes seconds, nor for the
  disk. What fails there is raised by the next call.

  Raises:
    ConfigError: if it is switched on and TensorFlow or clu is missing.
  """

  def __init__(self, directory: pathlib.Path, enabled: bool):
    self._directory = directory
    self._enabled = enabled and distributed.is_main()
    self._writers: dict[str, Any] = {}
    self._thread = ThreadPoolExecutor(1, "TensorBoard")
    self._calls: collections.deque[Future] = collections.deque()
    for package in ("tensorflow", "tensorboard", "clu"):
      if enabled and importlib.util.find_spec(package) is None:
        raise ConfigError(
          f"TensorBoard logging needs {package}, which is not installed; install requirements.txt"
          " or run with --notensorboard."
        )

  @property
  def enabled(self) -> bool:
    """Whether anything is written, so that what is costly to make need not be made."""
    return self._enabled

  def _later(self, write: Callable, *arguments: Any) -> None:
    """Has the thread call `write`; raises what an earlier call has met."""
    while self._calls and self._calls[0].done():
      self._calls.popleft().result()
    if self._enabled:
      self._calls.append(self._thread.submit(write, *arguments))

  def _writer(self, stage: str):
    """Made when first written to."""
    if stage not in self._writers:
      _import_tensorflow()
      from clu import metric_writers

      self._writers[stage] = metric_writers.SummaryWriter(str(self._directory / stage))
    return self._writers[stage]

  def rewind(self, stage: str, step: int) -> None:
    """Takes back what a killed process had written of a stage beyond `step`."""
    self._later(self._rewind, stage, step)

  def _rewind(self, stage: str, step: int) -> None:
    files = sorted((self._directory / stage).glob("*.tfevents.*"))
    if not files:
      return
    _import_tensorflow()
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.summary.writer.record_writer import RecordWriter

    now = time.time()
    start = Event(step=step + 1, wall_time=now)  # drops all that came before at this step or later
    start.session_log.status = SessionLog.START
    newest = files[-1]  # TensorBoard reads in the order of names
    with writing(newest), newest.with_name(newest.name + ".rewind").open("wb") as file:
      writer = RecordWriter(file)
      for event in (Event(file_version="brain.Event:2", wall_time=now), start):
        writer.write(event.SerializeToString())

  def scalars(self, step: int, values: Mapping[str, float], stage: str = "") -> None:
    self._later(lambda: self._writer(stage).write_scalars(step, values))

  def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
    """Writes uint8 pictures [H, W, 3]."""
    every = {name: p[None] for name, p in pictures.items()}
    self._later(lambda: self._writer("").write_images(step, every))

  def texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes Markdown."""
    self._later(lambda: self._writer("").write_texts(step, texts))

  def hparams(self, values: Mapping[str, object], metrics: Sequence[str] = ()) -> None:
    """Writes hyper-parameters, None for one that a run does not have.

    Args:
      values: the columns of the table of runs.
      metrics: names of scalars that become its columns too; without any, all scalars do.
    """
    self._later(self._write_hparams, values, metrics)

  def _write_hparams(self, values: Mapping[str, object], metrics: Sequence[str]) -> None:
    writer = self._writer("")
    plain = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in values.items()}
    writer.write_hparams({k: v for k, v in plain.items() if values[k] is not None})
    if metrics:
      from tensorboard.plugins.hparams import api
      from tensorboard.util.tensor_util import make_ndarray

      columns = api.hparams_config_pb(map(api.HParam, values), map(api.Metric, metrics))
      for v in columns.value:
        metadata = {v.tag: v.metadata.SerializeToString()}
        writer.write_summaries(0, {v.tag: make_ndarray(v.tensor)}, metadata)

  def projector(
    self, name: str, features: np.ndarray, metadata: Mapping[str, Sequence[object]]
  ) -> None:
    """Shows features [N, D] with columns [N] of metadata; see `projector.write`."""
    if self._enabled:
      projector.write(self._directory, name, features, metadata)

  def close(self) -> None:
    """Waits for what is still to be written."""
    self._thread.shutdown()
    for writer in self._writers.values():
      writer.flush()
      writer.close()
    for call in self._calls:
      call.result()


@functools.cache
def _import_tensorflow() -> None:
  """Imports TensorFlow, which only writes events here, and leaves the accelerators to JAX."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  import tensorflow as tf

  for device in ("GPU", "TPU"):
    tf.config.set_visible_devices([], device)
