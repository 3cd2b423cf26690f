"""A run's report laid out: one HTML page for people and a few lines of text for the terminal.

The page is a single file that needs nothing else: pictures are embedded, styles are inline, there
is no script and nothing is loaded from anywhere, so it can be mailed, archived and printed. Parts
of the report that are missing leave out their section and no more. What it says first is in
`answer`, its other sentences in `wording`, its tables in `tables`.
"""

import base64
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from memdiff.evaluation import numerals, pool_tables, ratings, tables, wording
from memdiff.evaluation.answer import answer
from memdiff.evaluation.lookup import made_data, num_seeds

_TEMPLATE = "report.html.j2"
_LINE = 100  # characters of a line in the terminal

# The pictures that the page has a place and a caption for; others are shown at its end.
FIGURES = (
  "long_tail_profile",
  "per_class_accuracy",
  "gap_closed",
  "feature_map",
  "confidence_histogram",
  "confidence_reliability",
  "training_curves",
)


_POOL = "pool_"  # begins the names of pictures of generated images


def render_html(report: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
  """The whole report as one self-contained HTML page.

  Args:
    report: the run's report, as it is written to report.json.
    figures: PNG files by name; those named in `FIGURES` have a section of their own.
  """
  return render_page(_TEMPLATE, _view(report, figures))


def render_page(template: str, view: Mapping[str, Any]) -> str:
  """A page out of the folder of templates."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {"tied": numerals.tied, "breakable": _breakable}
  return environment.get_template(template).render(view)


def text_table(report: Mapping[str, Any]) -> str:
  """The answer in sentences, then the short table: one line per method, in percent.

  Between them stands what was run and by which rule classes are called many, medium or few. With a
  single seed there is no spread, and only the mean is printed.
  """
  found = answer(report)
  said = [wrapped(line) for line in found.lines()] if found else []
  shown, number = len(tables.short(report)), len(report.get("classification") or [])
  rest = (
    ["", f"{shown} of {number} methods; report.html has all of them."] if shown < number else []
  )
  blocks = [*said, *([""] if said else []), *map(wrapped, wording.preamble(report)), ""]
  return "\n".join([*blocks, *aligned(tables.text_cells(report)), *rest])


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
  """Lines of text of a table whose first line is its header."""
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines = []
  for first, *rest in cells:
    padded = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
    lines.append("  ".join([first.ljust(widths[0]), *padded]))
  return [lines[0], "-" * len(lines[0]), *lines[1:]]


def wrapped(line: str) -> str:
  return textwrap.fill(
    line, _LINE, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
  )


def _view(report: Mapping[str, Any], figures: Mapping[str, bytes]) -> dict[str, Any]:
  pictures, found = data_uris(figures), answer(report)
  return {
    **common_view(report),
    "answer": found,
    "table": tables.methods(report, found),
    "untested": wording.untested(report),
    "usage": wording.usage(report, found and found.method),
    "decision": wording.decision(report),
    "advice": tables.advice(report),
    "comparison": wording.comparison(report),
    "summary": wording.summary(report),
    "steps": wording.steps(report),
    "seeds": num_seeds(report),
    "made": made_data(report),
    "pools": pool_tables.pools(report),
    "same_loss": pool_tables.same_loss(report),
    "reference": (report.get("comparison") or {}).get("reference"),
    "groups": tables.groups(report),
    "by_class": tables.by_class(report),
    "figures": {name: pictures.get(name) for name in FIGURES},
    "pool_figures": {n: p for n, p in pictures.items() if n.startswith(_POOL)},
    "further_figures": {
      n: p for n, p in pictures.items() if n not in FIGURES and not n.startswith(_POOL)
    },
    "metrics": tables.metric_tables(report),
  }


def data_uris(figures: Mapping[str, bytes]) -> dict[str, str]:
  """PNG files as they are embedded in a page, by name."""
  return {name: _data_uri(png) for name, png in figures.items() if png}


def common_view(report: Mapping[str, Any]) -> dict[str, Any]:
  """What the head and the closing of every page show."""
  return {
    "name": report.get("name") or "memdiff run",
    "timing": tables.timing(report),
    "command": report.get("command"),
    "versions": report.get("versions") or {},
    "hardware": report.get("hardware") or {},
    "split": (report.get("dataset") or {}).get("split_sha256"),
    "config": _pretty(report.get("config")),
    "ratings": _rated(report.get("ratings")),
  }


def _rated(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
  """A table of what people say of images."""
  if not found:
    return None
  lines = [(name, ratings.cells(of_source)) for name, of_source in found.items()]
  return {"titles": ratings.ASKED, "lines": lines}


def _breakable(text: str) -> markupsafe.Markup:
  """Lets a line break behind the + within a method's name."""
  return markupsafe.Markup(re.sub(r"(?<=\w)\+(?=\w)", "+<wbr>", str(markupsafe.escape(text))))


def _data_uri(png: bytes) -> str:
  return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _pretty(config: Mapping[str, Any] | None) -> str:
  return json.dumps(config, indent=2, default=str, ensure_ascii=False) if config else ""
