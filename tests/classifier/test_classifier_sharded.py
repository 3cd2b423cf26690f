"""The classifier's step on 2, 4 and 8 fake devices: what travels does not grow with them."""

import json
import math
import re

import jax
import jax.numpy as jnp
import pytest

from memdiff.classifier import backbones
from tests import support

DEVICES = (2, 4, 8)
PER_DEVICE, SIZE, CLASSES = 6, 8, 5
KINDS = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def child() -> None:
  """Runs where eight fake devices are; prints the compiled step by number of devices."""
  import numpy as np
  from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

  from configs import digits_lt
  from input_pipeline.dataset import LongTailDataset
  from memdiff import config as config_lib
  from memdiff.classifier import encoder, encoder_training
  from memdiff.classifier.encoder_training import Recipe
  from memdiff.experiments.classification import ClassificationConfig

  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (80, SIZE, SIZE, 1), np.uint8)
  labels = np.arange(80, dtype=np.int32) % CLASSES
  nothing = {"images": images[:0], "labels": labels[:0]}
  data = LongTailDataset(
    name="random", class_names=tuple("abcde"), profile="natural", imbalance=1.0,
    train_images=images, train_labels=labels, test_images=images, test_labels=labels,
    split_sha256="",
    **{f"{part}_{k}": v for part in ("holdout", "left_out") for k, v in nothing.items()},
  )  # fmt: skip
  programs = {}
  for number in DEVICES:
    values = digits_lt.get_config("classification").to_dict()
    values["classifier"]["batch_size"] = PER_DEVICE * number
    config = config_lib.build(ClassificationConfig, values)
    mesh = Mesh(np.array(jax.devices()[:number]), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    shared = encoder.device_data(config.encoder.input, data, mesh)
    stage = encoder_training.make_stage(
      Recipe(config.classifier, config.encoder, "cross_entropy"), data, shared, mesh
    )
    state = jax.jit(lambda key, init=stage.init: init(key, ()), out_shardings=everywhere)(
      jax.random.key(0)
    )
    step = jax.jit(stage.step, out_shardings=everywhere)
    programs[number] = step.lower(state, shared, ()).compile().as_text()
  print(json.dumps(programs))


@pytest.fixture(scope="module", params=support.SLOW)
def programs():
  return json.loads(support.on_fake_devices(__file__).splitlines()[-1])


def travelling(program: str) -> list[tuple[str, int]]:
  """(kind, numbers) of the result of every collective, those of asynchronous pairs once."""
  found = []
  for kind in KINDS:
    for line in re.findall(rf"= (.*?) {kind}(?:-start)?\(", program):
      for shape in re.findall(r"\w+\[([\d,]*)\]", line):
        found.append((kind, math.prod(int(n) for n in shape.split(",") if n)))
  return found


def test_a_larger_machine_sends_no_more_per_step(programs):
  """Weak scaling: the same collectives of the same sizes, whatever the devices and the batch."""
  sent = {number: sorted(travelling(programs[str(number)])) for number in DEVICES}
  assert sent[2] == sent[4] == sent[8]


def test_only_gradients_and_batch_statistics_travel(programs):
  model = backbones.ResNet(CLASSES, backbones.BACKBONES["resnet8"])
  images = jnp.zeros((1, SIZE, SIZE, 1))
  drawn = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
  size = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in drawn.items()}
  for number in DEVICES:
    sent = travelling(programs[str(number)])
    assert {kind for kind, _ in sent} == {"all-reduce"}
    # Statistics go forward and backward; a few scalars are the loss and the metrics.
    most = size["params"] + 2 * size["batch_stats"] + 8
    assert size["params"] <= sum(numbers for _, numbers in sent) <= most


if __name__ == "__main__":
  child()
