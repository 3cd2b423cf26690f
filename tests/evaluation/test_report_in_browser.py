"""The page in a browser, on a wide and a narrow screen: nothing sideways, the answer in sight."""

import html
import json
import re
import shutil
import subprocess

import pytest

from memdiff.evaluation import plots, report
from tests import support
from tests.evaluation.sample_report import difference, make_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(
  BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed"
)

SCREENS = ((1200, 900), (390, 844))

# Pages are framed at the width in question: a window without a screen may be wider than asked for.
MEASURE = """
const measure = (page) => {
  const root = page.document.documentElement, find = s => page.document.querySelector(s);
  const all = s => [...page.document.querySelectorAll(s)];
  const bottom = s => find(s)?.getBoundingClientRect().bottom ?? null;
  return {
    width: page.innerWidth, overflow: root.scrollWidth - page.innerWidth,
    out: all("body *").filter(e => e.getBoundingClientRect().right > root.clientWidth + 1 &&
      !e.closest("details:not([open]), .scroll")).map(e => e.outerHTML.slice(0, 60)),
    tables: all("#methods .scroll").map(e => e.scrollWidth - e.clientWidth),
    title: bottom("h1"), effects: bottom(".effects"), finding: bottom(".synthetic p"),
    pictures: all("img").map(i => i.naturalWidth),
  };
};
onload = () => {
  const measured = JSON.stringify(Array.from(frames, (_, i) => measure(frames[i])));
  document.body.textContent = "MEASURED" + measured + "END";
};
"""


def browse(folder, address: str) -> str:
  """The page's DOM when it is loaded; fails on any message in the browser's console."""
  command = [
    BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
    f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--dump-dom", address,
  ]  # fmt: skip
  done = subprocess.run(command, capture_output=True, text=True, timeout=support.HANG, check=True)
  assert "CONSOLE" not in done.stderr, done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
  """(page, width) -> sizes in CSS pixels."""
  folder = tmp_path_factory.mktemp("pages")
  opened = report.render_html(crowded(), {}).replace("<details>", "<details open>")
  sources = {
    "sample": report.render_html(make_report(), figures()),
    "crowded": report.render_html(crowded(), figures()),
    "opened": opened,
    "classifiers": report.render_html(classifiers(), {}),
    "broken": opened.replace("<main>", "<main><div style='width: 2000px'>wide</div>"),
  }
  for name, source in sources.items():  # the pages' policy forbids being measured
    copy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    (folder / f"{name}.html").write_text(copy)
  screens = [(name, width, height) for name in sources for width, height in SCREENS]
  frames = [
    f'<iframe src="{name}.html" width="{width}" height="{height}" style="border:0"></iframe>'
    for name, width, height in screens
  ]
  (folder / "all.html").write_text(f"<body>{''.join(frames)}<script>{MEASURE}</script>")
  found = re.search("MEASURED(.*)END", browse(folder, (folder / "all.html").as_uri()))[1]
  found = json.loads(html.unescape(found))
  return {(name, width): m for (name, width, _), m in zip(screens, found, strict=True)}


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


def classifiers() -> dict:
  """A report without a recommendation."""
  left_out = ("headline", "recommendation", "comparison")
  return {key: value for key, value in make_report().items() if key not in left_out}


def figures() -> dict:
  counts = sorted(range(1, 101), reverse=True)
  drawn = plots.long_tail_profile([f"class {c}" for c in range(100)], counts, counts, ["few"] * 100)
  return {"long_tail_profile": plots.to_png(drawn, 150)}


@pytest.mark.parametrize(("width", "height"), SCREENS)
@pytest.mark.parametrize("name", ["sample", "crowded"])
def test_the_answer_is_in_sight_and_nothing_scrolls_sideways(measured, name, width, height):
  found = measured[name, width]
  assert found["width"] == width and found["overflow"] <= 0 and found["out"] == []
  assert found["tables"] and max(found["tables"]) <= 0
  assert found["title"] < height / 3
  assert found["effects"] < height
  if name == "sample":
    assert found["finding"] < height
  assert found["pictures"] == [1440]


@pytest.mark.parametrize(("width", "height"), SCREENS)
def test_full_tables_may_be_wider_than_the_screen_but_the_page_is_not(measured, width, height):
  assert measured["opened", width]["overflow"] <= 0


@pytest.mark.parametrize(("width", "height"), SCREENS)
def test_the_page_of_classifiers_begins_with_its_best_row(measured, width, height):
  found = measured["classifiers", width]
  assert found["title"] < height / 2 and found["overflow"] <= 0 and max(found["tables"]) <= 0


@pytest.mark.parametrize(("width", "height"), SCREENS)
def test_a_page_that_is_too_wide_would_be_noticed(measured, width, height):
  assert measured["broken", width]["overflow"] > 0 and measured["broken", width]["out"]


def test_the_page_as_it_is_loads_without_a_complaint(tmp_path):
  """The policy that forbids everything from elsewhere must not forbid the page's own parts."""
  page = tmp_path / "report.html"
  page.write_text(report.render_html(make_report(), figures()))
  assert 'id="answer"' in browse(tmp_path, page.as_uri())
