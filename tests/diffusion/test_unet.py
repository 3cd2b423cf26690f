"""The U-Net of images: its size, what it depends on, parts against NumPy, a short training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff import convolution
from memdiff.diffusion import denoiser_training, sampler, unet
from memdiff.diffusion.denoiser_training import Batch, TrainingConfig
from memdiff.diffusion.sampler import Solver
from memdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from memdiff.diffusion.unet import UNet, UNetConfig
from memdiff.runtime.train_state import OptimizerConfig
from tests.support import TINY_UNET, moved, normal

TINY = UNetConfig(channels=8, multipliers=(1, 2), num_blocks=1, attention=(4,), dropout=0.5)
CLASSES = 3


def inputs(batch=2, side=8, channels=1):
  label = jnp.arange(batch) % CLASSES
  return jnp.asarray(normal(1, batch, side, side, channels)), jnp.full((batch,), 300.0), label, ()


@functools.cache
def make(config=TINY):
  """(model, parameters that are random everywhere)."""
  given = inputs()
  model = UNet(CLASSES, given[0].shape[-1], config)
  params = jax.jit(model.init)(jax.random.key(0), *given)["params"]
  return model, moved(params, 0.2)


@functools.cache
def jitted(model):
  return jax.jit(lambda params, *given, rngs: model.apply({"params": params}, *given, rngs=rngs))


def apply(model, params, *given, rngs=None):
  return jitted(model)(params, *given, rngs=rngs)


# --- size ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
  """(model, shapes of parameters, shapes of inputs) on 32 x 32 pixels."""
  model = UNet(10, 3, UNetConfig())
  given = jnp.zeros((1, 32, 32, 3)), jnp.zeros(1), jnp.zeros(1, int), ()
  return model, jax.eval_shape(model.init, jax.random.key(0), *given)["params"], given


def test_the_published_size_has_its_number_of_parameters(published):
  _, params, _ = published
  number = sum(x.size for x in jax.tree.leaves(params))
  assert number == 35_746_307 + 11 * 512  # DDPM's on CIFAR, and an embedding of ten labels


def test_the_published_size_takes_its_number_of_operations(published, monkeypatch):
  monkeypatch.setattr(unet, "conv2d", convolution._conv)  # whose operations XLA counts
  model, params, given = published

  def loss(params, x, t, label):
    return jnp.square(model.apply({"params": params}, x, t, label, ())[0]).mean()

  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in given[:3]]
  flops = jax.jit(jax.grad(loss)).lower(params, *shapes).cost_analysis()["flops"]
  assert flops == pytest.approx(34.96e9, rel=1e-3)


@pytest.mark.parametrize(
  ("config", "side", "channels"),
  [
    (TINY, 8, 1),
    (dataclasses.replace(TINY, multipliers=(1, 2, 2), attention=(7, 14)), 28, 1),
    (dataclasses.replace(TINY, multipliers=(1,), attention=()), 5, 3),
    (dataclasses.replace(TINY, channels=12, num_blocks=2), 8, 3),
  ],
)
def test_small_variants_keep_the_shape_of_images(config, side, channels):
  given = inputs(side=side, channels=channels)
  model = UNet(CLASSES, channels, config)
  (output, bottleneck), variables = jax.eval_shape(
    model.init_with_output, jax.random.key(0), *given
  )
  params = variables["params"]
  assert output.shape == given[0].shape and output.dtype == jnp.float32
  assert bottleneck.shape == (2, config.channels * config.multipliers[-1])
  attention = sum("query" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
  assert bool(attention)  # always in the middle


def test_sides_that_cannot_be_halved_are_refused():
  unet.check_side(UNetConfig(), 32)
  with pytest.raises(ValueError, match="30 pixels wide, but 4 levels need a multiple of 8"):
    unet.check_side(UNetConfig(), 30)


# --- what it depends on ----------------------------------------------------------------------


def test_a_new_network_predicts_nothing():
  given = inputs()
  model = UNet(CLASSES, 1, TINY)
  variables = jax.jit(model.init)(jax.random.key(0), *given)
  output, bottleneck = jax.jit(model.apply)(variables, *given)
  assert not output.any() and bottleneck.any()


def test_time_label_and_every_pixel_matter_to_their_own_image_alone():
  model, params = make()
  x, t, label, _ = inputs()
  plain = apply(model, params, x, t, label, ())[0]
  for least, changed in (
    (0.9, (x, t.at[0].set(20.0), label)),
    (0.9, (x, t, label.at[0].set(2))),
    (0.05, (x.at[0, 7, 0].add(1.0), t, label)),  # a pixel, mostly on its neighbours
  ):
    output = apply(model, params, *changed, ())[0]
    assert (np.abs(output - plain)[0] > 1e-5).mean() > least
    np.testing.assert_allclose(output[1], plain[1], atol=1e-5)


def test_one_time_and_one_context_serve_several_images():
  model, params = make()
  x, t, label, _ = inputs(batch=4)
  label = jnp.array([2, 2, 0, 0])
  expected = apply(model, params, x, t, label, ())[0]

  def of_groups(params, x):
    variables = {"params": params}
    context = model.apply(variables, jnp.array([2, 0]), (), method="condition")
    return model.apply(variables, x, t[:1], context, method="denoise")[0]

  np.testing.assert_allclose(jax.jit(of_groups)(params, x), expected, atol=1e-4)


RESERVED = dataclasses.replace(TINY, reserve=unet.ReserveConfig(rank_ratio=0.5, scale=0.7))


def test_a_reserve_adds_kernels_of_low_rank_to_the_way_up_alone():
  params = shapes(RESERVED)
  kernels = {
    jax.tree_util.keystr(path): x
    for path, x in jax.tree_util.tree_leaves_with_path(params)
    if "reserve" in jax.tree_util.keystr(path)
  }
  assert {name.split("'")[1].split("_")[0] for name in kernels} == {"up", "grow"}
  assert jax.tree.structure(shapes(TINY)) == jax.tree.structure(without_reserve(params))
  conv = params["up_0_0"]["_Conv_0"]
  rank = 3 * int(0.5 * 16)
  assert conv["reserve_in"].shape == (rank, 3, 32) and conv["reserve_out"].shape == (3, 16, rank)


def shapes(config):
  init = UNet(CLASSES, 1, config).init
  return jax.eval_shape(init, jax.random.key(0), *inputs())["params"]


def without_reserve(params):
  return {
    name: without_reserve(value) if isinstance(value, dict) else value
    for name, value in params.items()
    if not name.startswith("reserve_")
  }


def merged(params):
  """With the low-rank part added to its kernel, by a loop."""
  if "reserve_in" in params:
    kernel = np.array(params["kernel"], np.float64)
    inner, outer = np.asarray(params["reserve_in"]), np.asarray(params["reserve_out"])
    for row in range(3):
      for column in range(3):
        kernel[row, column] += 0.7 * (outer[row] @ inner[:, column]).T
    return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": params["bias"]}
  return {name: merged(x) if isinstance(x, dict) else x for name, x in params.items()}


@pytest.mark.parametrize(("reserved", "expected"), [(True, merged), (False, without_reserve)])
def test_with_its_reserve_or_without_it_is_a_network_of_plain_kernels(reserved, expected):
  model, params = make(RESERVED)
  given = inputs()

  def halves(params):
    descent, bottleneck = model.apply({"params": params}, *given, method="descend")
    return model.apply({"params": params}, descent, reserved, method="ascend"), bottleneck

  output, bottleneck = jax.jit(halves)(params)
  plain = apply(UNet(CLASSES, 1, TINY), expected(params), *given)
  np.testing.assert_allclose(output, plain[0], atol=1e-4, rtol=1e-4)
  np.testing.assert_allclose(bottleneck, plain[1], atol=1e-5)


def test_both_halves_drop_the_units_that_a_whole_call_drops():
  model, params = make(RESERVED)
  given, rngs = inputs(), {"dropout": jax.random.key(0)}

  def halves(params, reserved):
    descent, _ = model.apply({"params": params}, *given, rngs=rngs, method="descend")
    return model.apply({"params": params}, descent, reserved, rngs=rngs, method="ascend")

  whole = apply(model, params, *given, rngs=rngs)[0]
  np.testing.assert_allclose(jax.jit(halves, static_argnums=1)(params, True), whole, atol=1e-5)
  new = jax.jit(model.init)(jax.random.key(0), *given)["params"]
  new = new | {"last": params["last"]}  # so that there is an output
  on, off = (jax.jit(halves, static_argnums=1)(new, reserved) for reserved in (True, False))
  np.testing.assert_array_equal(on, off)  # no other masks: a new reserve is nothing
  assert np.abs(on).max() > 0


def test_units_are_dropped_only_with_a_key():
  model, params = make()
  given = inputs()
  plain, again = (apply(model, params, *given)[0] for _ in range(2))
  np.testing.assert_array_equal(plain, again)
  dropped = [
    apply(model, params, *given, rngs={"dropout": jax.random.key(seed)})[0] for seed in (0, 1)
  ]
  assert np.abs(dropped[0] - plain).max() > 1e-3 and np.abs(dropped[0] - dropped[1]).max() > 1e-3


def test_half_precision_computes_about_the_same_with_weights_in_full():
  model, params = make()
  half = UNet(CLASSES, 1, dataclasses.replace(TINY, dtype="bfloat16"))
  given = inputs()
  variables = jax.eval_shape(half.init, jax.random.key(0), *given)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  full, low = apply(model, params, *given)[0], apply(half, params, *given)[0]
  assert low.dtype == jnp.float32
  error = np.abs(low - full).max() / np.abs(full).max()
  assert 0 < error < 0.1


# --- parts against NumPy ---------------------------------------------------------------------


def group_norm(x, params, groups):
  parts = x.reshape(*x.shape[:3], groups, -1)
  mean = parts.mean(axis=(1, 2, 4), keepdims=True)
  parts = (parts - mean) / np.sqrt(parts.var(axis=(1, 2, 4), keepdims=True) + 1e-6)
  return parts.reshape(x.shape) * params["scale"] + params["bias"]


def silu(x):
  return x / (1 + np.exp(-x))


def conv(x, params):
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
  return np.einsum("bhwikl,klio->bhwo", windows, params["kernel"]) + params["bias"]


def test_a_block_is_its_formula():
  x, told = normal(0, 2, 4, 4, 6), normal(1, 2, 5)
  block = unet._Block(width=4, dropout=0.5, dtype=jnp.float32)
  params = jax.jit(block.init)(jax.random.key(0), x, told)["params"]
  params = jax.tree.map(lambda p: np.asarray(p) + 0.3 * normal(p.size, *p.shape), params)
  h = conv(silu(group_norm(x, params["GroupNorm_0"], 1)), params["_Conv_0"])
  h = h + (told @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])[:, None, None]
  h = conv(silu(group_norm(h, params["GroupNorm_1"], 1)), params["_Conv_1"])
  expected = x @ params["shortcut"]["kernel"] + params["shortcut"]["bias"] + h
  np.testing.assert_allclose(apply(block, params, x, told), expected, rtol=1e-3, atol=1e-3)


def test_attention_is_its_formula():
  x = normal(0, 2, 3, 3, 8)
  attention = unet._Attention(jnp.float32)
  params = jax.jit(attention.init)(jax.random.key(0), x)["params"]
  params = jax.tree.map(lambda p: np.asarray(p) + 0.3 * normal(p.size, *p.shape), params)
  rows = group_norm(x, params["GroupNorm_0"], 2).reshape(2, 9, 8)
  query, key, value = (
    rows @ params[n]["kernel"] + params[n]["bias"] for n in ("query", "key", "value")
  )
  scores = np.einsum("bqd,bkd->bqk", query, key) / np.sqrt(8)
  weights = np.exp(scores - scores.max(axis=2, keepdims=True))
  weights /= weights.sum(axis=2, keepdims=True)
  found = weights @ value @ params["out"]["kernel"] + params["out"]["bias"]
  expected = x + found.reshape(x.shape)
  np.testing.assert_allclose(apply(attention, params, x), expected, rtol=1e-3, atol=1e-3)


# --- in the engine ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_engine_trains_it_and_samples_images_of_the_asked_class(mesh):
  """Dark images of class 0 and bright ones of class 1."""
  config = TrainingConfig(
    schedule=ScheduleConfig("cosine", 50), prediction="v", ema_decay=0.9, num_steps=100,
    optimizer=OptimizerConfig("adamw", 3e-3, "cosine", (), (), 0.9, False, 0.0, 0.05, 1.0, 1),
  )  # fmt: skip
  model = UNet(2, 1, dataclasses.replace(TINY_UNET, dropout=0.0))

  def draw(key, shared, per_seed):
    label = jax.random.randint(key, (16,), 0, 2)
    noise = 0.1 * jax.random.normal(key, (16, 8, 8, 1))
    return Batch(x0=noise + (2.0 * label - 1)[:, None, None, None], label=label, memory=())

  stage = denoiser_training.make_stage(config, model, draw, (), (), mesh)
  state = jax.jit(lambda key: stage.init(key, ()))(jax.random.key(0))

  step, losses = jax.jit(stage.step), []
  for _ in range(config.num_steps):
    state, metrics = step(state, (), ())
    losses.append(float(metrics["loss"]))
  assert np.mean(losses[-20:]) < 0.4 * np.mean(losses[:5])

  @jax.jit
  def sample(params, key):
    variables, schedule = {"params": params}, NoiseSchedule(config.schedule)
    context = model.apply(variables, jnp.array([0, 1]), (), method="condition")
    return sampler.sample(
      lambda x, t: model.apply(variables, x, t, context, method="denoise")[0],
      schedule, (8, 8, 8, 1), key, Solver("ddim", 10, "v", 2.0),
    )  # fmt: skip

  images = np.asarray(sample(state.ema_params, jax.random.key(1)))
  np.testing.assert_allclose(images.mean(axis=(1, 2, 3)), [-1] * 4 + [1] * 4, atol=0.2)
