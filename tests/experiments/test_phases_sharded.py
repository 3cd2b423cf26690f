"""Every training step and the sampler on one and on eight fake devices: the same numbers."""

import dataclasses
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import support

DEVICES = (1, 8)
STEPS, BATCH, MADE, DIM = 3, 32, 4, 64
PHASES = ("classifier", "bank", "diffusion", "sampler", "heads", "joint", "joint_bank")
pytestmark = pytest.mark.slow


def settings_and_data():
  from configs import digits_lt
  from input_pipeline import dataset as dataset_lib
  from memdiff import config as config_lib
  from memdiff.experiments.feature_settings import MemdiffConfig

  config = digits_lt.get_config("smoke")
  config.classifier.batch_size = config.diffusion.batch_size = BATCH
  config.head.training.batch_size = config.hallucination.chunk_size = BATCH
  # Adam divides gradients near zero by their own size, and so shows in what order they were added.
  for part in (config.classifier, config.diffusion, config.head.training):
    part.optimizer.name = "sgd"
    part.optimizer.learning_rate = 0.05
  settings = config_lib.build(MemdiffConfig, config.to_dict())
  return settings, dataset_lib.load(settings.dataset)


def steps_of(stage, settings, mesh):
  """The state after a few steps and the metrics of every step."""
  from benchmarks.training import Training

  return Training(stage, settings.seeds, mesh, STEPS)()


def train_classifier(settings, data, mesh):
  from memdiff.classifier import encoder, encoder_training
  from memdiff.classifier.encoder_training import Recipe

  shared = encoder.device_data(settings.encoder.input, data, mesh)
  recipe = Recipe(settings.classifier, settings.encoder, "csl", settings.memory_bank)
  stage = encoder_training.make_stage(recipe, data, shared, mesh)
  state, metrics = steps_of(stage, settings, mesh)
  return {"classifier": (state.params, metrics), "bank": state.bank}


def make_runs(settings, data, mesh):
  """Of made features, the same on any number of devices."""
  from memdiff.memory import feature_space
  from memdiff.runtime.random import base_keys

  rng, labels = np.random.default_rng(0), data.train_labels
  centres = rng.normal(size=(data.num_classes, DIM))
  shape = (len(settings.seeds), len(labels), DIM)
  features = np.asarray(centres[labels] + rng.normal(size=shape), np.float32)
  labels = np.broadcast_to(labels, shape[:2])
  keys = base_keys(settings.seeds, "memory_bank")
  bank = feature_space.fill_bank(
    features, labels, data.num_classes, keys, settings.memory_bank, mesh
  )
  return feature_space.make_runs(features, labels, bank, None, data.num_classes, mesh)


def train_on_features(settings, data, mesh):
  """The denoiser, what a new one samples, and heads on real and made features."""
  from memdiff.classifier import heads
  from memdiff.runtime import mesh as mesh_lib
  from memdiff.runtime.random import base_keys
  from memdiff.synthesis import feature_diffusion, generators
  from memdiff.synthesis.memory_diffusion import MemoryDiffusion

  runs = make_runs(settings, data, mesh)
  own = feature_diffusion.make_data(
    runs.exemplars.features, data.train_labels, runs.bank, data.num_classes,
    settings.diffusion.class_exponent, mesh,
  )  # fmt: skip
  stage = feature_diffusion.make_stage(settings.diffusion, own, data.num_classes, mesh)
  state, metrics = steps_of(stage, settings, mesh)

  generator = MemoryDiffusion(settings.diffusion, settings.hallucination, data.num_classes)
  labels = np.repeat(np.arange(data.num_classes, dtype=np.int32), MADE)
  program = generators.sampling_program(
    generator, settings.generators.confidence, DIM, (MADE,) * data.num_classes, mesh
  )
  strengths = generator.strengths
  features, confidence = program(
    base_keys(settings.seeds, "sample"), jnp.asarray(strengths, jnp.float32), runs, state.ema_params
  )

  rng = np.random.default_rng(1)
  made = np.asarray(rng.normal(size=(len(settings.seeds), 1, len(labels), DIM)), np.float32)
  test = np.asarray(rng.normal(size=(len(settings.seeds), 40, DIM)), np.float32)
  head_data = heads.HeadData(
    exemplars=runs.exemplars,
    added=heads.Added(
      mesh_lib.replicate(mesh, made),
      mesh_lib.replicate(mesh, np.full(made.shape[:3], 0.5, np.float32)),
      mesh_lib.replicate(mesh, np.full(data.num_classes, MADE, np.int32)),
    ),
    start=runs.head,
    test_features=mesh_lib.replicate(mesh, test),
    test_labels=mesh_lib.replicate(mesh, np.arange(40, dtype=np.int32)[None] % 10),
  )
  every = [
    heads.Setting(run=n, seed=n, stream="heads", loss="csl") for n in range(len(settings.seeds))
  ]
  stage = heads.make_stage("heads", settings.head.training, head_data, every, mesh)
  head_state, head_metrics = steps_of(stage, settings, mesh)
  return {
    "diffusion": (state.params, state.ema_params, metrics),
    "sampler": (features, confidence),
    "heads": (head_state.params, head_metrics),
  }


def train_jointly(settings, data, mesh):
  """A second round, with hallucinated features."""
  from memdiff.classifier.added import Pool
  from memdiff.experiments import joint
  from memdiff.runtime import mesh as mesh_lib

  rng, seeds = np.random.default_rng(2), len(settings.seeds)
  labels = np.tile(np.repeat(np.arange(5, 10, dtype=np.int32), MADE), (seeds, 1))
  pool = Pool(
    features=np.abs(rng.normal(size=(*labels.shape, DIM))).astype(np.float32),
    confidence=np.full(labels.shape, 0.7, np.float32),
    labels=labels,
    prototype=np.abs(rng.normal(size=(seeds, data.num_classes, DIM))).astype(np.float32),
  )
  settings = dataclasses.replace(settings, joint=dataclasses.replace(settings.joint, loss="csl"))
  e = SimpleNamespace(config=settings, dataset=data, mesh=mesh, seeds=settings.seeds)
  first, _ = steps_of(joint.make_stage(e, "first", 0, STEPS, None, None), settings, mesh)
  pool = mesh_lib.replicate(mesh, pool)
  stage = joint.make_stage(e, "second", STEPS, 2 * STEPS, first, pool)
  state, metrics = steps_of(stage, settings, mesh)
  return {"joint": (state.params, metrics), "joint_bank": state.bank}


def child(out: str) -> None:
  """Runs where eight fake devices are; saves what every phase gives by number of devices."""
  from memdiff.runtime import mesh as mesh_lib

  jax.config.update("jax_disable_most_optimizations", True)
  settings, data = settings_and_data()
  found = {}
  for number in DEVICES:
    mesh = mesh_lib.make_mesh(jax.devices()[:number])
    for part in (train_classifier, train_on_features, train_jointly):
      for phase, tree in part(settings, data, mesh).items():
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        assert all(len(x.sharding.device_set) == number for _, x in leaves), phase
        found |= {
          f"{number}/{phase}/{jax.tree_util.keystr(path)}": np.asarray(x) for path, x in leaves
        }
  np.savez(out, **found)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  """number of devices -> phase -> name -> array."""
  out = tmp_path_factory.mktemp("phases") / "arrays.npz"
  support.on_fake_devices(__file__, str(out))
  nested = {number: {phase: {} for phase in PHASES} for number in DEVICES}
  with np.load(out, allow_pickle=False) as arrays:
    for key, array in arrays.items():
      number, phase, name = key.split("/", 2)
      nested[int(number)][phase][name] = array
  return nested


@pytest.mark.parametrize("phase", PHASES)
def test_the_number_of_devices_changes_nothing(found, phase):
  one, several = found[1][phase], found[8][phase]
  assert one and set(one) == set(several)
  for name, array in one.items():
    np.testing.assert_allclose(several[name], array, rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("phase", PHASES)
def test_seeds_and_numbers_are_there(found, phase):
  for name, array in found[1][phase].items():
    assert array.shape[0] in (2, STEPS), name
    if array.dtype.kind == "f":
      assert np.isfinite(array).all(), name


if __name__ == "__main__":
  child(sys.argv[1])
