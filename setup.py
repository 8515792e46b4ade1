"""Build gatedkernels: the Python packages, the CPU library always, the CUDA library where a CUDA toolkit is found."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent.resolve()


def cuda_toolkit() -> str | None:
    """The folder of a CUDA toolkit. PyTorch takes the first nvcc on the PATH, which may be a wrapper far from it."""
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        named.append(str(Path(nvcc).resolve().parent.parent))
    whole = (home for home in named if home and (Path(home) / "include" / "cuda_runtime.h").is_file())
    return next((home for home in whole if (Path(home) / "bin" / "nvcc").is_file()), None)


TOOLKIT = cuda_toolkit()
if TOOLKIT:
    os.environ["CUDA_HOME"] = TOOLKIT  # read by the import below

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

# Folders beside gatedkernels/ that are installed inside it: "models" and "training" are too generic for site-packages.
BESIDE = {"gatedkernels.models": "models", "gatedkernels.training": "training"}
# The oldest CPython and PyTorch that the libraries serve, through the stable interfaces of both.
STABLE = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
# Reads and writes outside of memory, and undefined behaviour, end the process and name the line. What is left out tells
# nothing that the address sanitizer would not, and makes the compiler take minutes for each set of kernels.
SANITIZERS = [
    *("-O1", "-g1", "-fno-var-tracking", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"),
    *("-fno-sanitize=null,alignment,object-size,vptr,pointer-overflow", "-fno-sanitize-recover=undefined"),
]


def packages() -> list[str]:
    """Every package, under the name it is installed as."""
    names = find_packages(include=["gatedkernels", "gatedkernels.*"])
    for name, folder in BESIDE.items():
        names += [name, *(f"{name}.{inner}" for inner in find_packages(folder))]
    return names


def generated_headers() -> str:
    """The operators' schemas as a header, from the one place where they are written."""
    schemas = runpy.run_path(str(ROOT / "gatedkernels" / "_schemas.py"))
    lines = ",\n".join(f'    R"({schema})"' for schema in schemas["SCHEMAS"])
    text = (
        f'#pragma once\n#define GATEDKERNELS_DIGEST "{schemas["digest"]()}"\n'
        f"namespace gatedkernels {{\nconstexpr const char* kSchemas[] = {{\n{lines}}};\n}}\n"
    )
    folder = ROOT / "build" / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    header = folder / "schemas.h"
    if not header.exists() or header.read_text() != text:
        header.write_text(text)
    return str(folder)


def cuda_problem() -> str | None:
    """What is missing for the CUDA library, or None. GATEDKERNELS_CUDA: 1 insists, 0 declines, unset: if possible."""
    wish = os.environ.get("GATEDKERNELS_CUDA", "")
    if wish not in ("", "0", "1"):
        raise ValueError(f"GATEDKERNELS_CUDA must be 0, 1 or unset, got {wish!r}")
    if wish == "0":
        return "GATEDKERNELS_CUDA=0"
    import torch

    problem = None
    if torch.version.cuda is None:
        problem = f"a CUDA build of PyTorch (found {torch.__version__})"
    elif TOOLKIT is None:
        problem = "a CUDA toolkit (set CUDA_HOME to the folder that holds bin/nvcc and include/cuda_runtime.h)"
    else:
        release = re.search(r"release (\d+)", subprocess.check_output([f"{TOOLKIT}/bin/nvcc", "--version"], text=True))
        if release is None or release[1] != torch.version.cuda.split(".")[0]:
            problem = f"the CUDA toolkit of PyTorch's major version, {torch.version.cuda} (found {TOOLKIT})"
    if problem and wish == "1":
        raise RuntimeError(f"GATEDKERNELS_CUDA=1, but the CUDA library needs {problem}")
    return problem


def extensions() -> list:
    """The compiled libraries."""
    includes = [str(ROOT / "csrc" / "include"), generated_headers()]
    cxx = ["-O2", "-std=c++20", "-Wall", "-fvisibility=hidden", *STABLE]
    link = ["-Wl,-s"]
    if os.environ.get("GATEDKERNELS_SANITIZE") == "1":  # what `make sanitize` builds, in a folder of its own
        cxx += SANITIZERS
        link = SANITIZERS
    cpu = CppExtension(
        "gatedkernels._cpu",
        sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp")),
        include_dirs=includes,
        extra_compile_args={"cxx": cxx},
        extra_link_args=link,
        py_limited_api=True,
    )
    problem = cuda_problem()
    if problem:
        print(f"gatedkernels: building without the CUDA library: {problem}", file=sys.stderr)
        return [cpu]
    # With no GPU in sight PyTorch would find no architecture to compile for.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    cuda = CUDAExtension(
        "gatedkernels._cuda",
        sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cuda").iterdir() if p.suffix in {".cpp", ".cu"}),
        include_dirs=includes,
        extra_compile_args={
            "cxx": [*cxx, "-DUSE_CUDA"],
            "nvcc": ["-O3", "-std=c++20", *STABLE, "-DUSE_CUDA", "-lineinfo"],
        },
        extra_link_args=link,
        py_limited_api=True,
    )
    return [cpu, cuda]


setup(
    packages=packages(),
    package_dir=BESIDE,
    package_data={"gatedkernels": ["py.typed"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
