"""Compile the Triton kernels and shipped configurations for chips that are not there, and judge what came out.

``python bench/aot.py`` needs Triton alone, whichever release: neither PyTorch nor a GPU nor an installation. It ends
with 1 if a case spills registers, takes more shared memory than a block may have, or misses the matrix units.

Without ``--all`` each kernel and each tile is compiled once for a chip, for as many numbers as differ: minutes on two
cores. With it, all of them for all numbers.
"""

import argparse
import multiprocessing
import re
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# The package imports PyTorch, its kernels do not: where it is not installed they are found through empty packages.
if "gatedkernels" not in sys.modules:
    for name in ("gatedkernels", "gatedkernels.ops"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(ROOT.joinpath(*name.split(".")))]
    sys.modules["gatedkernels.ops.plan"] = types.ModuleType("gatedkernels.ops.plan")
    sys.modules["gatedkernels.ops.plan"].__path__ = [str(ROOT / "gatedkernels" / "ops" / "plan")]

warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from gatedkernels.ops.channel_gate import configurations as gates  # noqa: E402
from gatedkernels.ops.channel_gate import kernels as gate_kernels  # noqa: E402
from gatedkernels.ops.plan import kernels as plan_kernels  # noqa: E402
from gatedkernels.ops.ragged import (  # noqa: E402
    gradient_kernels,
    group_kernels,
    kernels,
    schedule_kernels,
    similar_kernels,
    switch_kernels,
)
from gatedkernels.ops.ragged.configurations import (  # noqa: E402
    ARRIVED,
    GRADIENT_TILES,
    GROUPED_ROWS,
    SPLIT_MOST,
    GradientTile,
    Tile,
    family,
    shared_memory,
    shipped,
)

# The matrix instruction that a tile of 64 pixels or more is meant to use, and smaller ones.
MATRIX = {80: ("HMMA", "HMMA"), 89: ("HMMA", "HMMA"), 90: ("HGMMA", "HMMA"), 100: ("UTCHMMA", "HMMA")}
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
PRECISIONS = {"bf16": "ieee", "fp16": "ieee", "fp32": "tf32"}
HEAD = """| case | sm | registers | shared memory | spilled | matrix units | 16-byte copies | |
|---|---|---|---|---|---|---|---|"""


class Case(NamedTuple):
    """A kernel with everything that is fixed when it is compiled.

    Attributes:
        name: What it is.
        kernel: The function.
        pointers: Types of its tensors.
        constants: Values of what is constant; every other argument is an int32.
        warps: As the launcher has it.
        stages: Likewise.
        rows: Pixels of its matrix product, if it is one.
        daily: Whether it is compiled without ``--all``.
    """

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    rows: int = 0
    daily: bool = True


class Outcome(NamedTuple):
    """What the compiler made of a case: bytes, and what is wrong with it, if anything."""

    name: str
    arch: int
    registers: int
    shared: int
    spilled: int
    matrix: str
    wide_copies: int
    problem: str


def window(side: int, stride: int) -> dict[str, int]:
    """A square window with the padding that keeps the size at stride 1."""
    values = {"STRIDE": stride, "PADDING": side // 2, "DILATION": 1}
    return {"R": side, "S": side, **{f"{name}_{axis}": value for name, value in values.items() for axis in "HW"}}


def conv(
    kind: str, numbers: str, tile: Tile, side: int = 3, stride: int = 1, how: str = "", daily: bool = False
) -> Case:
    """The ragged convolution, as a launcher specialises it for aligned channels.

    Args:
        kind: "out" writes listed channels packed, "in" reads such, "dense" has no lists; "dx" is the input's gradient;
            "packed" is "in" with the weights of `optimize`, and with groups that are not neighbours; "sliced" has a
            width for every sample on either side, and "sliced dx" is its input's gradient.
        numbers: "bf16", "fp16" or "fp32".
        tile: The configuration.
        side: Of the window.
        stride: Between windows.
        how: "" is a program for each tile, "scheduled" a list of tiles; "split" sums parts of a reduction, and adds
            them up; "summed" leaves sums of pixels, of neighbours.
        daily: Whether it is compiled without ``--all``.
    """
    gradient, out, listed_inputs = kind.endswith("dx"), kind == "out", kind in ("in", "packed", "dx")
    grouped, sliced = kind == "packed", kind.startswith("sliced")
    tensors = {"x", "weight", "y"} | ({"bias"} if not gradient else set())
    tensors |= {"residual"} if listed_inputs and not gradient else set()
    lists = {"out_index", "out_count"} if out else {"in_index", "in_count"} if listed_inputs else set()
    lists |= {"in_count", "out_count"} if sliced else set()
    lists |= {"order", "lists"} if grouped and how != "summed" else set()
    lists |= {"tiles"} if how == "scheduled" else set()
    optional = {"bias", "residual", "gate", "sums", "in_index", "in_count", "out_index", "out_count", "order", "lists"}
    optional |= {"tiles", "partial", "arrived"}
    split = {"partial": "*fp32", "arrived": "*i32"} if how == "split" else {}
    left = {"sums": "*fp32"} if how == "summed" else {}
    spread, between = (stride, 1) if gradient else (1, stride)
    constants = {
        **dict.fromkeys(optional - tensors - lists - split.keys() - left.keys()),
        # Weights lie in rows of what is not listed: along the outputs where inputs are listed, else along the inputs.
        **({} if grouped else {"weight_stride_k" if listed_inputs else "weight_stride_c": 1}),
        **window(side, between),
        "SPREAD_H": spread,
        "SPREAD_W": spread,
        "MIRRORED": gradient,
        "RELU": not gradient and not sliced,
        "PACKED_IN": listed_inputs,
        "PACKED_OUT": out,
        "PRECISION": PRECISIONS[numbers],
        "BLOCK": 32 if grouped else 1,
        "ROWS": tile.rows,
        "CHANNELS": tile.channels,
        "DEPTH": tile.depth,
        "SPLITS": SPLIT_MOST if split else 1,
    }
    if kind != "dense" and not grouped:
        constants["shared"] = 1
    pointers = {**dict.fromkeys(tensors, f"*{numbers}"), **dict.fromkeys(lists, "*i32"), **split, **left}
    tile_name = f"{tile.rows}x{tile.channels}x{tile.depth}"
    name = " ".join(filter(None, ["conv", kind, how, f"{side}x{side}/{stride}", numbers, tile_name]))
    stages = tile.pipeline(listed_inputs)
    return Case(name, kernels.ragged_conv_kernel, pointers, constants, tile.warps, stages, tile.rows, daily)


def weight_gradient(listed: str, numbers: str, tile: GradientTile, daily: bool = False) -> Case:
    """The gradient of 3×3 weights where outputs ("out") or inputs ("in") are listed."""
    mask, other = ("out_mask", "in_mask") if listed == "out" else ("in_mask", "out_mask")
    pointers = {"x": f"*{numbers}", "dy": f"*{numbers}", mask: "*i1", "index": "*i32", "count": "*i32"}
    constants = {
        other: None,
        **window(3, 1),
        "BY_OUTPUTS": listed == "out",
        "PRECISION": PRECISIONS[numbers],
        "OUTPUTS": tile.outputs,
        "INPUTS": tile.inputs,
        "ROWS": tile.rows,
    }
    name = f"dweight {listed} {numbers} {tile.outputs}x{tile.inputs}x{tile.rows}"
    kernel = gradient_kernels.weight_gradient_kernel
    pointers["partial"] = "*fp32"
    return Case(name, kernel, pointers, constants, tile.warps, tile.stages, tile.outputs, daily)


def gate(kind: str, numbers: str, size: str, tile: gates.GateTile) -> Case:
    """A gate of images, with its list ("lists") or with the number of its largest logit ("codes")."""
    outputs = {"mask": "*i1", "index": "*i32", "count": "*i32", "codes": "*i32", "arrived": "*i32"}
    kept = {"codes", "arrived"} if kind == "codes" else outputs.keys() - {"codes"}
    layers = dict.fromkeys(("weight1", "bias1", "weight2", "bias2"), "*fp32")
    constants = {
        **dict.fromkeys(outputs.keys() - kept),
        **{name.upper(): value for name, value in tile._asdict().items() if name != "warps"},
        "x_stride_c": 1,
        "group": 1,
        "GROUP": 1,
        "ARRIVED": ARRIVED,
    }
    pointers = {"x": f"*{numbers}", **layers, **{name: outputs[name] for name in kept}}
    return Case(f"gate {kind} {numbers}, {size}", gate_kernels.gate_kernel, pointers, constants, tile.warps, 3)


def gate_cases() -> Iterator[Case]:
    """Gates, which samples share a code, and which of two sides serves."""
    tiles = gates.shipped()
    yield from (gate("lists", "bf16", size, tile_) for size, tile_ in tiles.items())
    yield from (gate(kind, numbers, "512", tiles["512"]) for kind, numbers in (("lists", "fp32"), ("codes", "bf16")))
    pointers = dict.fromkeys(("codes", "order", "lists"), "*i32")
    sizes = {"SAMPLES": group_kernels.MOST, "SHARED": 8}
    yield Case("groups of equal codes", group_kernels.equal_groups_kernel, pointers, sizes, 8, 3)
    names = ("count", "gated_inner", "gated_outer", "dense_inner", "dense_outer")
    constants = {"CHUNK": switch_kernels.CHUNK}
    yield Case("switch", switch_kernels.switch_kernel, dict.fromkeys(names, "*i32"), constants, 4, 3)


def schedule(listed: str) -> Case:
    """The list of tiles where outputs or inputs are listed, of groups that are not neighbours."""
    used = {f"{listed}_count", "order", "lists", "tiles"}
    unused = {"in_count", "out_count"} - used
    constants = {**dict.fromkeys(unused), "ROWS": 128, "CHANNELS": 64, "CHUNK": 1024}
    kernel = schedule_kernels.schedule_kernel
    return Case(f"schedule {listed}", kernel, dict.fromkeys(used, "*i32"), constants, 4, 3)


# Samples, channels and samples a group of the plans for similar masks that are compiled; and which of them daily.
SIMILAR = {
    "narrow": (16, 64, 2, False),
    "64 x 128": (64, 128, 4, True),
    "256 x 512": (256, 512, 8, False),
    "widest": (1024, 2048, 8, False),
}


def similar_cases() -> Iterator[Case]:
    """The order of similar masks and the unions of groups, with the list of their tiles and without."""
    for size, (samples, channels, shared, daily) in SIMILAR.items():
        constants = similar_kernels.sizes(samples, channels, shared)
        assert constants is not None
        pointers = {"mask": "*i1", "words": "*i32", "keys": "*i64", "order": "*i32", "count": "*i32"}
        kernel = similar_kernels.order_kernel
        constants["stride_c"] = 1
        warps = similar_kernels.warps(samples, channels)
        yield Case(f"order of similar masks, {size}", kernel, pointers, constants, warps, 1, daily=daily)
    pointers = dict.fromkeys(("words", "order", "count", "index"), "*i32")
    sizes = {"WORDS": 16, "CHUNK": 512, "TILE_ROWS": 128, "TILE_CHANNELS": 64, "TILE_CHUNK": similar_kernels.TILE_CHUNK}
    kernel = similar_kernels.union_kernel
    yield Case("unions with tiles", kernel, {**pointers, "tiles": "*i32"}, sizes, 4, 3)
    yield Case("unions", kernel, pointers, {**sizes, "tiles": None}, 4, 3, daily=False)


def cases(chip: str = "hopper") -> Iterator[Case]:
    """Everything that is shipped for a chip: one of ``configurations.TILES``."""
    yield from gate_cases()
    lists = {"index": "*i32", "count": "*i32"}
    yield Case(
        "plan", plan_kernels.plan_kernel, {"mask": "*i1", **lists, "arrived": "*i32"},
        {"order": None, "CHUNK": plan_kernels.CHUNK, "ARRIVED": ARRIVED}, 4, 3,
    )  # fmt: skip
    yield from (schedule(listed) for listed in ("out", "in"))
    yield from similar_cases()
    for numbers, size in SIZES.items():
        pack = {"x": f"*{numbers}", "packed": f"*{numbers}", **lists}
        yield Case(f"pack {numbers}", kernels.pack_kernel, pack, {"PIXELS": 64, "CHANNELS": 32}, 4, 3, 0, size == 2)
        yield from convolutions(numbers, shipped(size, True, chip), shipped(size, False, chip), chip != "ada")
        daily = numbers == "bf16"
        yield from (weight_gradient(listed, numbers, GRADIENT_TILES[size], daily) for listed in ("out", "in"))


def convolutions(numbers: str, listed: list[Tile], whole: list[Tile], every_tile: bool) -> Iterator[Case]:
    """The ragged convolution on these tiles: ``listed`` where only some outputs are computed, ``whole`` elsewhere.

    Registers are scarcest for float32 (tf32) on Hopper and Blackwell, and little scarcer for bfloat16 on Ampere: every
    day has all tiles in the one, and each kernel on its largest in the other. Ada's tiles are Ampere's with fewer
    stages (``every_tile`` is false), and float16 differs from bfloat16 by the suffix of an instruction.
    """
    half, brain = numbers == "fp16", numbers == "bf16"
    for kind, tiles in (("out", listed), ("in", whole)):
        for tile in tiles[-1:] if half else tiles:
            yield conv(kind, numbers, tile, daily=(brain and tile == tiles[-1]) or (numbers == "fp32" and every_tile))
        yield conv(kind, numbers, tiles[-1], side=1, daily=brain and kind == "out")
        yield conv(kind, numbers, listed[-1], how="scheduled", daily=brain)
        yield conv(kind, numbers, tiles[-1], how="split", daily=brain)
    yield conv("out", numbers, listed[-1], stride=2, daily=brain)
    yield conv("dx", numbers, whole[-1], stride=2, daily=brain)
    yield from (conv(kind, numbers, whole[-1], daily=brain) for kind in ("dense", "packed", "dx"))
    yield conv("packed", numbers, whole[-1], how="summed", daily=brain)
    for side, stride in ((3, 1), (3, 2), (1, 1)):
        daily = brain and (side, stride) == (3, 1)
        yield from (conv(kind, numbers, listed[-1], side, stride, daily=daily) for kind in ("sliced", "sliced dx"))


def compile_case(case: Case, arch: int) -> Outcome:
    """Compile a case for a chip; read registers, shared memory, spills and instructions off the machine code."""
    names = case.kernel.arg_names
    types_ = {n: "constexpr" if n in case.constants else case.pointers.get(n, "i32") for n in names}
    # As a launcher finds it: aligned memory; strides and channels that are multiples of 16.
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
    used = {what: int(number) for what, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    spilled, shared = used["STACK"] + used["LOCAL"], compiled.metadata.shared
    matrix = re.search(r"UTCHMMA|HGMMA|HMMA", code)
    found = matrix[0] if matrix else ""
    wide = len(re.findall(r"LDGSTS\S*\.128|UTMALDG", code))
    return Outcome(
        case.name, arch, used["REG"], shared, spilled, found, wide, judge(case, arch, shared, spilled, found)
    )


def judge(case: Case, arch: int, shared: int, spilled: int, matrix: str) -> str:
    """What is wrong with a compiled case, or nothing."""
    meant = MATRIX[arch][case.rows < GROUPED_ROWS] if case.rows else ""
    allowed = shared_memory(divmod(arch, 10))
    if spilled:
        return f"spills {spilled} bytes"
    if shared > allowed:
        return f"takes {shared} bytes of shared memory where {allowed} are allowed"
    if matrix != meant:
        return f"multiplies by {matrix or 'no matrix unit'} where {meant or 'none'} is meant"
    return ""


def disassemble(option: str, path: str) -> str:
    """What the ``cuobjdump`` that Triton brings along says."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=list(MATRIX), choices=list(MATRIX))
    parser.add_argument("--all", action="store_true", help="every kernel on every tile for all numbers")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name it matches")
    parser.add_argument("--table", type=Path, help="also write the table to this file")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    wanted = [
        (case.name, arch)
        for arch in options.arch
        for case in cases(chip(arch))
        if re.search(options.only, case.name) and (options.all or case.daily)
    ]
    lines, outcomes = [f"Triton {triton.__version__}\n", HEAD], []
    print(*lines, sep="\n", flush=True)
    for outcome in compile_all(wanted, options.jobs):
        outcomes.append(outcome)
        lines.append("| " + " | ".join(map(str, outcome)) + " |")
        print(lines[-1], flush=True)
    if options.table:
        options.table.write_text("\n".join(lines) + "\n")
    wrong = [outcome for outcome in outcomes if outcome.problem]
    for outcome in wrong:
        print(f"{outcome.name} for sm_{outcome.arch} {outcome.problem}", file=sys.stderr)
    return 1 if wrong or not outcomes else 0


def compile_all(wanted: list[tuple[str, int]], jobs: int) -> Iterator[Outcome]:
    """Every outcome as it comes, in order."""
    if jobs == 1:
        yield from map(compile_named, wanted)
        return
    # Fresh processes: copies of this one may hold the compiler's locks.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(compile_named, wanted)


def compile_named(wanted: tuple[str, int]) -> Outcome:
    """``compile_case`` for what travels between processes: the name of a case, and a chip."""
    name, arch = wanted
    return compile_case(next(case for case in cases(chip(arch)) if case.name == name), arch)


def chip(arch: int) -> str:
    """Whose tiles a chip has."""
    return family(divmod(arch, 10))


if __name__ == "__main__":
    sys.exit(main())
