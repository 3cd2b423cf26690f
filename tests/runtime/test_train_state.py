"""Learning-rate schedules and optimisers against the rules they are named after."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memdiff.config import build
from memdiff.errors import ConfigError
from memdiff.runtime import train_state
from memdiff.runtime.train_state import OptimizerConfig

LDAM = {
  "name": "sgd", "learning_rate": 0.1, "schedule": "step", "milestones": (0.8, 0.9),
  "factors": (0.01, 0.0001), "momentum": 0.9, "nesterov": False, "weight_decay": 2e-4,
  "warmup": 0.025, "clip_norm": 0.0, "accumulate": 1,
}  # fmt: skip


def rates(num_steps, **changes):
  config = build(OptimizerConfig, LDAM | changes)
  schedule = train_state.learning_rate(config, num_steps)
  return np.asarray(jax.vmap(schedule)(jnp.arange(num_steps)))


def test_the_ldam_recipe_at_the_end_of_every_epoch():
  """Cao et al.: epochs 1 to 5 rise by fifths, x 0.01 after epoch 160, x 0.0001 after 180."""
  per_epoch = 85
  rate = rates(200 * per_epoch)
  assert rate[0] == 0
  np.testing.assert_allclose(rate[5 * per_epoch], 0.1, rtol=1e-6)
  np.testing.assert_allclose(rate[3 * per_epoch], 0.06, rtol=1e-6)  # epoch 3 has 3/5 of the peak
  np.testing.assert_allclose(rate[5 * per_epoch : 160 * per_epoch], 0.1, rtol=1e-6)
  np.testing.assert_allclose(rate[160 * per_epoch : 180 * per_epoch], 1e-3, rtol=1e-6)
  np.testing.assert_allclose(rate[180 * per_epoch :], 1e-5, rtol=1e-6)


def test_cosine_decay_follows_its_formula():
  changes = {"schedule": "cosine", "milestones": (), "factors": (), "warmup": 0.1}
  rate = rates(100, **changes)
  step = np.arange(10, 100)
  np.testing.assert_allclose(rate[10:], 0.05 * (1 + np.cos(np.pi * (step - 10) / 90)), atol=1e-7)
  np.testing.assert_allclose(rate[:10], 0.01 * np.arange(10), rtol=1e-5, atol=1e-9)


def test_a_constant_rate_stays():
  rate = rates(50, schedule="constant", milestones=(), factors=(), warmup=0.0)
  np.testing.assert_allclose(rate, 0.1, rtol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_momentum_is_that_of_pytorch(nesterov):
  """v = m v + (g + wd p); p -= lr v, or lr (g + wd p + m v) with Nesterov's momentum."""
  config = build(
    OptimizerConfig,
    LDAM | {"schedule": "constant", "milestones": (), "factors": (), "warmup": 0.0,
            "nesterov": nesterov},
  )  # fmt: skip
  optimizer = train_state.make_optimizer(config, 10)
  gradients = np.random.default_rng(0).normal(size=(10, 4))
  ours, state = jnp.arange(4.0), optimizer.init(jnp.arange(4.0))
  theirs, velocity = np.arange(4.0), np.zeros(4)
  for gradient in gradients:
    updates, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, ours)
    ours = optax.apply_updates(ours, updates)
    decayed = gradient + 2e-4 * theirs
    velocity = 0.9 * velocity + decayed
    theirs = theirs - 0.1 * (decayed + 0.9 * velocity if nesterov else velocity)
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"factors": (0.01,)}, "2 milestones and 1 factors"),
    ({"schedule": "cosine"}, "milestones and factors go with the schedule step"),
    ({"milestones": (), "factors": ()}, "schedule is 'step' with 0 milestones"),
    ({"milestones": (0.9, 0.8)}, "must rise"),
    ({"milestones": (0.8, 0.8)}, "must rise"),
    ({"milestones": (0.01, 0.8)}, "the warm-up lasts until 0.025"),
    ({"milestones": (0.8, 1.0)}, "shares between 0 and 1"),
    ({"factors": (0.1, 0.0)}, "numbers above 0"),
  ],
)
def test_schedules_that_cannot_be_are_refused(changes, words):
  with pytest.raises(ConfigError, match="config") as caught:
    build(OptimizerConfig, LDAM | changes, "optimizer")
  assert words in str(caught.value)
