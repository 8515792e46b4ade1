"""The judge of what was compiled ahead of time; tests/ops/test_triton.py compiles."""

import pytest

pytest.importorskip("triton")

from bench import aot

CASE = next(case for case in aot.cases() if case.rows >= aot.ATOM)


def test_every_operation_and_tile_is_a_case():
    names = [case.name for case in aot.cases()]
    assert len(set(names)) == len(names)
    for numbers, size in aot.SIZES.items():
        for kind, listed in (("out", True), ("in", False)):
            for tile in aot.shipped(size, listed)[-1 if numbers == "fp16" else 0 :]:
                assert f"conv {kind} 3x3/1 {numbers} {tile.rows}x{tile.channels}x{tile.depth}" in names
        assert {f"dweight {listed} {numbers} 64x64" for listed in ("out", "in")} <= {n.rsplit("x", 1)[0] for n in names}


@pytest.mark.parametrize("arch", aot.MATRIX)
def test_what_is_as_meant_passes(arch: int):
    assert aot.judge(CASE, arch, aot.SHARED, 0, aot.MATRIX[arch][0]) == ""
    assert aot.judge(CASE._replace(rows=16), arch, 0, 0, "HMMA") == ""
    assert aot.judge(CASE._replace(rows=0), arch, 0, 0, "") == ""


@pytest.mark.parametrize(
    ("shared", "spilled", "matrix", "problem"),
    [
        (0, 8, "HGMMA", "spills 8 bytes"),
        (aot.SHARED + 1, 0, "HGMMA", "shared memory"),
        (0, 0, "HMMA", "HGMMA is meant"),
        (0, 0, "", "no matrix unit"),
    ],
)
def test_what_is_wrong_is_named(shared: int, spilled: int, matrix: str, problem: str):
    assert problem in aot.judge(CASE, 90, shared, spilled, matrix)


def test_no_case_is_no_success(capsys: pytest.CaptureFixture[str]):
    assert aot.main(["--only", "no such case"]) == 1
