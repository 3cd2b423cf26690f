"""What a memory bank costs as it grows: 100, 1,000 and 8,142 classes of 256 slots x 512 numbers.

  python -m benchmarks.bank_scaling [--json FILE] [--rounds N] [--devices 1 8]

Times an update by a batch of 256 features (the bank donated, as in a train state) and the read of
256 classes. Every number of devices runs in a process of its own, on that many fake CPU devices,
the bank split over them by class. 8,142 classes, iNaturalist's number, are 4.3 GB.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

_CLASSES, _SLOTS, _DIM, _BATCH = (100, 1000, 8142), 256, 512, 256


def measure(rounds: int) -> dict[str, Any]:
  """Milliseconds by number of classes, on the devices of this process."""
  import jax
  import numpy as np

  from benchmarks import timing
  from memdiff.memory import feature_space, memory_bank
  from memdiff.runtime import mesh as mesh_lib

  mesh, random, found = mesh_lib.make_mesh(), np.random.RandomState(0), {}
  for number in _CLASSES:
    sharding = feature_space.bank_sharding(number, mesh)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    create = jax.jit(lambda n=number: memory_bank.create(n, _SLOTS, _DIM), out_shardings=sharding)
    features = mesh_lib.replicate(mesh, random.standard_normal((_BATCH, _DIM)).astype(np.float32))
    labels = mesh_lib.replicate(mesh, random.randint(0, number, _BATCH).astype(np.int32))
    state = {"bank": create(), "step": 0}

    @jax.jit
    def read(bank, labels):
      return memory_bank.read(bank, labels, mesh=mesh)

    def update(bank, features, labels, key):
      valid = labels >= 0
      return memory_bank.update(bank, features, labels, valid, key, horizon=1000, mesh=mesh)

    update = jax.jit(update, donate_argnums=0, out_shardings=sharding)

    def next_update(state=state, update=update, features=features, labels=labels):
      state["step"] += 1
      key = jax.random.key(state["step"])
      state["bank"] = update(state["bank"], features, labels, key)
      return state["bank"].seen

    def next_read(state=state, read=read, labels=labels):
      return read(state["bank"], labels)

    times = timing.interleave({"update": (next_update, 1.0), "read": (next_read, 1.0)}, rounds)
    found[str(number)] = {name: 1e3 * clock.median for name, clock in times.items()}
    del state["bank"]
  return found | timing.environment()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", type=pathlib.Path, help="write versions, hardware and all figures")
  parser.add_argument("--rounds", type=int, default=20, help="repeats of every measurement")
  parser.add_argument("--devices", type=int, nargs="+", default=[1, 8], help="fake devices")
  parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.here:
    print(json.dumps(measure(arguments.rounds)))
    return
  result = {}
  print("devices  classes  update, ms  read, ms")
  for number in arguments.devices:
    flags = f"--xla_force_host_platform_device_count={number}"
    done = subprocess.run(
      [sys.executable, "-m", "benchmarks.bank_scaling", "--here", f"--rounds={arguments.rounds}"],
      env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
      stdout=subprocess.PIPE,
      encoding="utf-8",
      check=True,
    )
    result[str(number)] = found = json.loads(done.stdout)
    for classes in map(str, _CLASSES):
      line = f"{found[classes]['update']:>10.2f}  {found[classes]['read']:>8.2f}"
      print(f"{number:>7}  {int(classes):>7,}  {line}", flush=True)
  if arguments.json:
    arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
