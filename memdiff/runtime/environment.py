"""What a run ran on: versions and hardware, for manifests and reports."""

import importlib.metadata
import os
import platform
from typing import Any

import jax

import memdiff


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
