"""Benchmarks run, and the smoke run's comparison finds what differs; speeds are for people."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from benchmarks import (
  added_images,
  bank_scaling,
  feature_diffusion,
  generation,
  pixel_diffusion,
  smoke,
  unseen_classes,
)


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


@pytest.mark.slow
def test_generated_images_are_timed():
  size = added_images.Size(train=200, pool=300, side=8, backbone="resnet8", batch_size=16)
  rows, result = added_images.measure(size, rounds=1)
  assert [row.name for row in rows if row.target] == [
    "and of 16 generated ones beside them", "its largest memory"
  ]  # fmt: skip
  assert result["looking"]["seconds"] > 0
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


# --- images ------------------------------------------------------------------------------------


def reduced_report(method, scale=1.0, **config):
  row = {"method": method, "scale": scale}
  return {"config": {"seeds": [0]} | config, "dataset": {"split_sha256": "a"}, "commands": [method],
          "images": {"network": "classifier", "rows": [row]}}  # fmt: skip


def test_reports_of_one_set_are_joined_and_others_refused():
  parts = [reduced_report("ddpm"), reduced_report("cm"), reduced_report("cm", 2.0)]
  joined = generation.joined(parts)
  assert [row["method"] for row in joined["images"]["rows"]] == ["ddpm", "cm", "cm"]
  assert joined["commands"] == ["ddpm", "cm", "cm"] and joined["config"] == {"seeds": [0]}
  with pytest.raises(SystemExit, match="differ in their config"):
    generation.joined([reduced_report("ddpm"), reduced_report("cm", seeds=[1])])


def test_characters_are_split_by_drawer_and_whole_alphabets_left_out(tmp_path):
  for name in ("Greek/character01", "Latin/character02"):
    folder = tmp_path / "raw" / name
    folder.mkdir(parents=True)
    for i in range(20):
      Image.new("L", (5, 5), 10 * i).save(folder / f"0001_{i:02}.png")
  unseen_classes.prepare(tmp_path / "raw", tmp_path / "out", ["Greek"])
  found = {part: sorted(p.stem for p in (tmp_path / "out" / part).rglob("*.png"))
           for part in ("train", "test", "unseen")}  # fmt: skip
  assert [len(files) for files in found.values()] == [14, 6, 20]
  assert found["test"][0] == "0001_14"
  drawings = unseen_classes.read_unseen(tmp_path / "out", (5, 5, 1))
  assert drawings.shape == (1, 20, 5, 5, 1) and drawings[0, 3, 0, 0, 0] == 30
  (folder / "0001_19.png").unlink()
  with pytest.raises(SystemExit, match="has 19 drawings, but 20"):
    unseen_classes.prepare(tmp_path / "raw", tmp_path / "other", [])


def test_drawings_are_judged_by_the_nearest_mean_and_copies_told():
  shown = np.zeros((2, 2, 3, 3, 1), np.uint8)
  shown[1], shown[:, 1, 0, 0] = 200, 90  # two exemplars of each, apart
  drawn = shown.repeat(2, axis=1)
  drawn[0, 0] = 150  # a drawing of the second character, of its own
  drawn[1, 1, 1, 1] += 1

  def encode(images):
    return images.reshape(len(images), -1).mean(axis=1, keepdims=True).astype(float), None

  found = unseen_classes.measured(drawn, shown, encode, np.array([[10.0], [180.0]]))
  assert found["right"] == 7 / 8 and found["copied"] == 7 / 8
  flat = drawn.reshape(2, 4, -1) / 255
  pairs = [np.linalg.norm(c[i] - c[j]) for c in flat for i in range(4) for j in range(4) if i != j]
  assert found["spread"] == pytest.approx(np.mean(pairs))
