"""Captions as a condition of the U-Net: who is told what, and what it changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff.diffusion.text_condition import Captioned
from memdiff.runtime import loop
from memdiff.synthesis import (
  image_methods,
  pixel_data,
  pixel_diffusion,
  pixel_sampling,
  pixel_text,
)
from memdiff.synthesis.pixel_settings import PixelDiffusionConfig, SamplingConfig
from memdiff.synthesis.pixel_text import PixelTextConfig
from tests.support import TINY_UNET, make_run

TEXT = PixelTextConfig(is_read=True, hidden=0.2, alone=0.3)
CONFIG = PixelDiffusionConfig(
  unet=dataclasses.replace(TINY_UNET, dropout=0.0), batch_size=1024, num_steps=2,
  label_dropout=0.25, mirror=False, text=TEXT,
)  # fmt: skip
COUNTS = np.array([40, 15, 5])
LABELS, SIDE, WIDTH = np.repeat(np.arange(3), COUNTS), 8, 64
IMAGES = np.broadcast_to(
  np.arange(60, dtype=np.uint8)[:, None, None, None], (60, SIDE, SIDE, 1)
).copy()
CAPTIONS = np.eye(60, WIDTH, dtype=np.float32)  # which image it is
SILENT = 7  # an image without a caption
CAPTIONS[SILENT] = 0


@pytest.fixture(scope="module")
def data(mesh):
  return pixel_data.make_data(IMAGES, LABELS, 3, mesh, CAPTIONS)


def draw(data, config=CONFIG, seed=0):
  function = pixel_diffusion._draw(config, tuple(COUNTS.tolist()), config.class_exponent)
  return jax.jit(lambda key: function(key, data, ()))(jax.random.key(seed))


def numbers(batch):
  return np.asarray(pixel_data.to_pixels(batch.x0))[:, 0, 0, 0]


def test_rows_are_told_by_class_and_caption_by_either_or_by_neither(data):
  batch = draw(data)
  drawn, label = numbers(batch), np.asarray(batch.label)
  vectors = np.asarray(batch.memory.vectors)
  told, said = label != 3, vectors.any(axis=1)
  np.testing.assert_array_equal(label[told], LABELS[drawn[told]])
  np.testing.assert_array_equal(vectors[said], CAPTIONS[drawn[said]])
  spoken = drawn != SILENT
  shares = {
    (True, True): 0.75 * 0.5, (True, False): 0.75 * 0.2, (False, True): 0.75 * 0.3,
    (False, False): 0.25,
  }  # fmt: skip
  for (has_label, has_caption), share in shares.items():
    rows = (told == has_label) & (said == has_caption)
    np.testing.assert_allclose(rows[spoken].mean(), share, atol=0.05)
  np.testing.assert_allclose(told[~spoken].mean(), 0.75, atol=0.25)


@pytest.mark.parametrize("alone", [0.0, 1.0])
def test_an_image_without_caption_keeps_its_class(alone):
  config = PixelTextConfig(is_read=True, hidden=0.0, alone=alone)
  vectors = jnp.asarray(CAPTIONS[SILENT - 2 : SILENT + 1])
  shown, hidden = pixel_text.draw_told(jax.random.key(0), config, vectors)
  np.testing.assert_array_equal(shown, vectors)
  np.testing.assert_array_equal(hidden, [alone > 0, alone > 0, False])


def test_shares_beyond_all_images_are_refused():
  with pytest.raises(ValueError, match="more than all images"):
    PixelTextConfig(hidden=0.6, alone=0.5)


def test_of_another_class_the_caption_says_nothing(data):
  config = image_methods.apply("cbdm", CONFIG)
  batch = draw(data, config)
  mine, others = (np.asarray(m.vectors) for m in (batch.memory, batch.other_memory))
  label, other = np.asarray(batch.label), np.asarray(batch.other_label)
  assert ((label == 3) == (other == 3)).all()
  differ = (label != other) & (label != 3)
  assert differ.sum() > 100 and not others[differ].any()
  kept = others.any(axis=1)
  np.testing.assert_array_equal(others[kept], mine[kept])
  assert (label == other)[kept & (label != 3)].all()


def test_a_class_that_is_made_up_has_no_caption(data):
  memory = dataclasses.replace(
    CONFIG.memory, is_shown=True, num_exemplars=2, hidden=1.0, invented=1.0
  )
  batch = draw(data, dataclasses.replace(CONFIG, memory=memory))
  shown = np.asarray(batch.memory.memory.mask).any(axis=1)
  assert shown.mean() > 0.6 and not np.asarray(batch.memory.vectors)[shown].any()


def test_forgetting_leaves_nothing_said():
  kept = Captioned((), jnp.ones((2, 3))).forget(jnp.array([True, False]))
  assert kept.memory == ()
  np.testing.assert_array_equal(kept.vectors, [[0, 0, 0], [1, 1, 1]])


# --- the network -----------------------------------------------------------------------------


@pytest.mark.slow
def test_sentences_alone_decide_what_is_drawn(mesh, tmp_path):
  """Two sentences, dark and bright images, one class: what is said is what is drawn."""
  images = np.repeat(np.array([20, 230], np.uint8), 20)[:, None, None, None]
  images = np.broadcast_to(images, (40, SIDE, SIDE, 1)).copy()
  vectors = np.repeat(np.eye(2, 6, dtype=np.float32), 20, axis=0)
  labels = np.tile([0, 1], 20)  # say nothing of the brightness
  data = pixel_data.make_data(images, labels, 2, mesh, vectors)
  fast = dataclasses.replace(CONFIG.optimizer, learning_rate=2e-3, warmup=0.0)
  config = dataclasses.replace(
    CONFIG, label_dropout=0.1, prediction="v", num_steps=150, batch_size=32, ema_decay=0.9,
    optimizer=fast,
  )  # fmt: skip
  stage = pixel_diffusion.make_stage(config, data, np.array([20, 20]), mesh)
  state = loop.train(stage, make_run(mesh, (0,), 50), tmp_path / "stage")
  params = jax.tree.map(lambda x: x[0], state.ema_params)
  for scale in (1.0, 1.5):
    program = pixel_sampling.sampling_program(
      config, SamplingConfig(num_steps=8), (SIDE, SIDE, 1), 2, scale != 1, mesh
    )
    told = np.eye(2, 6, dtype=np.float32)[[0, 1, 0, 1]]
    classes = jnp.array([0, 0, 2, 2])  # told and not
    wanted = pixel_sampling.Wanted(classes, Captioned((), jnp.asarray(told)))
    drawn = program(params, wanted, np.uint32(0), 0, np.float32(scale))
    brightness = np.asarray(drawn).mean(axis=(1, 2, 3))
    assert (brightness[[1, 3]] - brightness[[0, 2]] > 120).all(), brightness


def test_a_configured_encoder_alone_makes_no_method_read():
  config = dataclasses.replace(CONFIG, text=PixelTextConfig(encoder="table", weights="a.npz"))
  assert not image_methods.apply("balanced", config).text.is_read
  assert image_methods.text_of(("balanced",), config) is None
  read = image_methods.text_of(("balanced", "balanced+prompted"), config)
  assert read.is_read and (read.encoder, read.weights) == ("table", "a.npz")
