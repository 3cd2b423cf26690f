"""The CPU convolutions against XLA's, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memdiff import convolution
from memdiff.convolution import Conv, _conv_on_cpu, _patches_times_kernel, conv2d

OURS = (_conv_on_cpu, _patches_times_kernel)


def reference(x, kernel, stride):
  half = kernel.shape[0] // 2
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), ((half, half), (half, half)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )  # fmt: skip


def arrays(size, height=7, width=10, channels=3, features=5, lead=()):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(*lead, 2, height, width, channels))
  kernel = rng.normal(size=(*lead, size, size, channels, features))
  return jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("size", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(7, 10), (8, 8), (9, 5)])
def test_values_and_gradients_are_those_of_xla(ours, size, stride, height, width):
  x, kernel = arrays(size, height, width)
  shape = jax.eval_shape(lambda: reference(x, kernel, stride)).shape
  weight = jnp.asarray(np.random.default_rng(1).normal(size=shape))

  def compute(convolve):
    """Values, and gradients of their weighted sum."""

    def total(x, kernel):
      values = convolve(x, kernel, stride)
      return jnp.sum(weight * values), values

    gradients, values = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(x, kernel)
    return values, gradients

  (values, gradients), (expected, of_xla) = compute(ours), compute(reference)
  np.testing.assert_allclose(values, expected, rtol=1e-5, atol=2e-5)
  for found, theirs in zip(gradients, of_xla, strict=True):
    assert found.shape == theirs.shape
    np.testing.assert_allclose(found, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("images", "convolved"), [(56, False), (57, True)])
def test_small_images_are_one_matrix_product(images, convolved):
  """Of 56 there are 56 * 16 * 16 * 8 * 9 = 1,032,192 numbers in patches."""
  x, kernel = jnp.zeros((images, 16, 16, 8)), jnp.zeros((3, 3, 8, 4))
  assert convolution._MAX_PATCH_NUMBERS == 2**20
  assert ("conv_general_dilated" in str(jax.make_jaxpr(conv2d)(x, kernel))) == convolved


@pytest.mark.parametrize("ours", OURS)
def test_several_kernels_at_once_inside_a_scan(ours):
  """As the training loop does it: seeds under vmap, steps under scan."""
  x, kernel = arrays(3, lead=(4,), features=3)

  def steps(convolve):
    def body(kernel, _):
      value, gradient = jax.value_and_grad(lambda k, x: jnp.mean(jnp.square(convolve(x, k, 1))))(
        kernel, body.x
      )
      return kernel - 0.1 * gradient, value

    def run(x, kernel):
      body.x = x
      return jax.lax.scan(body, kernel, length=3)

    return jax.jit(jax.vmap(run))(x, kernel)

  for found, theirs in zip(steps(ours), steps(reference), strict=True):
    np.testing.assert_allclose(found, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0)])
def test_a_batch_of_images_or_kernels_is_what_vmap_makes_of_it(in_axes, stride):
  x, kernel = arrays(3, lead=(3,))
  x, kernel = (a if axis == 0 else a[0] for a, axis in zip((x, kernel), in_axes, strict=True))

  def gradients(convolve):
    def total(x, kernel):
      return jnp.sum(jnp.sin(convolve(x, kernel, stride)))

    return jax.jit(jax.vmap(jax.grad(total, argnums=(0, 1)), in_axes))(x, kernel)

  for ours, theirs in zip(gradients(_conv_on_cpu), gradients(reference), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_module_computes_in_its_type_and_keeps_its_kernel_in_float32():
  x, _ = arrays(3)
  module = Conv(6, kernel_size=5, stride=2, dtype=jnp.bfloat16)
  variables = module.init(jax.random.key(0), x)
  kernel = variables["params"]["kernel"]
  assert kernel.dtype == jnp.float32 and kernel.shape == (5, 5, 3, 6)
  made = module.apply(variables, x)
  assert made.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    made.astype(jnp.float32), reference(x, kernel, 2), rtol=0.05, atol=0.05
  )


def test_kernels_are_drawn_for_the_fan_out():
  module = Conv(64)
  kernel = module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 32)))["params"]["kernel"]
  np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.05)
