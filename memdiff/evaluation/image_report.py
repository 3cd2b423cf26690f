"""The report of generated images laid out: what is said first, the page, the terminal's table."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from memdiff.evaluation import clip_score, networks, numerals, report
from memdiff.evaluation.criteria import Estimate
from memdiff.evaluation.lookup import mean_of

_TEMPLATE = "images.html.j2"
# What others are compared with: the first that the run has, and its name in a sentence.
_BASELINES = {"ddpm": "plain diffusion", "balanced": "diffusion on balanced batches"}
_FIGURES = (
  "kid_by_class", "guidance_sweep", "class_cosines", "long_tail_profile", "training_curves"
)  # fmt: skip
_MOST_CLASSES, _MOST_METHODS = 200, 8


@dataclasses.dataclass(frozen=True)
class Column:
  """A metric: its title, whether less is better (None: neither), what it means, shares as %."""

  title: str
  lower: bool | None
  meaning: str
  percent: bool = False


def columns(network: str) -> dict[str, Column]:
  meaning = "Fréchet distance between generated and real images, as the network's features"
  if not networks.is_fid(network):
    meaning += "; no FID, which has its own network: compare within this report"
  return {
    "fd": Column(networks.distance_title(network), True, meaning),
    "fd_many": Column("FD many", True, "the same for the most common classes"),
    "fd_medium": Column("FD medium", True, "the same for classes in between"),
    "fd_few": Column("FD few", True, "the same for the rarest classes"),
    "kid": Column("KID", True, "kernel distance: as FD, but not biased in small sets"),
    "precision": Column("precision", False, "share of generated images that lie among real ones"),
    "recall": Column("recall", False, "share of real images that lie among generated ones: the"
      " variety that is reached"),
    "density": Column("density", False, "as precision, less sensitive to outliers; may exceed 1"),
    "coverage": Column("coverage", False, "as recall, less sensitive to outliers"),
    "f8": Column("F8", False, "recall by clusters"),
    "f1_8": Column("F1/8", False, "precision by clusters"),
    "right": Column("right class", False, "share of generated images in which the classifier sees"
      " the class that was asked for", True),
    "right_few": Column("right, few", False, "the same for the rarest classes", True),
    "caption": Column("prompt", False, "share of generated images that lie nearer to their own"
      " prompt than to 99 other captions (R-precision), by a linear map from the network's features"
      " to sentences that was learned from real images; 1 % is chance", True),
    "caption_few": Column("prompt, few", False, "the same for the rarest classes", True),
    "clip": Column("CLIP", False, f"CLIP score, {clip_score.DEFINITION}; the name of the class"
      " stands for the prompt of a method that has none"),
    "clip_few": Column("CLIP, few", False, "the same for the rarest classes"),
    "diversity": Column("diversity", None, "mean distance of two generated images of a class over"
      " that of two real ones; 1 is as varied as real images"),
    "copied": Column("copied", True, "share of generated images less than a third as far from one"
      " training image as from any other, in pixels", True),
    "copied_few": Column("copied, few", True, "the same for the rarest classes", True),
    "intra_cosine": Column("intra", None, "mean cosine of the U-Net's bottlenecks of two test"
      " images of one class, noised to a quarter of the steps"),
    "inter_cosine": Column("inter", None, "the same of two classes; the lower, the better the U-Net"
      " tells classes apart"),
    "nearness": Column("nearness", None, "distance to the nearest training image over that of"
      " unseen real images; far below 1 is copying"),
  }  # fmt: skip


_SHORT = ("fd_few", "fd", "kid", "right_few", "right", "caption", "clip", "copied_few",
          "recall")  # fmt: skip
_BY_CLASS = (
  ("per_class_kid", "KID", "Kernel distance from the class's real images, lower is better."),
  ("per_class_right", "Right class", "Share in which the classifier sees the class asked for."),
  ("per_class_diversity", "Diversity", "Spread of generated images over that of real ones."),
  ("per_class_copied", "Copied", "Share that is nearly one training image."),
)


@dataclasses.dataclass(frozen=True)
class Effect:
  """A metric of the best method beside the baseline."""

  title: str
  verdict: str
  ours: str
  theirs: str
  note: str

  def sentence(self) -> str:
    return " ".join(part for part in (f"{self.title}: {self.ours}", self.theirs) if part) + (
      f": {self.note}" if self.note else "."
    )


@dataclasses.dataclass(frozen=True)
class Answer:
  """What a reader needs first; `verdict` is better, worse or unclear."""

  title: str
  explanation: str
  verdict: str
  method: str
  effects: tuple[Effect, ...]
  sentences: tuple[str, ...]


def _best(rows: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any]:
  known = [row for row in rows if mean_of(row, key) is not None]
  return min(known or rows, key=lambda row: mean_of(row, key) or 0.0)


def baseline(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
  """The row that others are compared with: plain diffusion, or else balanced batches."""
  by_name = {row["method"]: row for row in rows}
  return next((by_name[name] for name in _BASELINES if name in by_name), None)


def answer(found: Mapping[str, Any]) -> Answer:
  """Of the part `images` of a report. The criterion is the FD of the rarest classes."""
  rows, fd = found["rows"], networks.distance_title(found["network"])
  key = "fd_few" if any(mean_of(row, "fd_few") is not None for row in rows) else "fd"
  best, plain = _best(rows, key), baseline(rows)
  compared = plain if best is not plain else None
  effects = (
    _effect("Rarest classes", fd, "fd_few", best, compared),
    _effect("All classes", fd, "fd", best, compared),
  )
  effects = tuple(effect for effect in effects if effect)
  verdict = effects[0].verdict if effects else "unclear"
  description = best.get("description") or ""
  return Answer(
    title=_title(rows, best, verdict, "the rarest classes" if key == "fd_few" else "all classes"),
    explanation=f"{description[0].upper()}{description[1:]}." if description else "",
    verdict=verdict,
    method=best["method"],
    effects=effects,
    sentences=(*_content(best), *_chance(rows)),
  )


def _title(
  rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any], verdict: str, where: str
) -> str:
  """Claims a gain over the baseline only if its interval does."""
  if len(rows) == 1:
    return f"Images by {best['method']}"
  plain = baseline(rows)
  if best is plain:
    return f"No method improves on {_BASELINES[plain['method']]}"
  if plain and verdict == "better":
    return f"{best['method']}: better images of {where} than {_BASELINES[plain['method']]}"
  return f"No clear winner; {best['method']} is first on {where}"


def _effect(title, measure, key, best, plain) -> Effect | None:
  """Of the best method, and of what it gains over the baseline, if there is another."""
  if mean_of(best, key) is None:
    return None
  ours = f"{measure} {numerals.number_std(best[key], len(best['seeds']))}"
  if plain is None or mean_of(plain, key) is None:
    return Effect(title, "unclear", ours, "", "Lower is better.")
  theirs = (
    f"instead of {numerals.number_std(plain[key], len(plain['seeds']))} with {plain['method']}"
  )
  estimate = paired_difference(best[key]["values"], plain[key]["values"])
  if estimate is None:
    return Effect(title, "unclear", ours, theirs, "One seed: this may be chance.")
  low, high = estimate.interval()
  verdict = "better" if high < 0 else "worse" if low > 0 else "unclear"
  change = numerals.number(estimate.mean)
  words = "no clear difference, " if verdict == "unclear" else ""
  interval = f"{numerals.number(low)} to {numerals.number(high)}"
  return Effect(
    title, verdict, ours, theirs, f"{words}{change}, 95 % interval over seeds {interval}."
  )


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate | None:
  """Mean of the differences seed by seed; None for fewer than two seeds."""
  differences = [a - b for a, b in zip(ours, theirs, strict=True)]
  number = len(differences)
  if number < 2:
    return None
  mean = sum(differences) / number
  variance = sum((d - mean) ** 2 for d in differences) / (number - 1)
  return Estimate(mean, (variance / number) ** 0.5, number - 1)


def _content(row: Mapping[str, Any]) -> list[str]:
  """Whether the images are of their class, and whether they are new."""
  sentences = []
  if mean_of(row, "right_few") is not None:
    sentences.append(
      f"The classifier sees the class asked for in {numerals.percent(mean_of(row, 'right_few'))} %"
      f" of the images of the rarest classes, and in {numerals.percent(mean_of(row, 'right'))} % of"
      " all."
    )
  if mean_of(row, "copied_few") is not None:
    sentences.append(
      f"{numerals.percent(mean_of(row, 'copied_few'))} % of the images of the rarest classes are"
      f" nearly copies of a training image, {numerals.percent(mean_of(row, 'copied'))} % of all."
    )
  return sentences


def _chance(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  if len(rows) < 3:
    return []
  return [f"It is the best of {len(rows)} on these very images; part of its lead may be chance."]


def protocol(page: Mapping[str, Any]) -> str:
  """What every number depends on."""
  found, config = page["images"], page["config"]
  sampling, diffusion = config["sampling"], config["diffusion"]
  scale = sampling["guidance"][0]
  seeds = len(found["rows"][0]["seeds"])
  real = found.get("caption_of_real")
  captions = "" if real is None else (
    f" {numerals.percent(real)} % of real test images lie nearest to their own caption."
  )  # fmt: skip
  reference = {
    "train": "real training images, those included that the long tail left out",
    "test": "real test images",
  }[found["reference"]]
  return (
    f"{found['generated_number']:,} generated images, every class alike, against"
    f" {found['reference_number']:,} {reference}. Features: {found['network_description']}."
    f" {diffusion['num_steps']:,} training steps of {diffusion['batch_size']} images, EMA"
    f" {diffusion['ema_decay']:g}; {sampling['sampler']} with {sampling['num_steps']} steps,"
    f" guidance scale {scale:g} (ω = {scale - 1:g})."
    f"{captions}"
    f" {'Mean ± standard deviation over ' + str(seeds) + ' seeds.' if seeds > 1 else 'One seed.'}"
  )


def cell(row: Mapping[str, Any], key: str, column: Column) -> str:
  seeds = len(row["seeds"])
  if column.percent:
    return numerals.mean_std(row.get(key), seeds) + (" %" if mean_of(row, key) is not None else "")
  return numerals.number_std(row.get(key) or {}, seeds)


def _is_best(rows: Sequence[Mapping[str, Any]], key: str, column: Column) -> list[bool]:
  values = [mean_of(row, key) for row in rows]
  known = [value for value in values if value is not None]
  if column.lower is None or len(known) < 2:
    return [False] * len(rows)
  best = min(known) if column.lower else max(known)
  return [value == best for value in values]


def _table(found: Mapping[str, Any], best_method: str) -> dict[str, Any]:
  rows, known = found["rows"], columns(found["network"])
  shown = [key for key in _SHORT if any(mean_of(row, key) is not None for row in rows)]
  best = {key: _is_best(rows, key, known[key]) for key in shown}
  lines = [
    {
      "method": row["method"],
      "description": row["description"],
      "best_method": row["method"] == best_method and len(rows) > 1,
      "cells": [(cell(row, key, known[key]), best[key][i]) for key in shown],
    }
    for i, row in enumerate(rows)
  ]
  everything = found["sweep"] or rows
  full = [
    (f"{row['method']}, {row['scale']:g}", [cell(row, k, c) for k, c in known.items()])
    for row in everything
  ]
  arrows = {True: " ↓", False: " ↑", None: ""}
  return {
    "columns": [known[key].title + arrows[known[key].lower] for key in shown],
    "lines": lines,
    "full": {"titles": [column.title for column in known.values()], "lines": full},
  }


def _by_class(page: Mapping[str, Any]) -> dict[str, Any]:
  rows, data = page["images"]["rows"][:_MOST_METHODS], page["dataset"]
  if data["num_classes"] > _MOST_CLASSES:
    return {"methods": [], "tables": []}
  order = sorted(range(data["num_classes"]), key=lambda c: -data["train_counts"][c])
  tables = []
  for key, title, meaning in _BY_CLASS:
    if key not in rows[0]:
      continue
    lines = [
      (
        data["class_names"][c],
        f"{data['train_counts'][c]:,}",
        [numerals.number(row[key]["mean"][c]) for row in rows],
      )
      for c in order
    ]
    tables.append((title, meaning, lines))
  return {"methods": [row["method"] for row in rows], "tables": tables}


def render_html(page: Mapping[str, Any], figures: Mapping[str, bytes]) -> str:
  """The whole report as one self-contained HTML page.

  Args:
    page: the run's report, as it is written to report.json.
    figures: PNG files by name.
  """
  pictures, found = report.data_uris(figures), answer(page["images"])
  methods = [row["method"] for row in page["images"]["rows"]]
  of_methods = {
    kind: [(m, pictures[f"{kind}_{m}"]) for m in methods if f"{kind}_{m}" in pictures]
    for kind in ("samples", "prompts", "bottleneck")
  }
  placed = {*_FIGURES, *(f"{kind}_{m}" for kind in of_methods for m in methods)}
  view = {
    "answer": found,
    "table": _table(page["images"], found.method),
    "protocol": protocol(page),
    "terms": [(c.title, c.meaning) for c in columns(page["images"]["network"]).values()],
    "samples": of_methods["samples"],
    "prompts": of_methods["prompts"],
    "bottlenecks": of_methods["bottleneck"],
    "first_seed": page["config"]["seeds"][0],
    "by_class": _by_class(page),
    "figures": {name: pictures.get(name) for name in _FIGURES},
    "further_figures": {n: p for n, p in pictures.items() if n not in placed},
  }
  return report.render_page(_TEMPLATE, report.common_view(page) | view)


def text_table(page: Mapping[str, Any]) -> str:
  """The answer in sentences, then the short table."""
  found = answer(page["images"])
  table = _table(page["images"], found.method)
  first = f"{found.title}. {found.explanation}".strip()
  said = [first, *(effect.sentence() for effect in found.effects), *found.sentences]
  cells = [["method", *table["columns"]]]
  cells += [[line["method"], *(cell for cell, _ in line["cells"])] for line in table["lines"]]
  blocks = [*map(report.wrapped, said), "", report.wrapped(protocol(page)), ""]
  return "\n".join([*blocks, *report.aligned(cells)])
