"""Benchmarks run, and the smoke run's comparison finds what differs; speeds are for people."""

import json
import math

import pytest

from benchmarks import bank_scaling, feature_diffusion, pixel_diffusion, smoke


def test_numbers_are_found_at_every_depth_without_times():
  report = {"a": [1, {"b": 2.5}], "seconds": 3, "c": {"timing": {"x": 1}, "d": True}, "e": "text"}
  assert dict(smoke.numbers(report, "run")) == {"run/a/0": 1, "run/a/1/b": 2.5, "run/c/d": 1}


def test_a_comparison_counts_what_differs(tmp_path, capsys):
  first, second = tmp_path / "1.json", tmp_path / "2.json"
  first.write_text(json.dumps({"same": 1.0, "nan": math.nan, "near": 1.0, "gone": 0.0}))
  second.write_text(json.dumps({"same": 1.0, "nan": math.nan, "near": 1.0 + 1e-9, "new": 0.0}))
  assert smoke.compare(first, first, 0.0) == 0
  assert smoke.compare(first, second, 0.0) == 3
  assert smoke.compare(first, second, 1e-6) == 2
  printed = capsys.readouterr().out
  assert "only in one: gone" in printed and "near: 1.0 and 1.000000001" in printed


@pytest.mark.slow
def test_feature_diffusion_is_timed():
  rows, result = feature_diffusion.run(rounds=1, quick=True)
  names = [row.name for row in rows]
  for words in ("training, one seed", "sampling", "MMD", "bank update in an encoder step"):
    assert any(name.startswith(words) for name in names), words
  assert math.isfinite(result["sampling_mmd"]["training_features"])
  json.dumps(result)


@pytest.mark.slow
def test_pixel_diffusion_is_timed():
  rows, result = pixel_diffusion.measure(pixel_diffusion.smallest(), rounds=1, compiles=False)
  names = [row.name for row in rows]
  for words in ("training, ddpm", "time over ddpm’s, cbdm", "sampling, 20 steps"):
    assert words in names, words
  assert result["step_flops_per_image"] > 2 * result["parameters"]
  assert result.get("torch_disagreement", {"output": 0})["output"] < 1e-4
  json.dumps(result)


def test_the_configs_of_pixel_diffusion_are_those_of_experiments():
  published = pixel_diffusion.workload("cifar")
  assert published.config.unet.dtype == "bfloat16" and published.config.batch_size == 128
  assert pixel_diffusion.step_flops(published) == pytest.approx(34.96e9, rel=1e-3)
  assert pixel_diffusion.workload("fashion").config.unet.attention == (7,)
  assert pixel_diffusion.workload("digits").counts[0] == 122


def test_banks_are_timed(monkeypatch):
  monkeypatch.setattr(bank_scaling, "_CLASSES", (10, 30))
  monkeypatch.setattr(bank_scaling, "_SLOTS", 4)
  found = bank_scaling.measure(rounds=1)
  assert all(found[number][what] > 0 for number in ("10", "30") for what in ("update", "read"))
