"""--config and its overrides: every value that the fields document can be given."""

import ast
import dataclasses
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags

from memdiff import config as config_lib
from memdiff import config_flag, pipeline

ROOT = pathlib.Path(__file__).parent.parent
FILES = {  # of each kind of experiment
  "memdiff": "configs/digits_lt.py:smoke",
  "features": "configs/features.py",
  "classification": "configs/digits_lt.py:classification",
  "images": "configs/images/digits_lt.py:smoke",
  "augmented": "configs/augmented/digits_lt.py:smoke",
}
# ml_collections loads config files so.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def parse(monkeypatch):
  """Reads a command line as main.py does; returns the settings, flat."""

  def parse_in_root(file, *overrides):
    monkeypatch.chdir(ROOT)
    argv = ["main.py", f"--config={file}", *overrides]
    monkeypatch.setattr(sys, "argv", argv)
    values = flags.FlagValues()
    holder = config_flag.define(values)
    assert values(config_flag.expand_home(argv)) == ["main.py"]
    config = holder.value.to_dict()
    settings = config_lib.build(pipeline.kind_of(config).settings, config)
    return config_lib.flatten(config_lib.as_dict(settings))

  return parse_in_root


# --- the last one counts ---------------------------------------------------------------------


@pytest.mark.parametrize(
  ("overrides", "name", "expected"),
  [
    (["--config.seeds=(3,)", "--config.seeds=(3,4)"], "seeds", [3, 4]),
    (["--config.seeds", "(3,)", "--config.seeds", "(4,)"], "seeds", [4]),
    (["--config.seeds=(1,2,3)", "--config.seeds", "(4,)"], "seeds", [4]),
    (["-config.seeds=(1,)", "--config.seeds=7", "-config.seeds=(8,9)"], "seeds", [8, 9]),
    (["--config.joint.generators=('real',)", "--config.joint.generators=()"],
     "joint.generators", []),
    (["--config.head.losses=('csl',)", "--config.head.losses=cross_entropy"],
     "head.losses", ["cross_entropy"]),
    (["--config.diffusion.optimizer.milestones=(0.5,)",
      "--config.diffusion.optimizer.milestones=()"], "diffusion.optimizer.milestones", []),
    (["--config.loop.keep_every=10", "--config.loop.keep_every=20"], "loop.keep_every", 20),
    (["--config.dataset.name=digits", "--config.dataset.name=folder"], "dataset.name", "folder"),
    (["--config.encoder.init_head", "--noconfig.encoder.init_head"], "encoder.init_head", False),
  ],
)  # fmt: skip
def test_of_a_field_given_twice_the_last_value_counts(overrides, name, expected, parse):
  assert parse(FILES["memdiff"], *overrides)[name] == expected


@pytest.mark.parametrize(
  ("text", "expected"),
  [("(3,)", [3]), ("(3, 4)", [3, 4]), ("3,4", [3, 4]), ("[3,4]", [3, 4]), ("3", [3]), ("(3)", [3])],
)
def test_a_tuple_can_be_written_in_several_ways(text, expected, parse):
  assert parse(FILES["memdiff"], f"--config.seeds={text}")["seeds"] == expected


def test_tuples_that_are_not_given_stay(parse):
  assert parse(FILES["memdiff"], "--config.loop.keep_every=10")["seeds"] == [0, 1]


# --- ~ ---------------------------------------------------------------------------------------


def test_home_is_written_out_in_the_name_of_the_file(tmp_path, monkeypatch, parse):
  monkeypatch.setenv("HOME", str(tmp_path))
  mine = tmp_path / "mine.py"
  mine.write_text("from configs.digits_lt import get_config\n", encoding="utf-8")
  monkeypatch.syspath_prepend(str(ROOT))
  assert parse("~/mine.py:smoke")["seeds"] == [0, 1]


def test_other_arguments_stay_as_they_are():
  argv = ["main.py", "--config", "~", "--configs=~", "--config.name=~", "--workdir=~/x", "~"]
  assert config_flag.expand_home(argv) == argv


# --- documented values -----------------------------------------------------------------------

NEEDS = {  # values that ask something of other fields
  "diffusion.condition-class": ["--config.hallucination.condition=class"],
  "hallucination.condition-class": ["--config.diffusion.condition=class"],
  "diffusion.optimizer.schedule-step": [
    "--config.diffusion.optimizer.milestones=(0.5,)", "--config.diffusion.optimizer.factors=(0.1,)"
  ],
}  # fmt: skip


def leaves(settings, prefix=""):
  """(path, settings class, field) of every field that is not a group."""
  for field in dataclasses.fields(settings):
    if dataclasses.is_dataclass(field.type):
      yield from leaves(field.type, f"{prefix}{field.name}.")
    else:
      yield f"{prefix}{field.name}", settings, field


def documented():
  """(kind, path, value) of all that meanings and ranges name: `0: none`, `one of sgd, adamw`."""
  seen = set()
  for kind in FILES:
    for path, settings, field in leaves(pipeline.KINDS[kind].settings):
      meaning, allowed = field.metadata["meaning"], field.metadata.get("allowed")
      values = re.findall(r'(?:^|(?<=[;,] ))(\(\)|""|None|True|False|\d[\d.]*): ', meaning)
      values = [ast.literal_eval(value) for value in values]
      words = allowed.words() if allowed else ""
      if words.startswith("one of "):
        values += words.removeprefix("one of ").split(", ")
      for value in values:
        if (settings, field.name, value) not in seen:  # not every optimiser
          seen.add((settings, field.name, value))
          yield kind, path, value


DOCUMENTED = sorted(set(documented()), key=str)


def test_documented_values_are_found():
  assert {
    ("hallucination.x0_limit", 0), ("hallucination.sampler", "dpm++"), ("selection.folds", 0),
    ("encoder.input.mean", ()), ("dataset.test_path", ""), ("encoder.init_head", False),
    ("generators.confidence.name", "none"), ("dataset.image_size", 0),
  } <= {(path, value) for _, path, value in DOCUMENTED}  # fmt: skip
  assert len(DOCUMENTED) >= 50


@pytest.mark.parametrize("kind", FILES)
def test_no_field_takes_none_which_a_command_line_cannot_say(kind):
  for path, _, field in leaves(pipeline.KINDS[kind].settings):
    assert field.default is not None and "None" not in field.metadata["meaning"], path


@pytest.mark.parametrize(("kind", "path", "value"), DOCUMENTED)
def test_a_documented_value_can_be_given(kind, path, value, parse):
  needed = NEEDS.get(f"{path}-{value}", ())
  found = parse(FILES[kind], f"--config.{path}={value}", *needed)[path]
  if isinstance(found, list) and not isinstance(value, tuple):  # one of several candidates
    (found,) = found
  assert found == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize(
  "words",
  [
    ["python", "main.py", "--config.methods=('ddpm', 'cbdm')"],
    ["--workdir=a b", "plain", ""],
    ["it's $5", "both ' and \"", "back`tick'", "a\\'b", "wow!'"],
  ],
)
def test_a_command_line_is_read_back_as_it_was(words):
  line = config_flag.command_line(words)
  assert shlex.split(line) == words
  assert (
    subprocess.run(
      ["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True
    ).stdout.split("\n")[:-1]
    == words
  )


def test_tuples_are_easy_to_read_in_a_command_line():
  line = config_flag.command_line(["--config.methods=('ddpm','t2h')"])
  assert line == "\"--config.methods=('ddpm','t2h')\""
