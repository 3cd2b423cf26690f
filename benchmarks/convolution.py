"""The 3x3 convolution on CPU: memdiff's against XLA's.

  python -m benchmarks.convolution [--rounds N]

Times forward and backward pass, with a step of gradient descent, of `conv2d` and of the same
function as `lax.conv_general_dilated`; as single calls and inside `lax.scan`, for one kernel and
for three kernels under `vmap` (what the training loop does with three seeds). The ratio says how
many times faster `conv2d` is. On other platforms it is XLA's convolution itself, and the ratio 1.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.timing import Row, interleave, speedup
from memdiff.convolution import conv2d

_STEPS = 3  # per scan
_BATCH = 64
# (height and width, channels) of the digits encoder, and of a ResNet-32 on 32 px.
_SIZES = ((8, 16), (4, 32), (2, 64), (32, 16), (16, 32), (8, 64))


def direct(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def gradient_step(convolve, kernel, x):
  """Gradients of kernel and input, both used, so that neither is optimised away."""

  def loss(kernel, x):
    return jnp.mean(jnp.square(convolve(x, kernel)))

  kernel_gradient, x_gradient = jax.grad(loss, argnums=(0, 1))(kernel, x)
  return kernel - 0.1 * kernel_gradient, x - 0.1 * x_gradient


def in_scan(convolve, kernel, x):
  def body(carry, _):
    return gradient_step(convolve, *carry), None

  return jax.lax.scan(body, (kernel, x), length=_STEPS)[0]


def measure(size: int, channels: int, kernels: int, rounds: int) -> list[Row]:
  """Rows for `kernels` kernels at once; one is not vmapped."""
  random = np.random.RandomState(0)
  kernel = jnp.asarray(random.standard_normal((kernels, 3, 3, channels, channels)), jnp.float32)
  x = jnp.asarray(random.standard_normal((kernels, _BATCH, size, size, channels)), jnp.float32)
  variants = {}
  for name, convolve in (("ours", conv2d), ("XLA's", direct)):
    for where, function, work in (("alone", gradient_step, 1.0), ("in scan", in_scan, _STEPS)):
      step = functools.partial(function, convolve)
      if kernels > 1:
        call = functools.partial(jax.jit(jax.vmap(step)), kernel, x)
      else:
        call = functools.partial(jax.jit(step), kernel[0], x[0])
      variants[f"{name} {where}"] = (call, float(work))
  times = interleave(variants, rounds)
  rows = []
  for where in ("alone", "in scan"):
    fast, slow = times[f"ours {where}"], times[f"XLA's {where}"]
    name = f"{size}x{size}x{channels}, kernels: {kernels}, {where}"
    value = f"{fast.median * 1e6:.0f} us against {slow.median * 1e6:.0f} us"
    rows.append(Row(name, value, str(speedup(slow, fast))))
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=10, help="repeats of every measurement")
  rounds = parser.parse_args().rounds
  rows = []
  for size, channels in _SIZES:
    for kernels in (1, 3):
      print(f"timing {size}x{size}x{channels}, kernels: {kernels}", flush=True)
      rows += measure(size, channels, kernels, rounds)
  print("\nper step, memdiff's convolution against XLA's\n\n" + timing.table(rows))


if __name__ == "__main__":
  main()
