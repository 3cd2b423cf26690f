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
  FoldOrSeed,
  Part,
  lacking_to,
  members,
  part_of,
  parts,
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
    (method, fold_or_seed)
    for part in parts(experiment)
    for method in config.methods
    for fold_or_seed in members(experiment, part)
  ]
  progress.start_stage(0)
  for number, (method, fold_or_seed) in enumerate(work, 1):
    numbers = np.ceil(config.pool.surplus * fold_or_seed.wanted).astype(int)
    labels = np.repeat(np.arange(len(numbers)), numbers)
    _draw(fold_or_seed, method, labels)
    total += len(labels)
    progress.step(f"drawing {method}", number, len(work), {})
  return {"images": total}


def _draw(fold_or_seed: FoldOrSeed, method: str, labels: np.ndarray) -> None:
  experiment, drawer = fold_or_seed.experiment, None
  for chunk in chunks(labels, experiment.config.sampling.chunk_size):
    experiment.run.preemption.check(f"while drawing {method}")
    path = fold_or_seed.drawn_folder(method) / f"{chunk.start:06d}.npz"
    if not path.exists():
      drawer = drawer or _drawer(fold_or_seed, method)
      save(path, drawer.draw(chunk, experiment.config.pool.guidance))


def _drawer(fold_or_seed: FoldOrSeed, method: str) -> Drawer:
  experiment, part, rows = fold_or_seed.experiment, fold_or_seed.part, fold_or_seed.rows
  data, config = experiment.dataset, experiment.config
  diffusion = image_methods.apply(method, config.diffusion)
  seen = pixel_data.make_parts(
    diffusion.class_exponent,
    data.train_labels,
    part.rows[fold_or_seed.number][None],
    data.num_classes,
    experiment.mesh,
  )
  sampling = image_methods.apply_drawing(method, config.sampling)
  features = functools.cache(lambda: real_features(fold_or_seed))
  alike = None
  if sampling.guide.needs_negative:
    alike = most_alike(class_directions(features(), fold_or_seed.labels, data.num_classes))
  of_run = jax.tree.map(lambda x: x[0], seen).of(device_data(experiment))
  folder, number = experiment.workdir.folder("diffusion") / part.name, fold_or_seed.number
  params = load_unet(folder, method, config.diffusion.tuning, number, experiment.mesh)
  return Drawer(
    config=diffusion,
    sampling=sampling,
    data=of_run,
    mesh=experiment.mesh,
    params=params,
    seed=fold_or_seed.noise_seed,
    key=fold_or_seed.key("exemplars"),
    prompts=(
      prompting.learned_prompts(experiment, params, rows)
      or prompting.make_prompts(experiment, method, rows, features)
    ),
    alike=alike,
    judge=make_judge(fold_or_seed) if sampling.seeds.iterations else None,
  )


# --- looking ---------------------------------------------------------------------------------


def look_at_pools(experiment: Experiment) -> dict:
  """Writes every pool with what is known of its images."""
  if experiment.config.pool.needs_limits:
    _look_at_held_out(experiment)
  summary = {}
  for part in parts(experiment):
    for fold_or_seed in members(experiment, part):
      critic = make_critic(fold_or_seed)
      for source in experiment.config.sources:
        path = fold_or_seed.pool_path(source)
        if not path.exists():
          save(path, _described(fold_or_seed, source, critic))
        signs = signs_of(fold_or_seed, source)
        right = float((signs.predicted == signs.labels).mean())
        summary.setdefault(f"{part.name}/{source}", {"right": []})["right"].append(right)
      for move in experiment.config.controls:
        if move in _MOVES:
          _write_moved(fold_or_seed, move)
  return summary


def _described(fold_or_seed: FoldOrSeed, source: str, critic: Critic) -> dict[str, np.ndarray]:
  """Its images of a source, where each comes from, and what the critic says of it."""
  experiment, rows = fold_or_seed.experiment, fold_or_seed.rows
  data, path = experiment.dataset, experiment.config.pool.path_of.get(source)
  if path is None:
    asked = source == TEXT_TO_IMAGE
    folder = text_to_image.folder(experiment) if asked else fold_or_seed.drawn_folder(source)
    drawn = read_drawn(folder)
    images, labels = drawn["images"], drawn["labels"]
    config = experiment.config
    seed = config.text_to_image.seed if asked else fold_or_seed.seed
    scale = config.text_to_image.guidance if asked else config.pool.guidance
    origin = {"seed": np.array(seed), "guidance": np.array(scale)}
    if "prompt" in drawn:
      origin["prompt"] = drawn["prompt"]
    learned_from = text_to_image.learned_from(experiment) if asked else rows
  else:
    found = image_pool.read(path, data)
    images, labels, learned_from = found.images, found.labels, found.learned_from
    origin = {"file_sha256": np.array(identity.of_file(path))}
  near = image_quality.nearest(images, fold_or_seed.images)
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


def signs_of(fold_or_seed: FoldOrSeed, source: str) -> Signs:
  """What is known of its images of a source."""
  names = [field.name for field in dataclasses.fields(Signs)]
  if not fold_or_seed.experiment.config.pool.needs_second:
    names.remove("second")
  return _signs(read_arrays(fold_or_seed.pool_path(source), names))


def _held_out_path(experiment: Experiment):
  return experiment.workdir.folder("pool") / "held_out.npz"


def _look_at_held_out(experiment: Experiment) -> None:
  """What the folds' critics say of the images that their fold holds out."""
  if _held_out_path(experiment).exists():
    return
  part, data, found = part_of(experiment, "folds"), experiment.dataset, []
  for fold, held in zip(members(experiment, part), part.held_out, strict=True):
    rows = held[held >= 0]
    nothing = np.zeros(len(rows), bool)
    signs = make_critic(fold).look(data.train_images[rows], data.train_labels[rows], nothing)
    found.append({"confidence": signs.confidence, "distance": signs.distance, "example": rows})
  together = {name: np.concatenate([f[name] for f in found]) for name in found[0]}
  save(_held_out_path(experiment), together)


def limits_of(fold_or_seed: FoldOrSeed) -> Limits | None:
  """The limits of its filters, from held-out images that it is not judged on."""
  experiment, part = fold_or_seed.experiment, fold_or_seed.part
  if not experiment.config.pool.needs_limits:
    return None
  arrays = read_arrays(_held_out_path(experiment))
  if part.held_out is not None:
    others = ~np.isin(arrays["example"], part.held_out[fold_or_seed.number])
    arrays = {name: values[others] for name, values in arrays.items()}
  labels = experiment.dataset.train_labels[arrays["example"]]
  return image_filters.limits(
    arrays["confidence"], arrays["distance"], labels, experiment.config.pool.rejected
  )


# --- choosing --------------------------------------------------------------------------------


def kept(fold_or_seed: FoldOrSeed, row: Row) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """(the pool's arrays, indices of the images that are used), the first that pass, per class."""
  arrays = read_arrays(fold_or_seed.pool_path(row.source))
  signs = _signs(arrays)
  passed = image_filters.keep(row.filter, signs, limits_of(fold_or_seed))
  return arrays, first_of_class(signs.labels, passed, fold_or_seed.wanted)


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
  for fold_or_seed in members(experiment, part):
    if row.source in experiment.config.sources:
      arrays, index = kept(fold_or_seed, row)
      chosen = [arrays[name][index] for name in ("images", "labels", "confidence")]
      chosen[2] = np.maximum(chosen[2], added_images.LEAST_TRUST)
      if not len(index):
        experiment.run.progress.say(
          f"{row.name}: the filter keeps none of {len(arrays['labels']):,} images, so that this row"
          " trains on real ones alone"
        )
    else:
      images, labels = _REUSED[row.source](fold_or_seed)
      chosen = [images, labels, np.ones(len(labels))]
    places = max(size, len(chosen[1])) if row.reference else size
    num_train = len(data.train_labels)
    pool = added_images.make_pool(*chosen, places, fold_or_seed.rows, num_train=num_train)
    made.append(pool)
  return mesh_lib.replicate(experiment.mesh, added_images.stack_pools(made))


def _copies(fold_or_seed: FoldOrSeed) -> tuple[np.ndarray, np.ndarray]:
  """Its training images, every one of a class as often as any other."""
  data, rows, labels = fold_or_seed.experiment.dataset, fold_or_seed.rows, fold_or_seed.labels
  numbers = enumerate(fold_or_seed.wanted)
  index = np.concatenate([np.resize(rows[labels == c], number) for c, number in numbers])
  return data.train_images[index], data.train_labels[index]


def _unseen(fold_or_seed: FoldOrSeed) -> tuple[np.ndarray, np.ndarray]:
  return _left_out(fold_or_seed.experiment.dataset, fold_or_seed.wanted)


def _oracle(fold_or_seed: FoldOrSeed) -> tuple[np.ndarray, np.ndarray]:
  experiment, part = fold_or_seed.experiment, fold_or_seed.part
  largest = int(experiment.dataset.train_counts.max())
  return _left_out(experiment.dataset, lacking_to(experiment, part, largest)[fold_or_seed.number])


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


def _write_moved(fold_or_seed: FoldOrSeed, move: str) -> None:
  """Copies that are moved as far as the first source's images lie from the training images."""
  path = fold_or_seed.pool_path(move)
  if not path.exists():
    images, labels = _copies(fold_or_seed)
    strength = _strength(fold_or_seed, move)
    moved = _move(move, fold_or_seed.key(move), images, np.float32(strength))
    save(path, {"images": np.asarray(moved), "labels": labels, "strength": np.array(strength)})


def _moved(fold_or_seed: FoldOrSeed, move: str) -> tuple[np.ndarray, np.ndarray]:
  arrays = read_arrays(fold_or_seed.pool_path(move), ("images", "labels"))
  return arrays["images"], arrays["labels"]


def _strength(fold_or_seed: FoldOrSeed, move: str) -> float:
  """The strength that moves copies as far from training images as those of the first source lie.

  At most 4: beyond, little of an image is left.
  """
  first = fold_or_seed.experiment.config.sources[0]
  target = read_arrays(fold_or_seed.pool_path(first))["nearest_distance"].mean()
  images, _ = _copies(fold_or_seed)
  some = images[np.linspace(0, len(images) - 1, min(len(images), _SAMPLE)).astype(int)]
  train, key, low, high = fold_or_seed.images, fold_or_seed.key(move), 0, 4
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
