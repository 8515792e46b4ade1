"""What is installed, what a checkout finds, and what happens where the compiled library is missing or stale."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from gatedkernels import _extension

ROOT = Path(__file__).resolve().parents[2]
PURELIB = sysconfig.get_paths()["purelib"]
IGNORED = shutil.ignore_patterns(
    ".*", "build", "dist", "runs", "data", "scratch", "*.so", "*.egg-info", "__pycache__", "results"
)
SERVES = """
import torch
import gatedkernels as gk
from gatedkernels import _extension
print(_extension.find("_cpu"))
assert _extension.CPU_ERROR is None, _extension.CPU_ERROR
x, weight, mask = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.rand(2, 6) < 0.5
args = x, weight, None, None, mask
y, expected = (gk.gated_conv2d(*args, padding=1, backend=b) for b in ("cpu", "reference"))
torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
import gatedkernels.models, gatedkernels.training
"""

needs_cpu = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))


def python(code: str, folder: Path, *path: Path, hide_installed: bool = False) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process in this folder, which comes first on sys.path, before ``path`` and site-packages.

    With -S no .pth file is read: an editable install of the checkout does not step in for what is missing.
    """
    if hide_installed:
        code = "from importlib import metadata\nmetadata.distributions = lambda **_: []\n" + code
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), PURELIB])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_checkout_imports_from_its_root():
    code = "import gatedkernels.models, gatedkernels.training; print(gatedkernels.training.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "training" / "__init__.py"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A copy of the sources as a checkout has them, with no compiled library."""
    root = tmp_path / "checkout"
    for name in ("gatedkernels", "models", "training"):
        shutil.copytree(ROOT / name, root / name, ignore=IGNORED)
    (root / "csrc").mkdir()
    return root


def test_without_the_library_the_reference_serves(bare: Path):
    code = """
import torch
import gatedkernels as gk
from gatedkernels import _extension, policy
assert _extension.find("_cpu") is None
x, weight = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(6, 4, 3, 3)
mask = torch.tensor([[True, False, True, True, False, False]] * 2)
dense = torch.where(mask[..., None, None], torch.nn.functional.conv2d(x, weight, padding=1), 0)
for backend in ("auto", "reference", "dense"):
    y = gk.gated_conv2d(x, weight, None, None, mask, padding=1, backend=backend)
    torch.testing.assert_close(y, dense)
    y.sum().backward()
plan = gk.plan(mask)
gk.conv_in(gk.conv_out(x, weight, None, *plan, padding=1), weight.transpose(0, 1), None, *plan, padding=1)
gk.gated_block(x, weight, None, weight.transpose(0, 1), None, mask, residual=x)
torch.compile(lambda x: gk.gated_conv2d(x, weight, None, None, mask), fullgraph=True, backend="aot_eager")(x)
import gatedkernels.models, gatedkernels.training
try:
    gk.gated_conv2d(x, weight, backend="cpu")
except ValueError as error:
    print(error)
"""
    done = python(code, bare, hide_installed=True)
    assert done.returncode == 0, done.stderr
    assert "backend 'cpu' is not available: _cpu.abi3.so was not built: reinstall gatedkernels" in done.stdout


@needs_cpu
def test_a_library_of_other_sources_says_reinstall(bare: Path):
    shutil.copy(_extension.find("_cpu"), bare / "gatedkernels")
    schemas = bare / "gatedkernels" / "_schemas.py"
    stale = schemas.read_text().replace('"plan_cpu(Tensor mask)', '"plan_cpu(Tensor mask, int more=0)')
    assert stale != schemas.read_text()
    fresh = python(SERVES, bare, hide_installed=True)
    assert fresh.returncode == 0, fresh.stderr
    schemas.write_text(stale)
    code = """
import torch
import gatedkernels as gk
x = torch.randn(2, 4, 5, 5)
assert gk.gated_conv2d(x, torch.randn(6, 4, 3, 3)).shape == (2, 6, 3, 3)
gk.gated_conv2d(x, torch.randn(6, 4, 3, 3), padding=1, backend="cpu")
"""
    done = python(code, bare, hide_installed=True)
    assert "ValueError: backend 'cpu' is not available" in done.stderr
    assert "was built from other sources: reinstall gatedkernels" in done.stderr


def test_a_broken_library_says_so(bare: Path):
    broken = bare / "gatedkernels" / "_cpu.abi3.so"
    broken.write_text(f"no library at all, but {_extension.digest()}")
    done = python("from gatedkernels import _extension; print(_extension.CPU_ERROR)", bare, hide_installed=True)
    assert done.returncode == 0, done.stderr
    assert f"{broken} cannot be loaded: " in done.stdout


@needs_cpu
def test_a_checkout_finds_the_installed_library(bare: Path, tmp_path: Path):
    """The checkout hides the installed copy, and a stale egg-info in it comes before the real distribution."""
    installed = tmp_path / "site"
    for folder in (installed / "gatedkernels-0.1.0.dist-info", bare / "gatedkernels.egg-info"):
        folder.mkdir(parents=True)
        for name in ("METADATA", "PKG-INFO"):
            (folder / name).write_text("Metadata-Version: 2.1\nName: gatedkernels\nVersion: 0.1.0\n")
    (installed / "gatedkernels").mkdir()
    library = shutil.copy(_extension.find("_cpu"), installed / "gatedkernels")
    done = python(SERVES, bare, installed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == library


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the checkout."""
    source, folder = tmp_path_factory.mktemp("source") / "checkout", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, source, ignore=IGNORED)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(source),
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(folder),
    ]
    environment = {**os.environ, "GATEDKERNELS_CUDA": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_contents(wheel: Path):
    assert wheel.name.startswith("gatedkernels-")
    assert "-cp311-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    # "models" and "training" are too generic for site-packages.
    assert {name for name in top if not name.endswith(".dist-info")} == {"gatedkernels"}
    for file in ("_cpu.abi3.so", "py.typed", "models/__init__.py", "training/__init__.py", "ops/plan/op.py"):
        assert f"gatedkernels/{file}" in names
    sources = {
        f"gatedkernels/{path.relative_to(base).as_posix()}"
        for base in (ROOT / "gatedkernels", ROOT)
        for folder in ([base] if base != ROOT else [ROOT / "models", ROOT / "training"])
        for path in folder.rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == sources


@pytest.mark.slow
def test_installed_wheel_serves_anywhere_and_in_the_checkout(wheel: Path, tmp_path: Path):
    installed = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(installed), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    library = str(installed / "gatedkernels" / "_cpu.abi3.so")
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT, checkout, ignore=IGNORED)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    where = "\nimport gatedkernels.models as m; print(m.__file__)"
    for folder, models in ((elsewhere, installed / "gatedkernels" / "models"), (checkout, checkout / "models")):
        done = python(SERVES + where, folder, installed)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [library, str(models / "__init__.py")]
