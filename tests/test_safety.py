"""Files are data: nothing that is read is unpickled or run, and text is UTF-8 in every locale."""

import ast
import json
import pathlib

import numpy as np
import pytest

from memdiff.classifier import pretrained
from memdiff.errors import MemdiffError, WorkdirError
from memdiff.runtime import meter
from memdiff.runtime.workdir import Workdir, read_arrays

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = [
  path
  for folder in ("memdiff", "input_pipeline", "benchmarks", "configs")
  for path in (ROOT / folder).rglob("*.py")
] + [ROOT / "main.py"]
FORBIDDEN = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Reads pickles by an unpickler that lets arrays through and nothing else; see test_torch_files.py.
RESTRICTED = ROOT / "memdiff" / "evaluation" / "torch_files.py"


class Trap:
  """Sets a mark when it is unpickled."""

  def __init__(self, mark):
    self.mark = mark

  def __reduce__(self):
    return pathlib.Path.touch, (self.mark,)


def calls(tree):
  """(name of what is called, call) of every call."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_source_unpickles_or_executes(path):
  tree = ast.parse(path.read_text())
  for node in ast.walk(tree):
    if isinstance(node, (ast.Import, ast.ImportFrom)):
      names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
      found = FORBIDDEN & {name.split(".")[0] for name in names}
      assert not found or (path == RESTRICTED and found == {"pickle"})
  for name, call in calls(tree):
    assert name not in ("eval", "exec", "compile", "__import__")
    if name in ("np.load", "numpy.load"):
      keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
      assert keywords.get("allow_pickle") == "False", f"{path}:{call.lineno}"


def test_the_one_unpickler_lets_arrays_through_alone():
  tree = ast.parse(RESTRICTED.read_text())
  used = {
    node.attr
    for node in ast.walk(tree)
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"
  }
  assert used == {"Unpickler", "UnpicklingError"}
  classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
  assert [ast.unparse(b) for b in classes["_Unpickler"].bases] == ["pickle.Unpickler"]
  assert "find_class" in {getattr(node, "name", "") for node in classes["_Unpickler"].body}


def without_encoding(tree):
  """Calls that read or write text in the encoding of the locale."""
  for name, call in calls(tree):
    module, _, function = name.rpartition(".")
    keywords = {k.arg: k.value for k in call.keywords}
    if function in ("read_text", "write_text"):
      is_text = True
    elif function == "open" and module not in ("Image", "os", "tarfile"):
      place = 0 if module and module != "io" else 1  # of the mode; path.open has no path before it
      mode = keywords.get("mode", call.args[place] if len(call.args) > place else None)
      is_text = mode is None or "b" not in ast.literal_eval(mode)
    else:
      starts = function in ("run", "Popen", "call", "check_call", "check_output")  # subprocess
      is_text = starts and bool({"text", "universal_newlines"} & keywords.keys())
    if is_text and "encoding" not in keywords:
      yield call


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_text_is_utf_8_whatever_the_locale(path):
  assert not [call.lineno for call in without_encoding(ast.parse(path.read_text("utf-8")))]


@pytest.mark.parametrize(
  ("code", "is_found"),
  [
    ("path.read_text()", True),
    ("pathlib.Path(name).write_text(text)", True),
    ("path.read_text(encoding='utf-8')", False),
    ("open(name)", True),
    ("open(name, 'w')", True),
    ("open(name, 'rb')", False),
    ("open(name, mode='a')", True),
    ("path.open()", True),
    ("path.open('a')", True),
    ("path.open('ab')", False),
    ("path.open('a', encoding='utf-8')", False),
    ("Image.open(name)", False),
    ("subprocess.run(command, text=True)", True),
    ("subprocess.run(command, encoding='utf-8')", False),
  ],
)
def test_the_search_for_text_of_the_locale_finds_it(code, is_found):
  assert bool(list(without_encoding(ast.parse(code)))) == is_found


def test_arrays_with_objects_are_refused_and_not_unpickled(tmp_path):
  mark, path = tmp_path / "run", tmp_path / "features.npz"
  np.savez(path, train=np.array([Trap(mark)], dtype=object))
  with pytest.raises(WorkdirError, match="Cannot read"):
    read_arrays(path)
  with pytest.raises(MemdiffError):
    pretrained.load(str(path), {"params": {}, "batch_stats": {}}, head=False)
  assert not mark.exists()
  np.load(path, allow_pickle=True)["train"]  # what would have happened
  assert mark.exists()


def test_a_manifest_is_read_as_data_and_names_no_paths(tmp_path):
  workdir = Workdir(str(tmp_path / "run"))
  workdir.begin("heads", {"a": 1})
  workdir.finish("heads", {"metrics": {"path": "../../outside"}})
  assert workdir.folder("heads").parent == tmp_path / "run"
  assert json.loads((tmp_path / "run" / "heads" / "manifest.json").read_text())["finished"]
  (tmp_path / "run" / "heads" / "manifest.json").write_text('{"config": [], "finished": 1')
  with pytest.raises(WorkdirError, match="is damaged; remove it"):
    workdir.manifest("heads")
  workdir.close()


def test_speeds_are_read_from_below_the_workdir_alone(tmp_path):
  (tmp_path / "outside").mkdir()
  (tmp_path / "outside" / "speed.json").write_text("{}")
  (tmp_path / "run" / "a" / "b").mkdir(parents=True)
  (tmp_path / "run" / "a" / "b" / "speed.json").write_text('{"steps": 3}')
  assert meter.read_all(tmp_path / "run") == {"a/b": {"steps": 3}}
