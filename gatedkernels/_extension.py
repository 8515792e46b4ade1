"""Find and load the compiled libraries, or know why they are absent."""

import ctypes
from importlib import metadata
from pathlib import Path

import torch

from gatedkernels._schemas import SCHEMAS, digest

_NAMESPACE = "gatedkernels"
_DEFINITIONS = torch.library.Library(_NAMESPACE, "FRAGMENT")


def find(name: str) -> Path | None:
    """Path of ``_cpu.abi3.so`` or ``_cuda.abi3.so``: beside this file, else in the first installed copy that has it.

    A checkout's root comes first on ``sys.path`` and hides an installed copy, and a stale egg-info may come before the
    real distribution: so every distribution of that name is asked.
    """
    file = f"{name}.abi3.so"
    folders = [Path(__file__).parent]
    folders += [Path(str(found.locate_file(_NAMESPACE))) for found in metadata.distributions(name=_NAMESPACE)]
    return next((folder / file for folder in folders if (folder / file).is_file()), None)


def instruction_set() -> str | None:
    """The instruction set that the compiled CPU kernels chose, or None where there are none."""
    path = find("_cpu")
    if CPU_ERROR is not None or path is None:
        return None
    library = ctypes.CDLL(str(path))
    library.gatedkernels_cpu_isa.restype = ctypes.c_char_p
    return library.gatedkernels_cpu_isa().decode()


def _load(name: str) -> str | None:
    """Load one library; return why it is not there, or None."""
    path = find(name)
    if path is None:
        return f"{name}.abi3.so was not built: reinstall gatedkernels with a C++ compiler at hand"
    try:
        # Looked at before it is loaded: a loaded library has defined its operators, and nothing takes that back.
        if digest().encode() not in path.read_bytes():
            return f"{path} was built from other sources: reinstall gatedkernels"
        ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path} cannot be loaded: {error}"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    return _load("_cuda")


# Why a library is missing, or None where it is loaded.
CPU_ERROR = _load("_cpu")
if CPU_ERROR is not None:
    # The operators exist all the same, with their schemas; only the compiled launchers are out of reach.
    for schema in SCHEMAS:
        _DEFINITIONS.define(schema)
CUDA_ERROR = _load_cuda()
