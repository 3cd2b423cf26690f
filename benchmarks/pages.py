"""Pages of results, made from the JSON beside them.

  python -m benchmarks.pages                                    writes all pages anew
  python -m benchmarks.pages --readme=runs/digits_lt/report.json  the same after `make run`, whose
                                                                 report becomes README's table

A page is made whole (`isolating_*.md`, `confidence_*.md`), or written by hand around tables that
are made: what stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->` belongs to `BLOCKS`.
"""

import argparse
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from benchmarks import (
  aot,
  augmented,
  confidence,
  embeddings,
  embeddings_scale,
  generation,
  image_metrics,
  isolating,
  speed_tables,
  streaming,
  unseen_classes,
)
from benchmarks.faults import page as faults
from memdiff.runtime.workdir import write_atomically, write_json

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
DEFAULT_RUN = "digits_default"
_SETTINGS = {
  "foreign": "isolating_foreign",
  "memorised": "isolating_memorised",
  "memorised CIFAR-10": "isolating_cifar10",
  "trained": "isolating_trained",
  "digits": "isolating_digits",
}
_DESCRIBED = (  # rows that tell what embeddings of the classes are worth
  *("real+blend", "real+plda", "real+class_knowledge", "real+zero_shot"),
  *("memdiff+balanced_softmax", "memdiff_described+balanced_softmax"),
)


def load(name: str) -> Any:
  """The content of docs/results/NAME.json."""
  return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _settings() -> dict[str, Any]:
  return {title: load(name) for title, name in _SETTINGS.items()}


# page -> name of a block in it -> its text
BLOCKS: dict[str, dict[str, Callable[[], str]]] = {
  "README.md": {
    "default run": lambda: isolating.default_run(load(DEFAULT_RUN)),
    "generated images": lambda: augmented.summary_table(load("augmented")),
  },
  "docs/results/aot.md": {
    "imagenet_lt": lambda: aot.table(load("aot")["imagenet_lt"]),
    "inaturalist2018": lambda: aot.table(load("aot")["inaturalist2018"]),
    "bank": lambda: aot.bank_table(load("aot")),
  },
  "docs/results/faults.md": {"campaign": lambda: faults.markdown(load("faults"))},
  "docs/results/image_metrics.md": {
    "machine": lambda: speed_tables.machine(load("image_metrics")),
    "sets": lambda: image_metrics.table(load("image_metrics")),
  },
  "docs/results/isolating.md": {
    "settings": lambda: isolating.settings_table(_settings()),
    "recommendations": lambda: isolating.recommendations_table(_settings()),
    "ldmlr": lambda: isolating.judged_table(load("isolating_ldmlr")),
    "described": lambda: isolating.scores_table(load("isolating_described"), _DESCRIBED),
    "joint": lambda: isolating.joint_table(load("isolating_digits_joint")),
  },
  "docs/results/classification.md": {
    "machine": lambda: speed_tables.machine(load("classifier_speed")),
    "speed": lambda: speed_tables.measured(load("classifier_speed")["table"]),
  },
  "docs/results/feature_diffusion.md": {
    "machine": lambda: speed_tables.machine(load("feature_diffusion")),
    "speed": lambda: speed_tables.measured(load("feature_diffusion")["table"]),
  },
  "docs/results/peers.md": {
    "machine": lambda: speed_tables.machine(load("peers")),
    "LDMLR": lambda: speed_tables.measured(load("peers")["LDMLR"]["table"]),
    "LDMLR profile": lambda: speed_tables.profile(load("peers"), "LDMLR"),
    "CSL-P3": lambda: speed_tables.measured(load("peers")["CSL-P3"]["table"]),
    "CSL-P3 profile": lambda: speed_tables.profile(load("peers"), "CSL-P3"),
    "banks": lambda: speed_tables.banks(load("bank_scaling")),
  },
  "docs/results/pixel_diffusion_speed.md": {
    "machine": lambda: speed_tables.machine(load("pixel_diffusion_speed")),
    "digits": lambda: speed_tables.measured(
      load("pixel_diffusion_speed")["configs"]["digits"]["table"]
    ),
  },
  "docs/results/streaming.md": {
    "costs": lambda: streaming.cost_table(load("streaming")["costs"]),
    "throughput": lambda: streaming.throughput_table(load("streaming")["costs"]),
    "waits": lambda: streaming.waits_table(load("streaming")["waits"]),
    "resuming": lambda: streaming.resuming_text(load("streaming")["costs"]),
  },
}  # fmt: skip


def whole_pages() -> dict[str, Callable[[], str]]:
  """Page -> its text, of the pages that are made whole."""
  pages = {}
  for path in sorted(RESULTS.glob("isolating_*.json")):
    pages[f"docs/results/{path.stem}.md"] = lambda path=path: isolating.page(path)
  for path in sorted(RESULTS.glob("confidence_*.json")):
    pages[f"docs/results/{path.stem}.md"] = lambda path=path: confidence.markdown(load(path.stem))
  pages["docs/results/augmented.md"] = lambda: augmented.page(
    load("augmented"), load("added_images")
  )
  pages["docs/results/image_generation.md"] = lambda: generation.page(load("image_generation"))
  pages["docs/results/unseen_classes.md"] = lambda: unseen_classes.page(load("unseen_classes"))
  pages["docs/results/embeddings.md"] = lambda: embeddings.page(load("embeddings"))
  pages["docs/results/embeddings_scale.md"] = lambda: embeddings_scale.page(
    load("embeddings_scale")
  )
  return pages


BLOCK = re.compile(r"<!-- begin: (.+?) -->\n(.*?)<!-- end: \1 -->", re.DOTALL)


def blocks(text: str) -> dict[str, str]:
  """Name -> content of every block in a page."""
  return {match[1]: match[2] for match in BLOCK.finditer(text)}


def filled(text: str, makers: dict[str, Callable[[], str]]) -> str:
  """The page with every block made anew.

  Raises:
    ValueError: its blocks are not those that `makers` makes.
  """
  found = set(blocks(text))
  if found != set(makers):
    raise ValueError(f"The page has the blocks {sorted(found)}, not {sorted(makers)}.")

  def made(match: re.Match) -> str:
    name = match[1]
    return f"<!-- begin: {name} -->\n{makers[name]()}\n<!-- end: {name} -->"

  return BLOCK.sub(made, text)


def render() -> dict[str, str]:
  """Page, relative to the root -> the text that it should have."""
  pages = {name: make() for name, make in whole_pages().items()}
  for name, makers in BLOCKS.items():
    pages[name] = filled((ROOT / name).read_text(encoding="utf-8"), makers)
  return pages


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--readme", type=pathlib.Path, help="report.json of the default run")
  arguments = parser.parse_args()
  if arguments.readme:
    report = json.loads(arguments.readme.read_text(encoding="utf-8"))
    write_json(RESULTS / f"{DEFAULT_RUN}.json", isolating.reduced(report))
  for name, text in render().items():
    if text != (ROOT / name).read_text(encoding="utf-8"):
      write_atomically(ROOT / name, text.encode())
      print(f"written: {name}")


if __name__ == "__main__":
  main()
