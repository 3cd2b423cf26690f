"""The report: complete, self-contained, safe, and honest about what its numbers support."""

import copy
import html.parser
import json
import re

import pytest

from memdiff.evaluation import report as reports
from memdiff.evaluation import wording

pytestmark = pytest.mark.filterwarnings("error")

PNG = b"\x89PNG\r\n\x1a\n not a whole picture"
METHODS = {
  "own_head": 0.80, "own_head+logit_adjustment": 0.82, "real+csl": 0.85, "memdiff+csl": 0.87,
  "oracle+csl": 0.92, "unseen_exemplars+csl": 0.95,
}  # fmt: skip
REFERENCES = ("oracle+csl", "unseen_exemplars+csl")
SECTIONS = (
  "result", "recommendation", "methods", "data", "classes", "gap", "map", "confidence",
  "reliability", "quality", "training", "timing", "further", "reproduce",
)  # fmt: skip


def stat(mean, std=0.01):
  return {"mean": mean, "std": std}


def metric(mean, **more):
  return stat(mean) | {
    "per_class": [None, mean, mean],
    "meaning": "what it means",
    "better": "close to 1",
    **more,
  }


def advise(method, control, best, gain, interval, **more) -> dict:
  scores = {"real+csl": 0.8, "memdiff+csl": 0.831, "own_head": 0.764}
  return {
    "method": method,
    "control": control,
    "best": best,
    "expected_gain": gain,
    "interval": list(interval),
    "scores": {
      name: {"score": score, "gain": score - 0.8, "interval": [score - 0.82, score - 0.78]}
      for name, score in scores.items()
    },
    "basis": {"folds": 5, "repeats": 2, "encoder": "retrained"},
    "agreement": {
      "kendall_tau": 0.375,
      "pairs": 0.6875,
      "regret": 0.0,
      "methods": 3,
      "test_gain": stat(0.02, 0.01),
      "regret_of_recommended": 0.013,
    },
    **more,
  }


def make_report() -> dict:
  classification = [
    {
      "method": method,
      "description": f"Description of {method}.",
      "reference": method in REFERENCES,
      "seeds": [0, 1, 2, 3, 4],
      "top1": stat(score),
      "many": stat(score + 0.05),
      "medium": stat(score),
      "few": stat(score - 0.05),
      "macro_f1": stat(score - 0.02),
      "per_class_top1": {"mean": [score] * 3, "std": [0.01] * 3},
      "per_class_f1": {"mean": [score] * 3, "std": [0.01] * 3},
    }
    for method, score in METHODS.items()
  ]
  return {
    "schema": 1,
    "name": "digits_lt",
    "command": "python main.py --config=configs/digits_lt.py --workdir=runs/x",
    "config": {"encoder": {"width": 32}},
    "versions": {"memdiff": "0.1.0", "jax": "0.10.2"},
    "hardware": {"platform": "cpu", "devices": 1},
    "dataset": {
      "name": "digits",
      "num_classes": 3,
      "class_names": ["zero", "one", "two"],
      "train_counts": [120, 40, 5],
      "left_out_counts": [0, 80, 115],
      "test_count": 360,
      "split_sha256": "ab" * 32,
      "imbalance": 24.0,
    },
    "groups": [
      {"name": "many", "rule": "more than 100 training images", "classes": [0]},
      {"name": "medium", "rule": "20 to 100 training images", "classes": [1]},
      {"name": "few", "rule": "fewer than 20 training images", "classes": [2]},
    ],
    "classification": classification,
    "comparison": {
      "method": "memdiff+csl",
      "control": "real+csl",
      "reference": "oracle+csl",
      "gain": stat(0.02, 0.005),
      "headroom": stat(0.07, 0.01),
      "gap_closed": stat(0.29, 0.08),
    },
    "recommendation": advise("memdiff+csl", "real+csl", "memdiff+csl", 0.031, (0.012, 0.05)),
    "features": {
      "diversity": metric(0.912),
      "mmd": metric(0.0123, reference={"label": "two halves of real", **stat(0.001)}),
      "truth_test": {"frechet": metric(12.5), "precision": metric(0.8)},
    },
    "synthetic_counts": [0, 60, 95],
    "timing": {
      "phases": {"encoder": {"seconds": 12.3, "compile_seconds": 4.5}},
      "total_seconds": 130.0,
      "total_compile_seconds": 4.5,
    },
  }


def all_figures() -> dict[str, bytes]:
  return dict.fromkeys((*reports.FIGURES, "something_else"), PNG)


class Page(html.parser.HTMLParser):
  """The facts about a page that the tests ask for; fails on tags that do not match."""

  VOID = ("meta", "img", "link", "br", "hr", "input")

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
      assert method in shown.text
      assert f"Description of {method}." in shown.text

  def test_explains_the_run_with_its_numbers(self):
    text = page(make_report()).text
    assert "The data set digits has 3 classes" in text
    assert "120 training examples, the smallest 5 (imbalance factor 24)" in text
    assert "155 synthetic examples for the 2 rarest classes" in text
    assert "5 times, from different random seeds, and tested on the same 360 examples" in text
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

  def test_shows_times_with_compiling_apart(self):
    assert "encoder 12.3 s 4.5 s total 2 min 10 s 4.5 s" in page(make_report()).text

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
    source = reports.render_html(make_report(), {})
    rows = dict(re.findall(r'<th scope="row">(\S+)<small>.*?</th>(.*?)</tr>', source, re.DOTALL))
    assert {method: row.count('class="best"') for method, row in rows.items()} == {
      method: 5 if method == "memdiff+csl" else 0 for method in METHODS
    }


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
    shown = [method for method in (*METHODS, "other_0") if method in table]
    assert shown == ["real+csl", "memdiff+csl", "oracle+csl"]

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
    assert line.split() == ["oracle+csl", "92.0", "±", "1.0", "–", "–", "87.0", "±", "1.0", "90.0",
                            "±", "1.0"]  # fmt: skip


def compare(gain=None, std=0.005, seeds=5, headroom=None, gap=None) -> dict:
  report = make_report()
  for row in report["classification"]:
    row["seeds"] = list(range(seeds))
  report["comparison"]["gain"] = stat(gain, std)
  report["comparison"]["headroom"] = headroom or {}
  report["comparison"]["gap_closed"] = gap
  return report


class TestHeadline:
  def test_a_clear_gain_is_stated_with_its_interval(self):
    first = wording.headline(compare(0.012))[0]
    assert first.startswith("memdiff+csl scores 1.2 ± 0.5 points above real+csl (description of")
    assert "more than the noise between the 5 seeds (95 % interval +0.6 to +1.8)" in first
    assert "Better than the control" in page(compare(0.012)).text

  def test_a_loss_is_called_a_loss(self):
    first = wording.headline(compare(-0.012))[0]
    assert first.startswith("memdiff+csl scores 1.2 ± 0.5 points below real+csl")
    assert "did harm" in first
    shown = page(compare(-0.012)).text
    assert "Worse than the control" in shown and "−1.2 ± 0.5 points" in shown

  @pytest.mark.parametrize("gain", [0.004, -0.004])
  def test_what_the_seeds_cannot_tell_from_zero_is_called_noise(self, gain):
    first = wording.headline(compare(gain))[0]
    assert "within the noise between the 5 seeds" in first
    assert "does not show" in first
    assert "No clear difference" in page(compare(gain)).text

  def test_equal_scores_are_called_equal(self):
    assert "scores the same as real+csl" in wording.headline(compare(0.0, 0.0))[0]

  def test_one_seed_makes_no_claim(self):
    first = wording.headline(compare(0.03, 0.0, seeds=1))[0]
    assert "scores 3.0 points above" in first and "±" not in first
    assert "One seed was run" in first
    assert "One seed: no claim" in page(compare(0.03, 0.0, seeds=1)).text

  def test_the_reference_tells_the_room_and_the_share_that_is_filled(self):
    report = compare(0.012, headroom=stat(0.05, 0.01), gap=stat(0.24, 0.1))
    second = wording.headline(report)[1]
    assert "5.0 ± 1.0 points above real+csl" in second
    assert second.endswith("memdiff+csl fills 24 ± 10 % of it.")
    assert "of the gap from real+csl to oracle+csl closed" in page(report).text

  def test_a_negative_share_fills_nothing(self):
    report = compare(-0.012, headroom=stat(0.05, 0.01), gap=stat(-0.24, 0.1))
    assert wording.headline(report)[1].endswith("memdiff+csl fills none of it.")

  @pytest.mark.parametrize(
    ("headroom", "words"),
    [
      (stat(-0.02, 0.001), "2.0 ± 0.1 points below real+csl: even real additional examples"),
      (stat(0.0, 0.0), "level with real+csl: even real additional examples"),
      (stat(0.01, 0.02), "within the noise between seeds"),
    ],
  )
  def test_without_room_no_share_of_it_is_claimed(self, headroom, words):
    report = compare(0.012, headroom=headroom, gap=stat(9.9, 1.0))
    assert words in wording.headline(report)[1]
    assert "gap from" not in page(report).text

  def test_groups_are_compared(self):
    assert "82.0 % against 80.0 % on few" in wording.headline(make_report())[2]

  def test_a_rival_that_wins_is_named(self):
    report = make_report()
    assert not any("scores higher" in sentence for sentence in wording.headline(report))
    report["classification"][1]["top1"] = stat(0.9)
    assert wording.headline(report)[-1] == (
      "own_head+logit_adjustment scores higher than memdiff+csl in this run: 90.0 % top-1."
    )

  @pytest.mark.parametrize(
    ("mean", "std", "seeds", "expected"),
    [
      (None, None, 5, "unknown"), (float("nan"), 0.0, 5, "unknown"), (0.0004, 0.0, 5, "same"),
      (0.01, 0.0, 1, "one seed"), (0.01, 0.0, 2, "better"), (0.01, 0.005, 2, "noise"),
      (-0.01, 0.005, 5, "worse"), (0.01, None, 5, "noise"),
    ],
  )  # fmt: skip
  def test_verdict(self, mean, std, seeds, expected):
    assert wording.verdict(mean, std, seeds) == expected


class TestRecommendation:
  def said(self, *arguments, **more):
    report = make_report()
    report["recommendation"] = advise(*arguments, **more)
    return wording.recommendation(report), page(report).text

  def test_a_method_that_is_better_for_certain_is_recommended_with_its_gain(self):
    (first, *_), text = self.said("memdiff+csl", "real+csl", "memdiff+csl", 0.031, (0.012, 0.05))
    assert first == (
      "Use memdiff+csl (description of memdiff+csl): +3.1 points against real+csl, 95 % interval"
      " +1.2 to +5.0."
    )
    assert first in text

  def test_a_gain_that_may_be_chance_recommends_the_control(self):
    (first, *_), text = self.said("real+csl", "real+csl", "memdiff+csl", 0.031, (-0.012, 0.07))
    assert first.startswith(
      "Use real+csl (description of real+csl): the best method with synthetic"
    )
    assert "memdiff+csl, is not better for certain (+3.1 points" in first
    assert "−1.2 to +7.0" in first and first in text

  def test_a_control_that_is_best_is_recommended_as_such(self):
    (first, *_), _ = self.said("real+csl", "real+csl", "real+csl", 0.0, (0.0, 0.0))
    assert first.endswith(
      "no method that adds synthetic features scores higher in cross-validation."
    )

  def test_what_it_rests_on_and_how_the_test_set_agreed_is_said(self):
    (_, basis, agreement), _ = self.said("real+csl", "real+csl", "real+csl", 0.0, (0.0, 0.0))
    assert "by 5-fold cross-validation, 2 times, with an encoder per fold that never saw" in basis
    assert "memdiff" not in agreement and "real+csl against real+csl gives +2.0 points" in agreement
    assert "69 % of the pairs" in agreement and "Kendall's tau 0.38" in agreement
    assert "the best of 3 methods is 1.3 points above the recommended one" in agreement

  def test_features_that_were_trained_on_the_same_examples_are_warned_of(self):
    frozen = {"folds": 3, "repeats": 1, "encoder": "frozen"}
    (_, basis, *_), _ = self.said("real+csl", "real+csl", "real+csl", 0.0, (0.0, 0.0), basis=frozen)
    assert "by 3-fold cross-validation, on the features as they are" in basis
    assert "such scores mislead" in basis

  def test_all_methods_stand_by_score_beside_what_the_test_set_said(self):
    text = page(make_report()).text
    rows = ("memdiff+csl 83.1 +3.1 +1.1 to +5.1 87.0", "real+csl 80.0 0.0 −2.0 to +2.0 85.0",
            "own_head 76.4 −3.6 −5.6 to −1.6 80.0")  # fmt: skip
    assert " ".join(rows) in text

  def test_without_selection_nothing_is_recommended(self):
    report = make_report()
    report["recommendation"] = None
    assert wording.recommendation(report) == []
    assert "recommendation" not in page(report).sections
    assert "recommendation" not in reports.text_table(report)


class TestTextTable:
  def test_lines_are_aligned_and_rounded(self):
    report = make_report()
    report["classification"][0]["top1"] = stat(0.99951, 0.00049)
    report["classification"][1]["top1"] = stat(0.04449, 0.12345)
    lines = reports.text_table(report).splitlines()
    assert lines[-2:] == ["", f"recommendation: {wording.recommendation(report)[0]}"]
    table = lines[lines.index("") + 1 : -2]
    assert len({len(line) for line in table}) == 1
    assert len(table) == 2 + len(METHODS)
    assert table[0].split() == ["method", "top-1", "many", "medium", "few", "macro-F1"]
    assert table[2].split()[:4] == ["own_head", "100.0", "±", "0.0"]
    assert table[3].split()[:4] == ["own_head+logit_adjustment", "4.4", "±", "12.3"]
    ends = [re.search(r"± *\d+\.\d", line).end() for line in table[2:]]
    assert len(set(ends)) == 1

  def test_says_what_was_run_and_the_rule_of_the_groups(self):
    first, second, *_ = reports.text_table(make_report()).splitlines()
    assert "digits, 3 classes, 120 to 5 training examples per class" in first
    assert "mean ± std over 5 seeds" in first
    assert second.startswith("many = more than 100 training images (1 class); medium = ")

  def test_one_seed_has_no_spread(self):
    text = reports.text_table(compare(0.01, 0.0, seeds=1))
    assert "1 seed, so no spread" in text
    assert "±" not in text
