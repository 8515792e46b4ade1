"""The policy decides from static facts: shapes, strides, dtypes, devices."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gatedkernels import _extension, policy, thresholds

DENSE = policy.Choice("dense", 1.0)
KERNELS = ("conv_out", "conv_in", "gated_block")
needs_cpu = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))


def choose(kernel: str = "conv_out", n: int = 4, side: int = 3, device: str = "cpu", **change: Any) -> policy.Choice:
    dtype = change.get("dtype", torch.float32)
    x = torch.empty(n, 8, 16, 16, dtype=dtype, device=device)
    weight = torch.empty(8, 8, side, side, dtype=dtype, device=device)
    stride, padding, dilation = ((change.get(name, usual),) * 2 for name, usual in
                                 (("stride", 1), ("padding", side // 2), ("dilation", 1)))  # fmt: skip
    return policy.choose(kernel, x, weight, stride, padding, dilation, change.get("groups", 1))


@needs_cpu
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_kernels_serve_what_they_can(kernel: str, side: int, stride: int):
    if (kernel, side) == ("gated_block", 1):
        pytest.skip("a block has filters of 3x3")
    choice = choose(kernel, side=side, stride=stride)
    assert choice.backend == "cpu"
    assert 0 <= choice.threshold < 1


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
        {"device": "meta"},
        {"padding": 0},
        {"side": 5},
        {"stride": 3},
        {"dilation": 2},
        {"groups": 2},
    ],
    ids=str,
)
def test_dense_serves_the_rest(kernel: str, change: dict[str, Any]):
    assert choose(kernel, **change) == DENSE


@pytest.mark.parametrize("kernel", KERNELS)
def test_dense_serves_without_the_library(kernel: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_extension, "CPU_ERROR", "not built")
    assert choose(kernel) == DENSE


@needs_cpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_more_pixels_for_each_weight_pay_more(kernel: str):
    thresholds = [choose(kernel, n=n).threshold for n in (0, 1, 2, 4, 64, 1024)]
    assert thresholds == sorted(thresholds)


@needs_cpu
def test_layouts_that_are_converted_pay_less():
    weight = torch.empty(64, 64, 3, 3)
    x = torch.empty(4, 64, 16, 16)
    rest = weight, (1, 1), (1, 1), (1, 1), 1
    for kernel in KERNELS:
        last = policy.choose(kernel, x.contiguous(memory_format=torch.channels_last), *rest)
        assert policy.choose(kernel, x, *rest).threshold < last.threshold


@needs_cpu
def test_large_weights_pay_less():
    x, small, large = torch.empty(1, 8, 8, 8), torch.empty(8, 8, 3, 3), torch.empty(1 << 15, 8, 3, 3)
    choices = [policy.choose("conv_in", x, weight, (1, 1), (1, 1), (1, 1), 1) for weight in (large, small)]
    assert choices[0].threshold < choices[1].threshold


@needs_cpu
def test_what_was_measured_comes_before_what_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(thresholds.FOLDER_VARIABLE, str(tmp_path))
    policy.forget()
    before = choose("conv_out").threshold
    thresholds.save({"conv_out 3x3 float32 converted": {8: {1024: 0.123}}}, torch.get_num_threads())
    assert choose("conv_out").threshold == before  # read once
    policy.forget()
    assert choose("conv_out") == policy.Choice("cpu", 0.123)
    assert choose("conv_in").threshold != 0.123
    assert policy.in_effect()["measured"]["conv_out 3x3 float32 converted"] == {8: {1024: 0.123}}
    json.dumps(policy.in_effect(), allow_nan=False)
    monkeypatch.undo()
    policy.forget()
    assert choose("conv_out").threshold == before


@pytest.fixture
def measured_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A GPU that is not there, and thresholds that were measured on it."""
    monkeypatch.setenv(thresholds.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(thresholds, "gpu", lambda device: "a GPU")
    monkeypatch.setattr(policy.importlib.util, "find_spec", lambda name: object())
    policy.forget()

    def keep(
        density: float, kernel: str = "gated_block", dtype: str = "bfloat16", image: int = 256, side: int = 3
    ) -> None:
        table = {f"{kernel} {side}x{side} {dtype}, images of {image} pixels": {16: {1024: density}}}
        thresholds.save(table, thresholds.GPU_THREADS, "a GPU")
        policy.forget()

    yield keep
    monkeypatch.undo()
    policy.forget()


def choose_on_gpu(kernel: str = "gated_block", channels: int = 16, last: bool = True, **change: Any) -> policy.Choice:
    with FakeTensorMode():
        dtype = change.get("dtype", torch.bfloat16)
        x = torch.empty(change.get("n", 4), channels, 16, 16, dtype=dtype, device="cuda")
        weight = torch.empty(channels, channels, 3, 3, dtype=dtype, device="cuda")
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        return policy.choose(kernel, x, weight, (1, 1), (1, 1), (1, 1), change.get("groups", 1))


def test_a_gpu_is_dense_until_it_is_measured(measured_gpu):
    assert choose_on_gpu() == DENSE
    measured_gpu(0.4)
    assert choose_on_gpu() == policy.Choice("triton", 0.4)
    assert choose_on_gpu(n=64).backend == "triton"  # the next smaller class that was measured
    measured_gpu(1.0)
    assert choose_on_gpu() == policy.Choice("triton", 1.0)
    measured_gpu(0.0)
    assert choose_on_gpu() == DENSE


@pytest.mark.parametrize(
    "change", [{"n": 1}, {"dtype": torch.float16}, {"dtype": torch.float64}, {"groups": 2}, {"last": False}], ids=str
)
def test_other_calls_on_a_gpu_are_dense(measured_gpu, change: dict[str, Any]):
    measured_gpu(0.4)
    assert choose_on_gpu(**change) == DENSE


def test_what_has_one_side_serves_any_density_or_none(measured_gpu):
    for density, expected in ((0.4, DENSE), (1.0, policy.Choice("triton", 1.0))):
        measured_gpu(density, "conv_in")
        assert choose_on_gpu("conv_in") == expected
    measured_gpu(0.4)
    assert choose_on_gpu(channels=17) == DENSE  # of the same class, but no whole steps


def choose_linear_on_gpu(sides: str, *tokens: int, channels: int = 16, **change: Any) -> policy.Choice:
    with FakeTensorMode():
        x = torch.empty(4, *tokens, channels, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(channels, channels, dtype=torch.bfloat16, device="cuda")
        mask = torch.empty(4, *(tokens if change.get("by_token") else ()), channels, dtype=torch.bool, device="cuda")
        masks = mask if "in" in sides else None, mask if "out" in sides else None
        return policy.choose_linear_gpu(x, weight, *masks, change.get("recorded", False))


def test_linear_layers_on_a_gpu(measured_gpu):
    """Of one mask for a sample's tokens: those of outputs have two sides, those of inputs one."""
    assert choose_linear_on_gpu("out", 256) == DENSE
    measured_gpu(0.4, "linear_out", side=1)
    assert choose_linear_on_gpu("out", 256) == policy.Choice("triton", 0.4)
    assert choose_linear_on_gpu("out", 16, 16) == policy.Choice("triton", 0.4)
    assert choose_linear_on_gpu("out", 256, channels=17) == DENSE
    for tokens, change in (((256,), {"by_token": True}), ((256,), {"recorded": True}), ((16,), {}), ((), {})):
        assert choose_linear_on_gpu("out", *tokens, **change) == DENSE
    for density, expected in ((0.4, DENSE), (1.0, policy.Choice("triton", 1.0))):
        measured_gpu(density, "linear_in", side=1)
        assert choose_linear_on_gpu("in", 256) == expected
    assert choose_linear_on_gpu("in, out", 256) == DENSE


def test_what_is_measured_with_its_backward_serves_any_density_or_none(measured_gpu):
    for density, expected in ((0.4, DENSE), (1.0, policy.Choice("triton", 1.0))):
        measured_gpu(density, "gated_block_training")
        assert choose_on_gpu("gated_block_training") == expected
        measured_gpu(density, "linear_out_training", side=1)
        assert choose_linear_on_gpu("out", 256, recorded=True) == expected


def choose_linear(shape: tuple[int, ...], masks: str, by_token: bool = False, **change: Any) -> policy.Choice:
    x = torch.empty(*shape, dtype=change.get("dtype", torch.float32), device=change.get("device", "cpu"))
    mask = torch.empty(shape if by_token else (shape[0], shape[-1]), dtype=torch.bool)
    weight = torch.empty(16, shape[-1])
    return policy.choose_linear(x, weight, mask if "in" in masks else None, mask if "out" in masks else None)


@needs_cpu
@pytest.mark.parametrize("masks", ["in", "out"])
def test_linear_layers_of_more_tokens_pay_more(masks: str):
    thresholds = [choose_linear((16, t, 8), masks).threshold for t in (2, 4, 24, 65, 197)]
    assert thresholds == sorted(thresholds)
    assert thresholds[0] < 0.5 < thresholds[-1]
    assert choose_linear((8, 8, 8), masks).threshold <= choose_linear((64, 8, 8), masks).threshold


@needs_cpu
def test_linear_layers_that_pay_nothing_are_dense():
    assert choose_linear((1, 8), "out") == choose_linear((4, 3, 8), "in") == DENSE
    assert choose_linear((64, 65, 8), "out", by_token=True) == choose_linear((64 * 65, 8), "out") == DENSE
    assert choose_linear((64, 8, 8), "in, out") == DENSE
    assert choose_linear((64, 65, 8), "in, out").backend == "cpu"


@needs_cpu
def test_the_density_of_one_sample_is_not_looked_at():
    assert choose_linear((1, 65, 8), "out") == policy.Choice("cpu", 1.0)


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"device": "meta"}], ids=str)
def test_dense_serves_the_other_linear_layers(change: dict[str, Any]):
    assert choose_linear((16, 65, 8), "out", **change) == DENSE
