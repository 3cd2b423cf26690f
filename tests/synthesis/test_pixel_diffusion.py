"""Pixel diffusion: batches, methods as changes of the config, samples."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.diffusion import terms
from memdiff.diffusion.exemplar_images import ExemplarImages
from memdiff.diffusion.guidance import GuidanceConfig
from memdiff.runtime import loop
from memdiff.synthesis import (
  image_methods,
  pixel_data,
  pixel_diffusion,
  pixel_memory,
  pixel_sampling,
)
from memdiff.synthesis.pixel_augmentation import AugmentationConfig
from memdiff.synthesis.pixel_sampling import Wanted
from memdiff.synthesis.pixel_settings import PixelDiffusionConfig, SamplingConfig, SolverConfig
from tests.support import TINY_UNET, make_run, moved, normal

CONFIG = PixelDiffusionConfig(unet=TINY_UNET, batch_size=512, num_steps=2, label_dropout=0.25)
COUNTS = np.array([60, 20, 4])
SIDE = 8


def make_images():
  """Images whose every pixel tells which one it is, but for a mark on the left."""
  number = len(LABELS)
  images = np.broadcast_to(np.arange(number, dtype=np.uint8)[:, None, None, None],
                           (number, SIDE, SIDE, 1)).copy()  # fmt: skip
  images[:, :, 0] = 255
  return images


LABELS = np.repeat(np.arange(3), COUNTS)
IMAGES = make_images()


@pytest.fixture(scope="module")
def data(mesh):
  captions = np.eye(len(LABELS), 16, dtype=np.float32)  # for the method that reads them
  return pixel_data.make_data(IMAGES, LABELS, 3, mesh, captions)


def draw(data, **changes):
  config = dataclasses.replace(CONFIG, **changes)
  function = pixel_diffusion._draw(config, tuple(COUNTS.tolist()), config.class_exponent)
  return jax.jit(lambda key: function(key, data, ()))(jax.random.key(0))


def drawn_numbers(batch):
  """Which image every row is."""
  pixels = np.asarray(pixel_data.to_pixels(batch.x0))
  return pixels[:, 0, SIDE // 2, 0]


def test_pixels_survive_the_way_to_the_model_and_back():
  pixels = jnp.arange(256, dtype=jnp.uint8)
  x = pixel_data.to_model(pixels)
  assert (x.min(), x.max()) == (-1, 1)
  np.testing.assert_array_equal(pixel_data.to_pixels(x), pixels)
  np.testing.assert_array_equal(pixel_data.to_pixels(jnp.array([-3.0, 3.0])), [0, 255])


def test_labels_go_with_images_and_a_share_of_them_is_dropped(data):
  batch = draw(data)
  true = LABELS[drawn_numbers(batch)]
  dropped = np.asarray(batch.label) == 3
  np.testing.assert_array_equal(np.asarray(batch.label)[~dropped], true[~dropped])
  assert 0.15 < dropped.mean() < 0.35


def test_by_batch_all_labels_are_dropped_or_none(data):
  config = dataclasses.replace(CONFIG, dropped_by="batch", label_dropout=0.5)
  function = pixel_diffusion._draw(config, tuple(COUNTS.tolist()), config.class_exponent)
  keys = jax.random.split(jax.random.key(1), 40)
  labels = jax.jit(jax.vmap(lambda key: function(key, data, ()).label))(keys)
  shares = (np.asarray(labels) == 3).mean(axis=1)
  assert set(shares) == {0.0, 1.0} and 0.2 < shares.mean() < 0.8


@pytest.mark.parametrize(("exponent", "expected"), [(1.0, COUNTS / 84), (0.0, np.full(3, 1 / 3))])
def test_classes_come_by_their_counts_or_alike(data, exponent, expected):
  observed = np.bincount(LABELS[drawn_numbers(draw(data, class_exponent=exponent))], minlength=3)
  np.testing.assert_allclose(observed / 512, expected, atol=0.07)


def test_half_of_the_images_are_mirrored_if_asked(data):
  left = np.asarray(draw(data, mirror=True).x0)[:, 0, 0, 0]
  assert 0.4 < (left == 1).mean() < 0.6
  assert (np.asarray(draw(data, mirror=False).x0)[:, 0, 0, 0] == 1).all()


def test_the_last_steps_draw_classes_alike_if_asked(mesh, data):
  config = dataclasses.replace(CONFIG, balanced_last=0.4, num_steps=10, mirror=False)
  stage = pixel_diffusion.make_stage(config, data, COUNTS, mesh)
  state = jax.jit(stage.init)(jax.random.key(0), ())
  draw = jax.jit(lambda step: stage.batch(state.replace(step=step), data, ())[0])
  for step, expected in ((5, COUNTS / 84), (6, np.full(3, 1 / 3)), (9, np.full(3, 1 / 3))):
    batch = draw(jnp.int32(step))
    observed = np.bincount(LABELS[drawn_numbers(batch)], minlength=3) / 512
    np.testing.assert_allclose(observed, expected, atol=0.07)


def test_capacity_manipulation_needs_a_reserve():
  objective = image_methods.apply("cm", CONFIG).objective
  with pytest.raises(ValueError, match=r"no reserve; set unet\.reserve\.rank_ratio"):
    dataclasses.replace(CONFIG, objective=objective)


@pytest.mark.parametrize("name", ["ada", "ada+memdiff+cbdm"])
def test_the_u_net_is_told_how_images_were_changed(data, name):
  config = image_methods.apply(name, CONFIG)
  config = dataclasses.replace(config, augmentation=AugmentationConfig(0.3))
  changes = {"augmentation": config.augmentation, "memory": config.memory}
  batch = draw(data, objective=config.objective, **changes)
  same = ~np.asarray(batch.memory.vector).any(axis=1)
  assert 0.02 < same.mean() < 0.3
  if name == "ada":
    assert drawn_numbers(batch)[same].max() < 84  # the numbers of images, nothing between
  else:
    np.testing.assert_array_equal(batch.memory.vector, batch.other_memory.vector)
    assert batch.memory.memory.mask.shape == (512, 4)


ALL = ("memdiff+coral+cbdm", "cm+finetuned+ada", *image_methods.METHODS)


@pytest.mark.parametrize(
  "name", ["t2h+diffrop", *(pytest.param(name, marks=pytest.mark.slow) for name in ALL)]
)
def test_every_method_trains(mesh, data, name, tmp_path):
  base = dataclasses.replace(CONFIG, batch_size=16)
  config = image_methods.apply(name, base)
  assert config != base or image_methods.base(name) == "ddpm"
  stage = pixel_diffusion.make_stage(config, data, COUNTS, mesh)
  run = make_run(mesh, (0,), 2)
  state = loop.train(stage, run, tmp_path)
  moved = jax.tree.map(lambda x: np.isfinite(x).all(), state.params)
  assert all(jax.tree.leaves(moved)) and int(state.step[0]) == 2


def test_what_a_method_needs_of_a_batch_is_there_and_no_more(data):
  assert terms.needed(CONFIG.objective) == set()
  for name in image_methods.METHODS:
    config = image_methods.apply(name, CONFIG)
    function = pixel_diffusion._draw(config, tuple(COUNTS.tolist()), config.class_exponent)
    batch = jax.eval_shape(function, jax.random.key(0), data, ())
    needed = terms.needed(config.objective)
    for field in ("true_label", "class_count", "other_label", "class_share", "class_rarity"):
      assert (getattr(batch, field) is not None) == (field in needed), (name, field)


def test_other_classes_and_counts_are_those_of_the_data(data):
  config = image_methods.apply("cbdm_code+t2h", CONFIG)
  batch = draw(data, objective=config.objective, label_dropout=0.0)
  true = LABELS[drawn_numbers(batch)]
  np.testing.assert_array_equal(batch.class_count, COUNTS[true])
  observed = np.bincount(batch.other_label, minlength=3) / 512
  np.testing.assert_allclose(observed, COUNTS / 84, atol=0.07)
  config = image_methods.apply("cbdm", CONFIG)
  batch = draw(data, objective=config.objective)
  kept = np.asarray(batch.other_label) < 3
  np.testing.assert_array_equal(kept, np.asarray(batch.label) < 3)
  observed = np.bincount(batch.other_label[kept], minlength=3) / kept.sum()
  np.testing.assert_allclose(observed, np.full(3, 1 / 3), atol=0.08)


def test_shares_and_rarities_are_those_of_the_true_classes(data):
  config = image_methods.apply("cm", CONFIG)
  batch = draw(data, objective=config.objective, unet=config.unet)
  true, inverse = LABELS[drawn_numbers(batch)], 1 / COUNTS
  np.testing.assert_allclose(batch.class_share, 3 * COUNTS[true] / 84, rtol=1e-5)
  np.testing.assert_allclose(batch.class_rarity, (3 * inverse / inverse.sum())[true], rtol=1e-5)


def test_configured_exemplars_are_shown_to_memdiff_alone():
  config = dataclasses.replace(CONFIG, memory=pixel_memory.PixelMemoryConfig(num_exemplars=7))
  assert image_methods.apply("balanced", config).memory.num_shown == 0
  assert image_methods.apply("memdiff", config).memory.num_shown == 7


def test_names_of_methods():
  assert image_methods.is_known("t2h+balanced") and not image_methods.is_known("t2h+t2h")
  assert not image_methods.is_known("gan") and not image_methods.is_known("")
  assert "; " in image_methods.describe("t2h+balanced")


def test_samples_of_a_known_denoiser_are_its_images(mesh, monkeypatch):
  """A denoiser that knows one image per class, so that the sampler must end there."""
  centres = jnp.asarray(np.linspace(-0.9, 0.9, 4), jnp.float32)  # the last: no class

  class Oracle:
    def apply(self, params, *inputs, method):
      return inputs[0] if method == "condition" else self.denoise(params, *inputs)

    def denoise(self, params, x, t, label):
      schedule = pixel_sampling.NoiseSchedule(CONFIG.schedule)
      step = (t * CONFIG.schedule.num_steps / 1000).astype(int)
      signal, noise = schedule.scales(step, x)
      x0 = centres[label][:, None, None, None] + params["params"]
      return (x - signal * x0) / noise, None

  monkeypatch.setattr(pixel_sampling, "make_denoiser", lambda *_: Oracle())
  pixel_sampling.sampling_program.cache_clear()
  labels = jnp.arange(3).repeat(2)
  others = (labels + 1) % 3
  free, negative = GuidanceConfig(), GuidanceConfig("negative")
  for guide, guides, scale, expected in (
    (free, False, 1.0, centres[:3]),
    (free, True, 0.0, centres[3:].repeat(3)),
    (free, True, 0.5, (centres[:3] + centres[3:]) / 2),
    (negative, True, 0.5, (centres[:3] + centres[jnp.array([1, 2, 0])]) / 2),
    (negative, False, 1.0, centres[:3]),
  ):
    sampling = SamplingConfig(num_steps=10, guide=guide)
    program = pixel_sampling.sampling_program(CONFIG, sampling, (4, 4, 1), 3, guides, mesh)
    images = np.asarray(program(0.0, Wanted(labels, other_labels=others), np.uint32(0), 0, scale))
    assert images.shape == (6, 4, 4, 1) and images.dtype == np.uint8
    shown = np.asarray(pixel_data.to_pixels(expected)).repeat(2)
    np.testing.assert_allclose(images.astype(int), shown[:, None, None, None].repeat(4, 1).repeat(
      4, 2
    ), atol=1)  # fmt: skip
  pixel_sampling.sampling_program.cache_clear()


def test_samples_that_begin_from_images_keep_what_noise_leaves_of_them(mesh, monkeypatch):
  class Still:
    """Sees no noise, so that samples are their first state over its signal."""

    def apply(self, params, *arguments, method):
      first = arguments[0]
      return (jnp.zeros_like(first), None) if method == "denoise" else first

  monkeypatch.setattr(pixel_sampling, "make_denoiser", lambda *_: Still())
  pixel_sampling.sampling_program.cache_clear()
  origin = np.random.default_rng(0).integers(60, 200, (6, 4, 4, 1)).astype(np.uint8)
  labels, distance = jnp.zeros(6, int), []
  for start in (0.01, 0.3, 0.6):
    sampling = SolverConfig(num_steps=10, start=start)
    program = pixel_sampling.sampling_program(CONFIG, sampling, (4, 4, 1), 3, False, mesh)
    images = np.asarray(program(0.0, Wanted(labels, (), origin), np.uint32(0), 0, 1.0))
    distance.append(np.abs(images.astype(float) - origin).mean())
  pixel_sampling.sampling_program.cache_clear()
  assert distance[0] < 4 < distance[1] < distance[2]


def test_images_to_begin_from_are_of_the_class_and_all_come_up(data):
  labels = jnp.arange(2000) % 3
  found = np.asarray(pixel_sampling.origins_of(data, labels, jax.random.key(0)))
  for c in range(3):
    own = {image.tobytes() for image in IMAGES[c == LABELS]}
    assert {image.tobytes() for image in found[np.asarray(labels) == c]} == own


def test_methods_that_only_draw_differently_share_a_training():
  names = ("ddpm", "varied", "varied+balanced", "balanced", "t2h")
  assert image_methods.trainings(names) == ["ddpm", "balanced", "t2h"]
  assert image_methods.apply("varied", CONFIG) == CONFIG
  assert image_methods.apply_drawing("varied+balanced", SolverConfig()).start == 0.5
  assert image_methods.apply_drawing("t2h+balanced", SolverConfig()) == SolverConfig()


# --- memory ----------------------------------------------------------------------------------

MEMORY = pixel_memory.PixelMemoryConfig(is_shown=True, num_exemplars=3, hidden=0.5, invented=0.5)


def exemplar_numbers(memory):
  """Which training image every exemplar is, [B, K]."""
  return np.asarray(pixel_data.to_pixels(memory.images))[:, :, SIDE // 2, SIDE // 2, 0]


def test_exemplars_are_of_the_class_and_never_the_image_itself(data):
  still = dataclasses.replace(MEMORY, invented=0.0)
  batch = draw(data, memory=still, mirror=False, label_dropout=0.0)
  itself, others, mask = drawn_numbers(batch), exemplar_numbers(batch.memory), batch.memory.mask
  np.testing.assert_array_equal(LABELS[others][mask], LABELS[itself[:, None].repeat(3, 1)][mask])
  assert not (others == itself[:, None])[mask].any()
  for row, shown in zip(others, np.asarray(mask), strict=True):
    assert len(set(row[shown])) == shown.sum()  # a repeated one counts once
  assert set(np.asarray(mask).sum(axis=1)) == {1, 2, 3}
  hidden = np.asarray(batch.label) == 3
  assert 0.4 < hidden.mean() < 0.6


def test_a_class_of_one_image_has_no_exemplar_and_keeps_its_label(mesh):
  alone = pixel_data.make_data(IMAGES[[0, 1, 83]], np.array([0, 0, 1]), 2, mesh)
  config = dataclasses.replace(CONFIG, memory=MEMORY, label_dropout=0.0, mirror=False)
  function = pixel_diffusion._draw(config, (2, 1), 1.0)
  batch = jax.jit(lambda key: function(key, alone, ()))(jax.random.key(0))
  single = drawn_numbers(batch) == 83
  assert single.any() and not np.asarray(batch.memory.mask)[single].any()
  assert (np.asarray(batch.label)[single] == 1).all()


def test_dropped_rows_are_told_nothing(data):
  batch = draw(data, memory=MEMORY, label_dropout=1.0)
  assert (np.asarray(batch.label) == 3).all() and not np.asarray(batch.memory.mask).any()


def test_image_and_exemplars_of_a_made_up_class_are_turned_together(data):
  config = image_methods.apply("coral+t2h", CONFIG)
  always = dataclasses.replace(MEMORY, hidden=1.0, invented=1.0)
  batch = draw(data, memory=always, mirror=False, label_dropout=0.0, objective=config.objective)
  x0, exemplars = np.asarray(batch.x0)[..., 0], np.asarray(batch.memory.images)[..., 0]
  mask = np.asarray(batch.memory.mask)

  def mark(images):
    """On which side the white line is: top, bottom, left, right."""
    centre = images[..., SIDE // 2, SIDE // 2]
    ends = [images[..., 0, 4], images[..., -1, 4], images[..., 4, 0], images[..., 4, -1]]
    return np.stack([(end == 1) & (centre < 1) for end in ends], axis=-1).argmax(axis=-1)

  np.testing.assert_array_equal(mark(exemplars)[mask], mark(x0)[:, None].repeat(3, 1)[mask])
  counts = np.bincount(mark(x0), minlength=4)
  assert (counts > 40).all()  # seven ways, of which one leaves the line where it is
  assert (np.asarray(batch.label) == 3).all() and (np.asarray(batch.class_count) == 0).all()
  assert len(set(np.asarray(batch.true_label).tolist())) == 512


def test_turns_are_distinct_and_never_the_identity():
  draw_image = np.random.default_rng(0).normal(size=(1, 4, 4, 3)).astype(np.float32)
  for mirrored, number in ((False, 8 * 6 - 1), (True, 8 * 6 - 2)):
    ways = pixel_memory.turns(3, mirrored)
    assert len(ways) == number
    images = jnp.broadcast_to(draw_image, (number, 4, 4, 3))
    made = np.asarray(pixel_memory.turned(images, jnp.asarray(ways)))
    assert len({image.tobytes() for image in made}) == number
    others = [draw_image[0], draw_image[0][:, ::-1]] if mirrored else [draw_image[0]]
    assert not any(np.array_equal(image, other) for image in made for other in others)
  same = pixel_memory.turned(jnp.asarray(draw_image), jnp.asarray(pixel_memory.identity(3))[None])
  np.testing.assert_array_equal(same, draw_image)
  quarter = pixel_memory.turned(jnp.asarray(draw_image), jnp.array([[1, 1, 0, 0, 1, 2]]))
  np.testing.assert_array_equal(quarter[0], np.rot90(draw_image[0]))


def test_the_unet_looks_at_exemplars_in_any_order_and_only_where_they_are(mesh):
  config = dataclasses.replace(
    CONFIG, memory=MEMORY, unet=dataclasses.replace(TINY_UNET, attention=(SIDE,))
  )
  model = pixel_diffusion.make_denoiser(config, 3, 1)
  memory = ExemplarImages(jnp.asarray(normal(0, 2, 3, 8, 8, 1)), jnp.array([[1, 1, 0]] * 2) > 0)
  given = normal(1, 2, 8, 8, 1), jnp.full(2, 300.0), jnp.array([0, 3])
  params = jax.jit(model.init)(jax.random.key(2), *given, memory)["params"]
  params = moved(params, 0.2)
  apply = jax.jit(lambda memory: model.apply({"params": params}, *given, memory)[0])
  base = apply(memory)
  swapped = jax.tree.map(lambda x: x[:, jnp.array([1, 0, 2])], memory)
  np.testing.assert_allclose(apply(swapped), base, atol=2e-4)
  unseen = memory.replace(images=memory.images.at[:, 2].set(7.0))
  np.testing.assert_array_equal(apply(unseen), base)
  other = memory.replace(images=memory.images.at[0, 0].set(7.0))
  gap = np.abs(np.asarray(apply(other) - base)).max(axis=(1, 2, 3))
  assert gap[0] > 1e-2 and gap[1] == 0
  forgotten = memory.forget(jnp.array([True, False]))
  gap = np.abs(np.asarray(apply(forgotten) - base)).max(axis=(1, 2, 3))
  assert gap[0] > 1e-2 and gap[1] == 0
  nothing = memory.forget(jnp.array([True, True]))
  assert np.isfinite(np.asarray(apply(nothing))).all()


def test_exemplars_for_sampling_are_of_the_class_that_is_asked_for(data):
  labels = jnp.asarray(np.array([0, 1, 2, 2], np.int32))
  memory = pixel_sampling.exemplars_of(data, labels, jax.random.key(0), 5)
  found, mask = exemplar_numbers(memory), np.asarray(memory.mask)
  assert (LABELS[found] == np.asarray(labels)[:, None])[mask].all() and mask.any(axis=1).all()
  assert not np.array_equal(found[2], found[3])
