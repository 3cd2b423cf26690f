"""Joint training: encoder and head learn from real images and hallucinated features together.

The encoder is trained from scratch in rounds. The first sees real images only. Before each further
round the class means of the bank, which follows the encoder, are held against those for which the
synthetic features were made: if they have moved far, all is made anew (features, bank, denoiser,
samples); in between, synthetic features move along with their class mean. They enter at the head,
at first with little weight; a gradient reaches the encoder from real images alone.

`real` goes through the same rounds without synthetic features: the control. Its first round is
shared, so that seeds are paired. Generated images of a file may stand beside the real ones of all
rounds, the control's included.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.dataset import LongTailDataset
from memdiff.classifier import added, added_images, encoder, encoder_training, heads
from memdiff.classifier.added import AddedRows, Pool
from memdiff.classifier.added_images import AddedImagesConfig, ImagePool
from memdiff.classifier.encoder_training import Recipe
from memdiff.config import above, at_least, between, one_of, path_setting, setting, some_of
from memdiff.errors import ConfigError
from memdiff.experiments import feature_store
from memdiff.experiments.base import Experiment, forward_images
from memdiff.memory import feature_space
from memdiff.runtime import loop, results
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.workdir import read_arrays, write_arrays, writing
from memdiff.synthesis import generators, image_pool
from memdiff.synthesis.generators import GENERATORS, SynthesisSettings

REAL = "real"


@dataclasses.dataclass(frozen=True)
class JointConfig:
  """How encoder and head are trained together; no generators: not at all."""

  generators: tuple[str, ...] = setting(
    (),
    "real (the control) and any of generators.names; (): no joint training",
    some_of((REAL, *GENERATORS)),
  )
  loss: str = setting(
    "balanced_softmax", "what is minimised; csl with head.training's beta", one_of(heads.TRAINED)
  )
  counts: str = setting(
    "real",
    "of the classes, for prior and gamma; effective adds trusted synthetic features",
    one_of(heads.GAMMA_COUNTS),
  )
  num_rounds: int = setting(4, "of equal length; the first sees images only", at_least(2))
  ramp: float = setting(
    0.5, "share of the other rounds over which synthetic features gain weight", between(0, 1)
  )
  refresh_drift: float = setting(
    0.1, "shift of the class means, over their spread, that asks for new features", at_least(0)
  )
  added_batch_size: int = setting(
    64, "synthetic features beside classifier.batch_size images", at_least(1)
  )
  images: str = path_setting(
    'generated images beside the real ones, a file of memdiff.synthesis.image_pool; "": none'
  )
  images_share: float = setting(1.0, "generated images for each real one of a batch", above(0))

  @property
  def added_images(self) -> AddedImagesConfig | None:
    return AddedImagesConfig(share=self.images_share) if self.images else None


def make_stage(
  experiment: Experiment, name: str, first: int, last: int, start: Any, pool: Pool | None
) -> loop.Stage:
  """The training of classifiers from step `first` to `last`, perhaps with synthetic features.

  Args:
    experiment: the experiment.
    name: of the stage.
    first, last: steps.
    start: the state at `first`, seeds leading; None: a new one.
    pool: synthetic features, seeds leading; None: none.
  """
  shared = encoder.device_data(experiment.config.encoder.input, experiment.dataset, experiment.mesh)
  stage = encoder_training.make_stage(
    recipe(experiment), experiment.dataset, shared, experiment.mesh
  )
  return dataclasses.replace(
    stage,
    name=name,
    num_steps=last - first,
    init=stage.init if start is None else _resume,
    per_seed={"start": start, "pool": pool} | _images(experiment),
    result=(),  # the state goes from round to round
  )


def _images(experiment: Experiment) -> dict[str, ImagePool]:
  """The generated images beside the real ones, the same for all seeds; {} if there are none."""
  path, data = experiment.config.joint.images, experiment.dataset
  if not path:
    return {}
  found, number = image_pool.read(path, data), len(data.train_labels)
  pool = added_images.make_pool(
    found.images,
    found.labels,
    np.maximum(found.confidence, added_images.LEAST_TRUST),
    len(found.labels),
    np.arange(number),
    num_train=number,
  )
  return {"images": mesh_lib.replicate(experiment.mesh, added_images.stack_pools(
    [pool] * len(experiment.seeds)
  ))}  # fmt: skip


def _resume(_, per_seed: Any) -> Any:
  return jax.tree.map(jnp.copy, per_seed["start"])  # the state is donated


def recipe(experiment: Experiment) -> Recipe:
  """The classifier's own recipe, with a bank, synthetic features and the head stage's csl."""
  config = experiment.config
  limits = round_limits(config.joint, _num_steps(experiment))
  parameters = dataclasses.replace(
    config.classifier.loss_parameters,
    beta=config.head.training.beta,
    defer=config.head.training.defer,
  )
  return Recipe(
    classifier=dataclasses.replace(config.classifier, loss_parameters=parameters),
    encoder=config.encoder,
    loss=config.joint.loss,
    bank=config.memory_bank,
    images=config.joint.added_images,
    added=AddedRows(
      batch_size=config.joint.added_batch_size,
      counts=config.joint.counts,
      first_step=limits[1],
      ramp=config.joint.ramp,
    ),
  )


def _num_steps(experiment: Experiment) -> int:
  """Of the whole training."""
  return experiment.config.classifier.num_steps(len(experiment.dataset.train_labels))


def round_limits(config: JointConfig, num_steps: int) -> list[int]:
  """The steps at which rounds begin, and the last one."""
  return np.linspace(0, num_steps, config.num_rounds + 1).round().astype(int).tolist()


def make_pool(
  experiment: Experiment,
  settings: SynthesisSettings,
  generator: str,
  state: Any,
  round_number: int,
) -> Pool:
  """Synthetic features of the encoders as they are now, seeds leading; trains what it takes."""
  name = f"generator_{round_number}"
  run = dataclasses.replace(experiment.run, streams=f"{name}/")  # every refresh draws anew
  folder = experiment.workdir.folder("joint") / generator / name
  loss, labels = experiment.config.joint.loss, experiment.dataset.train_labels
  _, features = forward_images(experiment, loss, state, experiment.dataset.train_images)
  labels = np.broadcast_to(labels, features.shape[:2])
  bank = feature_space.fill_bank(
    features,
    labels,
    experiment.dataset.num_classes,
    run.keys("memory_bank"),
    experiment.config.memory_bank,
    experiment.mesh,
  )
  head = mesh_lib.fetch(state.params["head"])
  runs = feature_space.make_runs(
    features, labels, bank, head, experiment.dataset.num_classes, experiment.mesh
  )
  runs = feature_store.with_class_embeddings(experiment, runs)
  generators.train(generator, settings, runs, run, folder, f"{generator}/{name}")
  numbers = settings.numbers(generator, experiment.dataset.train_counts)
  strength = settings.generator(generator).strengths[0]
  synthetic = generators.make(generator, settings, runs, run, folder, numbers, [strength])
  backward = jax.jit(jax.vmap(lambda s, x: s.backward(x)))
  labels_of_seeds = np.broadcast_to(synthetic.labels, synthetic.confidence[:, 0].shape)
  prototype = state.bank.prototype[:, : experiment.dataset.num_classes]
  return Pool(
    features=backward(runs.standardizer, synthetic.features[:, 0]),
    confidence=synthetic.confidence[:, 0],
    labels=mesh_lib.replicate(experiment.mesh, labels_of_seeds),
    prototype=jnp.copy(prototype),  # the state is donated
  )


def train(
  experiment: Experiment, settings: SynthesisSettings, generator: str
) -> tuple[Any, list[float]]:
  """Goes through all rounds with a generator, or with REAL.

  Returns:
    (final state, seeds leading; the drift at the beginning of every round but the first two).
  """
  config, folder = experiment.config.joint, experiment.workdir.folder("joint")
  limits = round_limits(config, _num_steps(experiment))
  state, pool, drifts = None, None, []
  for number, (first, last) in enumerate(itertools.pairwise(limits)):
    name = "shared" if number == 0 else generator
    if number > 0 and generator != REAL:
      if pool is not None:
        drifts.append(float(jax.jit(jax.vmap(added.drift))(state.bank, pool).mean()))
      if pool is None or drifts[-1] > config.refresh_drift:
        pool = make_pool(experiment, settings, generator, state, number)
    stage = make_stage(experiment, f"joint/{name}/round_{number}", first, last, state, pool)
    state = loop.train(stage, experiment.run, folder / name / f"round_{number}")
  return state, drifts


def train_all(experiment: Experiment, settings: SynthesisSettings) -> dict:
  """Trains with every generator; keeps the classifiers, and what they say of the test images.

  Returns:
    generator -> metrics, for the manifest.
  """
  config, logits, summary = experiment.config.joint, {}, {}
  for generator in config.generators:
    state, drifts = train(experiment, settings, generator)
    folder = experiment.workdir.folder("joint") / generator
    with writing(folder):
      folder.mkdir(parents=True, exist_ok=True)  # `shared` holds what all have in common
    results.save(folder, state, ("params", "model_state"))
    logits[generator], _ = forward_images(
      experiment, config.loss, state, experiment.dataset.test_images
    )
    refreshed = sum(d > config.refresh_drift for d in drifts) + 1
    summary[generator] = {} if generator == REAL else {"drift": drifts, "made": refreshed}
  if logits:
    write_arrays(experiment.workdir.folder("joint") / "logits.npz", logits)
  return summary


def load_logits(experiment: Experiment) -> dict[str, np.ndarray]:
  """generator -> [S, T, C] on the test images; empty if nothing was trained jointly."""
  config = getattr(experiment.config, "joint", None)
  if config is None or not config.generators:
    return {}
  return read_arrays(experiment.workdir.folder("joint") / "logits.npz")


def check(config: Any, data: LongTailDataset) -> None:
  """Raises MemdiffError if joint training does not fit the other settings or the images."""
  if not config.joint.generators:
    return
  backbone = config.encoder.backbone
  for wrong, words in (
    (data.streamed, "the data set is streamed from disk, not held in memory"),
    (config.classifier.num_epochs == 0, "config.classifier.num_epochs is 0"),
    (config.classifier.augment.mixup > 0, "config.classifier.augment.mixup is not 0"),
    (backbone.taps, "config.encoder.backbone.taps are features that no head sees"),
    (backbone.head == "cosine", "config.encoder.backbone.head is cosine, not linear"),
  ):
    if wrong:
      raise ConfigError(
        f"config.joint.generators is {config.joint.generators}, but {words}; set it to ()."
      )
  if config.joint.images:
    image_pool.read(config.joint.images, data)
