"""Sheets to rate, and what filled tables say."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from memdiff.evaluation import ratings, report
from memdiff.runtime.workdir import write_arrays
from tests.evaluation.sample_report import make_report


def write_source(path, number, value):
  images = np.full((number, 8, 8, 3), value, np.uint8)
  prompts = np.array([f"{path.stem} {i}" for i in range(number)])
  write_arrays(path, {"images": images, "prompt": prompts})
  return f"{path.stem}={path}"


@pytest.fixture
def made(tmp_path):
  dark = write_source(tmp_path / "dark.npz", 50, 9)
  bright = write_source(tmp_path / "bright.npz", 50, 240)
  flags = ["make", f"--out={tmp_path / 'out'}", "--number=20", "--images", dark, bright]
  assert ratings.main(flags) == 0
  return tmp_path / "out"


def rows_of(path):
  with open(path, encoding="utf-8", newline="") as file:
    return list(csv.DictReader(file))


def fill(out, rate):
  """Fills the table: (row of the key, column) -> text."""
  key = {row["number"]: row for row in rows_of(out / "key.csv")}
  asked = rows_of(out / "ratings.csv")
  for row in asked:
    for name in ratings.ASKED:
      row[name] = rate(key[row["number"]], name)
  with open(out / "ratings.csv", "w", encoding="utf-8", newline="") as file:
    writer = csv.DictWriter(file, asked[0].keys())
    writer.writeheader()
    writer.writerows(asked)


def test_sources_are_mixed_and_the_table_does_not_tell_them_apart(made):
  key, asked = rows_of(made / "key.csv"), rows_of(made / "ratings.csv")
  sources = [row["source"] for row in key]
  assert sorted(sources) == ["bright"] * 20 + ["dark"] * 20 and sources != sorted(sources)
  assert list(asked[0]) == ["number", "prompt", "quality", "matches"]
  for row, of_key in zip(asked, key, strict=True):
    assert row["number"] == of_key["number"]
    assert row["prompt"] == f"{of_key['source']} {of_key['row']}"
  assert len({(row["source"], row["row"]) for row in key}) == 40
  sheets = sorted(made.glob("sheet_*.png"))
  assert len(sheets) == 2
  with Image.open(sheets[0]) as sheet:
    assert sheet.size[0] > 500


def test_means_and_intervals_are_by_source(made, tmp_path, capsys):
  given = {"dark": [1, 2, 3, 2], "bright": [5, 4, 4, 5]}
  left = {name: list(values) for name, values in given.items()}

  def rate(key, name):
    if name == "matches":
      return "3" if key["source"] == "dark" else ""
    return str(left[key["source"]].pop()) if left[key["source"]] else ""

  fill(made, rate)
  assert ratings.main(["read", f"--out={made}", f"--json={tmp_path / 'found.json'}"]) == 0
  found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
  for name, values in given.items():
    row = found[name]["quality"]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert row["number"] == 4 and row["mean"] == np.mean(values)
    np.testing.assert_allclose(row["interval"], [low, high])
  assert found["dark"]["matches"] == {"mean": 3.0, "interval": [3.0, 3.0], "number": 20}
  assert "matches" not in found["bright"]
  assert "bright" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["6", "0", "good", "2.5"])
def test_a_rating_that_is_none_is_named(made, capsys, text):
  fill(made, lambda key, name: text if (key["number"], name) == ("7", "matches") else "")
  assert ratings.main(["read", f"--out={made}"]) > 0
  assert f"image 7: matches is '{text}'" in capsys.readouterr().err


def test_what_is_missing_is_one_sentence(made, tmp_path, capsys):
  source = write_source(tmp_path / "few.npz", 3, 9)
  for flags, words in (
    (["read", f"--out={made}"], "holds no rating"),
    (["read", f"--out={tmp_path / 'none'}"], "Cannot read"),
    (["make", f"--out={made}", "--number=4", "--images", source], "has 3 images, fewer than"),
    (["make", f"--out={made}", "--images", "few"], "needs a name and a path"),
    (["make", f"--out={made}", "--images", source, source], "names a source twice"),
    (["make", f"--out={made}", "--number=0", "--images", source], "at least 1"),
  ):
    assert ratings.main(flags) > 0
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_ratings_in_the_folder_of_a_run_enter_its_page(made, tmp_path, capsys):
  workdir = tmp_path / "run"
  assert ratings.of_run(workdir) is None
  workdir.mkdir()
  made.rename(workdir / ratings.FOLDER)
  assert ratings.of_run(workdir) is None  # not filled in yet: said, and no reason to fail
  assert "the report has no ratings" in capsys.readouterr().err
  fill(
    workdir / ratings.FOLDER,
    lambda key, name: "4" if (key["source"], name) == ("dark", "quality") else "2",
  )
  found = ratings.of_run(workdir)
  assert found["dark"]["quality"]["mean"] == 4 and found["bright"]["matches"]["mean"] == 2
  page = report.render_html(make_report() | {"ratings": found}, {})
  assert "What people say" in page and "4.00 (4.00 to 4.00), 20" in page
  assert "What people say" not in report.render_html(make_report(), {})
