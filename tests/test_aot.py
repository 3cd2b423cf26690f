"""Compiling ahead of time: what the phases' programs send, and that they wait for nobody."""

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import aot, aot_programs, compiled_program
from input_pipeline.streaming import Order, StreamConfig, train_batches
from tests import support

DEVICES, ROWS, SLOTS, DIM, BATCH = 8, 16, 32, 64, 8


def child() -> None:
  """Runs where eight fake devices are; prints every phase's bank and compiled program."""
  from configs import digits_lt

  config = digits_lt.get_config("smoke")
  config.seeds = (0,)
  config.classifier.loss = "semantic_scale"  # it keeps a bank while it trains
  config.classifier.batch_size = config.diffusion.batch_size = BATCH  # fewer rows than the bank has
  config.hallucination.chunk_size = config.head.training.batch_size = BATCH
  settings, data = aot_programs.load(config.to_dict())
  mesh, found = aot.make_mesh(""), {}
  for program in aot_programs.programs(settings, data, mesh, "replicated"):
    compiled = program.lower().compile()
    found[program.name] = {"bank": aot.bank_bytes(program.bank), "text": compiled.as_text()}
  print(json.dumps(found))


@pytest.fixture(scope="module", params=support.SLOW)
def phases():
  return json.loads(support.on_fake_devices(__file__, devices=DEVICES).splitlines()[-1])


def test_every_phase_that_repeats_is_compiled(phases):
  assert list(phases) == ["classifier/semantic_scale", "diffusion", "hallucination", "heads"]


def test_every_device_holds_its_part_of_the_bank(phases):
  for name in ("classifier/semantic_scale", "diffusion", "hallucination"):
    bank = phases[name]["bank"]
    assert bank["whole"] == 4 * ROWS * ((SLOTS + 1) * DIM + 1)  # slots, a mean, a count
    assert bank["per_device"] == bank["whole"] / DEVICES
  assert phases["heads"]["bank"] is None


def test_no_phase_gathers_the_bank(phases):
  slots = jax.ShapeDtypeStruct((1, ROWS, SLOTS, DIM), jnp.float32)
  for name, phase in phases.items():
    sent = compiled_program.collectives(phase["text"])
    assert sent, name
    assert not compiled_program.gathers_bank(phase["text"], slots), name
    for kind, arrays in sent:
      for _, shape in arrays:
        assert shape[-3:] not in {(ROWS, SLOTS, DIM), (ROWS, SLOTS + 2, DIM)}, (name, kind)
        assert shape[-2:] != (ROWS * SLOTS, DIM), (name, kind)


@pytest.mark.parametrize(
  ("shape", "whole"),
  [
    ("1,16,32,64", True), ("16,34,64", True), ("512,64", True), ("16,64", False),
    ("2,32,64", False), ("111,1,8,64", False), ("16,32,65", False),
  ],
)  # fmt: skip
def test_a_gathered_bank_is_noticed(shape, whole):
  slots = jax.ShapeDtypeStruct((1, ROWS, SLOTS, DIM), jnp.float32)
  assert compiled_program.gathers_bank(f"%a = f32[{shape}]{{0}} all-gather(%b)", slots) == whole


@pytest.mark.parametrize("name", ["diffusion", "hallucination"])
def test_only_the_rows_of_a_batch_are_read(phases, name):
  read = [a for _, arrays in compiled_program.collectives(phases[name]["text"]) for a in arrays]
  memories = [shape[-3:] for _, shape in read if shape[-2:] == (SLOTS + 2, DIM)]
  assert memories == [(BATCH // DEVICES, SLOTS + 2, DIM)]  # of each device's part of the batch


def test_no_phase_waits_for_the_host(phases):
  for name, phase in phases.items():
    assert compiled_program.host_transfers(phase["text"]) == [], name


def test_what_waits_for_the_host_is_found():
  def noisy(x):
    jax.debug.callback(lambda v: None, x)
    return x + 1

  for ordinary, function in ((True, lambda x: x + 1), (False, noisy)):
    text = jax.jit(function).lower(jnp.zeros(3)).compile().as_text()
    assert (compiled_program.host_transfers(text) == []) == ordinary


def test_collectives_are_read_off_a_program():
  text = """
  %all-reduce.1 = (f32[4,2]{1,0:T(8,128)}, f32[]) all-reduce(%a, %b), replica_groups={}
  %ag = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%x), dimensions={0}
  %agd = bf16[16,8]{1,0} all-gather-done(%ag)
  ROOT %cp = (s32[5]{0}, s32[5]{0}, u32[], u32[]) collective-permute-start(%y)
  %f = f32[3]{0} fusion(%all-reduce.1), kind=kLoop
  """
  found = [
    (kind, compiled_program.num_bytes(arrays))
    for kind, arrays in compiled_program.collectives(text)
  ]
  assert found == [("all-reduce", 32), ("all-gather", 256), ("collective-permute", 20)]


@pytest.mark.parametrize("numbers", aot_programs.LARGE.values())
def test_made_counts_add_up(numbers):
  counts = aot_programs.class_counts(numbers)
  assert len(counts) == numbers.classes
  assert counts.sum() == numbers.images
  assert (counts.max(), counts.min()) == (numbers.largest, numbers.smallest)
  assert (np.diff(counts) <= 0).all()


@pytest.mark.parametrize(("name", "profile"), aot_programs.LARGE)
def test_large_sets_stand_in_with_batches_of_their_size(name, profile):
  numbers = aot_programs.LARGE[name, profile]
  config = SimpleNamespace(name=name, profile=profile, image_size=8)
  data = aot_programs._large_dataset(config, numbers)
  assert data.streamed and data.num_classes == numbers.classes
  assert len(data.train_labels) == numbers.images and len(data.test_labels) == numbers.test
  batches = train_batches(data.train_images, data.train_labels, 4, Order(0), StreamConfig(1, 0, 1))
  batch = next(batches)
  batches.close()
  assert {v.shape for v in batch.values()} == {(4, 8, 8, 3), (4,)}


@pytest.mark.slow
def test_a_slice_that_is_not_here_is_compiled_for(tmp_path):
  """Needs libtpu, which `make aot` brings; a minute."""
  pytest.importorskip("libtpu")
  options = ["--topology=v5e:2x4", "--phases=classifier", f"--json={tmp_path / 'rows.json'}"]
  subprocess.run(
    [sys.executable, "-m", "benchmarks.aot", "--config=configs/digits_lt.py:smoke", *options],
    cwd=support.ROOT, check=True, timeout=support.HANG,
  )  # fmt: skip
  result = json.loads((tmp_path / "rows.json").read_text())
  assert result["device_kind"] == "TPU v5 lite" and result["devices"] == 8
  for row in result["rows"]:
    assert row["fits"] and row["memory"]["total"] < 16 * 2**30 and row["flops"] > 0
    assert row["bank"]["whole"] == 8 * row["bank"]["per_device"]


if __name__ == "__main__":
  child()
