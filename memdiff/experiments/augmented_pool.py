"""Pools of images that classifiers are trained on beside the real ones: drawn, looked at, chosen.

Every run, a seed or a fold of cross-validation, has pools of its own: its U-Net and the classifier
that filters have seen no image but those it trains on.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import numpy as np

from input_pipeline import identity
from input_pipeline.dataset import LongTailDataset
from memdiff.classifier import added_images
from memdiff.classifier.added_images import AddedImagesConfig
from memdiff.evaluation import image_quality
from memdiff.experiments import prompting, text_to_image
from memdiff.experiments.augmented_critic import Critic, make_critic, make_judge, real_features
from memdiff.experiments.augmented_runs import (
  Part,
  lacking_to,
  part_of,
  parts,
  pool_path,
  save,
  wanted,
)
from memdiff.experiments.augmented_settings import (
  AFFINE,
  ELASTIC,
  ORACLE,
  OVERSAMPLING,
  TEXT_TO_IMAGE,
  UNSEEN,
  Row,
)
from memdiff.experiments.base import Experiment
from memdiff.experiments.drawer import Drawer, chunks, class_directions, most_alike
from memdiff.experiments.image_store import (
  device_data,
  load_unet,
  read_drawn,
)
from memdiff.runtime import mesh as mesh_lib
from memdiff.runtime.workdir import read_arrays
from memdiff.synthesis import (
  image_filters,
  image_methods,
  image_pool,
  pixel_augmentation,
  pixel_data,
)
from memdiff.synthesis.image_filters import Limits, Signs

_SAMPLE = 500  # images by which the strength of moves is found


def pool_size(experiment: Experiment) -> int:
  """Places of a pool, enough for any run."""
  return max(int(wanted(experiment, part).sum(axis=1).max()) for part in parts(experiment))


# --- drawing ---------------------------------------------------------------------------------


def sample_pools(experiment: Experiment) -> dict:
  """Draws the images of every method and run, chunk by chunk; those that are there are kept."""
  config, progress, total = experiment.config, experiment.run.progress, 0
  work = [
    (part, method, run)
    for part in parts(experiment)
    for method in config.methods
    for run in range(len(part.run.seeds))
  ]
  progress.start_stage(0)
  for number, (part, method, run) in enumerate(work, 1):
    numbers = np.ceil(config.pool.surplus * wanted(experiment, part)[run]).astype(int)
    labels = np.repeat(np.arange(len(numbers)), numbers)
    _draw_run(experiment, part, method, run, labels)
    total += len(labels)
    progress.step(f"drawing {method}", number, len(work), {})
  return {"images": total}


def _draw_run(
  experiment: Experiment, part: Part, method: str, run: int, labels: np.ndarray
) -> None:
  config, drawer = experiment.config, None
  folder = experiment.workdir.folder("sampling") / part.name / method / f"run_{run}"
  for chunk in chunks(labels, config.sampling.chunk_size):
    experiment.run.preemption.check(f"while drawing {method}")
    path = folder / f"{chunk.start:06d}.npz"
    if not path.exists():
      drawer = drawer or _drawer(experiment, part, method, run)
      save(path, drawer.draw(chunk, config.pool.guidance))


def _drawer(experiment: Experiment, part: Part, method: str, run: int) -> Drawer:
  data, config = experiment.dataset, experiment.config
  diffusion = image_methods.apply(method, config.diffusion)
  seen = pixel_data.make_parts(
    diffusion.class_exponent,
    data.train_labels,
    part.rows[run : run + 1],
    data.num_classes,
    experiment.mesh,
  )
  rows, sampling = part.rows_of(run), image_methods.apply_drawing(method, config.sampling)
  features = functools.cache(lambda: real_features(experiment, part, run))
  alike = None
  if sampling.guide.needs_negative:
    alike = most_alike(class_directions(features(), data.train_labels[rows], data.num_classes))
  of_run = jax.tree.map(lambda x: x[0], seen).of(device_data(experiment))
  folder = experiment.workdir.folder("diffusion") / part.name
  params = load_unet(folder, method, config.diffusion.tuning, run, experiment.mesh)
  return Drawer(
    config=diffusion,
    sampling=sampling,
    data=of_run,
    mesh=experiment.mesh,
    params=params,
    seed=part.noise_seed(run),
    key=part.run.keys("exemplars")[run],
    prompts=(
      prompting.learned_prompts(experiment, params, rows)
      or prompting.make_prompts(experiment, method, rows, features)
    ),
    alike=alike,
    judge=make_judge(experiment, part, run) if sampling.seeds.iterations else None,
  )


# --- looking ---------------------------------------------------------------------------------


def look_at_pools(experiment: Experiment) -> dict:
  """Writes every pool with what is known of its images."""
  if experiment.config.pool.needs_limits:
    _look_at_held_out(experiment)
  summary = {}
  for part in parts(experiment):
    for run in range(len(part.run.seeds)):
      critic = make_critic(experiment, part, run)
      for source in experiment.config.sources:
        path = pool_path(experiment, part, source, run)
        if not path.exists():
          save(path, _described(experiment, part, source, run, critic))
        signs = signs_of(experiment, part, source, run)
        right = float((signs.predicted == signs.labels).mean())
        summary.setdefault(f"{part.name}/{source}", {"right": []})["right"].append(right)
      for move in experiment.config.controls:
        if move in _MOVES:
          _write_moved(experiment, part, run, move)
  return summary


def _described(
  experiment: Experiment, part: Part, source: str, run: int, critic: Critic
) -> dict[str, np.ndarray]:
  """The images of one run, where each comes from, and what the critic says of it."""
  data, path = experiment.dataset, experiment.config.pool.path_of.get(source)
  rows = part.rows_of(run)
  if path is None:
    asked = source == TEXT_TO_IMAGE
    folder = experiment.workdir.folder("sampling") / part.name / source / f"run_{run}"
    folder = text_to_image.folder(experiment) if asked else folder
    drawn = read_drawn(folder)
    images, labels = drawn["images"], drawn["labels"]
    config = experiment.config
    seed = config.text_to_image.seed if asked else part.run.seeds[run]
    scale = config.text_to_image.guidance if asked else config.pool.guidance
    origin = {"seed": np.array(seed), "guidance": np.array(scale)}
    if "prompt" in drawn:
      origin["prompt"] = drawn["prompt"]
    learned_from = text_to_image.learned_from(experiment) if asked else rows
  else:
    found = image_pool.read(path, data)
    images, labels, learned_from = found.images, found.labels, found.learned_from
    origin = {"file_sha256": np.array(identity.of_file(path))}
  near = image_quality.nearest(images, data.train_images[rows])
  signs = critic.look(images, labels, near.copied)
  arrays = {name: value for name, value in vars(signs).items() if value is not None}
  about = image_pool.provenance(data.class_names, learned_from, data.split_sha256)
  return (
    about
    | arrays
    | origin
    | {
      "images": images,
      "method": np.array(source),
      "nearest_index": rows[near.index],
      "nearest_distance": near.distance,
    }
  )


def _signs(arrays: Mapping[str, np.ndarray]) -> Signs:
  return Signs(**{field.name: arrays.get(field.name) for field in dataclasses.fields(Signs)})


def signs_of(experiment: Experiment, part: Part, method: str, run: int) -> Signs:
  """What is known of the images of a method and run."""
  names = [field.name for field in dataclasses.fields(Signs)]
  if not experiment.config.pool.needs_second:
    names.remove("second")
  return _signs(read_arrays(pool_path(experiment, part, method, run), names))


def _held_out_path(experiment: Experiment):
  return experiment.workdir.folder("pool") / "held_out.npz"


def _look_at_held_out(experiment: Experiment) -> None:
  """What the folds' critics say of the images that their fold holds out."""
  if _held_out_path(experiment).exists():
    return
  part, data, found = part_of(experiment, "folds"), experiment.dataset, []
  for run, held in enumerate(part.held_out):
    rows = held[held >= 0]
    nothing = np.zeros(len(rows), bool)
    signs = make_critic(experiment, part, run).look(
      data.train_images[rows], data.train_labels[rows], nothing
    )
    found.append({"confidence": signs.confidence, "distance": signs.distance, "example": rows})
  together = {name: np.concatenate([f[name] for f in found]) for name in found[0]}
  save(_held_out_path(experiment), together)


def limits_of(experiment: Experiment, part: Part, run: int) -> Limits | None:
  """The limits of a run's filters, from held-out images that are not judged in it."""
  if not experiment.config.pool.needs_limits:
    return None
  arrays = read_arrays(_held_out_path(experiment))
  if part.held_out is not None:
    others = ~np.isin(arrays["example"], part.held_out[run])
    arrays = {name: values[others] for name, values in arrays.items()}
  labels = experiment.dataset.train_labels[arrays["example"]]
  return image_filters.limits(
    arrays["confidence"], arrays["distance"], labels, experiment.config.pool.rejected
  )


# --- choosing --------------------------------------------------------------------------------


def kept(experiment: Experiment, part: Part, row: Row, run: int):
  """(the pool's arrays, indices of the images that are used), the first that pass, per class."""
  arrays = read_arrays(pool_path(experiment, part, row.source, run))
  signs = _signs(arrays)
  passed = image_filters.keep(row.filter, signs, limits_of(experiment, part, run))
  return arrays, first_of_class(signs.labels, passed, wanted(experiment, part)[run])


def first_of_class(labels: np.ndarray, passed: np.ndarray, numbers: np.ndarray) -> np.ndarray:
  """Indices of the first rows that passed, `numbers` [C] of each class at most."""
  chosen = [
    np.flatnonzero(passed & (labels == c))[:number] for c, number in enumerate(numbers) if number
  ]
  return np.concatenate(chosen) if chosen else np.zeros(0, int)


def pools(experiment: Experiment, part: Part, row: Row) -> added_images.ImagePool:
  """Of every run, their axis first, on the devices."""
  size, data = pool_size(experiment), experiment.dataset
  made = []
  for run in range(len(part.run.seeds)):
    if row.source in experiment.config.sources:
      arrays, index = kept(experiment, part, row, run)
      chosen = [arrays[name][index] for name in ("images", "labels", "confidence")]
      chosen[2] = np.maximum(chosen[2], added_images.LEAST_TRUST)
      if not len(index):
        experiment.run.progress.say(
          f"{row.name}: the filter keeps none of {len(arrays['labels']):,} images, so that this row"
          " trains on real ones alone"
        )
    else:
      images, labels = _REUSED[row.source](experiment, part, run)
      chosen = [images, labels, np.ones(len(labels))]
    rows = part.rows_of(run)
    places = max(size, len(chosen[1])) if row.reference else size
    made.append(added_images.make_pool(*chosen, places, rows, num_train=len(data.train_labels)))
  return mesh_lib.replicate(experiment.mesh, added_images.stack_pools(made))


def _copies(experiment: Experiment, part: Part, run: int) -> tuple[np.ndarray, np.ndarray]:
  """Training images of the run, every one of a class as often as any other."""
  data, numbers = experiment.dataset, wanted(experiment, part)[run]
  rows = part.rows_of(run)
  index = np.concatenate(
    [np.resize(rows[data.train_labels[rows] == c], number) for c, number in enumerate(numbers)]
  )
  return data.train_images[index], data.train_labels[index]


def _unseen(experiment: Experiment, part: Part, run: int) -> tuple[np.ndarray, np.ndarray]:
  return _left_out(experiment.dataset, wanted(experiment, part)[run])


def _oracle(experiment: Experiment, part: Part, run: int) -> tuple[np.ndarray, np.ndarray]:
  largest = int(experiment.dataset.train_counts.max())
  return _left_out(experiment.dataset, lacking_to(experiment, part, largest)[run])


def _left_out(data: LongTailDataset, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Images that the long tail left out, `numbers` [C] of each class at most."""
  every = np.ones(len(data.left_out_labels), bool)
  index = first_of_class(data.left_out_labels, every, numbers)
  return data.left_out_images[index], data.left_out_labels[index]


_MOVES = {AFFINE: pixel_augmentation.affine, ELASTIC: pixel_augmentation.elastic}


@functools.partial(jax.jit, static_argnums=0)
def _move(name: str, key: jax.Array, images: jax.Array, strength: jax.Array) -> jax.Array:
  moved = _MOVES[name](key, pixel_data.to_model(images), strength)
  return pixel_data.to_pixels(moved)


def _write_moved(experiment: Experiment, part: Part, run: int, move: str) -> None:
  """Copies that are moved as far as the first source's images lie from the training images."""
  path = pool_path(experiment, part, move, run)
  if not path.exists():
    images, labels = _copies(experiment, part, run)
    strength = _strength(experiment, part, run, move)
    moved = _move(move, part.run.keys(move)[run], images, np.float32(strength))
    save(path, {"images": np.asarray(moved), "labels": labels, "strength": np.array(strength)})


def _moved(
  experiment: Experiment, part: Part, run: int, move: str
) -> tuple[np.ndarray, np.ndarray]:
  arrays = read_arrays(pool_path(experiment, part, move, run), ("images", "labels"))
  return arrays["images"], arrays["labels"]


def _strength(experiment: Experiment, part: Part, run: int, move: str) -> float:
  """The strength that moves copies as far from training images as those of the first source lie.

  At most 4: beyond, little of an image is left.
  """
  first = experiment.config.sources[0]
  target = read_arrays(pool_path(experiment, part, first, run))["nearest_distance"].mean()
  images, _ = _copies(experiment, part, run)
  some = images[np.linspace(0, len(images) - 1, min(len(images), _SAMPLE)).astype(int)]
  rows = part.rows_of(run)
  train, key, low, high = experiment.dataset.train_images[rows], part.run.keys(move)[run], 0, 4
  for _ in range(8):
    middle = (low + high) / 2
    moved = np.asarray(_move(move, key, some, np.float32(middle)))
    below = image_quality.nearest(moved, train).distance.mean() < target
    low, high = (middle, high) if below else (low, middle)
  return high


_REUSED = {
  OVERSAMPLING: _copies,
  AFFINE: functools.partial(_moved, move=AFFINE),
  ELASTIC: functools.partial(_moved, move=ELASTIC),
  UNSEEN: _unseen,
  ORACLE: _oracle,
}


def effective_counts(
  config: AddedImagesConfig, real: np.ndarray, pool: added_images.ImagePool, batch_size: int
) -> np.ndarray:
  """Images of the classes with generated ones, at the end of a training. [R, C]."""
  weight = np.float32(config.weight)

  def of_run(real, pool):
    return added_images.effective_counts(config, real, pool, weight, batch_size)

  return mesh_lib.fetch(jax.vmap(of_run)(real, pool))
