"""Captions of images in a folder, as Hugging Face's ImageFolder reads them.

Beside the folders of classes lies metadata.csv or metadata.jsonl. Each of its rows has `file_name`,
a path that starts at that folder, and `text` (or `caption`), what the image shows.
"""

import codecs
import csv
import io
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from memdiff.errors import DataError

NAMES = ("metadata.csv", "metadata.jsonl")
_FILE, _TEXTS = "file_name", ("text", "caption")


def read(folder: pathlib.Path, paths: Sequence[pathlib.Path]) -> tuple[str, ...] | None:
  """The captions of images, "" for those that have none; None if there is no file of captions.

  Args:
    folder: of the classes, where the file lies.
    paths: of the images, below the folder.

  Raises:
    DataError: naming the file, and the line that is wrong.
  """
  source = _source(folder)
  if source is None:
    return None
  known = _known(source)
  found = tuple(known.get(path.relative_to(folder).as_posix(), "") for path in paths)
  if not any(found):
    raise DataError(
      f"{source} has no caption for any image of {folder}; {_FILE} has to be a path from that"
      f" folder on, such as {paths[0].relative_to(folder).as_posix()}."
    )
  return found


def known(folder: pathlib.Path) -> dict[str, str]:
  """{path from the folder on: caption} of the images that have one.

  Raises:
    DataError: as `read`.
  """
  source = _source(folder)
  if source is None:
    return {}
  if source.suffix == ".csv":
    _columns(source)
  return {name: text for name, text in _known(source).items() if text}


def append(folder: pathlib.Path, captions: Mapping[str, str]) -> None:
  """Adds {path from the folder on: caption} to the file of captions, which is made if need be.

  Raises:
    DataError: if it has other columns, or cannot be written.
  """
  path = _source(folder) or folder / NAMES[0]
  try:
    is_new = not path.exists() or not path.read_bytes().removeprefix(codecs.BOM_UTF8).strip()
    lines = _csv_lines(path, captions, is_new=is_new) if path.suffix == ".csv" else "".join(
      json.dumps({_FILE: name, _TEXTS[0]: said}, ensure_ascii=False) + "\n"
      for name, said in captions.items()
    )  # fmt: skip
    if not is_new and not path.read_bytes().endswith(b"\n"):
      lines = "\n" + lines
    if is_new:
      path.write_text("", encoding="utf-8")
    with open(path, "a", encoding="utf-8", newline="") as file:
      file.write(lines)
  except OSError as error:
    raise DataError(f"Cannot write {path} ({error.strerror}).") from error


def _csv_lines(path: pathlib.Path, captions: Mapping[str, str], *, is_new: bool) -> str:
  columns = [_FILE, _TEXTS[0]] if is_new else _columns(path)
  text = io.StringIO(newline="")
  writer = csv.DictWriter(text, columns, lineterminator="\n")
  if is_new:
    writer.writeheader()
  column = next(name for name in _TEXTS if name in columns)
  writer.writerows({_FILE: name, column: said} for name, said in captions.items())
  return text.getvalue()


def _columns(path: pathlib.Path) -> list[str]:
  """Of a .csv file; none if there is nothing in it.

  Raises:
    DataError: if those that are needed are not among them.
  """
  try:
    with open(path, encoding="utf-8-sig", newline="") as file:
      columns = next(csv.reader(file, strict=True), [])
  except OSError as error:
    raise DataError(f"Cannot read {path} ({error.strerror}).") from error
  except (ValueError, csv.Error) as error:
    raise DataError(f"Cannot read the captions in {path} ({error}).") from error
  if columns and (_FILE not in columns or not set(_TEXTS) & set(columns)):
    raise DataError(f"{path} needs the columns {_FILE} and {' or '.join(_TEXTS)}.")
  return columns


def _source(folder: pathlib.Path) -> pathlib.Path | None:
  there = [folder / name for name in NAMES if (folder / name).is_file()]
  if len(there) > 1:
    raise DataError(f"{folder} has both {NAMES[0]} and {NAMES[1]}; keep one of them.")
  return there[0] if there else None


def _known(source: pathlib.Path) -> dict[str, str]:
  found: dict[str, str] = {}
  for number, row in _rows(source):
    texts = [row[t] for t in _TEXTS if t in row]
    name, text = row.get(_FILE), next((t for t in texts if t), texts[0] if texts else None)
    if not isinstance(name, str) or not isinstance(text, str):
      raise DataError(
        f"{source}, line {number}: it needs {_FILE} and {' or '.join(_TEXTS)}, both texts."
      )
    found[pathlib.PurePosixPath(name).as_posix()] = " ".join(text.split())
  return found


def _rows(path: pathlib.Path) -> Iterator[tuple[int, dict]]:
  """(number of the line, row)."""
  try:
    with open(path, encoding="utf-8-sig", newline="") as file:
      if path.suffix == ".csv":
        reader = csv.DictReader(file, strict=True)  # else an open quote swallows the rest
        try:
          for row in reader:
            yield reader.line_num, row
        except csv.Error as error:
          raise ValueError(f"after line {reader.line_num}: {error}; look at its quotes") from error
      else:
        for number, line in enumerate(file, 1):
          if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
              raise ValueError(f"line {number} is no object")
            yield number, row
  except OSError as error:
    raise DataError(f"Cannot read {path} ({error.strerror}).") from error
  except ValueError as error:  # torn JSON, or no UTF-8
    raise DataError(f"Cannot read the captions in {path} ({error}).") from error


def describe(captions: Sequence[str] | None) -> str:
  """How many there are: "with 90 captions of 100"; "" if there are none at all."""
  if captions is None:
    return ""
  return f"with {sum(map(bool, captions))} captions of {len(captions)}"
