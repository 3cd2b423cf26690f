"""Convolutions of the backbones: one function, fast where it runs.

On accelerators it is `lax.conv_general_dilated`. On CPU, XLA's own convolution is many times slower
inside `lax.scan` (python -m benchmarks.convolution). There the patches of a row are laid side by
side, each row of the kernel is one matrix product, and so are both gradients.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def conv2d(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
  """Cross-correlation, zero-padded by half the kernel on each side (as PyTorch's padding=k//2).

  Args:
    x: [B, H, W, in].
    kernel: [k, k, in, out], k odd.
    stride: in both directions.

  Returns:
    [B, ceil(H / stride), ceil(W / stride), out].
  """
  if jax.default_backend() == "cpu":
    return _as_matrix_products(x, kernel, stride)
  half = kernel.shape[0] // 2
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((half, half), (half, half)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def _row_patches(x: jax.Array, size: int, stride: int) -> jax.Array:
  """[B, H, W, in] -> [B, H + size - 1, ceil(W / stride), size * in], zero-padded."""
  half, width = size // 2, x.shape[2]
  padded = jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
  return jnp.concatenate([padded[:, :, j : j + width : stride] for j in range(size)], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _as_matrix_products(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  size, _, channels, features = kernel.shape
  rows, height = _row_patches(x, size, stride), x.shape[1]
  matrices = kernel.reshape(size, size * channels, features)
  return sum(rows[:, i : i + height : stride] @ matrices[i] for i in range(size))


def _forward(x, kernel, stride):
  return _as_matrix_products(x, kernel, stride), (x, kernel)


def _backward(stride, residuals, gradient):
  x, kernel = residuals
  size, _, channels, features = kernel.shape
  _, height, width, _ = x.shape
  rows, flat = _row_patches(x, size, stride), gradient.reshape(-1, features)
  of_rows = [
    rows[:, i : i + height : stride].reshape(-1, size * channels).T @ flat for i in range(size)
  ]
  # The input's gradient: the output's, spread out by the stride, through the mirrored kernel.
  spread = jax.lax.pad(
    gradient,
    jnp.zeros((), gradient.dtype),
    (
      (0, 0, 0),
      (0, (height - 1) % stride, stride - 1),
      (0, (width - 1) % stride, stride - 1),
      (0, 0, 0),
    ),
  )
  mirrored = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
  return _as_matrix_products(spread, mirrored, 1), jnp.stack(of_rows).reshape(kernel.shape)


_as_matrix_products.defvjp(_forward, _backward)


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
    fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    kernel = self.param("kernel", fan_out, shape)
    return conv2d(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)
