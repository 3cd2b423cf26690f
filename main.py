"""Runs a memdiff experiment: python main.py --config=configs/digits_lt.py --workdir=runs/digits_lt.

The same command resumes a run where it stopped. All the work is in memdiff.pipeline.
"""

import atexit
import gc
import logging
import os
import re
import sys

from absl import app, flags

from memdiff import config_flag, paths
from memdiff.errors import ConfigError, MemdiffError
from memdiff.runtime import startup

_CONFIG = config_flag.define()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: results, checkpoints, logs.")
_TENSORBOARD = flags.DEFINE_bool("tensorboard", True, "Write TensorBoard events to WORKDIR.")
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Join the other processes of the run first; also if JAX_COORDINATOR_ADDRESS is set.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of process 0; not needed on TPU pods, under Slurm or Open MPI."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the run has.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
_CLUSTER_TIMEOUT = flags.DEFINE_integer(
  "cluster_timeout", 300, "Seconds to wait until all processes have joined."
)
_DESCRIBE = flags.DEFINE_bool("describe", False, "Print every field of the config, and stop.")
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of errors.")


def _parse(argv: list[str]) -> list[str]:
  """Parses the flags; whatever is wrong with them or the config file is one sentence."""
  try:
    paths.check_arguments(argv)
    rest = flags.FLAGS(config_flag.expand_home(argv))
    if rest[1:]:
      raise ConfigError(f"Unknown argument {rest[1]!r}; options start with --.")
    if _CONFIG.value is None or (_WORKDIR.value is None and not _DESCRIBE.value):
      raise ConfigError("Both --config=configs/NAME.py and --workdir=FOLDER are needed.")
    _CONFIG.value.to_dict()  # raises if the file could not be read
    if _WORKDIR.value is not None:
      paths.workdir(_WORKDIR.value)
  except MemdiffError as error:
    _exit(error)
  except Exception as error:  # absl and ml_collections raise many types, configs may raise any
    _exit(ConfigError(_explain(error, argv)))
  return rest


def _explain(error: Exception, argv: list[str]) -> str:
  """One sentence for what went wrong while the flags were parsed."""
  if isinstance(error, (KeyError, AttributeError)):  # an override of a field that is not there
    for argument in argv:
      name = argument.lstrip("-").split("=")[0]
      if name.startswith("config.") and any(p in str(error) for p in name.split(".")[1:]):
        return f"{name} does not exist; --describe lists the fields."
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  if isinstance(error, OSError):
    words = " ".join(argv)
    path = next(iter(re.findall(r"(?:^| )--?config[= ]([^ :]*)", words)), "")
    return f"Cannot read the config file {path} ({lines[-1]})."
  if any(line.startswith("Traceback") for line in lines):
    return f"The config file failed: {lines[-1]}"
  return lines[0] if lines else repr(error)


def _exit(error: MemdiffError) -> None:
  if "--debug" in sys.argv:
    raise error
  print(f"memdiff: {error}", file=sys.stderr, flush=True)
  if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
    os._exit(error.exit_code)  # at once: the others must not wait for this one
  sys.exit(error.exit_code)


def _join_cluster() -> None:
  """Joins the other processes, if flags or the environment ask for it."""
  asked = _DISTRIBUTED.value or _COORDINATOR.value is not None
  asked = asked or _NUM_PROCESSES.value is not None or _PROCESS_ID.value is not None
  if not asked and "JAX_COORDINATOR_ADDRESS" not in os.environ:
    return
  from memdiff.runtime import distributed

  cluster = distributed.Cluster(
    _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _CLUSTER_TIMEOUT.value
  )
  distributed.join(distributed.from_environment(cluster, os.environ))


def _describe() -> None:
  from memdiff import describe, pipeline

  print(describe.describe(pipeline.settings_of(_CONFIG.value.to_dict())))


def main(_) -> None:
  for noisy in ("absl", "jax", "matplotlib"):
    logging.getLogger(noisy).setLevel(logging.ERROR)
  command = config_flag.command_line(["python", *sys.argv])
  try:
    if _DESCRIBE.value:
      _describe()
      return
    _join_cluster()
    from memdiff.runtime import devices

    devices.say(os.environ)
    from memdiff import pipeline
    from memdiff.runtime import checkpoint

    if not _DEBUG.value:
      checkpoint.keep_quiet()
    # What was imported stays, and garbage is collected between phases anyway.
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    pipeline.run(
      _CONFIG.value.to_dict(), _WORKDIR.value, tensorboard=_TENSORBOARD.value, command=command
    )
  except MemdiffError as error:
    _exit(error)
  except KeyboardInterrupt:
    print("memdiff: interrupted; the same command resumes the run.", file=sys.stderr)
    sys.exit(130)


if __name__ == "__main__":
  startup.print_anything()
  startup.choose_cache(os.environ)  # before the config file is read, which imports JAX
  startup.use_threefry_kernel(os.environ)
  atexit.register(gc.freeze)  # the garbage collector's last pass would take more than a second
  app.run(main, flags_parser=_parse)
