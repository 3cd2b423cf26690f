"""The isolating table: what is written from a run's report."""

import json
import pathlib

import pytest

from benchmarks import isolating


def stat(mean, std=0.01):
  return {"mean": mean, "std": std}


def row(method, top1, closed=None, *, reference=False):
  scores = {key: stat(top1) for key in ("top1", "many", "medium", "few", "macro_f1")}
  made = {"method": method, "description": method, "seeds": [0, 1], "reference": reference}
  return made | scores | ({} if closed is None else {"gap_closed": stat(closed, 0.05)})


@pytest.fixture
def report():
  quality = {
    "memorization_ratio": stat(0.9) | {"per_class": [0.8, 1.0]},
    "diversity": stat(1.1),
    "separation": stat(0.2),
  }
  quality["truth_test"] = {k: stat(0.5) for k in ("mmd", "frechet", "precision", "recall")}
  losses = ["cross_entropy", "balanced_softmax"]
  return {
    "name": "run", "schema": 1,
    "config": {"head": {"losses": losses}, "seeds": [0, 1], "list": "/c/d.npz:key"},
    "command": "main.py --config=configs/x.py --workdir=/a/b/run --config.list=/c/d.npz:key",
    "dataset": {"name": "set", "num_classes": 2, "train_counts": [9, 2], "split_sha256": "ab" * 32},
    "groups": [], "hardware": {"platform": "cpu"}, "versions": {"jax": "1"},
    "timing": {"total_seconds": 120.0},
    "classification": [
      row("own_head", 0.4), row("real+cross_entropy", 0.5), row("real+balanced_softmax", 0.52, 0.0),
      row("memdiff+cross_entropy", 0.51), row("memdiff+balanced_softmax", 0.56, 0.4),
      row("oracle+cross_entropy", 0.6, reference=True),
      row("oracle+balanced_softmax", 0.62, 1.0, reference=True),
    ],
    "comparison": {
      "method": "memdiff+balanced_softmax", "control": "real+balanced_softmax",
      "reference": "oracle+balanced_softmax", "gain": stat(0.04), "headroom": stat(0.1),
      "gap_closed": stat(0.4),
    },
    "recommendation": {
      "method": "real+balanced_softmax", "control": "real+balanced_softmax",
      "best": "memdiff+cross_entropy", "expected_gain": 0.012, "interval": [-0.01, 0.034],
      "basis": {"folds": 5, "repeats": 1, "encoder": "frozen"},
      "scores": {
        "real+cross_entropy": {"score": 0.40}, "real+balanced_softmax": {"score": 0.45},
        "memdiff+cross_entropy": {"score": 0.46, "settings": 5},
        "memdiff+balanced_softmax": {"score": 0.44},
      },
      "agreement": {
        "methods": 4, "kendall_tau": 0.33, "pairs": 0.67, "test_gain": stat(-0.01),
        "regret_of_recommended": 0.04,
      },
    },
    "choices": {"memdiff+cross_entropy": {"strength": 1.0, "fill": 20, "exponent": 0.5}},
    "generators": {"memdiff": quality},
    "generator_seconds": {"memdiff": {"training": 12.4, "sampling": None}},
  }  # fmt: skip


def test_every_generator_stands_under_every_loss(report):
  lines = isolating.accuracy_table(report).splitlines()
  assert lines[0] == "| accuracy % | as trained | CE | balanced softmax |"
  assert "| `real` | – | 50.00 ± 1.00 | 52.00 ± 1.00 |" in lines
  assert "| `memdiff` | – | 51.00 ± 1.00 | 56.00 ± 1.00 |" in lines
  assert "| `own_head` | 40.00 ± 1.00 | – | – |" in lines


def test_a_generator_is_shown_with_the_loss_that_cross_validation_chose(report):
  table = isolating.chosen_table(report)
  assert "| `memdiff+cross_entropy` | 51.00 ± 1.00 |" in table  # not the better one on test
  assert "46.00 | 5 | strength 1, fill 20, exponent 0.5 |" in table
  assert "`memdiff+balanced_softmax`" not in table and "`real+cross_entropy`" not in table
  assert "`oracle+balanced_softmax`" in table  # beside the comparison's loss


def test_without_cross_validation_the_compared_loss_stands_for_all(report):
  table = isolating.chosen_table(report | {"recommendation": None})
  assert "`memdiff+balanced_softmax`" in table and "`memdiff+cross_entropy`" not in table
  text = isolating.recommendation_text(report | {"recommendation": None})
  assert text == "No cross-validation was run."


def test_the_recommendation_says_what_was_expected_and_what_came(report):
  text = isolating.recommendation_text(report)
  for part in ("**`real+balanced_softmax`**", "+1.2 points", "−1.0 to +3.4", "−1.0 points",
               "67 % of the pairs", "4.0 points above"):  # fmt: skip
    assert part in text


@pytest.fixture
def judged(report):
  """The report with what newer ones have: a criterion, its scores, and intervals."""
  report["criterion"] = "balanced_accuracy"
  for entry in report["classification"]:
    entry["balanced_accuracy"] = stat(entry["top1"]["mean"] - 0.1)
    if "gap_closed" in entry:
      entry["gap_closed"] = {"mean": entry["gap_closed"]["mean"], "interval": [-0.25, 0.75]}
  report["comparison"]["gain"] = stat(0.04) | {"interval": [0.02, 0.06]}
  report["comparison"]["headroom"] = stat(0.1) | {"interval": [0.05, 0.15]}
  report["comparison"]["gap_closed"] = {"mean": 0.4, "interval": [-0.25, 0.75]}
  report["choices"]["memdiff+cross_entropy"] |= {"l2": 0.005, "tau": 1.5}
  return report


def test_tables_show_the_score_by_which_the_run_was_judged(judged):
  lines = isolating.accuracy_table(judged).splitlines()
  assert lines[0].startswith("| balanced accuracy % |")
  assert "| `memdiff` | – | 41.00 ± 1.00 | 46.00 ± 1.00 |" in lines
  table = isolating.chosen_table(judged)
  assert "| `memdiff+cross_entropy` | 41.0 ± 1.0 | 51.00 ± 1.00 |" in table
  assert "exponent 0.5, l2 0.005, tau 1.5 |" in table
  line = isolating.settings_table({"here": judged}).splitlines()[2]
  assert line.startswith("| here, balanced accuracy | 42.00 ± 1.00 (`real+balanced_softmax`) |")


def test_what_was_judged_stands_beside_its_test_score_if_it_has_one(judged):
  scores = judged["recommendation"]["scores"]
  for entry in scores.values():
    entry |= {"gain": 0.01, "interval": [0.0, 0.02]}
  untested = {"score": 0.5, "gain": -0.01, "interval": [-0.02, 0.0]}
  judged["recommendation"]["scores"] = scores | {
    "ldmlr+csl": untested, "ldmlr+cross_entropy": untested | {"score": 0.4}
  }  # fmt: skip
  lines = isolating.judged_table(judged).splitlines()[2:]
  assert "| `ldmlr+csl` | 50.00 | -1.00 (-2.00 to +0.00) | – |" in lines
  assert [line.split("+")[0] for line in lines if "ldmlr" in line] == ["| `ldmlr"]
  best = max((m for m in scores if m.startswith("memdiff+")), key=lambda m: scores[m]["score"])
  row = next(r for r in judged["classification"] if r["method"] == best)
  (line,) = (line for line in lines if "memdiff" in line)
  assert line.startswith(f"| `{best}` |")
  assert line.endswith(f"| {isolating.percent(row['balanced_accuracy'], 2)} |")


def test_a_share_of_the_gap_stands_with_its_interval_if_it_has_one(judged):
  table = isolating.chosen_table(judged)
  assert "| 100 (−25 to 75) |" in table
  row = next(r for r in judged["classification"] if r["method"] == "oracle+balanced_softmax")
  del row["gap_closed"]  # the room was within the noise
  assert "| 100 (" not in isolating.chosen_table(judged)
  assert "+4.00 (+2.00 to +6.00)" in isolating.settings_table({"here": judged})


def test_no_finding_is_claimed_without_an_interval(report, judged):
  assert "synthetic features help" in isolating.markdown(judged, {})
  judged["comparison"]["gain"] = stat(0.04)
  assert "clear" not in isolating.markdown(judged, {}).partition("## ")[0]


def test_a_note_and_a_run_of_unknown_length_are_shown(report):
  report["note"] = "Interrupted twice."
  del report["timing"]["total_seconds"]
  text = isolating.markdown(report, {})
  assert "Interrupted twice." in text and "minutes" not in text


def test_the_best_on_test_is_looked_for_among_the_judged_methods(report):
  line = isolating.recommendations_table({"here": report}).splitlines()[2]
  cells = ["here", "`real+balanced_softmax`", "`memdiff+balanced_softmax`", "4.00", "0.33", "4"]
  assert line == f"| {' | '.join(cells)} |"


def test_joint_training_stands_beside_encoders_trained_once(report):
  report["classification"] = [
    row("own_head", 0.4), row("joint:real+csl", 0.5), row("joint:memdiff+csl", 0.45),
    row("real+csl", 0.6),
  ]  # fmt: skip
  report["joint"] = [{"method": "joint:memdiff+csl", "gain": stat(-0.05)}]
  lines = isolating.joint_table(report).splitlines()[2:]
  assert [line.split(" | ")[0] for line in lines] == [
    "| `own_head`", "| `joint:real+csl`", "| `joint:memdiff+csl`",
  ]  # fmt: skip
  assert lines[2].endswith("| 45.00 ± 1.00 | -5.00 ± 1.00 |")


def test_files_lie_beside_each_other_and_name_no_folder_of_this_machine(report, tmp_path):
  pictures = tmp_path / "run" / "evaluation"
  pictures.mkdir(parents=True)
  (pictures / "gap_closed.png").write_bytes(b"png")
  isolating.write(report, tmp_path / "run", tmp_path / "out" / "table.json")
  assert (tmp_path / "out" / "table_gap_closed.png").read_bytes() == b"png"
  text = (tmp_path / "out" / "table.md").read_text()
  saved = json.loads((tmp_path / "out" / "table.json").read_text())
  assert saved["config"]["list"] == "DIR/d.npz:key"
  assert saved["generators"]["memdiff"]["memorization_ratio"] == stat(0.9)
  for content in (text, saved["command"]):
    assert "--workdir=DIR/run" in content and "--config.list=DIR/d.npz:key" in content
    assert "/a/b" not in content and "/c/d" not in content
  assert "| `memdiff` | 0.5 | 0.5 | 0.5 | 0.5 | 0.9 | 1.1 | 0.2 | 12 | – |" in text
  assert text.count("![") == 1 and "table_gap_closed.png" in text


def test_a_failed_run_writes_nothing(tmp_path, monkeypatch):
  monkeypatch.chdir(pathlib.Path(__file__).parent.parent)
  target = tmp_path / "table.json"
  code = isolating.main(["--config=configs/none.py", f"--json={target}", f"--workdir={tmp_path}/w"])
  assert code != 0 and not target.exists()
