"""The examples of the page run, one after the other, and print what they say."""

import re

from tests.support import ROOT


def test_the_page_runs_from_top_to_bottom(capsys):
  page = (ROOT / "docs" / "estimators.md").read_text(encoding="utf-8")
  blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
  assert len(blocks) == 2
  first = [line for line in blocks[0].splitlines() if line.strip()]
  assert len(first) <= 20
  names: dict = {}
  for block in blocks:
    exec(compile(block, "docs/estimators.md", "exec"), names)
  said = capsys.readouterr().out
  expected, plain = map(float, re.search(r"expected: (\S+), .* (\S+)\n", said).groups())
  test = float(re.search(r"test: (\S+)\n", said)[1])
  assert expected > plain and abs(test - expected) < 0.1
  assert len(names["X_more"]) == len(names["y_more"]) > len(names["train"])
