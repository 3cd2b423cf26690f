"""The page in a browser, on a wide and a narrow screen: nothing sideways, the answer in sight."""

import json
import re
import shutil
import subprocess

import pytest

from memdiff.evaluation import plots, report
from tests.evaluation.sample_report import difference, make_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(
  BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed"
)

# Put into a copy of the page, framed at the width in question: a window of a browser without a
# screen may be wider than it was asked to be.
MEASURE = """
const page = frames[0], root = page.document.documentElement, wide = root.clientWidth;
const sticksOut = [...page.document.querySelectorAll("body *")].filter(
  e => e.getBoundingClientRect().right > wide + 1 && !e.closest("details:not([open]), .scroll"));
const boxes = [...page.document.querySelectorAll("#methods .scroll")];
const bottom = selector => page.document.querySelector(selector)?.getBoundingClientRect().bottom;
const measured = {
  width: page.innerWidth, overflow: root.scrollWidth - page.innerWidth,
  out: sticksOut.map(e => e.outerHTML.slice(0, 60)),
  tables: boxes.map(e => e.scrollWidth - e.clientWidth),
  title: bottom("h1"), effects: bottom(".effects"), finding: bottom(".synthetic p"),
  pictures: [...page.document.images].map(i => i.naturalWidth),
};
document.body.textContent = "MEASURED" + JSON.stringify(measured) + "END";
"""
SCREENS = ((1200, 900), (390, 844))


def measure(folder, source: str, width: int, height: int) -> dict:
  """Loads a page and returns its sizes in CSS pixels, with all that is folded opened."""
  # The page forbids scripts and frames of its own kind by its policy, which the copy leaves out.
  copy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
  (folder / "page.html").write_text(copy)
  frame = (
    f'<body style="margin:0"><iframe src="page.html" width="{width}" height="{height}"'
    f' style="border:0"></iframe><script>onload = () => {{ {MEASURE} }}</script>'
  )
  (folder / "frame.html").write_text(frame)
  command = [
    BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
    f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--dump-dom",
    f"--window-size={width + 100},{height + 100}", (folder / "frame.html").as_uri(),
  ]  # fmt: skip
  done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
  assert "CONSOLE" not in done.stderr, done.stderr
  return json.loads(re.search("MEASURED(.*)END", done.stdout)[1])


def crowded() -> dict:
  """A report with long names and many rows, as a real run writes it."""
  sample = make_report()
  for row in sample["classification"][:4]:
    row["description"] = "exemplars mixed with a share of any other exemplar; cross-entropy, " * 2
  losses = ("cross_entropy", "logit_adjustment", "balanced_softmax")
  first = sample["classification"][0]
  sample["classification"] += [
    first | {"method": f"gaussian_shrunk_means_{i}+{loss}", "shown": i == 0}
    for i in range(9)
    for loss in losses
  ]
  for key in ("few", "many"):
    sample["headline"]["over_plain"][key] = difference(-0.1, -0.2, -0.05, theirs=1.0)
  return sample


def figures() -> dict:
  counts = sorted(range(1, 101), reverse=True)
  drawn = plots.long_tail_profile([f"class {c}" for c in range(100)], counts, counts, ["few"] * 100)
  return {"long_tail_profile": plots.to_png(drawn, 150)}


@pytest.mark.parametrize(("width", "height"), SCREENS)
@pytest.mark.parametrize("make", [make_report, crowded])
def test_the_answer_is_in_sight_and_nothing_scrolls_sideways(tmp_path, make, width, height):
  found = measure(tmp_path, report.render_html(make(), figures()), width, height)
  assert found["width"] == width and found["overflow"] <= 0 and found["out"] == []
  assert found["tables"] and max(found["tables"]) <= 0
  assert found["title"] < height / 3
  assert found["effects"] < height
  if make is make_report:
    assert found["finding"] < height
  assert found["pictures"] == [1440]


@pytest.mark.parametrize(("width", "height"), SCREENS)
def test_full_tables_may_be_wider_than_the_screen_but_the_page_is_not(tmp_path, width, height):
  source = report.render_html(crowded(), {}).replace("<details>", "<details open>")
  assert measure(tmp_path, source, width, height)["overflow"] <= 0


@pytest.mark.parametrize(("width", "height"), SCREENS)
def test_the_page_of_classifiers_begins_with_its_best_row(tmp_path, width, height):
  sample = make_report()
  for key in ("headline", "recommendation", "comparison"):
    del sample[key]
  found = measure(tmp_path, report.render_html(sample, {}), width, height)
  assert found["title"] < height / 2 and found["overflow"] <= 0 and max(found["tables"]) <= 0


def test_the_page_as_it_is_loads_without_a_complaint(tmp_path):
  """The policy that forbids everything from elsewhere must not forbid the page's own parts."""
  page = tmp_path / "report.html"
  page.write_text(report.render_html(make_report(), figures()))
  command = [
    BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
    f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri(),
  ]  # fmt: skip
  done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
  assert "CONSOLE" not in done.stderr and 'id="answer"' in done.stdout
