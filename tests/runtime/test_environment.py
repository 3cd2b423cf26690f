"""Switches of JAX with which no run works are one sentence before any work."""

import jax
import pytest

from configs import digits_lt
from memdiff import pipeline
from memdiff.errors import ConfigError
from memdiff.runtime import environment


@pytest.mark.parametrize(
  ("switch", "value"),
  [
    ("jax_enable_x64", True),
    ("jax_disable_jit", True),
    ("jax_numpy_dtype_promotion", "strict"),
  ],
)
def test_switches_that_break_a_run_are_refused_by_name(switch, value):
  normal = getattr(jax.config, switch)
  jax.config.update(switch, value)
  try:
    with pytest.raises(ConfigError, match=f"{switch.upper()} is {value}, .* unset it"):
      pipeline.prepare(digits_lt.get_config("smoke").to_dict())
  finally:
    jax.config.update(switch, normal)


def test_the_usual_switches_are_fine():
  environment.check_switches()
