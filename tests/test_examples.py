"""Examples of docstrings run and say what they show."""

import doctest
import importlib
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
# Where the sources of each package lie; the second is installed inside the first.
_FOLDERS = {"gatedkernels": _ROOT / "gatedkernels", "gatedkernels.models": _ROOT / "models"}


def _with_examples() -> list[str]:
    return [
        ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__")
        for package, folder in _FOLDERS.items()
        for path in sorted(folder.rglob("*.py"))
        if ">>> " in path.read_text()
    ]


@pytest.mark.parametrize("name", _with_examples())
def test_examples(name: str):
    outcome = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert outcome.attempted
    assert not outcome.failed
