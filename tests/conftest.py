"""One CPU device, strict promotion of ranks, quick compiling, and repeatable hypothesis."""

import gc
import importlib.metadata
import os
import pathlib
import tempfile

_CACHE = pathlib.Path(tempfile.gettempdir()) / f"memdiff-tests-{os.getuid()}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "Agg"
if importlib.metadata.version("jaxlib").startswith("0.10."):
  # XLA's older emitters compile several times faster. Later versions no longer have them.
  flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(_CACHE / "hypothesis"))

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from memdiff.runtime import mesh as mesh_lib  # noqa: E402

gc.set_threshold(20_000, 20, 50)  # as in main.py
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # tests compile much, compute little
jax.config.update("jax_compilation_cache_dir", str(_CACHE / f"jax-{jax.__version__}"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

hypothesis.settings.register_profile(
  "memdiff", deadline=None, derandomize=True, max_examples=40, database=None
)
hypothesis.settings.load_profile("memdiff")


@pytest.fixture(scope="session")
def mesh():
  """Over the one CPU device."""
  return mesh_lib.make_mesh()
