"""The import rules of the house, read from the source so that nothing needs to be importable."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTALLED_AS = {"models": "gatedkernels.models", "training": "gatedkernels.training"}
OURS = {"gatedkernels", "models", "training", "bench", "tests", "<outside>"}
BASE = {
    f"gatedkernels.{name}" for name in ("_checks", "_extension", "_schemas", "store", "thresholds", "policy", "ops")
}

HEAVY = ["triton", "lightning", "pytorch_lightning", "matplotlib", "torchvision", "sklearn", "onnxruntime", "openvino"]


def imported(path: Path, root: Path) -> set[str]:
    """Absolute names that a file imports from this repository."""
    package = path.relative_to(root).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts: list[str] = []
            if node.level:
                parts = [*package[: len(package) + 1 - node.level]] or ["<outside>"]
                parts[0] = INSTALLED_AS.get(parts[0], parts[0])
            stem = ".".join([*parts, *filter(None, [node.module])])
            names |= {f"{stem}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in OURS}


# The names of the layers below that gatedkernels/__init__.py offers to those above.
PUBLIC = {
    f"gatedkernels.{name.split('.')[-1]}"
    for name in imported(ROOT / "gatedkernels" / "__init__.py", ROOT)
    if name.startswith(("gatedkernels.nn.", "gatedkernels.ops."))
}
# What may be imported from this repository, by file or folder: the arrows of DESIGN.md.
MAY_IMPORT: dict[str, set[str]] = {
    "gatedkernels/_checks.py": set(),
    "gatedkernels/_schemas.py": set(),
    "gatedkernels/_extension.py": {"gatedkernels._schemas"},
    "gatedkernels/store.py": set(),
    "gatedkernels/thresholds.py": {"gatedkernels._extension", "gatedkernels.store"},
    "gatedkernels/policy.py": {"gatedkernels._extension", "gatedkernels.thresholds"},
    "gatedkernels/calibration.py": {"gatedkernels.calibration_gpu", "gatedkernels.reporting.timing", *BASE},
    "gatedkernels/calibration_gpu.py": {"gatedkernels.calibration", "gatedkernels.reporting.timing", *BASE},
    "gatedkernels/tuning.py": {"gatedkernels.reporting.timing", *BASE},
    "gatedkernels/ops": BASE,
    "gatedkernels/nn": {"gatedkernels._checks", "gatedkernels.nn", "gatedkernels.ops"},
    "gatedkernels/inference.py": {"gatedkernels.nn", *BASE, *PUBLIC},
    "gatedkernels/reporting": {
        "gatedkernels.reporting", "gatedkernels.inference", "gatedkernels.models", "gatedkernels.nn", *BASE, *PUBLIC
    },
    "models": {"gatedkernels._checks", "gatedkernels.models", "gatedkernels.nn", *PUBLIC},
    "training": {"gatedkernels.training", "gatedkernels.nn", "gatedkernels.policy", *PUBLIC},
}  # fmt: skip
# Those who put a network and a method together know both.
ASSEMBLY = {
    "training/recipes.py": {"gatedkernels.models"},
    "gatedkernels/reporting/command.py": {"gatedkernels.training", "gatedkernels.tuning"},  # a part of cli.py
}


def files(root: Path, place: str) -> list[Path]:
    """The Python files of a folder, or the one file."""
    return [root / place] if place.endswith(".py") else sorted((root / place).rglob("*.py"))


def violations(root: Path, place: str) -> list[str]:
    found = []
    for path in files(root, place):
        here = path.relative_to(root).as_posix()
        allowed = tuple(f"{name}." for name in MAY_IMPORT[place] | ASSEMBLY.get(here, set()))
        found += [
            f"{here} imports {name}"
            for name in sorted(imported(path, root))
            if not (f"{name}.".startswith(allowed) if allowed else False)
        ]
    return found


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_imports_point_down(place: str):
    assert files(ROOT, place), f"{place} is gone: the rule guards nothing"
    assert violations(ROOT, place) == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("gatedkernels/ops", "import gatedkernels.nn"),
        ("gatedkernels/ops", "from gatedkernels import nn"),
        ("gatedkernels/ops", "from ..nn import GatedConv2d"),
        ("gatedkernels/ops", "def f():\n    from gatedkernels.models import gate"),
        ("gatedkernels/nn", "from gatedkernels import GatedConv2d"),
        ("gatedkernels/nn", "from gatedkernels import models"),
        ("gatedkernels/nn", "from gatedkernels import _extension"),
        ("gatedkernels/nn", "from gatedkernels.inference import optimize"),
        ("gatedkernels/reporting", "from gatedkernels.training import run"),
        ("gatedkernels/policy.py", "from gatedkernels.ops import plan"),
        ("gatedkernels/thresholds.py", "from gatedkernels import policy"),
        ("gatedkernels/store.py", "from gatedkernels import thresholds"),
        ("gatedkernels/tuning.py", "from gatedkernels.inference import optimize"),
        ("gatedkernels/calibration.py", "from gatedkernels.reporting import machine"),
        ("gatedkernels/_schemas.py", "import gatedkernels._extension"),
        ("gatedkernels/inference.py", "from .models import gate"),
        ("models", "import training"),
        ("models", "import gatedkernels.training.losses"),
        ("models", "from gatedkernels.reporting import report"),
        ("models", "from gatedkernels import report"),
        ("training", "import models"),
        ("training", "from gatedkernels.models import gated_resnet18"),
        ("training", "from ..models import gated_resnet18"),
        ("training", "from ... import models"),
        ("training", "import bench.cases"),
        ("training", "from tests import conftest"),
    ],
)
def test_a_planted_import_is_found(place: str, line: str, tmp_path: Path):
    planted = tmp_path / place if place.endswith(".py") else tmp_path / place / "planted.py"
    planted.parent.mkdir(parents=True)
    planted.write_text(line)
    assert len(violations(tmp_path, place)) == 1


def broken_operations(root: Path) -> list[str]:
    """References that import more than references; operations that import Triton before a kernel is called."""
    found = []
    for path in sorted((root / "gatedkernels" / "ops").rglob("*.py")):
        here = path.relative_to(root).as_posix()
        names = imported(path, root)
        if path.name == "reference.py":
            found += [f"{here} imports {name}" for name in sorted(names) if ".reference." not in name]
        if path.name == "kernels.py":
            found += [f"{here} imports {name}" for name in sorted(names) if re.search(r"\.(op|reference)\.", name)]
    return found


def test_references_stand_alone():
    assert broken_operations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("reference.py", "from gatedkernels.ops.plan.op import plan"),
        ("reference.py", "from gatedkernels.ops import gated_conv2d"),
        ("reference.py", "from .kernels import launch"),
        ("kernels.py", "from gatedkernels.ops.plan.reference import plan_reference"),
    ],
)
def test_a_planted_reference_is_found(file: str, line: str, tmp_path: Path):
    folder = tmp_path / "gatedkernels" / "ops" / "plan"
    folder.mkdir(parents=True)
    (folder / file).write_text(line)
    assert len(broken_operations(tmp_path)) == 1


FRAMEWORK = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|Python|pybind11)')
UNSTABLE = re.compile(
    r'#\s*include\s*[<"](torch/(?!csrc/stable/|headeronly/|csrc/inductor/aoti_torch/)|ATen|c10|pybind11)'
)


def includes(root: Path, folder: str, forbidden: re.Pattern[str]) -> list[str]:
    suffixes = {".h", ".cuh", ".cpp", ".cu"}
    return [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in sorted((root / folder).rglob("*"))
        if path.suffix in suffixes
        for line in path.read_text().splitlines()
        if forbidden.search(line)
    ]


def test_kernels_know_no_framework():
    assert includes(ROOT, "csrc/include", FRAMEWORK) == []


def test_the_libraries_use_the_stable_abi():
    assert includes(ROOT, "csrc", UNSTABLE) == []


def test_a_planted_include_is_found(tmp_path: Path):
    for line in ('#include "torch/csrc/stable/tensor.h"', "#include <ATen/ATen.h>", "# include <c10/util/Half.h>"):
        (tmp_path / "planted.h").write_text(line)
        assert includes(tmp_path, ".", FRAMEWORK)
    for line in ("#include <torch/extension.h>", "#include <ATen/ATen.h>", "#include <torch/csrc/autograd/variable.h>"):
        (tmp_path / "planted.h").write_text(line)
        assert includes(tmp_path, ".", UNSTABLE)


def loaded(code: str, folder: Path) -> list[str]:
    """Which of the heavy packages a fresh process has loaded after this code."""
    code += f"\nimport sys\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    return subprocess.check_output([sys.executable, "-c", code], cwd=folder, text=True).split()


def test_importing_gatedkernels_is_light(tmp_path: Path):
    assert loaded("import gatedkernels", tmp_path) == []


def test_a_heavy_import_is_found(tmp_path: Path):
    (tmp_path / "matplotlib.py").touch()
    assert loaded("import gatedkernels, matplotlib", tmp_path) == ["matplotlib"]
