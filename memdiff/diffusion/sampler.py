"""The reverse process: every sampler is one `lax.scan` over a table of coefficients.

A sampler visits N of the T steps, from the noisiest down, and goes from step t to the next visited
step s < t with coefficients computed for that very stride; a one-step posterior applied to strided
steps is wrong (a distribution N(1, 0.3^2) comes out as N(0.18, 0.89^2)). The last stride ends at
abar = 1, the clean sample. With x0 as the denoiser's output implies it:

- `ddpm`, ancestral with the posterior variance: DDPM eq. 7 for the stride,
  sigma^2 = (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s);
- `ddpm_beta`, the same mean with sigma^2 = 1 - abar_t / abar_s (beta_t at stride one);
- `ddim`: Song et al., "Denoising diffusion implicit models", 2021, eq. 12 with sigma = 0;
- `dpm++`: DPM-Solver++(2M), Lu et al. 2022, algorithm 2, which extrapolates x0 linearly in
  log-SNR from the previous step; its steps are even in log-SNR and its last one is first order.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memdiff.diffusion import objectives
from memdiff.diffusion.schedules import NoiseSchedule
from memdiff.runtime.random import normal

SAMPLERS = ("ddpm", "ddpm_beta", "ddim", "dpm++")


def visited_steps(num_train_steps: int, num_steps: int) -> np.ndarray:
  """`num_steps` step indices from T - 1 down to 0, evenly spaced. [N] int."""
  return np.round(np.linspace(num_train_steps - 1, 0, num_steps)).astype(int)


def steps_even_in_log_snr(alphas_bar: np.ndarray, num_steps: int) -> np.ndarray:
  """Distinct step indices from T - 1 down to 0, evenly spaced in log-SNR. [N] int.

  DPM-Solver's expansion is in log-SNR; steps even in t make its last strides many times its first,
  and the extrapolation overshoots.
  """
  log_snr = 0.5 * np.log(alphas_bar / (1 - alphas_bar))  # [T], falling
  wanted = np.linspace(log_snr[-1], log_snr[0], num_steps)
  t = np.abs(log_snr[None] - wanted[:, None]).argmin(axis=1)
  for i in range(1, num_steps):  # neighbours may share a nearest step
    t[i] = min(t[i], t[i - 1] - 1)
  t[-1] = 0
  for i in range(num_steps - 2, -1, -1):
    t[i] = max(t[i], t[i + 1] + 1)
  return t


def coefficients(
  schedule: NoiseSchedule, method: str, num_steps: int, prediction: str = "eps"
) -> dict[str, np.ndarray]:
  """The table of a sampler, one row per visited step.

  A step is x0 = from_x x + from_output output; then, with the previous step's x0',
  x <- keep x + pull (x0 + extrapolate (x0 - x0')) + sigma z.

  Returns:
    {"t", "from_x", "from_output", "keep", "pull", "extrapolate", "sigma"}, each [N] float64.
  """
  if method == "dpm++":
    t = steps_even_in_log_snr(schedule.alphas_bar, num_steps)
  else:
    t = visited_steps(schedule.num_steps, num_steps)
  now = schedule.alphas_bar[t]  # abar_t
  then = np.append(now[1:], 1.0)  # abar_s
  beta = 1 - now / then  # of the stride
  extrapolate, sigma = np.zeros(num_steps), np.zeros(num_steps)
  if method in ("ddpm", "ddpm_beta"):
    keep = np.sqrt(now / then) * (1 - then) / (1 - now)
    pull = np.sqrt(then) * beta / (1 - now)
    posterior = (1 - then) / (1 - now) * beta
    sigma = np.sqrt(posterior if method == "ddpm" else beta * (then < 1))
  else:
    keep = np.sqrt((1 - then) / (1 - now))
    pull = np.sqrt(then) - keep * np.sqrt(now)
  if method == "dpm++" and num_steps > 2:
    log_snr = 0.5 * np.log(now / (1 - now))
    stride = np.diff(log_snr)  # h_1, ..., h_{N-1}
    extrapolate[1:-1] = stride[1:] / (2 * stride[:-1])
  from_x, from_output = objectives.x0_weights(prediction, np.sqrt(now), np.sqrt(1 - now))
  return {
    "t": t.astype(float),
    "from_x": from_x,
    "from_output": from_output,
    "keep": keep,
    "pull": pull,
    "extrapolate": extrapolate,
    "sigma": sigma,
  }


@dataclasses.dataclass(frozen=True)
class Solver:
  """How the reverse process is solved.

  Attributes:
    method: one of SAMPLERS.
    num_steps: visited steps N, 2 <= N <= T.
    prediction: what the denoiser predicts, one of objectives.PREDICTIONS.
    x0_limit: clips every predicted x0 to [-x0_limit, x0_limit]. At the first steps of a schedule
      that ends in pure noise, x0 is the difference of two large numbers; data of known range need
      not suffer from it. 0 leaves x0 alone.
    last: how many of the last predicted x0 are given beside the samples.
  """

  method: str
  num_steps: int
  prediction: str = "eps"
  x0_limit: float = 0.0
  last: int = 0


def sample(
  predict: Callable[[jax.Array, jax.Array], jax.Array],
  schedule: NoiseSchedule,
  shape: tuple[int, ...],
  key: jax.Array,
  solver: Solver,
  *,
  origin: jax.Array | None = None,
  start: float | jax.Array = 1.0,
  noise: jax.Array | None = None,
) -> Any:
  """Draws samples; pure, to be called inside jit.

  Args:
    predict: (x [B, ...], t [1] in [0, 1000), the time of all rows) -> the denoiser's output
      [B, ...].
    schedule: of the training.
    shape: (B, ...) of the samples.
    key: of the initial noise and of every step.
    solver: the method and its steps.
    origin: [B, ...] samples to begin from, not noise alone (SDEdit, Meng et al. 2022): as long
      as t is `start` T or more, x0 is taken to be `origin`, so that x_t is a draw from
      q(x_t | origin), whatever the method.
    start: in [0, 1], may be traced: 0 gives `origin` back, 1 nearly forgets it.
    noise: [B, ...] to begin with; None: drawn from `key`. Its gradient computes every step anew, so
      that it needs the memory of one.

  Returns:
    Samples x_0, [B, ...] float32; with `solver.last`, (samples, predicted x0 [last, B, ...]).
  """
  start_key, step_key = jax.random.split(key)
  x = normal(start_key, shape) if noise is None else noise
  table = coefficients(schedule, solver.method, solver.num_steps, solver.prediction)
  rows = {name: jnp.asarray(column, jnp.float32) for name, column in table.items()}
  rows["index"] = jnp.arange(solver.num_steps)
  rows["previous_t"] = jnp.concatenate([jnp.array([jnp.inf]), rows["t"][:-1]])
  stochastic = bool(table["sigma"].any())

  def step(carry, row):
    x, previous_x0 = carry
    t = model_time(row["t"], schedule)[None]
    x0 = row["from_x"] * x + row["from_output"] * predict(x, t)
    if solver.x0_limit:
      x0 = jnp.clip(x0, -solver.x0_limit, solver.x0_limit)
    extrapolate = row["extrapolate"]
    if origin is not None:
      begin = start * schedule.num_steps
      x0 = jnp.where(row["t"] >= begin, origin, x0)
      # The first predicted x0 has none before it, from which it could be extrapolated.
      extrapolate = jnp.where(row["previous_t"] >= begin, 0.0, extrapolate)
    x = row["keep"] * x + row["pull"] * (x0 + extrapolate * (x0 - previous_x0))
    if stochastic:
      z = normal(jax.random.fold_in(step_key, row["index"]), shape)
      x = x + row["sigma"] * z
    return (x, x0), x0 if solver.last else None

  if noise is not None:
    step = jax.checkpoint(step)
  (x, _), predicted = jax.lax.scan(step, (x, jnp.zeros(shape)), rows)
  return (x, predicted[-solver.last :]) if solver.last else x


def sample_in_chunks(
  make_predict: Callable[[Any], Callable[[jax.Array, jax.Array], jax.Array]],
  conditions: Any,
  schedule: NoiseSchedule,
  shape: tuple[int, ...],
  key: jax.Array,
  solver: Solver,
  *,
  origin: jax.Array | None = None,
  start: float | jax.Array = 1.0,
) -> jax.Array:
  """`sample`, one chunk after the other in one compiled program, which bounds the memory.

  Args:
    make_predict: conditions of a chunk -> `predict` of `sample`.
    conditions: arrays that lead with N chunks.
    schedule, solver, start: see `sample`.
    shape: (B, ...) of a chunk.
    key: each chunk's is folded in by its number.
    origin: [N, B, ...] or None, see `sample`.

  Returns:
    [N B, ...] float32.
  """
  num_chunks = jax.tree.leaves(conditions)[0].shape[0]

  def sample_chunk(arguments):
    number, conditions, origin = arguments
    predict, own_key = make_predict(conditions), jax.random.fold_in(key, number)
    return sample(predict, schedule, shape, own_key, solver, origin=origin, start=start)

  samples = jax.lax.map(sample_chunk, (jnp.arange(num_chunks), conditions, origin))
  return samples.reshape(num_chunks * shape[0], *shape[1:])


def model_time(t: jax.Array, schedule: NoiseSchedule) -> jax.Array:
  """Step index -> the time a denoiser sees, in [0, 1000) whatever T is."""
  return t.astype(jnp.float32) * (1000.0 / schedule.num_steps)
