"""Paths as people type them: written out, or refused before any work."""

import os
import pathlib
import pwd

import pytest

from memdiff import paths
from memdiff.errors import ConfigError


def refusal(call, *arguments) -> str:
  with pytest.raises(ConfigError) as caught:
    call(*arguments)
  message = str(caught.value)
  assert "\n" not in message and message.endswith(".") and message.isascii()
  return message


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  return tmp_path


@pytest.fixture
def _nobody(monkeypatch):
  """A user without HOME and without an entry in the list of users."""
  monkeypatch.delenv("HOME", raising=False)

  def unknown(_):
    raise KeyError

  monkeypatch.setattr(pwd, "getpwuid", unknown)


# --- ~ ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["~", "~/a", "~/a b/[c].npz:key"])
def test_home_is_written_out(path, home):
  assert paths.expand_home(path, "it") == str(home) + path[1:]


@pytest.mark.parametrize("path", ["", "a/~", "./~", "/x/~/y", "a~b", "gs://bucket/~/x", "x.npz:~"])
def test_other_tildes_are_names(path, home):
  assert paths.expand_home(path, "it") == path


def test_the_home_of_another_user_is_written_out():
  user = pwd.getpwuid(os.getuid())
  assert paths.expand_home(f"~{user.pw_name}/x", "it") == f"{user.pw_dir.rstrip('/')}/x"


@pytest.mark.usefixtures("_nobody")
@pytest.mark.parametrize("path", ["~/x", "~nobody-has-this-name/x"])
def test_a_home_that_is_not_known_is_refused(path):
  message = refusal(paths.expand_home, path, "config.dataset.train_path")
  assert message.startswith(f"config.dataset.train_path is {path!r}") and f"./{path}" in message


# --- the workdir -----------------------------------------------------------------------------


def test_a_workdir_is_absolute(tmp_path, monkeypatch, home):
  monkeypatch.chdir(tmp_path)
  assert paths.workdir("runs/a") == tmp_path / "runs" / "a"
  assert paths.workdir("~/runs") == home / "runs"
  assert paths.workdir("/x/y") == pathlib.Path("/x/y")


@pytest.mark.parametrize(
  "name",
  ["[lr=0.1]", "a*b", "who?", "{a,b}", "a b", "ü", "数", "a:b", "%41", "-x", "~", "a\nb", "gs"],
)
def test_a_workdir_may_have_any_name_that_checkpoints_can_have(name, tmp_path):
  assert paths.workdir(f"{tmp_path}/{name}/run") == tmp_path / name / "run"


@pytest.mark.parametrize(
  ("path", "words"),
  [
    ("gs://bucket/run", "an address"),
    ("s3://bucket", "an address"),
    ("file:///tmp/run", "an address"),
    ("abfs+x://y", "an address"),
    ("", "is empty"),
    ("  ", "is empty"),
    ("a\\b", "a backslash"),
    ("/tmp/\udce9", "not UTF-8"),
    ("/gs/run", "taken for a bucket"),
    ("/s3", "taken for a bucket"),
  ],
)
def test_what_is_no_folder_for_checkpoints_is_refused(path, words):
  message = refusal(paths.workdir, path)
  assert message.startswith("--workdir is ") and words in message


def test_a_folder_under_a_folder_that_cannot_be_named_is_refused(tmp_path, monkeypatch):
  folder = tmp_path / "a\\b"
  folder.mkdir()
  monkeypatch.chdir(folder)
  assert "a backslash" in refusal(paths.workdir, "run")


# --- arguments -------------------------------------------------------------------------------


def test_arguments_that_the_locale_cannot_read_are_named():
  paths.check_arguments(["main.py", "--workdir=ü", "--config.x=数"])
  argument = os.fsencode("--workdir=ü").decode("ascii", "surrogateescape")  # as LC_ALL=C reads it
  message = refusal(paths.check_arguments, ["main.py", argument])
  assert "--workdir=\\udcc3\\udcbc" in message and "PYTHONUTF8=1" in message
