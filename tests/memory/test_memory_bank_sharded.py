"""The memory bank on 1, 2 and 8 fake devices: the same bank, and only the batch travels."""

import json
import math
import pathlib
import re
import sys

import numpy as np
import pytest

from tests import support

DEVICES = (1, 2, 8)
CLASSES, ROWS, SLOTS, DIM, BATCH, SEEDS = 10, 16, 3, 4, 24, 2
UNEVEN = 9  # rows of a batch that no number of devices divides


def make_batches():
  """Three batches with head and tail classes, an invalid row, a NaN and labels of nobody."""
  rng = np.random.default_rng(0)
  labels = rng.choice(CLASSES, p=np.arange(CLASSES, 0, -1) / 55, size=(3, BATCH))
  labels[1, :3] = -1, ROWS, 2**31 - 1
  features = rng.normal(size=(SEEDS, 3, BATCH, DIM))
  features[:, 2, 5, 1] = np.nan
  valid = np.ones((3, BATCH), bool)
  valid[0, 7] = False
  return features.astype(np.float32), labels.astype(np.int32), valid


def child(out: str) -> None:
  """Runs where eight fake devices are; writes arrays and compiled programs to the folder `out`."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

  from memdiff.memory import memory_bank
  from memdiff.runtime import mesh as mesh_lib

  features, labels, valid = make_batches()
  arrays, programs = {}, {}
  for number in DEVICES:
    mesh = Mesh(np.array(jax.devices()[:number]), ("data",), axis_types=(AxisType.Auto,))
    split = mesh_lib.class_spec(ROWS, mesh)
    assert split == PartitionSpec("data")
    by_class = NamedSharding(mesh, split)
    by_seed_and_class = NamedSharding(mesh, PartitionSpec(None, *split))
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def update(bank, features, labels, valid, key, mesh=mesh):
      return memory_bank.update(bank, features, labels, valid, key, horizon=6, mesh=mesh)

    def read(bank, labels, mesh=mesh):
      return memory_bank.read(bank, labels, mesh=mesh)

    def fill(features, key, update=update):
      bank = memory_bank.create(CLASSES, SLOTS, DIM)
      for i in range(3):
        bank = update(bank, features[i], labels[i], valid[i], jax.random.fold_in(key, i))
      return bank

    bank = jax.device_put(memory_bank.create(CLASSES, SLOTS, DIM), by_class)
    one_update = (
      jax.jit(update, out_shardings=by_class)
      .lower(
        bank,
        jax.device_put(features[0, 0], by_row),
        jax.device_put(labels[0], by_row),
        jax.device_put(valid[0], by_row),
        jax.device_put(jax.random.key(0), everywhere),
      )
      .compile()
    )
    one_read = jax.jit(read).lower(bank, jax.device_put(labels[0], everywhere)).compile()
    uneven = jax.device_put(labels[0, :UNEVEN], everywhere)
    read_uneven = jax.jit(read).lower(bank, uneven).compile()
    programs[number] = {
      "update": one_update.as_text(),
      "read": one_read.as_text(),
      "read_uneven": read_uneven.as_text(),
    }

    key = jax.random.key(5)
    single = jax.jit(fill, out_shardings=by_class)(features[0], key)
    assert len(single.slots.sharding.device_set) == number
    keys = jnp.stack([key, jax.random.key(6)])
    both = jax.jit(jax.vmap(fill), out_shardings=by_seed_and_class)(features, keys)
    wanted = jnp.arange(ROWS)
    results = {"single": single, "both": both}
    results["read"] = jax.jit(read)(single, wanted)
    results["read_uneven"] = jax.jit(read)(single, wanted[:UNEVEN])
    results["read_both"] = jax.jit(jax.vmap(read, in_axes=(0, None)))(both, wanted)
    for name, tree in results.items():
      for field, value in vars(tree).items():
        if value is not None:
          arrays[f"{number}/{name}/{field}"] = np.asarray(value)
    known = jnp.arange(2.0 * ROWS).reshape(ROWS, 2)
    told = jax.jit(read)(single.replace(class_embeddings=known), wanted[::-1])
    arrays[f"{number}/known"] = np.asarray(told.class_embeddings)
  np.savez(pathlib.Path(out) / "arrays.npz", **arrays)
  (pathlib.Path(out) / "programs.json").write_text(json.dumps(programs))


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
  """(arrays, compiled programs) of one child process with eight fake devices."""
  out = tmp_path_factory.mktemp("sharded")
  support.on_fake_devices(__file__, str(out))
  with np.load(out / "arrays.npz") as arrays:
    return dict(arrays), json.loads((out / "programs.json").read_text())


def collectives(program: str, kind: str) -> list[tuple[int, ...]]:
  """Shapes of the results of every collective of a kind, those of asynchronous pairs once."""
  lines = re.findall(rf"= (.*?) {kind}(?:-start)?\(", program)
  return [
    tuple(int(n) for n in shape.split(",") if n)
    for line in lines
    for shape in re.findall(r"\w+\[([\d,]*)\]", line)
  ]


@pytest.mark.parametrize("number", DEVICES[1:])
@pytest.mark.parametrize("result", ["single", "both"])
def test_the_bank_does_not_depend_on_the_number_of_devices(outcome, number, result):
  arrays, _ = outcome
  for field in ("slots", "seen"):
    np.testing.assert_array_equal(
      arrays[f"{number}/{result}/{field}"], arrays[f"1/{result}/{field}"]
    )
  np.testing.assert_allclose(
    arrays[f"{number}/{result}/prototype"], arrays[f"1/{result}/prototype"], rtol=0, atol=1e-6
  )


def test_the_bank_holds_what_was_offered(outcome):
  arrays, _ = outcome
  _, labels, valid = make_batches()
  valid[2, 5] = False  # the NaN
  enters = valid & (labels >= 0) & (labels < ROWS)
  seen = np.bincount(labels[enters], minlength=ROWS)
  for number in DEVICES:
    np.testing.assert_array_equal(arrays[f"{number}/single/seen"], seen)
    np.testing.assert_array_equal(arrays[f"{number}/both/seen"], np.stack([seen, seen]))
  assert seen.max() > 6 > SLOTS > seen[:CLASSES].min()  # horizon and slots were exceeded


def test_seeds_under_vmap_equal_a_seed_alone(outcome):
  arrays, _ = outcome
  for number in DEVICES:
    for field in ("slots", "seen"):
      np.testing.assert_array_equal(
        arrays[f"{number}/both/{field}"][0], arrays[f"{number}/single/{field}"]
      )
    assert not np.array_equal(arrays[f"{number}/both/slots"][0], arrays[f"{number}/both/slots"][1])


@pytest.mark.parametrize("number", DEVICES)
@pytest.mark.parametrize(
  ("bank", "memory", "rows"),
  [("single", "read", ROWS), ("single", "read_uneven", UNEVEN), ("both", "read_both", ROWS)],
)
def test_reading_equals_dense_indexing_on_any_number_of_devices(
  outcome, number, bank, memory, rows
):
  arrays, _ = outcome
  part = np.s_[:rows] if bank == "single" else np.s_[:, :rows]
  for field in ("prototype", "slots"):
    expected = arrays[f"{number}/{bank}/{field}"][part]
    np.testing.assert_array_equal(arrays[f"{number}/{memory}/{field}"], expected)
  seen = arrays[f"{number}/{bank}/seen"][part]
  np.testing.assert_array_equal(arrays[f"{number}/{memory}/count"], seen)
  np.testing.assert_array_equal(
    arrays[f"{number}/{memory}/mask"], np.arange(SLOTS) < seen[..., None]
  )
  table = np.arange(2.0 * len(arrays[f"{number}/known"])).reshape(-1, 2)
  np.testing.assert_array_equal(arrays[f"{number}/known"], table[::-1])


@pytest.mark.parametrize("number", DEVICES[1:])
@pytest.mark.parametrize(
  ("name", "kind", "rows"),
  [("read", "reduce-scatter", BATCH), ("read_uneven", "all-reduce", UNEVEN)],
)
def test_reading_is_one_collective(outcome, number, name, kind, rows):
  """Each device is left with its part of a batch that splits evenly, else with the whole."""
  _, programs = outcome
  program = programs[str(number)][name]
  rows = rows // number if kind == "reduce-scatter" else rows
  assert collectives(program, kind) == [(rows, SLOTS + 2, DIM)]
  others = {"all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"}
  assert not any(collectives(program, other) for other in others - {kind})


@pytest.mark.parametrize("number", DEVICES[1:])
def test_an_update_gathers_the_batch_and_never_the_bank(outcome, number):
  _, programs = outcome
  program = programs[str(number)]["update"]
  gathered = [shape for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
              for shape in collectives(program, kind)]  # fmt: skip
  assert (BATCH, DIM) in gathered  # the batch came in split
  assert max(math.prod(shape) for shape in gathered) <= BATCH * DIM < ROWS * SLOTS * DIM
  assert all(not shape or shape[0] != ROWS for shape in gathered)


def test_a_single_device_needs_no_gathering(outcome):
  _, programs = outcome
  for kind in ("all-gather", "all-to-all", "collective-permute"):
    for program in programs["1"].values():
      assert not collectives(program, kind)


if __name__ == "__main__":
  child(sys.argv[1])
