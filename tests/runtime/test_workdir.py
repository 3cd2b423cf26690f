"""The workdir: locked, written whole or not at all, and frank about what is wrong with it."""

import errno
import json
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from memdiff.errors import ConfigError, WorkdirError
from memdiff.runtime import workdir as workdirs
from memdiff.runtime import writers
from memdiff.runtime.workdir import Workdir, read_arrays, write_arrays, write_atomically, write_json

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def workdir(tmp_path):
  opened = Workdir(str(tmp_path / "run"))
  yield opened
  opened.close()


def message_of(call, *arguments):
  with pytest.raises(WorkdirError) as caught:
    call(*arguments)
  message = str(caught.value)
  assert "\n" not in message and message.endswith(".") and caught.value.exit_code == 1
  return message


# --- the lock --------------------------------------------------------------------------------


def test_two_runs_cannot_share_a_workdir(workdir):
  message = message_of(Workdir, str(workdir.path))
  assert f"Another run is working in {workdir.path}" in message and "--workdir" in message


def test_the_lock_ends_with_the_run(tmp_path):
  for _ in range(2):
    Workdir(str(tmp_path / "run")).close()


def test_the_lock_of_a_killed_process_is_gone(tmp_path):
  program = "import os, sys; from memdiff.runtime.workdir import Workdir; Workdir(sys.argv[1]); "
  killed = program + "os.kill(os.getpid(), 9)"
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, "-c", killed, str(tmp_path / "run")], env=environment)
  assert done.returncode == -9
  Workdir(str(tmp_path / "run")).close()


def refuse_locks(monkeypatch, number):
  def flock(*_):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(workdirs.fcntl, "flock", flock)


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "ENOTSUP", "EOPNOTSUPP", "EIO", "EINVAL"])
def test_a_file_system_without_locks_is_said_once_and_used(name, tmp_path, monkeypatch, capsys):
  refuse_locks(monkeypatch, getattr(errno, name))
  workdir = Workdir(str(tmp_path / "run"))
  assert not workdir.begin("encoder", {})
  workdir.finish("encoder", {})
  workdir.close()
  (line,) = capsys.readouterr().err.splitlines()
  assert f"there are no locks in {tmp_path / 'run'} (" in line and "second run" in line


@pytest.mark.parametrize("name", ["EWOULDBLOCK", "EAGAIN", "EACCES"])
def test_a_lock_that_another_holds_is_another_run(name, tmp_path, monkeypatch, capsys):
  refuse_locks(monkeypatch, getattr(errno, name))
  assert "Another run is working in" in message_of(Workdir, str(tmp_path / "run"))
  assert capsys.readouterr().err == ""


def test_home_is_written_out_in_a_workdir(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.chdir(tmp_path)
  workdir = Workdir("~/run")
  workdir.close()
  assert workdir.path == tmp_path / "home" / "run" and workdir.path.is_dir()
  assert [p.name for p in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run", "file:///tmp/x", ""])
def test_an_address_is_no_workdir_and_makes_no_folder(path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError, match="--workdir is"):
    Workdir(path)
  assert not list(tmp_path.iterdir())


def test_a_workdir_that_cannot_be_made_is_one_sentence(tmp_path):
  (tmp_path / "file").write_text("")
  message = message_of(Workdir, str(tmp_path / "file"))
  assert "Cannot use the workdir" in message and "choose another --workdir" in message
  assert "Not a directory" in message_of(Workdir, str(tmp_path / "file" / "deeper"))


def test_a_phase_whose_folder_cannot_be_made_is_one_sentence(workdir):
  (workdir.path / "diffusion").write_text("")
  message = message_of(workdir.begin, "diffusion", {})
  assert f"Cannot write {workdir.path / 'diffusion'} (File exists)" in message


# --- atomic writes ---------------------------------------------------------------------------


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
  path = tmp_path / "a.json"
  for value in ({"a": 1}, {"b": "ü"}):
    write_json(path, value)
    assert json.loads(path.read_text()) == value
  assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_names_that_are_no_utf_8_come_back_from_json(tmp_path):
  value = {"class": os.fsdecode(b"b\xeata"), "other": "bêta"}
  write_json(tmp_path / "a.json", value)
  assert json.loads((tmp_path / "a.json").read_text("utf-8")) == value


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_content(tmp_path, monkeypatch, moment):
  path = tmp_path / "a"
  write_atomically(path, b"old")

  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(workdirs.os, moment, killed)
  with pytest.raises(KeyboardInterrupt):
    write_atomically(path, b"new")
  assert path.read_bytes() == b"old"


def test_data_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
  calls = []
  fsync, replace = os.fsync, os.replace
  monkeypatch.setattr(workdirs.os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
  monkeypatch.setattr(workdirs.os, "replace", lambda *a: calls.append("replace") or replace(*a))
  write_atomically(tmp_path / "a", b"x")
  assert calls == ["fsync", "replace"]


def test_a_full_disk_is_one_sentence_and_the_old_content_stays(tmp_path, monkeypatch):
  path = tmp_path / "a"
  write_atomically(path, b"old")

  def full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(workdirs.os, "fsync", full)
  message = message_of(write_atomically, path, b"new")
  assert f"Cannot write {path} (No space left on device)" in message and "make room" in message
  assert path.read_bytes() == b"old"


def test_numbers_that_json_has_not_are_refused(tmp_path):
  with pytest.raises(ValueError, match="Out of range float"):
    write_json(tmp_path / "a.json", {"a": float("nan")})
  assert not (tmp_path / "a.json").exists()


# --- arrays ----------------------------------------------------------------------------------


def test_arrays_come_back_as_they_were(tmp_path):
  arrays = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": np.array([0.5, np.nan])}
  write_arrays(tmp_path / "x.npz", arrays)
  back = read_arrays(tmp_path / "x.npz")
  assert set(back) == {"a", "b"}
  for name, value in arrays.items():
    np.testing.assert_array_equal(back[name], value)
    assert back[name].dtype == value.dtype


class Trap:
  """Unpickling it leaves a trace."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["array of objects", "plain pickle"])
def test_pickles_are_refused_and_never_run(tmp_path, form):
  path, trace = tmp_path / "x.npz", tmp_path / "trace"
  if form == "plain pickle":
    path.write_bytes(pickle.dumps(Trap(trace)))
  else:
    np.savez(path, a=np.array([Trap(trace)], dtype=object))
  message = message_of(read_arrays, path)
  assert f"Cannot read {path}" in message and not trace.exists()


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "text", "flipped"])
def test_damaged_arrays_name_the_folder_to_remove(tmp_path, damage):
  folder = tmp_path / "phase"
  folder.mkdir()
  path = folder / "x.npz"
  write_arrays(path, {"a": np.arange(1000), "b": np.arange(5)})
  data = path.read_bytes()
  flipped = bytearray(data)
  flipped[len(data) // 2] ^= 255
  changed = {
    "empty": b"", "half": data[: len(data) // 2], "text": b"hello", "flipped": bytes(flipped)
  }  # fmt: skip
  if damage == "missing":
    path.unlink()
  else:
    path.write_bytes(changed[damage])
  message = message_of(read_arrays, path)
  assert f"Cannot read {path}" in message and f"remove {path} and run" in message
  (tmp_path / "manifest.json").write_text("{}")  # of the phase
  message = message_of(read_arrays, path)
  assert f"remove {path} and {tmp_path / 'manifest.json'} and run the same command" in message


# --- manifests -------------------------------------------------------------------------------


def test_a_phase_begins_and_finishes_once(workdir):
  assert workdir.manifest("encoder") is None
  assert not workdir.begin("encoder", {"a": 1})
  assert not workdir.begin("encoder", {"a": 1})  # began, not finished: go on
  assert workdir.manifest("encoder") == {"config": {"a": 1}, "finished": False}
  workdir.finish("encoder", {"metrics": {"top1": 0.5}})
  assert workdir.begin("encoder", {"a": 1})
  manifest = {"config": {"a": 1}, "finished": True, "metrics": {"top1": 0.5}}
  assert workdir.manifest("encoder") == manifest


def test_times_of_several_processes_add_up(workdir):
  workdir.begin("encoder", {"a": 1})
  workdir.add("encoder", {"killed": 1})
  workdir.add("encoder", {"seconds": 2.5, "killed": -1})
  workdir.add("encoder", {"killed": 1})
  workdir.add("encoder", {"seconds": 0.1, "killed": -1})
  manifest = workdir.manifest("encoder")
  assert (manifest["seconds"], manifest["killed"]) == (2.6, 0)


@pytest.mark.parametrize("finished", [False, True])
def test_a_changed_config_is_refused_with_every_differing_field(workdir, finished):
  workdir.begin("encoder", {"same": 1, "rate": 0.1, "gone": "x", "sizes": (1, 2)})
  if finished:
    workdir.finish("encoder", {})
  new = {"same": 1, "rate": 0.2, "fresh": None, "sizes": (1, 3)}
  message = message_of(workdir.begin, "encoder", new)
  assert "rate was 0.1 and is now 0.2" in message
  assert "gone was 'x' and is now None" in message and "sizes was [1, 2]" in message
  assert "same" not in message and "Phase encoder" in message
  assert str(workdir.folder("encoder")) in message and "new --workdir" in message


@pytest.mark.parametrize("finished", [False, True])
def test_changed_data_are_refused_in_words(workdir, finished):
  old = {"rate": 0.1, "data/split": "ab", "data/initial_weights": None}
  old |= {f"data/{part}_labels": part for part in ("train", "holdout", "left_out", "test")}
  workdir.begin("encoder", old)
  if finished:
    workdir.finish("encoder", {})
  for name, words in (
    ("train_labels", "the training labels"),
    ("holdout_labels", "the held-out labels"),
    ("left_out_labels", "the left-out labels"),
    ("test_labels", "the test labels"),
    ("split", "the split"),
    ("initial_weights", "the initial weights"),
  ):
    message = message_of(workdir.begin, "encoder", old | {f"data/{name}": "other"})
    assert message == (
      f"Phase encoder in {workdir.path} was run with other data (changed since: {words}); put the"
      " data back, or use a new --workdir."
    )
  new = old | {"data/test_labels": "x", "data/train_labels": "y"}
  assert "changed since: the test labels, the training labels)" in message_of(
    workdir.begin, "encoder", new
  )
  message = message_of(workdir.begin, "encoder", new | {"rate": 0.2})
  assert "another config (rate was 0.1 and is now 0.2) and other data (changed since: " in message
  assert workdir.begin("encoder", old) == finished


def test_a_workdir_of_a_version_that_kept_no_digests_is_refused(workdir):
  workdir.begin("encoder", {"rate": 0.1, "split_sha256": "ab"})
  message = message_of(workdir.begin, "encoder", {"rate": 0.1, "data/split": "ab"})
  assert "was run with an older memdiff" in message and "use a new --workdir" in message


def test_tuples_and_lists_are_the_same_config(workdir):
  workdir.begin("encoder", {"sizes": (1, 2)})
  workdir.finish("encoder", {})
  assert workdir.begin("encoder", {"sizes": [1, 2]})


def test_a_report_of_what_was_here_before_goes_with_the_first_new_phase(workdir):
  workdir.begin("encoder", {"a": 1})
  (workdir.path / "report.json").write_text("{}")
  workdir.begin("encoder", {"a": 1})
  assert (workdir.path / "report.json").exists()
  workdir.begin("heads", {"a": 1})
  assert not (workdir.path / "report.json").exists()


def test_a_process_with_another_config_or_other_data_is_told(workdir, monkeypatch):
  said = []
  monkeypatch.setattr(
    "memdiff.runtime.workdir.distributed.has_main", lambda text: said.append(text)
  )
  message = message_of(workdir.begin, "encoder", {"data/train_images": "ab", "rate": 0.1})
  assert "another config than process 0, or reads other data" in message
  assert said == ['{"data/train_images": "ab", "rate": 0.1}']
  assert workdir.manifest("encoder") is None


@pytest.mark.parametrize(
  "content", ["", "{", "[]", "3", "null", '{"config": {}}', '{"finished": true}', '"text"']
)
def test_a_damaged_manifest_is_named(workdir, content):
  workdir.begin("encoder", {"a": 1})
  path = workdir.folder("encoder") / "manifest.json"
  path.write_text(content)
  for call in (workdir.manifest, lambda phase: workdir.begin(phase, {"a": 1})):
    message = message_of(call, "encoder")
    assert f"{path} is damaged; remove it" in message


def test_a_manifest_that_is_no_text_is_named(workdir):
  workdir.begin("encoder", {"a": 1})
  (workdir.folder("encoder") / "manifest.json").write_bytes(b"\xff\xfe\x00")
  assert "is damaged" in message_of(workdir.manifest, "encoder")


# --- writers ---------------------------------------------------------------------------------


def test_a_full_disk_under_the_history_is_one_sentence(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.symlink_to("/dev/full")
  history = writers.History(path)
  message = message_of(history.write, 1, "train", {"loss": np.ones(2)})
  assert "No space left on device" in message


def test_tensorboard_without_its_packages_says_how_to_go_on(tmp_path, monkeypatch):
  monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r"needs tensorflow, .*--notensorboard"):
    writers.TensorBoard(tmp_path, enabled=True)
  writer = writers.TensorBoard(tmp_path / "tb", enabled=False)
  writer.scalars(0, {"a": 1.0})
  writer.pictures(0, {"a": np.zeros((2, 2, 3), np.uint8)})
  writer.hparams({"a": None})
  writer.close()
  assert not (tmp_path / "tb").exists()


HEAVY = (
  "tensorflow",
  "tensorboard",
  "tensorflow_datasets",
  "clu",
  "matplotlib",
  "sklearn",
  "grain",
)


def test_importing_the_library_imports_nothing_that_only_some_runs_need():
  program = f"import sys, memdiff.pipeline; print(*sys.modules.keys() & set({HEAVY}))"
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
  )
  assert done.stdout.split() == []


def test_the_library_runs_without_tensorflow():
  program = """
import sys
sys.modules["tensorflow"] = sys.modules["clu"] = sys.modules["tensorflow_datasets"] = None
import memdiff.pipeline
"""
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", program], env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
