"""Pages of results show what the JSON beside them holds, and nothing else."""

import json
import re

import pytest

from benchmarks import pages

# Pages of speed: text by hand around tables that are made.
OF_SPEED = {"classification.md", "feature_diffusion.md", "peers.md", "pixel_diffusion_speed.md"}
RENDERED = pages.render()


@pytest.mark.parametrize("name", sorted(RENDERED))
def test_a_page_is_what_its_json_renders_to(name):
  committed = (pages.ROOT / name).read_text(encoding="utf-8")
  assert committed == RENDERED[name], "run python -m benchmarks.pages"


def test_every_json_and_every_page_of_results_is_accounted_for():
  made = {name.rpartition("/")[2] for name in RENDERED if name.startswith("docs/results/")}
  assert {path.name for path in pages.RESULTS.glob("*.md")} == made
  shown = {
    f"{name.removesuffix('.md')}.json" for name in made - {"classification.md", "isolating.md"}
  }
  beside = {
    f"{name}.json"
    for name in (pages.DEFAULT_RUN, "added_images", "bank_scaling", "classifier_speed")
  }
  found = {path.name for path in pages.RESULTS.glob("*.json")}
  assert found == shown | beside


@pytest.mark.parametrize("name", sorted(OF_SPEED))
def test_a_page_of_speed_names_its_command(name):
  assert re.search(r"`(make bench|python -m benchmarks\.\w+)", (pages.RESULTS / name).read_text())


def loose_figures(text):
  """Decimal numbers outside of blocks and code that no block of the page shows."""
  shown = set(re.findall(r"\d+\.\d+", " ".join(pages.blocks(text).values())))
  prose = pages.BLOCK.sub("", text)
  prose = re.sub(r"```.*?```|`[^`]*`|\]\(.*?\)", "", prose, flags=re.DOTALL)
  return set(re.findall(r"\d+\.\d+", prose)) - shown


def test_the_account_of_the_generators_quotes_only_what_its_tables_show():
  assert not loose_figures((pages.RESULTS / "isolating.md").read_text(encoding="utf-8"))


def test_a_figure_outside_of_the_tables_is_found():
  page = "It is 1.5, not 2.25 as `run --x=3.5` says.\n<!-- begin: t -->\n1.5\n<!-- end: t -->\n"
  assert loose_figures(page) == {"2.25"}


def test_blocks_are_filled_and_the_rest_is_kept():
  page = "a\n<!-- begin: x y -->\nold\n<!-- end: x y -->\nb\n<!-- begin: z -->\n<!-- end: z -->\n"
  made = pages.filled(page, {"x y": lambda: "new\nlines", "z": lambda: "filled"})
  assert pages.blocks(made) == {"x y": "new\nlines\n", "z": "filled\n"}
  assert made.startswith("a\n<!-- begin: x y -->") and "-->\nb\n<!--" in made
  assert pages.filled(made, {"x y": lambda: "new\nlines", "z": lambda: "filled"}) == made


@pytest.mark.parametrize("makers", [{}, {"y": str}, {"x": str, "y": str}])
def test_a_page_must_have_the_blocks_that_are_made_for_it(makers):
  with pytest.raises(ValueError, match="blocks"):
    pages.filled("<!-- begin: x -->\n<!-- end: x -->\n", makers)


def test_a_changed_figure_in_the_json_changes_the_page(tmp_path):
  source = pages.RESULTS / "isolating_digits.json"
  report = json.loads(source.read_text(encoding="utf-8"))
  row = next(r for r in report["classification"] if r["method"] == "memdiff+balanced_softmax")
  row["balanced_accuracy"]["mean"] = 0.12346
  path = tmp_path / source.name
  path.write_text(json.dumps(report), encoding="utf-8")
  assert "12.35 ± " in pages.isolating.page(path)
