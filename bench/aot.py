"""Compile every Triton kernel and shipped configuration for chips that are not there, and judge what came out.

Needs Triton alone: neither PyTorch nor a GPU nor an installation. ``python bench/aot.py [--arch 80 90 100] [--json F]``.
"""

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# The package imports PyTorch, its kernels do not: they are found through packages that are nothing but their folders.
for _name in ("gatedkernels", "gatedkernels.ops", "gatedkernels.ops.plan", "gatedkernels.ops.ragged"):
    if _name not in sys.modules and __name__ in ("__main__", "__mp_main__"):
        sys.modules[_name] = types.ModuleType(_name)
        sys.modules[_name].__path__ = [str(ROOT.joinpath(*_name.split(".")))]

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gatedkernels.ops.plan import kernels as plan_kernels  # noqa: E402
from gatedkernels.ops.ragged import kernels  # noqa: E402
from gatedkernels.ops.ragged.configurations import Tile, shipped  # noqa: E402

ARCHITECTURES = (80, 90, 100)
# Shared memory that one block may have: A100, H100, B200. Shipped tiles must fit into Ada's, too.
SHARED_LIMIT = 99 * 1024
NUMBERS = {"bf16": 2, "fp16": 2, "fp32": 4}


class Case(NamedTuple):
    """A kernel with everything that is fixed when it is compiled."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    matrix: bool = False


class Outcome(NamedTuple):
    """What the compiler made of a case."""

    case: str
    arch: int
    registers: int
    shared: int
    spilled: int
    instructions: str
    problem: str = ""


def conv(kind: str, numbers: str, tile: Tile, side: int = 3, stride: int = 1) -> Case:
    """The ragged convolution as a launcher specialises it on aligned channels.

    Args:
        kind: "out", writes listed channels packed; "in", reads them so; "gradient", of a strided convolution's input.
        numbers: "bf16", "fp16" or "fp32".
        tile: The configuration.
        side: Of the window.
        stride: Between windows.
    """
    gradient, out, into = kind == "gradient", kind == "out", kind == "in"
    tensors = ("x", "weight", "y", *(() if gradient else ("bias",)), *(("residual",) if into else ()))
    lists = ("out_index", "out_count") if out else ("in_index", "in_count")
    absent = {"bias", "residual", "gate", "in_index", "in_count", "out_index", "out_count"} - {*tensors, *lists}
    spread, between = (stride, 1) if gradient else (1, stride)
    return Case(
        f"conv {kind} {side}x{side}/{stride} {numbers} {tile.rows}x{tile.channels}x{tile.depth}",
        kernels.ragged_conv_kernel,
        {**dict.fromkeys(tensors, f"*{numbers}"), **dict.fromkeys(lists, "*i32")},
        {
            **dict.fromkeys(absent),
            # Weights are rows of what is not listed: (K, R, S, C) for listed outputs, (C, R, S, K) for listed inputs.
            "weight_stride_c" if out else "weight_stride_k": 1,
            **dict(R=side, S=side, STRIDE_H=between, STRIDE_W=between, PADDING_H=side // 2, PADDING_W=side // 2),
            **dict(DILATION_H=1, DILATION_W=1, SPREAD_H=spread, SPREAD_W=spread, MIRRORED=gradient, RELU=not gradient),
            **dict(PACKED_IN=not out, PACKED_OUT=out, PRECISION="tf32" if numbers == "fp32" else "ieee"),
            **dict(ROWS=tile.rows, CHANNELS=tile.channels, DEPTH=tile.depth),
        },
        tile.warps,
        tile.stages,
        matrix=True,
    )


def cases() -> Iterator[Case]:
    """Everything that is shipped."""
    lists = {"mask": "*i1", "index": "*i32", "count": "*i32"}
    yield Case("plan", plan_kernels.plan_kernel, lists, {"CHUNK": plan_kernels.CHUNK}, 4, 3)
    for numbers, size in NUMBERS.items():
        pointers = {"x": f"*{numbers}", "packed": f"*{numbers}", "index": "*i32", "count": "*i32"}
        yield Case(f"pack {numbers}", kernels.pack_kernel, pointers, {"PIXELS": 64, "CHANNELS": 32}, 4, 3)
        for bytes_, tile in sorted(shipped()):
            if bytes_ == size:
                yield from (conv(kind, numbers, tile) for kind in ("out", "in"))
        widest = max(tile for bytes_, tile in shipped() if bytes_ == size)
        yield from (conv(kind, numbers, widest, side=1) for kind in ("out", "in"))
        yield from (conv(kind, numbers, widest, stride=2) for kind in ("out", "gradient"))


def compile_case(case: Case, arch: int) -> Outcome:
    """Compile one case for one chip, and read registers, shared memory, spills and instructions off the machine code."""
    names = case.kernel.arg_names
    types_ = {n: "constexpr" if n in case.constants else case.pointers.get(n, "i32") for n in names}
    # As the launcher finds it: aligned memory, and strides and channels that are multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if types_[n].startswith("*") or (types_[n] == "i32" and ("stride" in n or "channels" in n))
    }
    source = ASTSource(case.kernel, types_, case.constants, aligned)
    options = {"num_warps": case.warps, "num_stages": case.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = disassemble("--dump-resource-usage", file.name)
        code = disassemble("--dump-sass", file.name)
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
    spilled = stack + local
    matrix = re.search(r"UTC\w*MMA|HGMMA|HMMA", code)
    instructions = " ".join(
        name for name, pattern in (("async", r"LDGSTS|UTMALDG"), (matrix[0] if matrix else "", r"MMA")) if name and re.search(pattern, code)
    )
    shared = compiled.metadata.shared
    problem = ""
    if spilled:
        problem = f"spills {spilled} bytes"
    elif shared > SHARED_LIMIT:
        problem = f"takes {shared} bytes of shared memory, {SHARED_LIMIT} are allowed"
    elif case.matrix and not matrix:
        problem = "does not use the matrix units"
    return Outcome(case.name, arch, registers, shared, spilled, instructions, problem)


def disassemble(option: str, path: str) -> str:
    """What the ``cuobjdump`` that Triton brings along says."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    import time
    for case in cases():
        if len(sys.argv) > 1 and not re.search(sys.argv[1], case.name): continue
        for arch in ARCHITECTURES:
            t = time.time()
            print(*compile_case(case, arch), f"{time.time()-t:.1f}s", sep=" | ", flush=True)
