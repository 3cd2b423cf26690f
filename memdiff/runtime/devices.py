"""The devices of a run: found, or missed in one sentence; named; noticed if they are left idle."""

import importlib.util
import os
import sys
from collections.abc import Mapping

import jax
from jax._src import hardware_utils  # what is plugged in has no public name

from memdiff.errors import ConfigError

_EXTRAS = {"cuda": "cuda13", "gpu": "cuda13", "tpu": "tpu"}  # platform -> of JAX's package
_PLUGINS = {"cuda": ("jax_cuda13_plugin", "jax_cuda12_plugin"), "tpu": ("libtpu",)}
_NAMES = {"cuda": "an NVIDIA GPU", "tpu": "a TPU"}


def find() -> list[jax.Device]:
  """All devices of the run.

  Raises:
    ConfigError: if JAX cannot use those that it was told to use.
  """
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as error:  # JAX asserts that there is a default device
    asked = jax.config.jax_platforms
    words = str(error).split("\n")[0].split(" (set JAX_PLATFORMS=")[0]  # ours follow
    reason = f" ({words})" if words else ""
    if not asked:
      message = f"JAX cannot use the devices of this machine{reason}; set JAX_PLATFORMS=cpu."
      raise ConfigError(message) from error
    extra = _EXTRAS.get(asked.split(",")[0])
    install = f", or install JAX for it with {_pip(extra)}" if extra else ""
    raise ConfigError(
      f"JAX_PLATFORMS is {asked}, but JAX finds no such device{reason}; unset it to use what this"
      f" machine has{install}."
    ) from error


def say(environment: Mapping[str, str]) -> None:
  """Prints what the run uses, and what it leaves idle; the main process does.

  Raises:
    ConfigError: as `find`.
  """
  devices = find()
  if jax.process_index() == 0:
    for line in (f"running on {describe(devices)}", idle(devices, environment)):
      if line:
        print(line, file=sys.stderr, flush=True)


def describe(devices: list[jax.Device]) -> str:
  """For example "1 x CPU, 2 cores" or "16 x TPU v5 lite, 4 processes"."""
  first = devices[0]
  parts = [f"{len(devices)} x {'CPU' if first.platform == 'cpu' else first.device_kind}"]
  if first.platform == "cpu":
    parts.append(_counted(_num_cores(), "core", "cores"))
  if jax.process_count() > 1:
    parts.append(_counted(jax.process_count(), "process", "processes"))
  return ", ".join(parts)


def _counted(number: int, one: str, many: str) -> str:
  return f"{number} {one if number == 1 else many}"


def _num_cores() -> int:
  """That this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def idle(devices: list[jax.Device], environment: Mapping[str, str]) -> str | None:
  """What to do about an accelerator that JAX leaves idle; None if there is none, or by choice."""
  chosen = environment.get("JAX_PLATFORMS") or environment.get("JAX_PLATFORM_NAME")
  if devices[0].platform != "cpu" or chosen:
    return None
  platform = _plugged_in(environment)
  if platform is None:
    return None
  if any(map(importlib.util.find_spec, _PLUGINS[platform])):
    remedy = f"JAX's plugin for it fails; JAX_PLATFORMS={platform} makes it say why"
  else:
    remedy = f"this JAX is for CPUs; to use it, {_pip(_EXTRAS[platform])}"
  return f"note: {_NAMES[platform]} seems to be here, but {remedy} (JAX_PLATFORMS=cpu: not to)."


def _plugged_in(environment: Mapping[str, str]) -> str | None:
  """The platform of an accelerator of this machine that is not hidden from the process."""
  hidden = environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
  try:
    if hardware_utils.has_visible_nvidia_gpu() and not hidden:
      return "cuda"
    return "tpu" if hardware_utils.num_available_tpu_chips_and_device_id()[0] else None
  except Exception:  # another JAX may have other functions, a container may hide its files
    return None


def _pip(extra: str) -> str:
  return f'pip install "jax[{extra}]=={jax.__version__}"'
