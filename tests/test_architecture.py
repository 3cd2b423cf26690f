"""The structure: imports run one way, files and functions stay short."""

import ast
import pathlib
import re

import pytest

from memdiff import pipeline
from tests.support import ROOT

# What each part may import of memdiff, beside itself; see docs/design.md.
FOUNDATION = {"config", "errors", "paths"}
PARTS = {
  "config": {"errors", "paths"},
  "config_flag": {"paths"},
  "describe": set(),
  "errors": set(),
  "paths": {"errors"},
  "runtime": FOUNDATION,
  "contrastive": set(),
  "convolution": {"runtime"},
  "diffusion": {"contrastive", "convolution", "runtime"} | FOUNDATION,
  "evaluation": {"runtime"} | FOUNDATION,
  "memory": {"runtime"} | FOUNDATION,
  "classifier": {"contrastive", "convolution", "memory", "runtime"} | FOUNDATION,
  "synthesis": {"contrastive", "diffusion", "evaluation", "memory", "runtime"} | FOUNDATION,
  "fitting": {"classifier", "evaluation"} | FOUNDATION,
  "experiments": {
    "classifier",
    "contrastive",
    "diffusion",
    "evaluation",
    "fitting",
    "memory",
    "runtime",
    "synthesis",
  }
  | FOUNDATION,
  "estimators": {
    "classifier",
    "diffusion",
    "evaluation",
    "fitting",
    "memory",
    "runtime",
    "synthesis",
  }
  | FOUNDATION,
  "pipeline": {"classifier", "evaluation", "experiments", "runtime"} | FOUNDATION,
  "prediction": {"classifier", "evaluation", "experiments", "fitting", "pipeline", "runtime"}
  | FOUNDATION,
  "predict": {"evaluation", "prediction", "runtime"} | FOUNDATION,
  "export": {"prediction", "predict", "runtime"} | FOUNDATION,
}
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_PARAMETERS = 400, 80, 8


def sources(folder: str) -> list[pathlib.Path]:
  return sorted((ROOT / folder).rglob("*.py"))


def imported(path: pathlib.Path) -> set[str]:
  """The modules of memdiff that a file imports, anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.ImportFrom) and node.module == "memdiff":
      found |= {f"memdiff.{alias.name}" for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found.add(node.module)
    elif isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
  return {name for name in found if name.startswith("memdiff.")}


def part_of(path: pathlib.Path) -> str:
  return path.relative_to(ROOT / "memdiff").parts[0].removesuffix(".py")


@pytest.mark.parametrize("part", sorted(PARTS))
def test_imports_run_one_way(part):
  for path in sources("memdiff"):
    if part_of(path) == part:
      others = {name.split(".")[1] for name in imported(path)} - {part}
      assert others <= PARTS[part], f"{path} imports {others - PARTS[part]}"


def test_every_part_has_its_rule():
  assert {part_of(path) for path in sources("memdiff")} - {"__init__"} == set(PARTS)


def test_the_rules_have_no_circle():
  rest = dict(PARTS)
  while rest:
    free = [part for part, may_import in rest.items() if not may_import & set(rest)]
    assert free, f"a circle among {sorted(rest)}"
    for part in free:
      del rest[part]


def test_data_know_nothing_of_training():
  allowed = {"memdiff.config", "memdiff.errors", "memdiff.paths", "memdiff.runtime"}
  for path in sources("input_pipeline"):
    for name in imported(path):
      assert any(name == a or name.startswith(f"{a}.") for a in allowed), f"{path} imports {name}"


@pytest.mark.parametrize("folder", ["memdiff", "input_pipeline"])
def test_files_and_functions_are_short(folder):
  for path in sources(folder):
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= MOST_LINES, path
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        length = node.end_lineno - node.lineno + 1
        assert length <= MOST_LINES_OF_A_FUNCTION, f"{path}: {node.name} has {length} lines"
        taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        taken = [argument.arg for argument in taken if argument.arg not in ("self", "cls")]
        assert len(taken) <= MOST_PARAMETERS, f"{path}: {node.name} takes {', '.join(taken)}"


def test_the_picture_of_the_data_flow_names_the_phases_and_the_parts():
  picture = (ROOT / "docs" / "images" / "data_flow.svg").read_text(encoding="utf-8")
  words = set(re.findall(r">([a-z_]+)</text>", picture))
  phases = {phase.name for phase in pipeline.KINDS["memdiff"].phases}
  parts = {path.name for path in (ROOT / "memdiff").iterdir() if (path / "__init__.py").exists()}
  assert phases | parts | {"input_pipeline"} <= words


def test_the_design_page_names_files_that_exist():
  page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
  paths = re.findall(r"`((?:memdiff|input_pipeline|tests|configs)/[\w/.]+\.py)`", page)
  assert len(paths) > 10
  for path in paths + [f"memdiff/experiments/{name}" for name in re.findall(r"`(\w+\.py)`", page)]:
    assert (ROOT / path).exists() or (ROOT / path.replace("experiments/", "")).exists(), path
