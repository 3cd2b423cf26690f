"""A finished run, as its workdir tells it; its data are not needed."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from memdiff import paths, pipeline
from memdiff.errors import ConfigError, WorkdirError
from memdiff.evaluation.lookup import is_reference, row_of
from memdiff.experiments.record import SCHEMA


@dataclasses.dataclass(frozen=True)
class FinishedRun:
  """What is known of a run without its data.

  Attributes:
    path: its workdir.
    report: report.json.
    settings: its config.
  """

  path: pathlib.Path
  report: Mapping[str, Any]
  settings: Any

  def folder(self, phase: str) -> pathlib.Path:
    return self.path / phase

  @property
  def class_names(self) -> tuple[str, ...]:
    return tuple(self.report["dataset"]["class_names"])

  @property
  def methods(self) -> list[str]:
    """The rows of its table."""
    return [row["method"] for row in self.report["classification"]]

  def method(self, wanted: str = "") -> str:
    """The method of this name, or the one to use: the recommended one, or the first of the table.

    Raises:
      ConfigError: if the run has no such method.
    """
    if wanted:
      if wanted not in self.methods:
        raise ConfigError(
          f"--method is {wanted!r}, but must be a method of the run: {', '.join(self.methods)}."
        )
      return wanted
    recommended = (self.report.get("headline") or {}).get("recommended")
    recommended = recommended or (self.report.get("recommendation") or {}).get("method")
    usual = (row["method"] for row in self.report["classification"] if not self._is_reference(row))
    return recommended or next(usual)

  def _is_reference(self, row: Mapping[str, Any]) -> bool:
    return is_reference(self.report, row)

  def description(self, method: str) -> str:
    return row_of(self.report, method).get("description") or ""

  def calibration(self, method: str) -> Mapping[str, Any]:
    """{"temperature", "error", "error_before"}, as `evaluation.calibration.measure` has it."""
    return row_of(self.report, method)["calibration"]

  def choice(self, method: str) -> Mapping[str, Any]:
    """How the run has set a method; empty if there was nothing to choose."""
    return (self.report.get("choices") or {}).get(method) or {}


def open_run(workdir: str) -> FinishedRun:
  """The run in a workdir.

  Raises:
    ConfigError, WorkdirError: if it is not finished, of another version, or has no classifiers.
  """
  path = paths.workdir(workdir)
  try:
    report = json.loads((path / "report.json").read_text(encoding="utf-8"))
    kind, schema = pipeline.KINDS[report["experiment"]], report["schema"]
  except FileNotFoundError:
    begun = sorted(folder.parent.name for folder in path.glob("*/manifest.json"))
    if not begun:
      raise ConfigError(f"There is no run in {path}; give the --workdir of one.") from None
    raise WorkdirError(
      f"The run in {path} is not finished; run its command again, which continues it."
    ) from None
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise WorkdirError(
      f"Cannot read {path / 'report.json'} ({error}); remove it and run the command of the run"
      " again, which writes it anew."
    ) from error
  if not kind.predicts:
    raise ConfigError(
      f"The run in {path} generated images and trained no classifier for them; give the --workdir"
      " of a run that did, such as those of configs/augmented/."
    )
  version = (report.get("versions") or {}).get("memdiff", "unknown")
  if schema != SCHEMA or "input" not in report:
    raise WorkdirError(
      f"The run in {path} is of another version of memdiff ({version}), which did not record what"
      f" its classifiers take; remove {path / 'evaluation'} and run its command again."
    )
  try:
    settings = pipeline.settings_of(report["config"])
  except ConfigError as error:
    raise WorkdirError(
      f"The run in {path} is of another version of memdiff ({version}), whose config this one does"
      f" not know ({str(error).rstrip('.')}); use that version."
    ) from error
  return FinishedRun(path, report, settings)
