"""What a process settles first: text in every encoding, a cache where there can be one."""

import io
import os
import pwd
import sys

import jax
import pytest

from memdiff.runtime import startup

KERNEL = "JAX_THREEFRY_GPU_KERNEL_LOWERING"
CACHE, LEAST = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"

# --- text ------------------------------------------------------------------------------------


def printed(text, encoding, monkeypatch, errors="strict"):
  streams = [io.TextIOWrapper(io.BytesIO(), encoding, errors) for _ in range(2)]
  monkeypatch.setattr(sys, "stdout", streams[0])
  monkeypatch.setattr(sys, "stderr", streams[1])
  startup.print_anything()
  print(text, end="", file=sys.stdout, flush=True)
  print(text, end="", file=sys.stderr, flush=True)
  out, err = (stream.buffer.getvalue() for stream in streams)
  assert out == err
  return out


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("plain", b"plain"),
    ("93.2 ± 1.1", b"93.2 +- 1.1"),
    ("±±", b"+-+-"),
    ("20–100, 2×2, a → b", b"20-100, 2x2, a -> b"),
    ("bêta", b"b\\xeata"),
    ("γ 数 😀", b"\\u03b3 \\u6570 \\U0001f600"),
    ("torn \udce9", b"torn \\udce9"),
  ],
)
def test_ascii_terminals_get_every_text(text, expected, monkeypatch):
  assert printed(text, "ascii", monkeypatch) == expected


def test_other_terminals_get_what_they_can_show(monkeypatch):
  assert printed("± γ", "latin-1", monkeypatch) == b"\xb1 \\u03b3"
  assert printed("± γ", "utf-8", monkeypatch) == "± γ".encode()
  assert printed("torn \udce9", "utf-8", monkeypatch) == b"torn \\udce9"


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_streams_that_are_closed_or_replaced_are_left_alone(stream, monkeypatch):
  monkeypatch.setattr(sys, "stdout", stream)
  monkeypatch.setattr(sys, "stderr", stream)
  startup.print_anything()


# --- the cache of programs -------------------------------------------------------------------


def test_programs_are_kept_in_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  environment = {}
  startup.choose_cache(environment)
  assert environment[CACHE] == str(tmp_path / ".cache" / "memdiff" / "jax")
  assert os.path.isdir(environment[CACHE]) and float(environment[LEAST]) == 0


def test_what_the_user_chose_stays(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  chosen = {CACHE: "", LEAST: "7"}
  environment = dict(chosen)
  startup.choose_cache(environment)
  assert environment == chosen and not list(tmp_path.iterdir())


def test_a_user_without_home_and_entry_has_no_cache(monkeypatch):
  monkeypatch.delenv("HOME", raising=False)

  def unknown(_):
    raise KeyError

  monkeypatch.setattr(pwd, "getpwuid", unknown)
  environment = {}
  startup.choose_cache(environment)
  assert CACHE not in environment


@pytest.mark.parametrize("home", ["file", "file/deeper", "blocked"])
def test_a_home_that_cannot_hold_a_cache_has_none(home, tmp_path, monkeypatch):
  (tmp_path / "file").write_bytes(b"")
  (tmp_path / "blocked").mkdir()
  (tmp_path / "blocked" / ".cache").write_bytes(b"")
  monkeypatch.setenv("HOME", str(tmp_path / home))
  environment = {}
  startup.choose_cache(environment)
  assert CACHE not in environment


def test_a_cache_that_cannot_be_written_is_not_used(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setattr(startup.os, "access", lambda *_: False)  # root may write anywhere
  environment = {}
  startup.choose_cache(environment)
  assert CACHE not in environment


# --- random numbers on GPUs ------------------------------------------------------------------


def test_random_numbers_are_one_kernel_unless_the_user_says_otherwise():
  for environment, expected in ({}, "1"), ({KERNEL: "0"}, "0"):
    startup.use_threefry_kernel(environment)
    assert environment == {KERNEL: expected}


def test_jax_still_has_the_switch():
  assert hasattr(jax.config, KERNEL.lower())
