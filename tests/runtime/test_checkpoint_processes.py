"""Two processes restore what both can read, whatever one of them meets."""

import pathlib
import socket
import subprocess
import sys

import pytest

from tests import support

TORN = 2  # the step that process 1 cannot read


def child(folder: str, port: str, number: str) -> None:
  """One of two processes; prints what it restores, which steps stay, and its part of the state."""
  import jax
  import numpy as np
  from jax.sharding import NamedSharding, PartitionSpec

  from memdiff.runtime import checkpoint, distributed
  from memdiff.runtime import mesh as mesh_lib

  distributed.join(distributed.Cluster(f"localhost:{port}", 2, int(number), 60))
  split = NamedSharding(mesh_lib.make_mesh(), PartitionSpec("data"))
  states = {
    step: jax.make_array_from_callback((4,), split, lambda i, s=step: (10.0 * s + np.arange(4))[i])
    for step in (1, TORN)
  }
  directory = pathlib.Path(folder)
  writer = checkpoint.Checkpointer(directory, keep=5)
  for step, state in states.items():
    writer.save(step, {"x": state})
  writer.close()

  reader = checkpoint.Checkpointer(directory, keep=5)
  read = reader._read

  def read_or_fail(step, abstract_state):
    if jax.process_index() == 1 and step == TORN:
      raise OSError("Input/output error")
    return read(step, abstract_state)

  reader._read = read_or_fail
  step, state = reader.restore({"x": jax.ShapeDtypeStruct((4,), states[1].dtype, sharding=split)})
  own = [float(x) for shard in state["x"].addressable_shards for x in np.asarray(shard.data)]
  print(step, sorted(reader._manager.all_steps()), own)
  reader.close()


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_all(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  processes = [
    subprocess.Popen(
      [sys.executable, __file__, str(tmp_path), str(port), str(number)],
      env=support.environment_of_children(1), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]  # fmt: skip
  ended = [process.communicate(timeout=support.HANG) for process in processes]
  assert [p.returncode for p in processes] == [0, 0], [err[-2000:] for _, err in ended]
  assert [out.splitlines()[-1] for out, _ in ended] == [
    "1 [1] [10.0, 11.0]",
    "1 [1] [12.0, 13.0]",
  ]


if __name__ == "__main__":
  child(*sys.argv[1:])
