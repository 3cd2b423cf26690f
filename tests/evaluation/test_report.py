"""The report: complete, self-contained, safe, and honest about what its numbers support."""

import copy
import html.parser
import json
import re

import pytest

from memdiff.evaluation import report as reports
from tests.evaluation.sample_report import METHODS, SHOWN, difference, make_report, stat

pytestmark = pytest.mark.filterwarnings("error")

PNG = b"\x89PNG\r\n\x1a\n not a whole picture"
SECTIONS = (
  "answer", "methods", "recommendation", "about", "data", "classes", "gap", "map", "confidence",
  "reliability", "quality", "training", "timing", "further", "reproduce",
)  # fmt: skip


def all_figures() -> dict[str, bytes]:
  return dict.fromkeys((*reports.FIGURES, "something_else"), PNG)


class Page(html.parser.HTMLParser):
  """The facts about a page that the tests ask for; fails on tags that do not match."""

  VOID = ("wbr", "meta", "img", "link", "br", "hr", "input")

  def __init__(self, text: str):
    super().__init__()
    self.open, self.sections, self.loaded, self.tags, self.text = [], [], [], set(), []
    self.feed(text)
    assert self.open == []
    self.text = " ".join(" ".join(self.text).replace("\u00a0", " ").split())

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.tags.add(tag)
    self.loaded += [attrs[key] for key in ("src", "href", "data", "srcset") if key in attrs]
    if tag == "section":
      self.sections.append(attrs["id"])
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


def page(report, figures=None) -> Page:
  return Page(reports.render_html(report, all_figures() if figures is None else figures))


class TestPage:
  def test_has_every_section_and_every_method(self):
    shown = page(make_report())
    assert tuple(shown.sections) == SECTIONS
    for method in METHODS:
      assert method.replace("+", "+ ") in shown.text  # a line may break behind the +
      assert f'data-method="{method}"' in reports.render_html(make_report(), {})
      assert f"Description of {method}." in shown.text

  def test_explains_the_run_with_its_numbers(self):
    text = page(make_report()).text
    assert "The data set digits has 3 classes" in text
    assert "120 training examples, the smallest 5 (imbalance factor 24)" in text
    assert "155 synthetic examples for the 2 rarest classes" in text
    assert "5 times with different random seeds. It was tested on 360 examples" in text
    assert "fewer than 20 training images (1 class)" in text

  def test_shows_metrics_with_meaning_direction_and_reference(self):
    text = page(make_report()).text
    assert "Diversity 0.912 ± 0.010 – close to 1 what it means" in text
    assert "0.00100 ± 0.01000 two halves of real" in text
    assert "The truth test" in text and "Fréchet distance 12.5 ± 0.0" in text

  def test_shows_how_to_reproduce(self):
    report = make_report()
    text = page(report).text
    assert report["command"] in text and "ab" * 32 in text
    assert '"width": 32' in text and "jax 0.10.2" in text and "platform cpu" in text

  def test_shows_times_with_compiling_and_cpu_time_apart(self):
    text = page(make_report()).text
    assert "encoder 12.3 s 4.5 s 20.6 s total 2 min 10 s 4.5 s 2 min 41 s" in text

  def test_says_whose_times_are_not_whole(self):
    report = make_report()
    assert "lower bounds" not in page(report).text
    report["timing"]["phases"]["encoder"]["killed"] = 1
    assert "lower bounds: processes that were killed during encoder did not" in page(report).text

  def test_runs_from_before_cpu_time_have_a_dash(self):
    report = make_report()
    del report["timing"]["total_cpu_seconds"], report["timing"]["phases"]["encoder"]["cpu_seconds"]
    assert "encoder 12.3 s 4.5 s – total 2 min 10 s 4.5 s –" in page(report).text

  def test_loads_nothing_and_runs_nothing(self):
    shown = page(make_report())
    assert all(url.startswith(("data:image/png;base64,", "#")) for url in shown.loaded)
    assert not shown.tags & {"script", "link", "iframe", "object"}
    source = reports.render_html(make_report(), all_figures())
    assert not re.search(r"https?://|@import|url\(", source)

  def test_escapes_what_the_report_says(self):
    report = make_report()
    report["dataset"]["class_names"][0] = "<b>x</b>"
    report["name"] = "<script>alert(1)</script>"
    report["classification"][0]["description"] = '"><img src=x>'
    source = reports.render_html(report, {})
    assert "&lt;b&gt;x&lt;/b&gt;" in source and "<b>x</b>" not in source
    assert "<script" not in source and "<img" not in source

  def test_survives_the_way_through_json(self):
    report = make_report()
    again = json.loads(json.dumps(report))
    assert reports.render_html(again, {}) == reports.render_html(report, {})

  def test_does_not_change_the_report(self):
    report = make_report()
    before = copy.deepcopy(report)
    page(report)
    reports.text_table(report)
    assert report == before

  def test_bold_marks_the_best_without_the_reference(self):
    source = reports.render_html(make_report(), {}).replace("<wbr>", "")
    rows = re.findall(r'<th scope="row">(\S+?)(?: <em>.*?)?<small>.*?</th>(.*?)</tr>', source)
    assert len(rows) == len(SHOWN) + len(METHODS)  # the short table and the full one
    for method, row in rows:
      assert row.count('class="best"') == (6 if method == "memdiff+csl" else 0)


class TestAnswer:
  """What the page begins with."""

  def begins(self, report) -> str:
    source = reports.render_html(report, all_figures())
    return source[source.index("<body>") : source.index('<section id="methods">')]

  def test_the_answer_is_all_that_stands_above_the_methods(self):
    begin = self.begins(make_report())
    assert begin.count("<section") == 1 and "<img" not in begin
    text = Page(begin + "</main></body>").text
    for words in (
      "Use memdiff+ csl", "83.6 % instead of 75.0 % with plain training", "+8.6 points",
      "95 % interval +5.1 to +12.0", "86.0 % instead of 79.0 %", "Synthetic features are part of",
      "Criterion: balanced accuracy",
    ):  # fmt: skip
      assert words in text

  @pytest.mark.parametrize(
    ("interval", "colour"), [((0.01, 0.1), "better"), ((-0.01, 0.1), "unclear"),
                             ((-0.1, -0.01), "worse")],
  )  # fmt: skip
  def test_colour_follows_the_recommended_method(self, interval, colour):
    report = make_report()
    over = report["headline"]["over_plain"]
    over["overall"] = difference(sum(interval) / 2, *interval, theirs=0.8)
    assert f'<section id="answer" class="{colour}">' in self.begins(report)

  def test_synthetic_data_that_are_not_recommended_never_alarm(self):
    report = make_report()
    report["headline"] |= {"recommended": "real+csl"}
    report["headline"]["synthetic"] |= {
      "recommended": False, "overall": difference(-0.05, -0.07, -0.03, theirs=0.84)
    }  # fmt: skip
    begin = self.begins(report)
    assert "Synthetic features do not help" in begin
    styles = reports.render_html(report, {}).partition("<style>")[2].partition("</style>")[0]
    assert ".synthetic.better" in styles and ".synthetic.worse" not in styles

  def test_the_page_of_classifiers_begins_with_the_best_row(self):
    report = make_report()
    for key in ("headline", "recommendation", "comparison"):
      del report[key]
    begin = self.begins(report)
    assert "<h1>memdiff+<wbr>csl: 86.0 % balanced accuracy</h1>" in begin
    assert "the highest of 4 scores" in begin


class TestMethods:
  def tables(self, report) -> list[str]:
    source = reports.render_html(report, {}).replace("<wbr>", "")
    return re.findall(r'<table class="methods">.*?</table>', source, re.DOTALL)

  def named(self, table) -> list[str]:
    return re.findall(r'<th scope="row">([^\s<]+)', table)

  def test_few_rows_first_and_all_of_them_one_click_away(self):
    report = make_report()
    short, full = self.tables(report)
    assert self.named(short) == list(SHOWN)
    assert self.named(full) == list(METHODS)
    source = reports.render_html(report, {})
    assert "<details><summary>All 6 methods" in source

  def test_where_no_row_is_marked_all_are_shown_once(self):
    report = make_report()
    for row in report["classification"]:
      del row["shown"]
    (table,) = self.tables(report)
    assert self.named(table) == list(METHODS)

  def test_balanced_accuracy_stands_beside_top1(self):
    for table in self.tables(make_report()):
      titles = re.findall(r"<th>([^<]+)", table)
      assert titles[:2] == ["balanced", "top-1"]
      row = table[table.index(">real+csl") :].partition("</tr>")[0]
      assert re.findall(r"\d+\.\d ± \d\.\d", row)[:2] == ["84.0 ± 1.0", "85.0 ± 1.0"]

  def test_rows_from_before_balanced_accuracy_have_no_such_column(self):
    report = make_report()
    for row in report["classification"]:
      del row["balanced_accuracy"]
    assert all("balanced" not in table for table in self.tables(report))

  def test_the_gap_closed_stands_with_its_interval(self):
    full = self.tables(make_report())[1]
    row = full[full.index(">memdiff+csl") :].partition("</tr>")[0]
    assert "29<small>9 to 39</small>" in row
    row = full[full.index(">own_head ") :].partition("</tr>")[0]
    assert "−71<small>−91 to −61</small>" in row

  def test_without_a_gap_there_is_no_such_column(self):
    report = make_report()
    for row in report["classification"]:
      del row["gap_closed"]
    assert "gap closed" not in "".join(self.tables(report))

  def test_roles_are_named(self):
    short, _ = self.tables(make_report())
    roles = {
      method: re.findall(r"<em>(.*?)</em>", row)
      for method, row in re.findall(r'<th scope="row">([^\s<]+)(.*?)</th>', short)
    }
    assert roles == {
      "own_head": ["plain training"], "real+csl": [],
      "memdiff+csl": ["recommended", "best with synthetic data"],
      "oracle+csl": ["given more real examples"],
    }  # fmt: skip

  def test_all_methods_stand_by_score_beside_what_the_test_set_said(self):
    text = page(make_report()).text
    rows = ("memdiff+ csl 83.1 +3.1 +1.1 to +5.1 8 86.0", "real+ csl 80.0 0.0 −2.0 to +2.0 8 84.0",
            "own_head 76.4 −3.6 −5.6 to −1.6 8 79.0")  # fmt: skip
    assert " ".join(rows) in text

  def test_classes_without_test_rows_are_named(self):
    report = make_report()
    report["dataset"]["classes_without_test_rows"] = ["one"]
    assert "1 class has no test examples" in page(report).text
    assert "1 class has no test examples" in reports.text_table(report)


class TestMissingParts:
  @pytest.mark.parametrize(
    ("figure", "section"),
    [
      ("long_tail_profile", "data"), ("feature_map", "map"), ("training_curves", "training"),
      ("confidence_histogram", "confidence"), ("something_else", "further"),
      ("gap_closed", "gap"), ("confidence_reliability", "reliability"),
    ],
  )  # fmt: skip
  def test_section_of_a_missing_figure_is_left_out(self, figure, section):
    figures = all_figures()
    del figures[figure]
    shown = page(make_report(), figures)
    assert tuple(shown.sections) == tuple(s for s in SECTIONS if s != section)
    assert f"#{section}" not in shown.loaded

  @pytest.mark.parametrize("key", list(make_report()))
  def test_any_part_of_the_report_may_be_missing_or_empty(self, key):
    report = make_report()
    del report[key]
    page(report)
    reports.text_table(report)
    report[key] = None
    page(report)
    reports.text_table(report)

  def test_of_many_methods_the_table_by_class_shows_those_that_are_compared_or_recommended(self):
    report = make_report()
    row = report["classification"][0]
    report["classification"] += [row | {"method": f"other_{i}"} for i in range(4)]
    source = reports.render_html(report, {})
    table = source[source.index('id="classes"') :].partition("</section>")[0]
    shown = [method for method in (*METHODS, "other_0") if f">{method}<" in table]
    assert shown == ["own_head", "real+csl", "memdiff+csl", "oracle+csl"]

  def test_an_empty_report_is_a_page(self):
    assert page({}, {}).sections == []
    assert reports.text_table({}).splitlines()[-1].startswith("---")

  def test_without_features_there_is_no_quality_section(self):
    report = make_report()
    report["features"] = {"truth_test": {}}
    assert "quality" not in page(report).sections

  def test_metrics_without_classes_and_unknown_metrics(self):
    report = make_report()
    report["features"] = {"new_metric": {"mean": None, "std": None}, "mmd": {"mean": 3e-7}}
    text = page(report).text
    assert "new metric – –" in text and "3.0 × 10⁻⁷" in text

  def test_an_empty_group_is_a_dash(self):
    report = make_report()
    for row in report["classification"]:
      row["many"] = stat(float("nan"), float("nan"))
      row["medium"] = stat(None, None)
    page(report)
    (line,) = (x for x in reports.text_table(report).splitlines() if x.startswith("oracle+csl"))
    assert line.split() == ["oracle+csl", "91.0", "±", "1.0", "92.0", "±", "1.0", "–", "–", "87.0",
                            "±", "1.0", "90.0", "±", "1.0"]  # fmt: skip


class TestTextTable:
  def test_begins_with_the_answer(self):
    text = reports.text_table(make_report())
    said = " ".join(text.split("\n\n")[0].split())
    assert said.startswith("Use memdiff+csl. Description of memdiff+csl. Rarest classes: 83.6 %")
    assert "Criterion: balanced accuracy" in said
    assert max(map(len, text.splitlines())) <= 100

  def test_lines_are_aligned_and_rounded(self):
    report = make_report()
    report["classification"][0]["top1"] = stat(0.99951, 0.00049)
    report["classification"][2]["top1"] = stat(0.04449, 0.12345)
    table = reports.text_table(report).split("\n\n")[2].splitlines()
    assert len({len(line) for line in table}) == 1
    assert len(table) == 2 + len(SHOWN)
    assert table[0].split() == ["method", "balanced", "top-1", "many", "medium", "few", "macro-F1"]
    assert table[2].split()[4:7] == ["100.0", "±", "0.0"]
    assert table[3].split()[4:7] == ["4.4", "±", "12.3"]
    ends = [re.search(r"± *\d+\.\d", line).end() for line in table[2:]]
    assert len(set(ends)) == 1

  def test_tells_how_many_rows_are_elsewhere(self):
    report = make_report()
    assert reports.text_table(report).endswith("4 of 6 methods; report.html has all of them.")
    for row in report["classification"]:
      row["shown"] = True
    assert "report.html" not in reports.text_table(report)

  def test_says_what_was_run_and_the_rule_of_the_groups(self):
    text = " ".join(reports.text_table(make_report()).split())
    assert "digits, 3 classes, 120 to 5 training examples per class" in text
    assert "mean ± std over 5 seeds" in text
    assert "many = more than 100 training images (1 class); medium = " in text

  def test_one_seed_has_no_spread(self):
    report = make_report()
    for row in report["classification"]:
      row["seeds"] = [0]
    text = reports.text_table(report)
    assert "1 seed, so no spread" in " ".join(text.split())
    assert "±" not in text
