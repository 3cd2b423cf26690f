"""TensorBoard after a kill: every point of a curve once, of every stage its own."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from memdiff.runtime import loop
from memdiff.runtime.writers import TensorBoard
from tests import support
from tests.runtime.test_loop import Killed, KilledAt, make_stage

accumulator = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")
tensor_util = pytest.importorskip("tensorboard.util.tensor_util")


def curves(folder):
  """tag -> [(step, value)] as TensorBoard shows them."""
  events = accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0})
  events.Reload()
  return {
    tag: [(e.step, float(tensor_util.make_ndarray(e.tensor_proto))) for e in events.Tensors(tag)]
    for tag in events.Tags()["tensors"]
    if not tag.startswith("speed/")
  }


def test_a_run_killed_and_resumed_shows_the_curves_of_an_undisturbed_one(mesh, tmp_path):
  def train(name, progress=None):
    time.sleep(1.1)  # files are read in order of their names, which tell the second
    tensorboard = TensorBoard(tmp_path / name / "tb", enabled=True)
    changes = {"tensorboard": tensorboard} | ({} if progress is None else {"progress": progress})
    run = support.make_run(mesh, (3, 7), 5, eval_every=5, checkpoint_every=10, **changes)
    try:
      loop.train(make_stage(), run, tmp_path / name)
    finally:
      tensorboard.close()

  train("whole")
  for at in (20, 20, 23):
    with pytest.raises(Killed):
      train("killed", KilledAt(at))
  train("killed")
  whole, killed = (curves(tmp_path / name / "tb" / "toy") for name in ("whole", "killed"))
  assert [step for step, _ in whole["train/loss"]] == [5, 10, 15, 20, 23]
  assert [step for step, _ in whole["eval/error"]] == [0, 5, 10, 15, 20, 23]
  assert killed == whole


def test_stages_do_not_take_back_each_others_points(tmp_path):
  for step in (0, 5, 10):
    time.sleep(1.1)  # as above
    board = TensorBoard(tmp_path, enabled=True)
    board.rewind("second", 3)
    board.scalars(step, {"train/loss": 1.0}, "first")
    board.scalars(step, {"train/loss": 2.0}, "second")
    board.close()
  assert [s for s, _ in curves(tmp_path / "first")["train/loss"]] == [0, 5, 10]
  assert [s for s, _ in curves(tmp_path / "second")["train/loss"]] == [0, 10]


def test_a_run_that_writes_no_event_makes_no_writer(tmp_path):
  program = (
    "import pathlib, sys; from memdiff.runtime.writers import TensorBoard\n"
    "board = TensorBoard(pathlib.Path(sys.argv[1]), enabled=True); board.close()\n"
    "assert not {'tensorflow', 'tensorboard', 'clu'} & set(sys.modules)"
  )
  subprocess.run(
    [sys.executable, "-c", program, str(tmp_path / "tb")], cwd=support.ROOT, check=True
  )
  assert not (tmp_path / "tb").exists()


def test_switched_off_nothing_is_written(tmp_path):
  board = TensorBoard(tmp_path / "tb", enabled=False)
  board.rewind("stage", 3)
  board.scalars(1, {"a": np.float32(1)}, "stage")
  board.close()
  assert not (tmp_path / "tb").exists()


def test_hyper_parameters_have_the_columns_that_were_asked_for(tmp_path):
  plugin_data = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
  board = TensorBoard(tmp_path, enabled=True)
  board.texts(0, {"1_result/answer": "Use *it*."})
  board.hparams({"loss": "csl", "seeds": (0, 1), "folds": None}, ["1_result/few"])
  board.close()
  events = accumulator.EventAccumulator(str(tmp_path))
  events.Reload()
  stored = {
    tag: plugin_data.HParamsPluginData.FromString(content)
    for tag, content in events.PluginTagToContent("hparams").items()
  }
  columns = stored["_hparams_/experiment"].experiment
  assert [h.name for h in columns.hparam_infos] == ["loss", "seeds", "folds"]
  assert [m.name.tag for m in columns.metric_infos] == ["1_result/few"]
  values = stored["_hparams_/session_start_info"].session_start_info.hparams
  assert {k: v.string_value for k, v in values.items()} == {"loss": "csl", "seeds": "(0, 1)"}
  (text,) = tensor_util.make_ndarray(events.Tensors("1_result/answer")[0].tensor_proto).reshape(-1)
  assert text == b"Use *it*."


def test_writing_makes_nobody_wait_and_what_fails_is_raised_later(tmp_path):
  (tmp_path / "file").write_text("no folder")
  board, begin = TensorBoard(tmp_path / "file", enabled=True), threading.Event()
  board._thread.submit(begin.wait)  # as an import that takes long
  board.scalars(0, {"train/loss": 1.0}, "first")
  begin.set()
  with pytest.raises(Exception, match="file"):
    board.close()


def test_calls_are_written_in_their_order_by_the_time_of_closing(tmp_path):
  board = TensorBoard(tmp_path, enabled=True)
  for step in range(20):
    board.scalars(step, {"train/loss": float(step)}, "first")
  board.close()
  assert curves(tmp_path / "first")["train/loss"] == [(step, step) for step in range(20)]
