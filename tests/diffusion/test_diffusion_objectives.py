"""Terms of the denoiser's loss against NumPy; what each changes, and what is left without them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memdiff.diffusion import denoiser_training, objectives, sampler
from memdiff.diffusion.denoiser_training import Batch, TrainingConfig
from memdiff.diffusion.sampler import model_time
from memdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from memdiff.diffusion.terms import PROJECTION, ObjectiveConfig
from memdiff.memory import memory_bank
from memdiff.runtime.random import stream
from memdiff.runtime.train_state import OptimizerConfig
from memdiff.synthesis.denoisers import DenoiserConfig
from memdiff.synthesis.feature_diffusion import DENOISERS
from tests.support import normal

BATCH, DIM, WIDTH, STEPS = 8, 5, 6, 40
CONFIG = TrainingConfig(
  schedule=ScheduleConfig("cosine", STEPS),
  prediction="v",
  objective=ObjectiveConfig(),
  ema_decay=0.9,
  num_steps=10,
  optimizer=OptimizerConfig("adamw", 1e-2, "cosine", (), (), 0.9, False, 0.0, 0.05, 1.0, 1),
)


def change(loss="mse", min_snr=0.0, prediction="v", **groups):
  """CONFIG with these settings; a group is a dict of its changed fields."""
  changed = {n: dataclasses.replace(getattr(CONFIG.objective, n), **g) for n, g in groups.items()}
  objective = ObjectiveConfig(loss=loss, min_snr=min_snr, **changed)
  return dataclasses.replace(CONFIG, objective=objective, prediction=prediction)


# --- formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", objectives.PREDICTIONS)
def test_the_target_of_each_prediction_gives_the_noise_back(prediction):
  rng = np.random.default_rng(1)
  x0, eps = rng.normal(size=(2, 5, 3, 2))
  abar = rng.uniform(0.1, 0.9, size=(5, 1, 1))
  signal, noise = np.sqrt(abar), np.sqrt(1 - abar)
  target = objectives.target(prediction, x0, eps, signal, noise)
  a, b = objectives.eps_weights(prediction, signal, noise)
  np.testing.assert_allclose(a * (signal * x0 + noise * eps) + b * target, eps, atol=1e-9)


@pytest.mark.parametrize("prediction", objectives.PREDICTIONS)
@given(abar=st.floats(1e-4, 1 - 1e-4), gamma=st.sampled_from([0.5, 5.0, 20.0]))
def test_min_snr_is_the_same_weight_of_x0_errors_for_every_prediction(prediction, abar, gamma):
  signal, noise = np.sqrt(abar), np.sqrt(1 - abar)
  snr = abar / (1 - abar)
  weight = float(objectives.min_snr_weights(prediction, signal, noise, gamma))
  of_paper = {"x0": min(snr, gamma), "eps": min(snr, gamma) / snr, "v": min(snr, gamma) / (snr + 1)}
  assert weight == pytest.approx(of_paper[prediction], rel=1e-5)
  _, slope = objectives.x0_weights(prediction, signal, noise)  # x0 error = slope x output error
  assert weight / slope**2 == pytest.approx(min(snr, gamma), rel=1e-5)


def infonce(eps_hat, eps, temperature):
  rows = []
  for i in range(len(eps)):
    a = eps_hat[i].ravel()
    cosines = [a @ e.ravel() / np.linalg.norm(a) / np.linalg.norm(e) for e in eps]
    odds = np.exp(np.array(cosines) / temperature)
    rows.append(-np.log(odds[i] / odds.sum()))
  return np.array(rows)


@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 2, 2)])
@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_infonce_is_the_log_chance_of_picking_the_own_noise(shape, temperature):
  rng = np.random.default_rng(0)
  eps = rng.normal(size=shape).astype(np.float32)
  eps_hat = (0.6 * eps + 0.5 * rng.normal(size=shape)).astype(np.float32)
  value = objectives.infonce(jnp.asarray(eps_hat), jnp.asarray(eps), temperature)
  expected = infonce(eps_hat.astype(float), eps.astype(float), temperature)
  np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)
  longer = objectives.infonce(jnp.asarray(3 * eps_hat), jnp.asarray(eps), temperature)
  np.testing.assert_allclose(longer, value, rtol=1e-4, atol=1e-5)  # blind to the length


def test_infonce_of_nothing_predicted_is_log_batch_with_a_gradient():
  eps = jax.random.normal(jax.random.key(0), (6, 4))
  value, gradient = jax.value_and_grad(lambda x: objectives.infonce(x, eps, 0.1).mean())(0 * eps)
  assert float(value) == pytest.approx(np.log(6), rel=1e-5)
  assert np.isfinite(gradient).all() and (np.abs(gradient).max(axis=1) > 0).all()


def test_supcon_weighs_most_where_there_is_least_noise():
  time = np.array([0.0, 0.25, 0.9])
  weights = objectives.supcon_weights(jnp.asarray(time), 0.5, 0.3)
  np.testing.assert_allclose(weights, 0.5 * np.exp((1 - time) / 0.3), rtol=1e-5)


def test_class_balance_pulls_both_predictions_each_by_its_share():
  rng = np.random.default_rng(0)
  a, b = (jnp.asarray(x) for x in rng.normal(size=(2, 4, 3, 2)).astype(np.float32))
  time = jnp.array([0.0, 0.2, 0.5, 0.9])
  value = objectives.class_balance(a, b, time, 0.25)
  gap = np.asarray((a - b) ** 2).reshape(4, -1).mean(axis=1)
  np.testing.assert_allclose(value, np.asarray(time) * 1.25 * gap, rtol=1e-5)
  gradients = jax.grad(lambda *x: objectives.class_balance(*x, time, 0.25).sum(), (0, 1))(a, b)
  pull = np.asarray(2 * (a - b) / 6 * time[:, None, None])
  np.testing.assert_allclose(gradients[0], pull, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(gradients[1], -0.25 * pull, rtol=1e-5, atol=1e-7)


# --- terms of the loss -----------------------------------------------------------------------


class Toy(nn.Module):
  """Linear in everything that it is given; the bottleneck is a linear map too."""

  @nn.compact
  def __call__(self, x_t, t, label, memory):
    size = x_t.shape[1]
    told = jnp.concatenate([x_t, memory, t[:, None] / 1000, label[:, None] / 3], axis=1)
    return nn.Dense(size, name="out")(told), nn.Dense(WIDTH, name="neck")(told)


def make_batch():
  return Batch(
    x0=normal(0, BATCH, DIM), label=jnp.array([0, 1, 2, 3, 3, 0, 1, 3]),
    memory=normal(1, BATCH, 2), true_label=jnp.array([0, 1, 2, 0, 1, 0, 1, 7]),
    other_label=jnp.array([1, 1, 0, 3, 3, 2, 0, 3]), other_memory=normal(2, BATCH, 2),
  )  # fmt: skip


T, EPS = jnp.array([0, 3, 8, 15, 20, 28, 35, 39]), normal(3, BATCH, DIM)


def params_of(config, denoiser=None, batch=None):
  batch = batch or make_batch()
  init = jax.jit(lambda key: denoiser_training.init_params(key, config, denoiser or Toy(), batch))
  return init(jax.random.key(0))


def terms_of(config, params=None):
  params = params or params_of(config)
  return jax.jit(lambda p: denoiser_training.loss_terms(config, Toy(), p, make_batch(), T, EPS))(
    params
  )


def numpy_terms(config, params):
  """What the docstrings promise, row by row."""
  b, o = jax.tree.map(np.asarray, make_batch()), config.objective
  params = jax.tree.map(np.asarray, params)
  abar = NoiseSchedule(config.schedule).alphas_bar[np.asarray(T)][:, None]
  s, n, eps, time = np.sqrt(abar), np.sqrt(1 - abar), np.asarray(EPS), np.asarray(T) / STEPS
  x_t = s * b.x0 + n * eps
  wanted = {"eps": eps, "x0": b.x0, "v": s * eps - n * b.x0}[config.prediction]

  def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]

  def denoise(label, memory):
    told = np.concatenate([x_t, memory, time[:, None], label[:, None] / 3], axis=1)
    output = dense(params["out"], told)
    x0 = {"eps": (x_t - n * output) / s, "x0": output, "v": s * x_t - n * output}[config.prediction]
    return output, (x_t - s * x0) / n, dense(params["neck"], told)

  output, eps_hat, neck = denoise(b.label, b.memory)
  squared = ((output - wanted) ** 2).mean(axis=1)
  if o.min_snr:
    snr = (abar / (1 - abar))[:, 0]
    divide = {"eps": snr, "x0": 1, "v": snr + 1}[config.prediction]
    squared = np.minimum(snr, o.min_snr) / divide * squared
  terms = {"mse": squared.mean()}
  if o.loss == "infonce":
    terms["mse"] *= o.infonce.mse_weight
    terms["infonce"] = infonce(eps_hat, eps, o.infonce.temperature).mean()
  if o.supcon.weight:
    z = dense(params[PROJECTION], neck)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    anchors = []
    for i, label in enumerate(b.true_label):
      others = [j for j in range(BATCH) if j != i]
      own = [j for j in others if b.true_label[j] == label]
      below = sum(np.exp(z[i] @ z[j] / o.supcon.temperature) for j in others)
      lam = o.supcon.weight * np.exp((1 - time[i]) / o.supcon.decay)
      if own:
        odds = [np.exp(z[i] @ z[j] / o.supcon.temperature) / below for j in own]
        anchors.append(-lam * np.mean(np.log(odds)))
    terms["supcon"] = np.mean(anchors)
  if o.cbdm.weight:
    gap = ((eps_hat - denoise(b.other_label, b.other_memory)[1]) ** 2).mean(axis=1)
    terms["cbdm"] = o.cbdm.weight * ((1 + o.cbdm.commitment) * time * gap).mean()
  return terms


CASES = {
  "plain": change(),
  "min_snr": change(min_snr=2.0),
  "infonce": change(loss="infonce"),
  "infonce, scaled": change(loss="infonce", min_snr=5.0, infonce={"mse_weight": 0.3}),
  "supcon": change(supcon={"weight": 0.5, "temperature": 0.4}),
  "cbdm": change(cbdm={"weight": 2.0}),
  "cbdm, no commitment": change(cbdm={"weight": 1.0, "commitment": 0.0}),
  "all": change(loss="infonce", min_snr=5.0, supcon={"weight": 0.5}, cbdm={"weight": 1.0}),
}


@pytest.mark.parametrize("prediction", objectives.PREDICTIONS)
@pytest.mark.parametrize("case", CASES)
def test_terms_equal_their_formulas(case, prediction):
  config = dataclasses.replace(CASES[case], prediction=prediction)
  terms, expected = terms_of(config), numpy_terms(config, params_of(config))
  assert set(terms) == set(expected)
  for name, value in expected.items():
    assert float(terms[name]) == pytest.approx(value, rel=2e-3, abs=1e-5), name


@pytest.mark.parametrize("case", [name for name in CASES if name != "plain"])
def test_every_term_changes_the_gradient(case):
  config = CASES[case]
  params = params_of(config)

  def gradient(config):
    def loss(params):
      return sum(denoiser_training.loss_terms(config, Toy(), params, make_batch(), T, EPS).values())

    return jax.jit(jax.grad(loss))(params)

  ours, plain = gradient(config), gradient(CONFIG)
  changed = {
    name: float(jnp.abs(ours[name]["kernel"] - plain[name]["kernel"]).max()) for name in params
  }
  reached = {"neck", PROJECTION} if case == "supcon" else {"out"}
  if case == "all":
    reached = {"out", "neck", PROJECTION}
  assert {name for name, size in changed.items() if size > 1e-4} == reached


def test_without_terms_the_loss_is_ddpms(mesh):
  images = normal(4, 1, BATCH, DIM)

  def draw(key, shared, own):
    return make_batch().replace(x0=own + jax.random.normal(key, own.shape))

  stage = denoiser_training.make_stage(CONFIG, Toy(), draw, (), images, mesh)
  state = jax.jit(stage.init)(jax.random.key(7), images[0])

  @jax.jit
  def plain_step(state):
    names = ("batch", "time", "noise")
    draws, times, noises = (stream(state.key, name, state.step) for name in names)
    batch = draw(draws, (), images[0])
    t = jax.random.randint(times, (BATCH,), 0, STEPS)
    eps = jax.random.normal(noises, batch.x0.shape)
    schedule = NoiseSchedule(CONFIG.schedule)
    signal, noise = schedule.scales(t, batch.x0)
    x_t = schedule.noise(batch.x0, t, eps)

    def loss_of(params):
      time = model_time(t, schedule)
      output, _ = Toy().apply({"params": params}, x_t, time, batch.label, batch.memory)
      return jnp.mean(jnp.square(output - (signal * eps - noise * batch.x0)), axis=1).mean()

    return loss_of(state.params)

  for _ in range(3):
    expected = plain_step(state)
    state, metrics = jax.jit(stage.step)(state, (), images[0])
    assert set(metrics) == {"loss"}
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)


def test_metrics_show_every_term_and_their_sum(mesh):
  images = normal(4, 1, BATCH, DIM)
  config = CASES["all"]
  stage = denoiser_training.make_stage(
    config, Toy(), lambda key, shared, own: make_batch(), (), images, mesh
  )
  state = jax.jit(stage.init)(jax.random.key(7), images[0])
  state, metrics = jax.jit(stage.step)(state, (), images[0])
  assert set(metrics) == {"loss", "mse", "infonce", "supcon", "cbdm"}
  total = sum(float(value) for name, value in metrics.items() if name != "loss")
  assert float(metrics["loss"]) == pytest.approx(total, rel=1e-5)
  assert set(state.ema_params) == {"out", "neck", PROJECTION}


@pytest.mark.parametrize("name", sorted(DENOISERS))
def test_denoisers_do_not_read_the_projection_that_training_adds(name):
  denoiser = DENOISERS[name](3, DIM, DenoiserConfig(name, 16, 1, 8, 2))
  bank = memory_bank.create(3, 4, DIM)
  memory = memory_bank.Memory(bank.prototype, bank.slots, jnp.zeros((4, 4), bool), jnp.zeros(4))
  label = jnp.arange(4)
  batch = Batch(x0=normal(0, 4, DIM), label=label, memory=memory, true_label=label)
  with_it, without = (params_of(config, denoiser, batch) for config in (CASES["supcon"], CONFIG))
  assert set(with_it) - set(without) == {PROJECTION}
  assert with_it[PROJECTION]["kernel"].shape == (16, ObjectiveConfig().supcon.projection_dim)
  jax.tree.map(np.testing.assert_array_equal, {n: with_it[n] for n in without}, without)
  apply = jax.jit(lambda p: denoiser.apply({"params": p}, batch.x0, jnp.zeros(4), label, memory))
  jax.tree.map(np.testing.assert_array_equal, apply(with_it), apply(without))


# --- dropout ---------------------------------------------------------------------------------


class Dropping(nn.Module):
  """Toy with half of its output dropped, if it is given a key for that."""

  @nn.compact
  def __call__(self, x_t, t, label, memory):
    output, bottleneck = Toy(name="toy")(x_t, t, label, memory)
    drop = nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))
    return drop(output), bottleneck


def test_a_denoiser_drops_units_in_training_and_not_without_a_key(mesh):
  params = params_of(CONFIG, Dropping())

  def mse(rngs):
    terms = denoiser_training.loss_terms(CONFIG, Dropping(), params, make_batch(), T, EPS, rngs)
    return float(terms["mse"])

  plain = {"toy": params["toy"]}
  assert mse(None) == mse(None)
  kept = denoiser_training.loss_terms(CONFIG, Toy(), plain["toy"], make_batch(), T, EPS)["mse"]
  assert mse(None) == pytest.approx(float(kept), rel=1e-6)
  assert len({mse({"dropout": jax.random.key(n)}) for n in range(3)}) == 3


def test_every_training_step_drops_other_units(mesh):
  """At a learning rate of next to nothing, one batch and one noise cost differently by step."""
  stage = denoiser_training.make_stage(
    CONFIG, Dropping(), lambda key, shared, per_seed: make_batch(), (), (), mesh
  )
  state = jax.jit(stage.init)(jax.random.key(0), ())
  drawn = stage.batch(state, (), ())

  def loss_at(step):
    key = stream(state.key, "dropout", step)
    terms = denoiser_training.loss_terms(CONFIG, Dropping(), state.params, *drawn, {"dropout": key})
    return float(sum(terms.values()))

  _, metrics = jax.jit(stage.step)(state, (), ())
  assert float(metrics["loss"]) == pytest.approx(loss_at(0), rel=1e-5)
  assert abs(loss_at(0) - loss_at(1)) > 1e-4


# --- transfer of targets (T2H) ---------------------------------------------------------------

COUNTS = jnp.array([50, 9, 2, 50, 9, 50, 9, 0])  # of the rows' classes; the last is made up


def noised(t=T):
  schedule = NoiseSchedule(CONFIG.schedule)
  batch = make_batch()
  return schedule.noise(batch.x0, t, EPS), batch.x0, *schedule.scales(t, batch.x0)


def draws(rule, t=T, number=4000):
  keys = jax.random.split(jax.random.key(0), number)
  draw = jax.vmap(lambda key: objectives.transferred(key, *noised(t), COUNTS, rule))
  return np.asarray(jax.jit(draw)(keys))


def posterior(t=T):
  """[B, B] weight of every clean sample behind each noised one, in NumPy."""
  x_t, x0, signal, noise = (np.asarray(x, float) for x in noised(t))
  squared = np.square((x_t / signal)[:, None] - x0[None]).sum(axis=2)
  weights = np.exp(-squared / (2 * np.square(noise / signal)))
  return weights / weights.sum(axis=1, keepdims=True)


def test_targets_are_drawn_by_their_posterior_in_the_batch():
  drawn, weights = draws("full", jnp.full(BATCH, 30)), posterior(jnp.full(BATCH, 30))
  assert 0.02 < weights.max() < 0.9  # noisy enough that others are likely
  for row in range(BATCH - 1):
    expected = weights[row].copy()
    expected[row] += expected[-1]  # made up: taken by no other row
    expected[-1] = 0
    frequency = np.bincount(drawn[:, row], minlength=BATCH) / len(drawn)
    np.testing.assert_allclose(frequency, expected, atol=0.04)
  assert (drawn[:, -1] == BATCH - 1).all()


@pytest.mark.parametrize(("rule", "sign"), [("t2h", 1), ("h2t", -1)])
def test_targets_go_one_way_only(rule, sign):
  drawn, counts = draws(rule, jnp.full(BATCH, 38)), np.asarray(COUNTS)
  assert (sign * (counts[drawn] - counts[None]) >= 0).all()
  assert (drawn != np.arange(BATCH)[None]).mean() > 0.1


def with_counts(rngs, t=T, **transfer):
  """The terms of the plain objective with these settings of the transfer."""
  config = change(transfer=transfer)
  batch = make_batch().replace(class_count=COUNTS)
  return denoiser_training.loss_terms(config, Toy(), params_of(CONFIG), batch, t, EPS, rngs)["mse"]


def test_the_loss_holds_a_prediction_against_the_transferred_sample():
  key, t = jax.random.key(5), jnp.full(BATCH, 36)
  x_t, x0, signal, noise = noised(t)
  source = objectives.transferred(key, x_t, x0, signal, noise, COUNTS, "t2h")
  assert (np.asarray(source) != np.arange(BATCH)).any()
  eps = (x_t - signal * x0[source]) / noise
  batch, time = make_batch(), sampler.model_time(t, NoiseSchedule(CONFIG.schedule))
  output, _ = Toy().apply({"params": params_of(CONFIG)}, x_t, time, batch.label, batch.memory)
  expected = np.square(output - objectives.target("v", x0[source], eps, signal, noise)).mean()
  rngs = {"dropout": key, "transfer": key}
  assert float(with_counts(rngs, t, rule="t2h")) == pytest.approx(float(expected), rel=1e-5)


def test_targets_stay_before_their_time_and_without_a_key():
  rngs = {"dropout": jax.random.key(5), "transfer": jax.random.key(5)}
  late = jnp.full(BATCH, 36)  # of 40
  plain = float(with_counts(None, late))
  for keys, before in ((rngs, 0.0), (rngs, 0.5), (None, 1.0)):
    value = float(with_counts(keys, late, rule="t2h", before=before))
    assert value == pytest.approx(plain, rel=1e-6)
  assert float(with_counts(rngs, late, rule="t2h")) != pytest.approx(plain, rel=1e-3)
