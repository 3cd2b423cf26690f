"""Features for TensorBoard's projector: tables of text and a small config, without TensorFlow."""

import io
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from memdiff.runtime.workdir import write_atomically

# Where TensorBoard's plugin looks, inside the folder of a run.
FOLDER = pathlib.Path("plugins") / "org_tensorflow_tensorboard_projector"
CONFIG = "projector_config.pbtxt"


def write(
  run: pathlib.Path, name: str, features: np.ndarray, metadata: Mapping[str, Sequence[object]]
) -> None:
  """Writes one set of points; those of an earlier call are replaced.

  Args:
    run: the folder of a run that TensorBoard shows.
    name: of the set.
    features: [N, D], finite.
    metadata: column -> [N] values that points can be coloured and searched by; at least two.
  """
  folder = run / FOLDER
  folder.mkdir(parents=True, exist_ok=True)
  table = io.BytesIO()
  np.savetxt(table, features, fmt="%.5g", delimiter="\t")
  write_atomically(folder / "features.tsv", table.getvalue())
  lines = ["\t".join(metadata)]
  lines += ["\t".join(map(_cell, row)) for row in zip(*metadata.values(), strict=True)]
  write_atomically(folder / "metadata.tsv", ("\n".join(lines) + "\n").encode())
  config = (
    f"embeddings {{\n  tensor_name: {json.dumps(name)}\n"
    '  tensor_path: "features.tsv"\n  metadata_path: "metadata.tsv"\n}\n'
  )
  write_atomically(folder / CONFIG, config.encode())


def _cell(value: object) -> str:
  return " ".join(str(value).split())
