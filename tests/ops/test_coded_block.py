"""The gated block of a mask codebook: `gated_block` with the rows of a table."""

import pytest
import torch
from torch import Tensor

import gatedkernels as gk
from gatedkernels.ops import coded_block


def block(n: int = 4, c: int = 6, m: int = 16, k: int = 9) -> list[Tensor]:
    return [
        torch.randn(n, c, 5, 4),
        torch.randn(m, c, 3, 3),
        torch.randn(m),
        torch.randn(k, m, 3, 3),
        torch.randn(k),
    ]


@pytest.mark.parametrize("backend", ["auto", "reference", "dense"])
@pytest.mark.parametrize("group", [1, 4])
def test_it_is_the_block_with_rows_of_the_table(group: int, backend: str):
    tensors, table = block(), torch.rand(3, 16 // group) < 0.5
    codes = torch.tensor([2, 0, 2, 1], dtype=torch.int32)
    residual = torch.randn(4, 9, 3, 2)
    options = {"residual": residual, "stride": 2, "group": group, "backend": backend}
    y = coded_block(*tensors, table, codes, **options)
    assert torch.equal(y, gk.gated_block(*tensors, table[codes.long()], **options))


def test_its_gradients_are_those_of_the_block(gradients):
    tensors, table, codes = block(), torch.rand(3, 16) < 0.5, torch.tensor([2, 0, 2, 1])
    own = gradients(lambda *t: coded_block(*t, table, codes, backend="reference"), tensors)
    exact = gradients(lambda *t: gk.gated_block(*t, table[codes], backend="reference"), tensors)
    assert all(torch.equal(*pair) for pair in zip(own, exact, strict=True))


def test_compiled_and_exported():
    tensors, table, codes = block(), torch.rand(3, 16) < 0.5, torch.tensor([2, 0, 2, 1])

    class Network(torch.nn.Module):
        def forward(self, codes: Tensor, *tensors: Tensor) -> Tensor:
            return coded_block(*tensors, table, codes)

    y = Network()(codes, *tensors)
    compiled = torch.compile(Network(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(codes, *tensors), y, rtol=1e-4, atol=1e-4)
    exported = torch.export.export(Network(), (codes, *tensors)).module()
    torch.testing.assert_close(exported(codes, *tensors), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"table": torch.ones(0, 16, dtype=torch.bool)}, ValueError, "table must have shape .* at least one mask"),
        ({"table": torch.ones(3, 16)}, TypeError, "dtype torch.bool, got torch.float32"),
        ({"table": torch.ones(3, 15, dtype=torch.bool)}, ValueError, "got \\(4, 15\\)"),
        ({"table": None}, TypeError, "table must be a tensor, got NoneType"),
        ({"codes": torch.zeros(4)}, TypeError, "codes must be integers, got torch.float32"),
        ({"codes": torch.zeros(5, dtype=torch.int64)}, ValueError, "codes must have shape \\(4,\\), got \\(5,\\)"),
        ({"codes": torch.tensor([0, 1, 3, 0])}, ValueError, "codes must be rows of the table, 0 to 2, got 0 to 3"),
        ({"codes": torch.tensor([0, -1, 2, 0])}, ValueError, "codes must be rows of the table, 0 to 2, got -1 to 2"),
        ({"backend": "cuda"}, ValueError, "backend must be one of auto"),
    ],
    ids=str,
)
def test_what_it_refuses(changes: dict, error: type[Exception], message: str):
    arguments = {"table": torch.ones(3, 16, dtype=torch.bool), "codes": torch.zeros(4, dtype=torch.int64), **changes}
    with pytest.raises(error, match=message):
        coded_block(*block(), **arguments)
