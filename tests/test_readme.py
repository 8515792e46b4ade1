"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest

import gatedkernels.reporting

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) == 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.count("\n"))
def test_snippets_run(snippet: str, monkeypatch: pytest.MonkeyPatch):
    # The report has tests of its own, and compiles for a minute.
    monkeypatch.setattr(gatedkernels.reporting, "report", lambda *_: "report")
    exec(compile(snippet, "README.md", "exec"), {})
