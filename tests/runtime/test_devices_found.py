"""Which devices a run has, and which it leaves idle: said in a line."""

import importlib.util
import types

import jax
import pytest

from memdiff.errors import ConfigError
from memdiff.runtime import devices

CPU = types.SimpleNamespace(platform="cpu", device_kind="cpu")
GPU = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")


@pytest.fixture
def machine(monkeypatch):
  """Sets what is plugged in and which of JAX's plugins are installed."""

  def set_up(gpu=False, tpus=0, plugins=()):
    find = importlib.util.find_spec
    known = {name for names in devices._PLUGINS.values() for name in names}
    monkeypatch.setattr(devices.hardware_utils, "has_visible_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(
      devices.hardware_utils, "num_available_tpu_chips_and_device_id", lambda: (tpus, None)
    )
    monkeypatch.setattr(
      importlib.util, "find_spec", lambda n: (n in plugins or None) if n in known else find(n)
    )

  return set_up


# --- named -----------------------------------------------------------------------------------


def test_devices_are_counted_and_named(monkeypatch):
  monkeypatch.setattr(devices, "_num_cores", lambda: 2)
  assert devices.describe([CPU]) == "1 x CPU, 2 cores"
  assert devices.describe([CPU] * 8) == "8 x CPU, 2 cores"
  assert devices.describe([GPU] * 4) == "4 x NVIDIA H100 80GB HBM3"
  monkeypatch.setattr(devices, "_num_cores", lambda: 1)
  assert devices.describe([CPU]) == "1 x CPU, 1 core"
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert devices.describe([GPU] * 4) == "4 x NVIDIA H100 80GB HBM3, 2 processes"


def test_the_line_comes_from_the_main_process_alone(monkeypatch, capsys, machine):
  machine(gpu=True)
  devices.say({})
  first, second = capsys.readouterr().err.splitlines()
  assert first.startswith("running on 1 x CPU, ") and second.startswith("note: an NVIDIA GPU ")
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  devices.say({})
  assert capsys.readouterr().err == ""


# --- idle ------------------------------------------------------------------------------------


def test_nothing_is_said_if_nothing_is_idle(machine):
  machine()
  assert devices.idle([CPU], {}) is None
  machine(gpu=True, tpus=4)
  assert devices.idle([GPU], {}) is None


@pytest.mark.parametrize(
  ("gpu", "tpus", "words"),
  [(True, 0, ("an NVIDIA GPU", "jax[cuda13]")), (False, 4, ("a TPU", "jax[tpu]"))],
)
def test_an_idle_accelerator_is_said_with_what_to_install(gpu, tpus, words, machine):
  machine(gpu, tpus)
  note = devices.idle([CPU], {})
  assert note.startswith(f"note: {words[0]}")
  assert f'pip install "{words[1]}=={jax.__version__}"' in note and "\n" not in note


@pytest.mark.parametrize("plugin", ["jax_cuda13_plugin", "jax_cuda12_plugin"])
def test_a_plugin_that_fails_is_not_to_be_installed_again(plugin, machine):
  machine(gpu=True, plugins=(plugin,))
  note = devices.idle([CPU], {})
  assert "pip install" not in note and "JAX_PLATFORMS=cuda makes it say why" in note


@pytest.mark.parametrize(
  "environment",
  [
    {"JAX_PLATFORMS": "cpu"},
    {"JAX_PLATFORM_NAME": "cpu"},
    {"CUDA_VISIBLE_DEVICES": ""},
    {"CUDA_VISIBLE_DEVICES": "-1"},
  ],
)
def test_a_gpu_that_is_hidden_by_choice_is_not_missed(environment, machine):
  machine(gpu=True)
  assert devices.idle([CPU], environment) is None


def test_another_jax_may_lack_the_search(machine, monkeypatch):
  machine(gpu=True)
  monkeypatch.delattr(devices.hardware_utils, "has_visible_nvidia_gpu")
  assert devices.idle([CPU], {}) is None


# --- missing ---------------------------------------------------------------------------------


def test_the_devices_are_those_of_jax():
  assert devices.find() == jax.devices()


NO_ROCM = RuntimeError("no rocm (set JAX_PLATFORMS='' to go on)\nand more")


@pytest.mark.parametrize(
  ("asked", "error", "parts"),
  [
    ("cuda", AssertionError(), ["JAX_PLATFORMS is cuda", "jax[cuda13]==", "unset it"]),
    (
      "gpu",
      NO_ROCM,
      ["JAX_PLATFORMS is gpu", "(no rocm)", "cuda13"],
    ),
    ("tpu,cpu", RuntimeError("libtpu.so"), ["JAX_PLATFORMS is tpu,cpu", "(libtpu.so)", "jax[tpu]"]),
    ("nonsense", RuntimeError("unknown"), ["JAX_PLATFORMS is nonsense", "(unknown)", "unset it"]),
    (None, RuntimeError("driver"), ["JAX cannot use the devices", "(driver)", "JAX_PLATFORMS=cpu"]),
    ("", RuntimeError("driver"), ["JAX cannot use the devices", "JAX_PLATFORMS=cpu"]),
  ],
)
def test_devices_that_jax_does_not_find_are_one_sentence(asked, error, parts, monkeypatch):
  def fail():
    raise error

  config = types.SimpleNamespace(jax_platforms=asked)
  fake = types.SimpleNamespace(devices=fail, config=config, __version__="1.2.3")
  monkeypatch.setattr(devices, "jax", fake)
  with pytest.raises(ConfigError) as caught:
    devices.find()
  message = str(caught.value)
  assert all(part in message for part in parts) and message.endswith(".") and "\n" not in message
  assert ("pip install" in message) == (asked not in ("nonsense", None, ""))
