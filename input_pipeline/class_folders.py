"""The images in a folder per class, and what is left out there and why.

Links to folders and files are followed. Hidden names and what systems leave behind (LITTER) are
neither classes nor images, and are not mentioned.
"""

import os
import pathlib
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from input_pipeline import image_files
from memdiff.errors import DataError

LITTER = frozenset({
  "__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "thumbs.db", "ehthumbs.db",
  "desktop.ini",
})  # fmt: skip
_KINDS = 6  # reasons that are listed; the others are counted together


class LeftOut(NamedTuple):
  """A file that is not taken."""

  path: pathlib.Path
  reason: str  # the same for all files of a kind: ".txt"
  detail: str = ""  # of this file


def visible(folder: pathlib.Path) -> list[os.DirEntry]:
  """What lies in a folder, by name, without hidden names and LITTER."""
  try:
    with os.scandir(folder) as entries:
      seen = [e for e in entries if not e.name.startswith(".") and e.name.lower() not in LITTER]
  except OSError as error:
    raise DataError(f"Cannot read the folder {folder} ({error.strerror}).") from error
  return sorted(seen, key=lambda entry: entry.name)


def kind_of(entry: os.DirEntry) -> str:
  """What an entry is, or leads to: folder, file, broken link, or special file."""
  try:
    if entry.is_dir():
      return "folder"
    if entry.is_file():
      return "file"
  except OSError:  # a link to itself, or to if nobody may look
    return "broken link"
  return "broken link" if entry.is_symlink() else "special file"


def find_classes(folder: pathlib.Path) -> tuple[dict[str, pathlib.Path], list[LeftOut]]:
  """Folders of the classes, by name in alphabetical order, and the files beside them.

  Names are in Unicode's composed form, so that they are the same whatever system wrote them.
  """
  classes, beside = {}, []
  for entry in visible(folder):
    path, kind = folder / entry.name, kind_of(entry)
    if kind != "folder":
      beside.append(LeftOut(path, kind if kind != "file" else "outside the folders of classes"))
      continue
    name = unicodedata.normalize("NFC", entry.name)
    if name in classes:
      raise DataError(
        f"{folder} has two folders {name!r}, whose names differ only in how their letters are"
        " encoded; merge them."
      )
    classes[name] = path
  return dict(sorted(classes.items())), beside


def find_images(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[LeftOut]]:
  """Images of a class at any depth, in alphabetical order, and the files that are none.

  Each file is taken once, however many links lead to it. Links to a folder above are not followed.
  """
  images, left_out = [], []
  real, parent = folder.resolve(), folder.parent.resolve()  # two places if the folder is a link
  above = {str(path) for place in (real, parent) for path in (place, *place.parents)}
  reached = set()

  def visit(folder: pathlib.Path, real: str) -> None:
    for entry in visible(folder):
      path, kind = folder / entry.name, kind_of(entry)
      place = os.path.realpath(path) if entry.is_symlink() else os.path.join(real, entry.name)
      if kind == "folder" and place in above:
        left_out.append(LeftOut(path, "link to a folder above it"))
      elif kind in ("folder", "file") and place in reached:
        left_out.append(LeftOut(path, "linked twice"))
      elif kind == "folder":
        reached.add(place)
        visit(path, place)
      elif kind == "file" and path.suffix.lower() in image_files.suffixes():
        reached.add(place)
        images.append(path)
      elif kind == "file":
        left_out.append(LeftOut(path, path.suffix.lower() or "without a suffix"))
      else:
        left_out.append(LeftOut(path, kind))

  visit(folder, str(real))
  return images, left_out


def describe(left_out: Sequence[LeftOut], root: pathlib.Path) -> str:
  """Numbers by reason, each with an example: "2 files left out: 2 .txt (cat/notes.txt)"."""
  by_reason = {}
  for item in left_out:
    by_reason.setdefault(item.reason, []).append(item)
  groups = sorted(by_reason.items(), key=lambda group: -len(group[1]))
  if len(groups) > _KINDS:
    others = [item for _, items in groups[_KINDS:] for item in items]
    groups = [*groups[:_KINDS], ("of other kinds", others)]
  listed = ", ".join(
    f"{len(items)} {reason} ({_example(items[0], root)})" for reason, items in groups
  )
  number = f"{len(left_out)} file{'s' if len(left_out) != 1 else ''} left out"
  return f"{number}: {listed}" if listed else number


def _example(item: LeftOut, root: pathlib.Path) -> str:
  path = item.path.relative_to(root).as_posix()
  return f"{path}: {item.detail}" if item.detail else path
