"""What a run runs on: JAX's switches are checked; versions and hardware go into reports."""

import importlib.metadata
import os
import platform
from typing import Any

import jax

import memdiff
from memdiff.errors import ConfigError

# Switches of JAX, and how they are set if a run is to work.
_SWITCHES = {
  "jax_enable_x64": False,
  "jax_disable_jit": False,
  "jax_numpy_dtype_promotion": "standard",
}


def check_switches() -> None:
  """Notices what users may have in their environment and have forgotten.

  Raises:
    ConfigError: if JAX is switched to something with which no run works.
  """
  for name, needed in _SWITCHES.items():
    value = getattr(jax.config, name)
    if value != needed:
      raise ConfigError(
        f"{name.upper()} is {value}, but memdiff needs {needed}; unset it in the environment."
      )


def versions() -> dict[str, str]:
  """Versions of what decides the numbers."""
  packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scikit-learn")
  found = {name: importlib.metadata.version(name) for name in packages}
  return {"memdiff": memdiff.__version__, "python": platform.python_version()} | found


def hardware() -> dict[str, Any]:
  device = jax.devices()[0]
  return {
    "platform": device.platform,
    "device_kind": device.device_kind,
    "devices": jax.device_count(),
    "processes": jax.process_count(),
    "cpu_count": os.cpu_count(),
  }
