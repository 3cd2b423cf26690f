"""Where numbers and pictures of a run go: metrics.jsonl always, TensorBoard unless switched off.

The only file that knows clu's metric writers, and with them TensorFlow; both are imported when the
first TensorBoard writer is made.
"""

import functools
import importlib.util
import json
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from memdiff.errors import ConfigError
from memdiff.runtime.workdir import write_atomically, writing


class History:
  """metrics.jsonl: one line per record {"step", "kind", "metrics": {name: [per seed]}}."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  def rewind(self, step: int) -> None:
    """Drops what a killed process had written beyond the checkpoint it is restored from."""
    kept = [
      record
      for record in read_history(self._path)
      if record["step"] < step or (record["step"] == step and record["kind"] == "train")
    ]
    write_atomically(self._path, "".join(json.dumps(record) + "\n" for record in kept).encode())

  def write(self, step: int, kind: str, metrics: Mapping[str, np.ndarray]) -> None:
    values = {name: np.asarray(value, float).tolist() for name, value in metrics.items()}
    with writing(self._path), self._path.open("a") as file:
      file.write(json.dumps({"step": step, "kind": kind, "metrics": values}) + "\n")


def read_history(path: pathlib.Path) -> list[dict]:
  """The records of a metrics.jsonl; a last line that a kill cut short is dropped."""
  if not path.exists():
    return []
  records = []
  for line in path.read_text().splitlines():
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return records


class TensorBoard:
  """Scalars, pictures and hyper-parameters of one run, or nothing where it is switched off.

  Raises:
    ConfigError: where it is switched on and TensorFlow or clu is missing.
  """

  def __init__(self, directory: pathlib.Path, enabled: bool):
    self._directory = directory
    self._enabled = enabled
    for package in ("tensorflow", "tensorboard", "clu"):
      if enabled and importlib.util.find_spec(package) is None:
        raise ConfigError(
          f"TensorBoard logging needs {package}, which is not installed; install requirements.txt"
          " or run with --notensorboard."
        )

  @functools.cached_property
  def _writer(self):
    """Made when first written to: the import takes seconds."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow only writes events here
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf
    from clu import metric_writers

    for device in ("GPU", "TPU"):  # they belong to JAX
      tf.config.set_visible_devices([], device)
    return metric_writers.SummaryWriter(str(self._directory))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    if self._enabled:
      self._writer.write_scalars(step, values)

  def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
    """Writes uint8 pictures [H, W, 3]."""
    if self._enabled:
      self._writer.write_images(step, {name: p[None] for name, p in pictures.items()})

  def hparams(self, values: Mapping[str, object]) -> None:
    if self._enabled:
      plain = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in values.items()}
      self._writer.write_hparams(plain)

  def close(self) -> None:
    if self._enabled and "_writer" in self.__dict__:
      self._writer.flush()
      self._writer.close()
