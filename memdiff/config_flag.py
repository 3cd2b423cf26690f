"""The flag --config with its overrides, --config.FIELD=VALUE; the last one of a field counts."""

import shlex
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import tuple_parser

from memdiff import paths


class _TupleParser(flags.ArgumentParser):
  """Reads a tuple; ml_collections appends one to the other if it is given its own parser."""

  _parser = tuple_parser.TupleParser()

  def parse(self, argument):
    return self._parser.parse(argument)

  def flag_type(self) -> str:
    return "tuple"


def command_line(words: Sequence[str]) -> str:
  """Words as one would type them; in double quotes if a word has single ones, as tuples do."""

  def quoted(word: str) -> str:
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)

  return " ".join(map(quoted, words))


def expand_home(argv: Sequence[str]) -> list[str]:
  """The command line with ~ written out in --config=~/NAME.py; the shell leaves it as it is."""
  return [_expand_home(argument) for argument in argv]


def _expand_home(argument: str) -> str:
  name, equals, path = argument.partition("=")
  if name in ("--config", "-config") and equals:
    return f"{name}={paths.expand_home(path, '--config')}"
  return argument


def define(flag_values: flags.FlagValues = flags.FLAGS) -> flags.FlagHolder:
  """Defines --config, the file of an experiment's settings."""
  config_flags.register_flag_parser_for_type(tuple, _TupleParser())
  return config_flags.DEFINE_config_file(
    "config",
    help_string="Config file, with a variant if wanted: configs/NAME.py:VARIANT.",
    flag_values=flag_values,
  )
