"""Samplers against closed forms: exact Gaussian data, and the papers' own formulas."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdiff.diffusion import objectives, sampler
from memdiff.diffusion.sampler import SAMPLERS, Solver, coefficients, visited_steps
from memdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig

MEAN, STD = 1.0, 0.3  # of the data x0 in all closed-form checks
NUM_SAMPLES = 20_000


def make_schedule(name="linear", num_steps=1000):
  return NoiseSchedule(ScheduleConfig(name, num_steps))


def exact_denoiser(schedule):
  """The noise that the best denoiser of x0 ~ N(MEAN, STD^2) predicts."""
  table = jnp.asarray(schedule.alphas_bar, jnp.float32)

  def predict(x, t):
    index = jnp.round(t * schedule.num_steps / 1000).astype(int)
    abar = table[index].reshape(-1, *[1] * (x.ndim - 1))
    gain = STD**2 * jnp.sqrt(abar) / (STD**2 * abar + 1 - abar)
    x0 = MEAN + gain * (x - jnp.sqrt(abar) * MEAN)
    return (x - jnp.sqrt(abar) * x0) / jnp.sqrt(1 - abar)

  return predict


@functools.partial(jax.jit, static_argnames=("schedule", "shape", "method", "num_steps", "limit"))
def draw(key, schedule, shape, method, num_steps, limit=0.0):
  predict = exact_denoiser(schedule)
  return sampler.sample(predict, schedule, shape, key, Solver(method, num_steps, x0_limit=limit))


def is_the_data_distribution(samples, tolerance):
  """Whether `samples` have the mean and the deviation of the data."""
  samples = np.asarray(samples)
  error = 5 * STD / math.sqrt(samples.size)
  return abs(samples.mean() - MEAN) < error + 0.003 and abs(samples.std() - STD) < tolerance


def step_moments(schedule, method, num_steps):
  """(mean, std) that a textbook sampler gives with the exact denoiser, by a scalar recursion."""
  abars = [*schedule.alphas_bar[visited_steps(schedule.num_steps, num_steps)], 1.0]
  mean, variance = 0.0, 1.0
  for now, then in itertools.pairwise(abars):
    gain = STD**2 * math.sqrt(now) / (STD**2 * now + 1 - now)
    offset = MEAN - gain * math.sqrt(now) * MEAN
    if then == 1.0:
      keep, pull, added = 0.0, 1.0, 0.0
    elif method == "ddim":  # x_s = sqrt(abar_s) x0 + sqrt(1 - abar_s) eps
      keep = math.sqrt(1 - then) / math.sqrt(1 - now)
      pull, added = math.sqrt(then) - keep * math.sqrt(now), 0.0
    else:  # Bayes' rule: x_s | x0 is N(sqrt(abar_s) x0, 1 - abar_s), and x_t | x_s Gaussian too
      alpha = now / then
      precision = 1 / (1 - then) + alpha / (1 - alpha)
      keep = math.sqrt(alpha) / (1 - alpha) / precision
      pull = math.sqrt(then) / (1 - then) / precision
      added = 1 / precision if method == "ddpm" else 1 - alpha
    mean = keep * mean + pull * (gain * mean + offset)
    variance = (keep + pull * gain) ** 2 * variance + added
  return mean, math.sqrt(variance)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize(
  ("method", "num_steps", "tolerance"),
  [("ddpm", 1000, 0.009), ("ddpm_beta", 1000, 0.009), ("ddim", 50, 0.03), ("dpm++", 20, 0.025),
   ("ddpm", 50, 0.055), ("ddim", 1000, 0.006)],
)  # fmt: skip
def test_samplers_reproduce_the_data_of_an_exact_denoiser(name, method, num_steps, tolerance):
  schedule = make_schedule(name)
  samples = draw(jax.random.key(0), schedule, (NUM_SAMPLES, 1), method, num_steps)
  assert is_the_data_distribution(samples, tolerance), (samples.mean(), samples.std())


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("method", ["ddpm", "ddpm_beta", "ddim"])
@pytest.mark.parametrize("num_steps", [10, 50])
def test_strided_samplers_have_the_moments_of_the_textbook_recursion(name, method, num_steps):
  schedule = make_schedule(name)
  samples = np.asarray(draw(jax.random.key(1), schedule, (NUM_SAMPLES, 1), method, num_steps))
  mean, std = step_moments(schedule, method, num_steps)
  assert samples.mean() == pytest.approx(mean, abs=4.5 * std / math.sqrt(NUM_SAMPLES))
  assert samples.std() == pytest.approx(std, abs=4.5 * std / math.sqrt(2 * NUM_SAMPLES))


def test_a_one_step_posterior_with_strided_steps_is_caught():
  """The classic mistake: DDPM's coefficients of t -> t - 1, used to go from t to t - 20."""
  schedule = make_schedule()
  abars = np.append(schedule.alphas_bar, 1.0)  # index -1 is the clean sample
  predict, rng = exact_denoiser(schedule), np.random.default_rng(0)
  x = rng.normal(size=(NUM_SAMPLES, 1))
  for t in visited_steps(1000, 50):
    now, before = abars[t], abars[t - 1]
    beta = 1 - now / before
    eps = np.asarray(predict(x.astype(np.float32), jnp.full(NUM_SAMPLES, float(t))), float)
    x0 = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
    x = (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * x) / (1 - now)
    x = x + math.sqrt((1 - before) / (1 - now) * beta) * rng.normal(size=x.shape)
  assert x.mean() == pytest.approx(0.175, abs=0.02) and x.std() == pytest.approx(0.892, abs=0.015)
  assert not is_the_data_distribution(x, 0.055)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_fast_solver_is_more_accurate_than_ddim_at_equal_work(name):
  error = {}
  for method in ("ddim", "dpm++"):
    samples = draw(jax.random.key(0), make_schedule(name), (NUM_SAMPLES, 1), method, 20)
    error[method] = abs(float(samples.std()) - STD)
  assert error["dpm++"] < 0.5 * error["ddim"]


# --- coefficients ----------------------------------------------------------------------------


def test_full_length_ddpm_is_equation_7_of_ddpm():
  betas = np.linspace(1e-4, 0.02, 1000)
  abar = np.cumprod(1 - betas)
  before = np.concatenate([[1.0], abar[:-1]])
  table = coefficients(make_schedule(), "ddpm", 1000)
  down = slice(None, None, -1)  # the table runs from the noisiest step
  np.testing.assert_array_equal(table["t"], np.arange(1000)[down])
  pull = (np.sqrt(before) * betas / (1 - abar))[down]
  keep = (np.sqrt(1 - betas) * (1 - before) / (1 - abar))[down]
  variance = ((1 - before) / (1 - abar) * betas)[down]
  np.testing.assert_allclose(table["pull"], pull, rtol=1e-9)
  np.testing.assert_allclose(table["keep"], keep, rtol=1e-9, atol=1e-15)
  np.testing.assert_allclose(table["sigma"] ** 2, variance, rtol=1e-9, atol=1e-15)
  literal = coefficients(make_schedule(), "ddpm_beta", 1000)["sigma"]
  np.testing.assert_allclose(literal[:-1] ** 2, betas[down][:-1], rtol=1e-9)
  assert literal[-1] == 0


@given(
  st.sampled_from(["linear", "cosine"]), st.sampled_from(SAMPLERS), st.integers(2, 400), st.data()
)
def test_every_table_ends_at_the_predicted_clean_sample(name, method, total, data):
  num_steps = data.draw(st.integers(2, total))
  table = coefficients(make_schedule(name, total), method, num_steps)
  assert all(np.isfinite(column).all() and len(column) == num_steps for column in table.values())
  assert table["keep"][-1] == pytest.approx(0, abs=1e-12)
  assert table["pull"][-1] == pytest.approx(1)
  assert table["sigma"][-1] == 0 and table["extrapolate"][-1] == 0


@given(st.integers(2, 2000), st.data())
def test_visited_steps_fall_evenly_from_the_last_to_the_first(total, data):
  num_steps = data.draw(st.integers(2, total))
  steps = visited_steps(total, num_steps)
  strides = -np.diff(steps)
  assert steps[0] == total - 1 and steps[-1] == 0 and len(steps) == num_steps
  assert strides.min() >= 1 and strides.max() - strides.min() <= 1


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("num_steps", [7, 50])
def test_ddim_is_equation_12_with_sigma_zero(name, num_steps):
  schedule = make_schedule(name)
  table = coefficients(schedule, "ddim", num_steps)
  steps = visited_steps(1000, num_steps)
  x, eps = 0.7, -1.3
  for row in range(num_steps):
    now = schedule.alphas_bar[steps[row]]
    then = schedule.alphas_bar[steps[row + 1]] if row + 1 < num_steps else 1.0
    x0 = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
    expected = math.sqrt(then) * x0 + math.sqrt(1 - then) * eps
    assert table["keep"][row] * x + table["pull"][row] * x0 == pytest.approx(expected, rel=1e-6)
    assert table["from_x"][row] * x + table["from_output"][row] * eps == pytest.approx(x0)
  assert not table["sigma"].any() and not table["extrapolate"].any()


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("num_steps", [2, 3, 10])
def test_dpm_solver_is_algorithm_2_in_log_snr(name, num_steps):
  """The table walks like DPM-Solver++(2M) written in alpha, sigma and lambda."""
  schedule = make_schedule(name)
  table = coefficients(schedule, "dpm++", num_steps)
  abar = schedule.alphas_bar[table["t"].astype(int)]
  alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
  lam = np.log(alpha / sigma)
  data = np.random.default_rng(0).normal(size=num_steps)  # any sequence of predicted x0
  walk = [0.4]
  for i in range(1, num_steps):
    h = lam[i] - lam[i - 1]
    mixed = data[i - 1]
    if i > 1:
      r = (lam[i - 1] - lam[i - 2]) / h
      mixed = (1 + 1 / (2 * r)) * data[i - 1] - 1 / (2 * r) * data[i - 2]
    walk.append(sigma[i] / sigma[i - 1] * walk[-1] - alpha[i] * math.expm1(-h) * mixed)
  walk.append(data[-1])  # lambda -> infinity, first order
  x, previous = 0.4, 0.0
  for row in range(num_steps):
    slope = table["extrapolate"][row] * (data[row] - previous)
    x = table["keep"][row] * x + table["pull"][row] * (data[row] + slope)
    previous = data[row]
    assert x == pytest.approx(walk[row + 1], rel=1e-9, abs=1e-12)


# --- sample ----------------------------------------------------------------------------------


def numpy_sample(predict, schedule, x, method, num_steps):
  """The documented recursion for samplers without noise, as a Python loop."""
  table = coefficients(schedule, method, num_steps)
  previous = np.zeros_like(x)
  for row in range(num_steps):
    c = {name: column[row] for name, column in table.items()}
    t = np.full(len(x), c["t"] * 1000 / schedule.num_steps)
    x0 = c["from_x"] * x + c["from_output"] * predict(x, t, np)
    x = c["keep"] * x + c["pull"] * (x0 + c["extrapolate"] * (x0 - previous))
    previous = x0
  return x


@pytest.mark.parametrize("method", ["ddim", "dpm++"])
def test_the_scan_equals_a_plain_loop_for_a_curved_denoiser(method):
  schedule = make_schedule("linear", 40)

  def predict(x, t, xp=jnp):
    return xp.tanh(x) + (t[:, None] / 1000 - 0.5) * xp.cos(2 * x)

  key = jax.random.key(5)
  first = []

  def spy(x, t):
    jax.debug.callback(lambda x: first.append(np.asarray(x)), x, ordered=True)
    return predict(x, t)

  samples = sampler.sample(spy, schedule, (6, 3), key, Solver(method, 9))
  jax.effects_barrier()
  assert len(first) == 9
  expected = numpy_sample(predict, schedule, first[0].astype(float), method, 9)
  np.testing.assert_allclose(samples, expected, rtol=2e-3, atol=2e-4)


def test_noise_velocity_and_clean_sample_are_one_and_the_same_process():
  """The exact denoiser, asked for either of the three, draws the same samples."""
  schedule = make_schedule("cosine", 100)
  predict_noise = exact_denoiser(schedule)
  table = jnp.asarray(schedule.alphas_bar, jnp.float32)

  def predict(prediction, x, t):
    abar = table[jnp.round(t / 10).astype(int)][:, None]
    signal, noise = jnp.sqrt(abar), jnp.sqrt(1 - abar)
    eps = predict_noise(x, t)
    x0 = (x - noise * eps) / signal
    return {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}[prediction]

  samples = {}
  for name in objectives.PREDICTIONS:
    samples[name] = sampler.sample(
      functools.partial(predict, name),
      schedule,
      (300, 2),
      jax.random.key(0),
      Solver("ddim", 12, prediction=name),
    )
  np.testing.assert_allclose(samples["v"], samples["eps"], atol=5e-3)
  np.testing.assert_allclose(samples["x0"], samples["eps"], atol=5e-3)
  assert float(samples["v"].std()) == pytest.approx(STD, abs=0.07)  # 12 steps


@pytest.mark.parametrize("method", ["ddpm", "dpm++"])
def test_images_and_vectors_go_through_the_same_process(method):
  schedule = make_schedule("cosine")
  key = jax.random.key(3)
  vectors = draw(key, schedule, (400, 12), method, 12)
  images = draw(key, schedule, (400, 2, 3, 2), method, 12)
  assert images.shape == (400, 2, 3, 2) and images.dtype == jnp.float32
  assert vectors.mean() == pytest.approx(float(images.mean()), abs=0.03)
  assert vectors.std() == pytest.approx(float(images.std()), abs=0.03)
  for samples in (vectors, images):  # neighbours are independent draws
    flat = np.asarray(samples).reshape(400, -1)
    off_diagonal = np.corrcoef(flat.T) - np.eye(12)
    assert np.abs(off_diagonal).max() < 5 / math.sqrt(400)


@pytest.mark.parametrize("total", [10, 1000, 4000])
def test_denoisers_see_times_below_a_thousand_whatever_the_length(total):
  schedule = make_schedule("cosine", total)
  seen = []

  def spy(x, t):
    jax.debug.callback(lambda t: seen.append(np.asarray(t)), t, ordered=True)
    return x

  sampler.sample(spy, schedule, (2, 1), jax.random.key(0), Solver("ddim", 5))
  jax.effects_barrier()
  expected = visited_steps(total, 5) * 1000 / total
  np.testing.assert_allclose(np.array(seen), expected[:, None], rtol=1e-6)  # [1] for all rows


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_the_limit_clips_predicted_clean_samples(method):
  schedule = make_schedule("cosine")
  free = draw(jax.random.key(4), schedule, (500, 2), method, 10)
  clipped = draw(jax.random.key(4), schedule, (500, 2), method, 10, limit=1.1)
  assert float(jnp.abs(free).max()) > 1.2
  assert float(jnp.abs(clipped).max()) <= 1.1 + 1e-6


def test_samples_depend_on_the_key_alone():
  schedule = make_schedule("cosine")
  one, again, other = (
    draw(jax.random.key(k), schedule, (50, 2), "ddpm", 10) for k in (0, 0, 1)
  )  # fmt: skip
  np.testing.assert_array_equal(one, again)
  assert not np.allclose(one, other)


# --- from a sample instead of from noise -----------------------------------------------------


@functools.partial(jax.jit, static_argnames=("schedule", "method", "num_steps"))
def draw_from(key, origin, start, schedule, method, num_steps):
  return sampler.sample(
    exact_denoiser(schedule),
    schedule,
    origin.shape,
    key,
    Solver(method, num_steps),
    origin=origin,
    start=start,
  )


@pytest.mark.parametrize("start", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_from_an_origin_samples_are_what_the_noised_origin_may_have_been(method, start):
  """ddpm draws from p(x0 | x_t); ddim follows the probability flow; x_t ~ q(x_t | origin)."""
  schedule, origin = make_schedule(), 1.8
  abar = schedule.alphas_bar[round(1000 * start) - 1]
  spread = STD**2 * abar + 1 - abar  # of x_t over the data
  if method == "ddpm":
    gain = STD**2 * math.sqrt(abar) / spread
    variance = STD**2 * (1 - abar) / spread + gain**2 * (1 - abar)
  else:
    gain = STD / math.sqrt(spread)
    variance = gain**2 * (1 - abar)
  mean = MEAN + gain * math.sqrt(abar) * (origin - MEAN)
  origins = jnp.full((NUM_SAMPLES, 1), origin)
  samples = np.asarray(draw_from(jax.random.key(0), origins, start, schedule, method, 1000))
  assert samples.mean() == pytest.approx(mean, abs=0.012)
  assert samples.std() == pytest.approx(math.sqrt(variance), abs=0.012)


@pytest.mark.parametrize("method", SAMPLERS)
def test_no_noise_gives_the_origin_back_and_full_noise_forgets_it(method):
  schedule = make_schedule("cosine")
  origins = jax.random.normal(jax.random.key(1), (2000, 1)) - 3
  same = draw_from(jax.random.key(0), origins, 0.0, schedule, method, 50)
  np.testing.assert_allclose(same, origins, atol=1e-5)
  far = np.asarray(draw_from(jax.random.key(0), origins, 1.0, schedule, method, 50))
  plain = np.asarray(draw(jax.random.key(0), schedule, (2000, 1), method, 50))
  np.testing.assert_allclose(far, plain, atol=0.05)


@pytest.mark.parametrize("start", [0.3, 0.7])
def test_dpm_solver_begins_at_the_origin_without_a_history(start):
  """It goes on from x_t of the origin as DPM-Solver++(2M) begins: with a step of first order."""
  schedule, num_steps = make_schedule("cosine"), 12
  table = coefficients(schedule, "dpm++", num_steps, "x0")
  key, origin = jax.random.key(5), np.random.default_rng(0).normal(size=(4, 3))

  def predict(x, t, m):
    return m.tanh(x) + 0.5 + t[:, None] / 1000

  samples = sampler.sample(
    lambda x, t: predict(x, t, jnp), schedule, origin.shape, key,
    Solver("dpm++", num_steps, "x0"), origin=jnp.asarray(origin, jnp.float32), start=start,
  )  # fmt: skip
  x = np.asarray(sampler.normal(jax.random.split(key)[0], origin.shape), float)
  previous = None
  for row in range(num_steps):
    c = {name: column[row] for name, column in table.items()}
    if c["t"] >= start * schedule.num_steps:
      x = c["keep"] * x + c["pull"] * origin
      continue
    x0 = predict(x, np.array([c["t"] * 1000 / schedule.num_steps]), np)
    towards = x0 if previous is None else x0 + c["extrapolate"] * (x0 - previous)
    x, previous = c["keep"] * x + c["pull"] * towards, x0
  np.testing.assert_allclose(samples, x, atol=1e-5)


def test_several_starts_share_a_program_and_equal_each_alone():
  schedule, starts = make_schedule("cosine"), jnp.array([0.2, 0.5, 1.0])
  origins = jax.random.normal(jax.random.key(1), (8, 3))
  run = functools.partial(draw_from, schedule=schedule, method="dpm++", num_steps=10)
  together = jax.vmap(lambda start: run(jax.random.key(0), origins, start))(starts)
  for start, samples in zip(starts, together, strict=True):
    alone = run(jax.random.key(0), origins, start)
    np.testing.assert_allclose(samples, alone, atol=1e-5)
