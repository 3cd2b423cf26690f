"""The programs that a run would dispatch, of data that need not be at hand."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from memdiff.errors import ConfigError

# --- data sets that are not at hand ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Numbers:
  """What is known of a data set's long tail without reading it."""

  images: int
  classes: int
  largest: int
  smallest: int
  test: int


LARGE = {  # (config.dataset.name, profile)
  ("imagenet2012", "list"): Numbers(115_846, 1000, 1280, 5, 50_000),
  ("i_naturalist2018", "natural"): Numbers(437_513, 8142, 1000, 2, 24_426),
}


def class_counts(numbers: Numbers) -> np.ndarray:
  """Images per class, [C]: smallest + (largest - smallest) (1 - c / (C - 1))^a, with the right sum.

  `a` is the smallest with which the sum does not exceed the number of images, to rounding; the few
  that are missing go one each to the classes after the first.
  """
  rest = 1 - np.arange(numbers.classes) / (numbers.classes - 1)

  def of(power):
    return (numbers.smallest + (numbers.largest - numbers.smallest) * rest**power).astype(np.int64)

  low, high = 0.0, 1000.0
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if of(middle).sum() > numbers.images else (low, middle)
  counts = of(high)
  counts[1 : 1 + numbers.images - counts.sum()] += 1
  return counts


class _Blank:
  """So many images, all of them black."""

  def __init__(self, number: int, size: int):
    self._number, self._image = number, Image.new("RGB", (size, size))

  def __len__(self) -> int:
    return self._number

  def __getitem__(self, index: int) -> Image.Image:
    return self._image


def _large_dataset(config: Any, numbers: Numbers):
  from input_pipeline.dataset import LongTailDataset
  from input_pipeline.lazy_images import LazyImages

  def images(number):
    return LazyImages(_Blank(number, config.image_size), config.image_size)

  labels = np.repeat(np.arange(numbers.classes, dtype=np.int32), class_counts(numbers))
  return LongTailDataset(
    name=config.name, class_names=tuple(map(str, range(numbers.classes))), profile=config.profile,
    imbalance=numbers.largest / numbers.smallest, split_sha256="",
    train_images=images(numbers.images), train_labels=labels,
    test_images=images(numbers.test), test_labels=np.resize(labels, numbers.test),
    holdout_images=images(0), holdout_labels=labels[:0],
    left_out_images=images(0), left_out_labels=labels[:0],
  )  # fmt: skip


def load(values: Mapping[str, Any]) -> tuple[Any, Any]:
  """(settings, data set) of a config's values, checked as a run checks them."""
  from memdiff import config as config_lib
  from memdiff import pipeline

  kind = pipeline.kind_of(values)
  settings = config_lib.build(kind.settings, values)
  if not hasattr(settings, "encoder"):
    raise ConfigError("Only experiments on images are compiled ahead of time, not embeddings.")
  numbers = LARGE.get((settings.dataset.name, settings.dataset.profile))
  data = _large_dataset(settings.dataset, numbers) if numbers else kind.load(settings.dataset)
  kind.check(settings, data)
  return settings, data


# --- the programs ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
  """What a phase dispatches, and the bank that it works on."""

  name: str
  lower: Callable[[], Any]  # () -> what can be compiled
  bank: Any  # shapes with shardings, or None


def _described(tree: Any, mesh: Any, sharding: Any = None) -> Any:
  """Shapes and dtypes with `sharding`, by default replicated."""
  import jax

  from memdiff.runtime import checkpoint
  from memdiff.runtime import mesh as mesh_lib

  sharding = sharding or mesh_lib.replicated(mesh)
  return checkpoint.abstract(tree, jax.tree.map(lambda _: sharding, tree))


def _stage_program(stage: Any, run: Any, bank: Any = None) -> Program:
  """A training stage's dispatch; its bank is the one in its state where `bank` is None."""
  import jax

  from memdiff.runtime import mesh as mesh_lib
  from memdiff.runtime import programs as stage_programs

  steps, seeds = run.config.steps_per_dispatch, len(run.seeds)
  state = stage_programs.abstract_state(stage, run)

  def stacked(x):
    """The batches of a dispatch, from one of them."""
    return mesh_lib.place_batches(run.mesh, np.broadcast_to(x, (seeds, steps, *x.shape)))

  def lower():
    alive, batches = mesh_lib.replicate(run.mesh, np.ones(seeds, bool)), None
    if stage.batches is not None:
      iterator = stage.batches(run.seeds[0], 0)
      batches = jax.tree.map(stacked, next(iterator))
      iterator.close()
    dispatch = stage_programs.make_dispatch(stage, run)
    count = mesh_lib.replicate(run.mesh, np.int32(steps))
    return dispatch.lower(state, alive, stage.shared, stage.per_seed, batches, count, at_most=steps)

  return Program(stage.name, lower, state.bank if bank is None else bank)


def _feature_runs(settings: Any, data: Any, mesh: Any) -> Any:
  """Shapes of the standardised training features of all seeds, their bank and the encoder's head.

  As `feature_space.make_runs` leaves them: everything on every device, the bank split by class.
  """
  import jax
  import jax.numpy as jnp

  from input_pipeline.batches import ByClass
  from memdiff.memory import feature_space, memory_bank
  from memdiff.memory.exemplars import Exemplars

  runs, classes, rows = len(settings.seeds), data.num_classes, len(data.train_labels)
  dim, slots = settings.encoder.feature_dim, settings.memory_bank.num_slots

  def make():
    whole, real = jnp.int32, jnp.float32
    by_class = ByClass(*(jnp.zeros((runs, n), whole) for n in (rows, classes, classes)))
    bank = memory_bank.create(classes, slots, dim)
    return feature_space.FeatureRuns(
      exemplars=Exemplars(
        jnp.zeros((runs, rows, dim), real), jnp.zeros((runs, rows), whole), by_class
      ),
      bank=jax.tree.map(lambda x: jnp.broadcast_to(x, (runs, *x.shape)), bank),
      standardizer=feature_space.Standardizer(*(jnp.zeros((runs, dim), real) for _ in range(3))),
      head={
        "kernel": jnp.zeros((runs, dim, classes), real), "bias": jnp.zeros((runs, classes), real)
      },
    )  # fmt: skip

  shapes = jax.eval_shape(make)
  by_class = feature_space.bank_sharding(classes, mesh)
  return _described(shapes, mesh).replace(bank=_described(shapes.bank, mesh, by_class))


def _classifiers(settings: Any, data: Any, run: Any) -> Iterator[Program]:
  from memdiff.classifier import encoder, encoder_training, losses

  shared = encoder.device_data(settings.encoder.input, data, run.mesh)
  for loss in encoder_training.trained_losses(settings.classifier):
    bank = settings.memory_bank if losses.LOSSES[loss].needs_bank else None
    recipe = encoder_training.Recipe(settings.classifier, settings.encoder, loss, bank)
    stage = encoder_training.make_stage(recipe, data, shared, run.mesh)
    yield _stage_program(stage, run)


def _on_features(settings: Any, data: Any, run: Any) -> Iterator[Program]:
  """The denoiser's training, the sampler, and the heads on what it makes."""
  import jax
  import jax.numpy as jnp

  from memdiff.classifier import heads
  from memdiff.runtime import programs as stage_programs
  from memdiff.runtime.random import base_keys
  from memdiff.synthesis import feature_diffusion, generators
  from memdiff.synthesis.memory_diffusion import MemoryDiffusion

  mesh, runs = run.mesh, _feature_runs(settings, data, run.mesh)
  per_seed = feature_diffusion.make_data(
    runs.exemplars.features, data.train_labels, runs.bank, data.num_classes,
    settings.diffusion.class_exponent, mesh,
  )  # fmt: skip
  diffusion = feature_diffusion.make_stage(settings.diffusion, per_seed, data.num_classes, mesh)
  yield _stage_program(diffusion, run, runs.bank)

  generator = MemoryDiffusion(settings.diffusion, settings.hallucination, data.num_classes)
  made = generators.plan(data.train_counts, settings.generators)
  strengths = generator.strengths

  def sample():
    dim = settings.encoder.feature_dim
    program = generators.sampling_program(
      generator, settings.generators.confidence, dim, tuple(made.tolist()), mesh
    )
    arguments = jax.eval_shape(lambda: (base_keys(run.seeds, "sample"), jnp.zeros(len(strengths))))
    learned = stage_programs.abstract_state(diffusion, run).ema_params
    return program.lower(*_described(arguments, mesh), runs, learned)

  yield Program("hallucination", sample, runs.bank)

  number, test = len(run.seeds), len(data.test_labels)
  dim, added = runs.exemplars.features.shape[-1], (number, len(strengths), int(made.sum()))
  shapes = _described(
    jax.eval_shape(
      lambda: {
        "added": heads.Added(
          jnp.zeros((*added, dim)), jnp.zeros(added), jnp.zeros(len(made), jnp.int32)
        ),
        "test_features": jnp.zeros((number, test, dim)),
        "test_labels": jnp.zeros((number, test), jnp.int32),
      }
    ),
    mesh,
  )
  learned_from = heads.HeadData(exemplars=runs.exemplars, start=runs.head, **shapes)
  # A stage is made of numbers; features stay shapes.
  small = (runs.exemplars.by_class, runs.head, learned_from.added.replace(features=()))
  by_class, start, trusted = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), small)
  begun_with = learned_from.replace(
    exemplars=runs.exemplars.replace(by_class=by_class), start=start, added=trusted
  )

  every = [
    heads.Setting(run=seed, seed=seed, stream=loss, loss=heads.trained_loss(loss))
    for loss in settings.head.losses
    for seed in range(len(run.seeds))
  ]
  stage = heads.make_stage("heads", settings.head.training, begun_with, every, mesh)
  stage = dataclasses.replace(stage, shared=learned_from)
  yield _stage_program(stage, dataclasses.replace(run, seeds=tuple(range(len(every)))))


def programs(settings: Any, data: Any, mesh: Any, parameters: str) -> Iterator[Program]:
  """Everything that a run of the settings dispatches more than a few times."""
  from benchmarks.training import make_run

  run = make_run(settings.seeds, mesh, settings.loop.steps_per_dispatch, parameters)
  run = dataclasses.replace(run, config=settings.loop)
  yield from _classifiers(settings, data, run)
  if settings.experiment == "memdiff":
    yield from _on_features(settings, data, run)
