"""Convolutions: one function, fast where it runs.

On accelerators it is `lax.conv_general_dilated`. XLA's CPU backend is fast at plain convolutions
alone: the gradient of a kernel is hundreds of times slower inside `lax.scan`, and a convolution
under `vmap`, which becomes a grouped one, several times (python -m benchmarks.convolution). There
both gradients are built of what is fast, plain convolutions and matrix products, and a batch of
kernels is one convolution after the other. Images whose patches fit into the cache are convolved as
one matrix product, which is faster still.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from memdiff.runtime.random import normal

_MAX_PATCH_NUMBERS = 2**20  # in the patches of all images; with more, copying them takes longer


def conv2d(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Cross-correlation, zero-padded by half the kernel on each side (as PyTorch's padding=k//2).

  Args:
    x: [B, H, W, in].
    kernel: [k, k, in, out], k odd.
    stride: in both directions.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), out].
  """
  exported = not isinstance(x.shape[0], int)  # for any size of batches and any platform
  if exported or jax.default_backend() != "cpu":
    return _conv(x, kernel, stride)
  if kernel.shape[0] ** 2 * x.size // stride**2 <= _MAX_PATCH_NUMBERS:
    return _patches_times_kernel(x, kernel, stride)
  return _conv_on_cpu(x, kernel, stride)


def _conv(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  half = kernel.shape[0] // 2
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((half, half), (half, half)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def _patches_times_kernel(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """`_conv` as one matrix product of all patches, side by side, with the kernel."""
  (size, _, channels, features), (_, height, width, _) = kernel.shape, x.shape
  half = size // 2
  padded = jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
  shifted = [
    padded[:, i : i + height : stride, j : j + width : stride]
    for i in range(size)
    for j in range(size)
  ]
  patches = jnp.concatenate(shifted, axis=-1)
  return patches @ kernel.reshape(size * size * channels, features)


def _one_by_one(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """`_conv` that `vmap` turns into a convolution per item in place of a grouped one."""

  @jax.custom_batching.custom_vmap
  def convolve(x, kernel):
    return _conv(x, kernel, stride)

  @convolve.def_vmap
  def _(size, batched, x, kernel):
    if not batched[1]:  # one kernel for all: one convolution of them all
      flat = convolve(x.reshape(-1, *x.shape[2:]), kernel)
      return flat.reshape(*x.shape[:2], *flat.shape[1:]), True
    items = [convolve(x[i] if batched[0] else x, kernel[i]) for i in range(size)]
    return jnp.stack(items), True

  return convolve(x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_on_cpu(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  return _one_by_one(x, kernel, stride)


def _forward(x, kernel, stride):
  return _one_by_one(x, kernel, stride), (x, kernel)


def _backward(stride, residuals, gradient):
  x, kernel = residuals
  spread = _spread(_spread(gradient, 1, x.shape[1], stride), 2, x.shape[2], stride)
  mirrored = kernel[::-1, ::-1].swapaxes(2, 3)
  return _one_by_one(spread, mirrored, 1), _kernel_gradient(x, gradient, kernel.shape, stride)


def _spread(x: jax.Array, axis: int, size: int, stride: int) -> jax.Array:
  """Puts `stride` - 1 zeros after every row, `size` rows in all."""
  padding = [(0, 0, 0)] * x.ndim
  padding[axis] = (0, size - 1 - stride * (x.shape[axis] - 1), stride - 1)
  return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)


def _kernel_gradient(x, gradient, shape, stride):
  """sum_bhw x[b, sh + i - k/2, sw + j - k/2, c] gradient[b, h, w, f] as one matrix product.

  On its left are the columns j of all patches of x, on its right the gradient at all shifts i.
  """
  size, _, channels, features = shape
  half, (_, height, width, _) = size // 2, x.shape
  padded = jnp.pad(x, ((0, 0), (0, 0), (half, half), (0, 0)))
  columns = [padded[:, :, j : j + width : stride] for j in range(size)]
  rows = _spread(gradient, 1, height, stride)
  rows = jnp.pad(rows, ((0, 0), (half, half), (0, 0), (0, 0)))
  shifts = [rows[:, size - 1 - i : size - 1 - i + height] for i in range(size)]
  left = jnp.concatenate(columns, axis=-1).reshape(-1, size * channels)
  right = jnp.concatenate(shifts, axis=-1).reshape(-1, size * features)
  product = (left.T @ right).reshape(size, channels, size, features)
  return product.transpose(2, 0, 1, 3)


_conv_on_cpu.defvjp(_forward, _backward)


def _he_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Normal with variance 2 / (k k out), as PyTorch's kaiming_normal_ with fan_out."""
  return math.sqrt(2 / (shape[0] * shape[1] * shape[3])) * normal(key, shape)


class Conv(nn.Module):
  """`conv2d` with a learned kernel and no bias; computes in `dtype`, the kernel stays float32."""

  features: int
  kernel_size: int = 3
  stride: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, in] -> [B, H', W', features]."""
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    kernel = self.param("kernel", _he_normal, shape)
    return conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)
