"""What the report of generated images says first, its tables and its page."""

import re

import numpy as np

from memdiff.evaluation import image_report, scores
from memdiff.evaluation.image_report import answer

CLASSES = 3


def row(method, fd_few, fd=10.0, scale=1.0, **metrics):
  """A row with these values per seed."""
  values = {"fd_few": fd_few, "fd": [fd] * len(fd_few), "kid": [0.01] * len(fd_few)} | metrics
  made = {"method": method, "description": f"{method} in words", "scale": scale}
  made["seeds"] = list(range(len(fd_few)))
  for name, of_seeds in values.items():
    made[name] = scores.mean_std(np.array(of_seeds)) | {"values": scores.plain(of_seeds)}
  made["per_class_kid"] = scores.mean_std(np.ones((len(fd_few), CLASSES)))
  return made


def found(*rows, sweep=()):
  return {
    "network": "classifier", "network_description": "a network", "reference": "train",
    "reference_number": 300, "generated_number": 90, "rows": list(rows), "sweep": list(sweep),
  }  # fmt: skip


def page(*rows, **more):
  sampling = {"guidance": [1.5, 1.0], "sampler": "ddim", "num_steps": 20}
  diffusion = {"num_steps": 1000, "batch_size": 64, "ema_decay": 0.99}
  return {
    "name": "a run", "images": found(*rows, **more),
    "config": {"seeds": [4], "sampling": sampling, "diffusion": diffusion},
    "dataset": {"num_classes": CLASSES, "class_names": ["a", "b<", "c"],
                "train_counts": [5, 50, 1]},
  }  # fmt: skip


def test_a_clear_gain_is_called_one():
  said = answer(found(row("ddpm", [20.0, 21.0, 22.0]), row("cbdm", [15.0, 16.1, 17.0])))
  assert said.method == "cbdm" and said.verdict == "better"
  assert said.title == "cbdm: better images of the rarest classes than plain diffusion"
  first = said.effects[0].sentence()
  assert "FD-classifier 16.0 ± 1.0 instead of 21.0 ± 1.0 with ddpm" in first and "−4.97" in first


def test_an_interval_that_contains_zero_is_unclear():
  said = answer(found(row("ddpm", [20.0, 21.0, 22.0]), row("cbdm", [15.0, 22.1, 20.0])))
  assert said.verdict == "unclear" and said.title.startswith("No clear winner; cbdm")
  assert "no clear difference" in said.effects[0].sentence()


def test_one_seed_claims_nothing():
  said = answer(found(row("ddpm", [20.0]), row("cbdm", [15.0])))
  assert said.verdict == "unclear" and "may be chance" in said.effects[0].sentence()


def test_plain_diffusion_may_be_best_or_alone():
  said = answer(found(row("ddpm", [10.0, 11.0]), row("cbdm", [15.0, 14.0])))
  assert said.title == "No method improves on plain diffusion" and said.method == "ddpm"
  assert answer(found(row("ddpm", [10.0]))).title == "Images by ddpm"
  assert answer(found(row("t2h", [10.0]))).title == "Images by t2h"


def test_three_methods_come_with_a_warning():
  said = answer(found(*(row(name, [10.0, 11.0]) for name in ("ddpm", "cbdm", "t2h"))))
  assert any("chance" in sentence for sentence in said.sentences)


def test_the_difference_is_paired_by_seed():
  estimate = image_report.paired_difference([1.0, 12.0, 20.0], [2.0, 13.0, 21.0])
  assert estimate.mean == -1 and estimate.interval() == [-1, -1]
  assert image_report.paired_difference([1.0], [2.0]) is None


def test_the_terminal_shows_the_answer_the_protocol_and_the_table():
  text = image_report.text_table(page(row("ddpm", [20.0, 21.0]), row("cbdm", [15.0, 16.0])))
  assert "guidance scale 1.5 (ω = 0.5)" in text and "EMA 0.99" in text and "ddim" in text
  assert re.search(r"^cbdm +15\.5 ± 0\.7", text, re.M)
  assert max(map(len, text.splitlines())) <= 110


def test_the_page_shows_samples_tables_and_what_the_columns_mean():
  figures = {"samples_ddpm": b"png", "kid_by_class": b"png", "odd": b"png"}
  html = image_report.render_html(
    page(row("ddpm", [20.0], right=[0.5]), row("t2h", [float("nan")])), figures
  )
  assert html.count("<img") == 3 and "samples" in html and "b&lt;" in html
  assert "FD-classifier" in html and "FID-" not in html
  assert "{{" not in html and "None" not in html


def test_without_rare_classes_the_whole_set_decides():
  rows = [row("ddpm", [1.0], fd=9.0), row("cbdm", [1.0], fd=5.0)]
  for of_row in rows:
    of_row["fd_few"] = {"mean": None, "std": None, "values": [None]}
  said = answer(found(*rows))
  assert said.method == "cbdm" and said.title == "No clear winner; cbdm is first on all classes"


def test_without_plain_diffusion_balanced_batches_are_the_baseline():
  rows = row("memdiff+balanced", [15.0, 16.0]), row("balanced", [20.0, 21.1])
  said = answer(found(*rows))
  assert said.title.endswith(
    "better images of the rarest classes than diffusion on balanced batches"
  )
  assert "instead of 20.6 ± 0.8 with balanced" in said.effects[0].sentence()
  said = answer(found(*rows, row("ddpm", [30.0, 31.1])))
  assert "30.6 ± 0.8 with ddpm" in said.effects[0].sentence()


def test_without_a_baseline_nothing_is_claimed():
  said = answer(found(row("cbdm", [15.0, 16.0]), row("t2h", [10.0, 11.0])))
  assert said.title == "No clear winner; t2h is first on the rarest classes"
