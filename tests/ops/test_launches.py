"""What is launched, and how many of it: recorded on tensors without memory, for the shipped configurations."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

# Channels and pixels along a side: ResNet-18's stages for CIFAR and for ImageNet, and what is wider.
STAGES = [(64, 32), (128, 16), (256, 8), (512, 4), (64, 56), (128, 28), (256, 14), (512, 7), (1024, 7), (2048, 4)]
CHIPS = [(8, 0), (8, 9), (9, 0), (10, 0)]
FILES = ("ragged.kernels", "ragged.schedule_kernels", "ragged.group_kernels", "plan.kernels", "channel_gate.kernels")
# What of PyTorch launches nothing.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "permute", "slice", "detach", "alias"}


class Ops(TorchDispatchMode):
    """Notes the operators that launch something."""

    def __init__(self, launched: list[str]) -> None:
        super().__init__()
        self.launched = launched

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in FREE:
            self.launched.append(name)
        return function(*args, **(kwargs or {}))


class Recorder:
    """Notes a kernel instead of launching it."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched
        self.constants: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*tensors: Any, **constants: Any) -> None:
            self.launched.append(self.name)
            self.constants = constants

        return launch


@pytest.fixture(params=CHIPS, ids=str)
def launched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was launched so far, as if on a chip."""
    from gatedkernels.ops.ragged import launch, measured

    noted: list[str] = []
    monkeypatch.setattr(measured, "capability", lambda device: request.param)
    for file in FILES:
        module = importlib.import_module(f"gatedkernels.ops.{file}")
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(name, noted))
    launch.forget()
    yield noted
    launch.forget()


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def weights(channels: int, inputs: int) -> tuple[Tensor, ...]:
    """Of a block, as `optimize` lays them out."""
    blocks = empty(channels // 32, channels, 3, 3, 32)
    return empty(channels, 3, 3, inputs), empty(channels), blocks, empty(channels)


def gate(inputs: int, decisions: int) -> tuple[Tensor, ...]:
    return empty(16, inputs), empty(16), empty(decisions, 16), empty(decisions)


def images(batch: int, channels: int, side: int) -> Tensor:
    return empty(batch, side, side, channels).permute(0, 3, 1, 2)


BLOCK = ["gate_kernel", "ragged_conv_kernel", "ragged_conv_kernel"]


@pytest.mark.parametrize("batch", [1, 2, 16, 64, 256, 1024])
def test_a_block_with_its_gate_is_three_launches(launched: list[str], batch: int):
    """For every class of shapes, whether tiles are few or many: no list of tiles, no launch that adds parts up."""
    from gatedkernels.ops.ragged import optimized

    for channels, side in STAGES:
        with Ops(launched):
            optimized.packed_residual(
                images(batch, channels, side), gate(channels, channels), *weights(channels, channels),
                None, None, None, 1, summed=True,
            )  # fmt: skip
        assert launched == BLOCK, (channels, side)
        launched.clear()


@pytest.mark.parametrize("batch", [1, 16, 256])
def test_a_shortcut_that_convolves_is_one_more(launched: list[str], batch: int):
    from gatedkernels.ops.ragged import optimized

    for channels, side in STAGES:
        shortcut = empty(channels // 32, channels // 2, 1, 1, 32), empty(channels)
        with Ops(launched):
            optimized.packed_residual(
                images(batch, channels // 2, 2 * side), gate(channels // 2, channels),
                *weights(channels, channels // 2), None, *shortcut, 2,
            )  # fmt: skip
        assert launched == [*BLOCK, "ragged_conv_kernel"], (channels, side)
        launched.clear()


@pytest.mark.parametrize("batch", [1, 16, 256])
def test_a_block_with_given_masks_is_three_launches(launched: list[str], batch: int):
    from gatedkernels.ops.ragged.gated import gated_block

    for channels, side in STAGES:
        mask = torch.empty(batch, channels, dtype=torch.bool, device="meta")
        weight = (
            empty(channels, 3, 3, channels).permute(0, 3, 1, 2),
            empty(3, 3, channels, channels).permute(3, 2, 0, 1),
        )
        x = images(batch, channels, side)
        with Ops(launched):
            gated_block(x, weight[0], None, weight[1], None, mask, x, (1, 1))
        assert launched == ["plan_kernel", *BLOCK[1:]], (channels, side)
        launched.clear()


@pytest.mark.parametrize("batch", [1, 16, 256])
def test_a_codebook_is_three_launches_and_one_where_small_images_share_lists(launched: list[str], batch: int):
    from gatedkernels.ops.ragged import optimized
    from gatedkernels.ops.ragged.configurations import together

    for channels, side in STAGES:
        table = optimized.List(*(torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((8, channels), 8)))
        with Ops(launched):
            optimized.packed_coded_residual(
                images(batch, channels, side), gate(channels, 8), *weights(channels, channels), table, None,
                None, None, 1,
            )  # fmt: skip
        shared = min(batch, together(side * side)) > 1
        assert launched == [BLOCK[0], *["equal_groups_kernel"] * shared, *BLOCK[1:]], (channels, side)
        launched.clear()


def precision_of(launched: list[str], dtype: torch.dtype, linear: bool) -> str:
    """How a gated convolution or linear layer multiplies, and its gradient by the weights likewise."""
    from gatedkernels.ops.ragged import gated, gradient_kernels, kernels

    mask = torch.empty(2, 32, dtype=torch.bool, device="meta")
    with pytest.MonkeyPatch.context() as patch:
        weight_gradient = Recorder("weight_gradient", launched)
        patch.setattr(gradient_kernels, "weight_gradient_kernel", weight_gradient)
        if linear:
            x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((2, 3, 16), (32, 16)))
            y = gated.gated_linear(x, weight, None, None, mask)
            gated.gated_linear_backward(y, x, weight, None, mask, False, (False, True, False))
        else:
            x, weight = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((2, 16, 4, 4), (32, 16, 3, 3)))
            ones = (1, 1)
            y = gated.gated_conv2d(x, weight, None, None, mask, ones, ones, ones, 1)
            gated.gated_conv2d_backward(
                y, x, weight, None, mask, ones, ones, ones, 1, False, (False, True, False)
            )  # fmt: skip
        found = [kernel.constants["PRECISION"] for kernel in (kernels.ragged_conv_kernel, weight_gradient)]
    assert found[0] == found[1]
    return found[0]


def test_float32_is_rounded_where_pytorchs_flags_say_so(launched: list[str]):
    """Convolutions by cuDNN's flag, linear layers by that of matrix products; other numbers never."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    try:
        for of_convs, of_linears in (("tf32", "ieee"), ("ieee", "tf32")):
            conv.fp32_precision, matmul.fp32_precision = of_convs, of_linears
            assert precision_of(launched, torch.float32, linear=False) == of_convs
            assert precision_of(launched, torch.float32, linear=True) == of_linears
            for dtype in (torch.float16, torch.bfloat16):
                assert {precision_of(launched, dtype, linear) for linear in (True, False)} == {"ieee"}
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


def test_what_pytorch_launches_is_noticed(launched: list[str]):
    with Ops(launched):
        torch.zeros(3, device="meta")
    assert launched
