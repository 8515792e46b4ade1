"""What the README shows runs as it stands there, and what it names exists."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import gatedkernels.reporting
from gatedkernels.cli import app

CHECKOUT = Path(__file__).resolve().parent.parent
README = (CHECKOUT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SNIPPETS = [text for language, text in BLOCKS if language == "python"]
SHELL = "".join(text for language, text in BLOCKS if not language)
COMMANDS = re.findall(r"^gatedkernels (.*?)(?:    #.*)?$", SHELL, re.MULTILINE)
TARGETS = re.findall(r"^make ([\w-]+)", SHELL, re.MULTILINE)
# Links, and code that begins with a name from the checkout's root.
PATHS = [path for path in re.findall(r"\]\(([\w./-]+)\)|`([\w.-]+/[\w./-]*)`", README) for path in path if path]


def test_there_are_snippets():
    assert len(SNIPPETS) == 3
    assert len(COMMANDS) == 9 and len(TARGETS) == 2 and len(PATHS) > 5


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_are_understood(words: str):
    name, *arguments = shlex.split(words)
    commands: Any = typer.main.get_command(app)
    context = commands.commands[name].make_context(name, arguments)  # reads the words and runs nothing
    assert all(word.isdecimal() for word in context.args)  # more batch sizes


@pytest.mark.parametrize("target", TARGETS)
def test_targets_exist(target: str):
    assert re.search(rf"^{target}:", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", [path for path in PATHS if (CHECKOUT / path.split("/")[0]).exists()])
def test_paths_exist(path: str):
    assert (CHECKOUT / path).exists()


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.count("\n"))
def test_snippets_run(snippet: str, monkeypatch: pytest.MonkeyPatch):
    # The report has tests of its own, and compiles for a minute.
    monkeypatch.setattr(gatedkernels.reporting, "report", lambda *_: "report")
    exec(compile(snippet, "README.md", "exec"), {})
