"""The digits experiment, trained as far as benchmarks of feature diffusion need it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.training import Training
from configs.digits_lt import get_config
from input_pipeline import dataset as dataset_lib
from memdiff import config as config_lib
from memdiff.classifier import encoder, encoder_training
from memdiff.experiments.feature_settings import MemdiffConfig
from memdiff.memory import feature_space, memory_bank
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.loop import Stage
from memdiff.runtime.random import base_keys
from memdiff.synthesis import feature_diffusion, generators
from memdiff.synthesis.feature_diffusion import FeatureData


@dataclasses.dataclass(frozen=True)
class Workload:
  """The digits experiment, trained as far as this benchmark needs it."""

  config: MemdiffConfig
  data: dataset_lib.LongTailDataset
  mesh: Mesh
  per_seed: FeatureData  # standardised, leading axis of one seed
  left_out: np.ndarray  # [n, D] held-out real features, standardised
  labels: np.ndarray  # [M] what to sample: the tail classes filled up as the config has it

  @property
  def num_classes(self) -> int:
    return self.data.num_classes

  def one_run(self) -> FeatureData:
    return jax.tree.map(lambda x: x[0], self.per_seed)

  def bank(self) -> memory_bank.MemoryBank:
    return self.one_run().bank

  def denoiser_stage(self, num_seeds: int) -> Stage:
    """The diffusion stage of that many seeds, all on the same features."""
    per_seed = jax.tree.map(lambda x: jnp.repeat(x, num_seeds, axis=0), self.per_seed)
    per_seed = jax.device_put(per_seed, mesh_lib.replicated(self.mesh))
    return feature_diffusion.make_stage(
      self.config.diffusion, per_seed, self.num_classes, self.mesh
    )

  def encoder_stage(self) -> Stage:
    return make_encoder_stage(self.config, self.data, self.mesh)

  def denoiser(self):
    dim = self.per_seed.exemplars.features.shape[-1]
    return feature_diffusion.make_denoiser(self.config.diffusion, self.num_classes, dim)


def make_encoder_stage(config, data, mesh: Mesh) -> Stage:
  shared = encoder.device_data(config.encoder.input, data, mesh)
  recipe = encoder_training.Recipe(
    config.classifier, config.encoder, config.classifier.loss, config.memory_bank
  )
  return encoder_training.make_stage(recipe, data, shared, mesh)


def prepare(encoder_steps: int) -> tuple[Workload, Training]:
  """Loads digits, trains the encoder and fills the bank, as the pipeline does.

  Returns:
    The workload, and the training of the encoder, for more of it.
  """
  config = config_lib.build(MemdiffConfig, get_config("full").to_dict())
  data, mesh = dataset_lib.load(config.dataset), mesh_lib.make_mesh()
  stage = make_encoder_stage(config, data, mesh)
  training = Training(stage, (0,), mesh, steps=25)
  training.train_until(encoder_steps)
  model = encoder.make_model(config.encoder, config.classifier.loss, data.num_classes)

  @jax.jit
  def encode_chunk(images):
    images = encoder.normalize(config.encoder.input, images, stage.shared)
    return jax.vmap(lambda s: encoder.apply_eval(model, s, images)[1])(training.state)

  train = feature_space.encode(encode_chunk, data.train_images, mesh)
  left_out = feature_space.encode(encode_chunk, data.left_out_images, mesh)
  labels = np.asarray(data.train_labels)[None]
  keys = base_keys((0,), "memory_bank")
  bank = feature_space.fill_bank(train, labels, data.num_classes, keys, config.memory_bank, mesh)
  runs = feature_space.make_runs(train, labels, bank, None, data.num_classes, mesh)
  standardize = jax.vmap(lambda s, x: s.forward(x))
  numbers = generators.plan(data.train_counts, config.generators)
  work = Workload(
    config=config,
    data=data,
    mesh=mesh,
    per_seed=feature_diffusion.make_data(
      runs.exemplars.features,
      labels,
      runs.bank,
      data.num_classes,
      config.diffusion.class_exponent,
      mesh,
    ),
    left_out=np.asarray(standardize(runs.standardizer, left_out))[0],
    labels=np.repeat(np.arange(data.num_classes), numbers).astype(np.int32),
  )
  return work, training
