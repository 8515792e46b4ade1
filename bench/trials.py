"""From a case to two functions that compute the same: the gated one, and the dense one it is measured against."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from bench.cases import BlockCase, BottleneckCase, FunctionalCase, NetworkCase, PointwiseCase
from bench.replay import draw, open_as
from gatedkernels import count_flops, fix_gates, gated_block, gated_conv2d, models, optimize
from gatedkernels.nn import Gate, GatedBasicBlock, GatedBottleneck, gated_flops, kept_fraction
from gatedkernels.nn.fix_gates import draw_masks
from gatedkernels.reporting import density_for
from gatedkernels.reporting.baselines import Baselines, check_same, dense_baselines, verify
from gatedkernels.reporting.machine import last_level_cache
from gatedkernels.reporting.twins import build_twin, prepack

Call = Callable[[], Tensor]

_SETTLING_SECONDS = 0.01
# Caches do not drop the oldest first, and not all say how large they are.
_CACHES_READ = 2
_LARGE_CACHE = 64 << 20


def settle_before(call: Call) -> None:
    """Prepare a timed call: untimed ones for 10 ms, at least one, until all is as in a process that does nothing else.

    A call finds its weights in the caches then, and not those of the side that was timed before it: a gated one takes
    several calls for that, because each has another mask. And the threads of an engine that ran before are asleep: some
    wait busily for milliseconds, on cores that the other side wants.
    """
    end = time.perf_counter() + _SETTLING_SECONDS
    call()
    while time.perf_counter() < end:
        call()


def evict_before(call: Call) -> None:
    """Prepare a timed call: nothing that it needs is in a cache, because every thread has read other things since."""
    _other_things().sum()


@lru_cache(maxsize=1)
def _other_things() -> Tensor:
    return torch.ones(_CACHES_READ * (last_level_cache() or _LARGE_CACHE) // 4)


@dataclass(frozen=True)
class Trial:
    """What to measure; everything in it has been checked.

    Attributes:
        gated: The gated computation.
        dense: Ways to do it densely, by name; the fastest is the baseline.
        kept: Fraction of the dense multiply-adds that the gated one executes, gates included.
        prepare: What is done with a call before it is timed.
        missing: Why a dense way is not among them, by name.
    """

    gated: Call
    dense: dict[str, Call]
    kept: float
    prepare: Callable[[Call], None] = settle_before
    missing: dict[str, str] = field(default_factory=dict)


@contextmanager
def block_trial(case: BlockCase) -> Iterator[Trial]:
    """An optimised block against prepacked oneDNN with fused activations; checked in float64."""
    block, fast, reference, dense, x = _block(case.channels, case.size, case.batch, case.dtype)
    masks = None if case.masks == "exact" else draw(case.masks, case.density, case.batch, case.channels)

    def masked(network: nn.Module) -> AbstractContextManager[None]:
        return fix_gates(network, case.density) if masks is None else open_as(network.get_submodule("gate"), masks)

    with masked(fast), masked(reference), torch.inference_mode():
        check_same("the optimised block", fast(x), reference(x.double()))
    with masked(fast):
        kept = count_flops(fast, x).kept if masks is None else _mean_kept(block, x, masks)
        prepare = evict_before if case.cache == "cold" else settle_before
        yield Trial(lambda: fast(x), {"prepacked": lambda: dense(x)}, kept, prepare)


@contextmanager
def bottleneck_trial(case: BottleneckCase) -> Iterator[Trial]:
    """An optimised bottleneck likewise."""
    _, fast, reference, dense, x = _block(case.planes, case.size, case.batch, "float32", GatedBottleneck)
    with fix_gates(fast, case.density), fix_gates(reference, case.density), torch.inference_mode():
        check_same("the optimised bottleneck", fast(x), reference(x.double()))
    with fix_gates(fast, case.density):
        yield Trial(lambda: fast(x), {"prepacked": lambda: dense(x)}, count_flops(fast, x).kept)


@lru_cache(maxsize=1)
def _block(
    planes: int, size: int, batch: int, dtype: str, kind: type[GatedBasicBlock | GatedBottleneck] = GatedBasicBlock
) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module, Tensor]:
    """A block, optimised, masked in float64 and dense, the same for all masks, and its batch."""
    torch.manual_seed(0)
    channels = planes * kind.expansion
    block = _settled(kind(channels, planes)).to(getattr(torch, dtype))
    x = _images(batch, channels, size).to(getattr(torch, dtype))
    fast, reference, dense = optimize(block, x), build_twin(block, gated=True).double(), prepack(build_twin(block))
    with fix_gates(reference, 1.0), torch.inference_mode():
        check_same("the prepacked block", dense(x), reference(x.double()))
    return block, fast, reference, dense, x


def _mean_kept(block: nn.Module, x: Tensor, masks: Tensor) -> float:
    """Fraction of the multiply-adds that a block keeps, on average over all drawn masks."""
    decided = masks.flatten(0, 1)
    return kept_fraction(gated_flops(block, x), {"gate": Gate(decided, decided.float())}).item()


@contextmanager
def network_trial(case: NetworkCase, *, complete: bool = True) -> Iterator[Trial]:
    """A whole optimised network against the fastest dense one.

    Args:
        case: The network.
        complete: Whether ``torch.compile`` with freezing, ONNX Runtime and OpenVINO take part, which takes a minute.
    """
    model, x, dense = _network(replace(case, kept=1.0), complete)
    fast = optimize(model, x)
    density = 1.0 if case.kept == 1 else density_for(model, x, case.kept)
    verify(build_twin(model, gated=True), {"the optimised network": fast}, dense, x, density=density)
    with fix_gates(fast, density):
        yield Trial(lambda: fast(x), dense.calls, count_flops(fast, x).kept, missing=dense.missing)


@contextmanager
def functional_trial(case: FunctionalCase) -> Iterator[Trial]:
    """A functional call against the same result from plain PyTorch and the same unpacked weights, in either layout."""
    torch.manual_seed(0)
    own, other = torch.channels_last, torch.contiguous_format
    if case.layout == "contiguous":
        own, other = other, own
    x = _images(case.batch, case.channels, case.size).contiguous(memory_format=own)
    weights = [torch.randn(case.channels, case.channels, 3, 3) / (3 * case.channels**0.5) for _ in range(2)]
    biases = [torch.randn(case.channels) for _ in range(2)]
    gated, dense = (_gated_conv, _dense_conv) if case.operation == "gated_conv2d" else (_gated_block, _dense_block)
    masks = list(draw_masks(case.operation, case.density, 0, case.batch, case.channels))
    scales = [mask.float()[..., None, None] for mask in masks]

    def converted(scale: Tensor) -> Tensor:
        return dense(x.contiguous(memory_format=other), weights, biases, scale).contiguous(memory_format=own)

    with torch.inference_mode():
        wide_weights, wide_biases = ([tensor.double() for tensor in tensors] for tensors in (weights, biases))
        want = dense(x.double(), wide_weights, wide_biases, scales[0].double())
        check_same(case.operation, gated(x, weights, biases, masks[0]), want)
        check_same("the dense way", dense(x, weights, biases, scales[0]), want)
        check_same("the dense way in the other layout", converted(scales[0]), want)
    mask, scale, other_scale = cycle(masks), cycle(scales), cycle(scales)
    ways: dict[str, Call] = {
        case.layout: lambda: dense(x, weights, biases, next(scale)),
        "converted": lambda: converted(next(other_scale)),
    }
    yield Trial(lambda: gated(x, weights, biases, next(mask)), ways, float(masks[0].float().mean()))


@contextmanager
def pointwise_trial(case: PointwiseCase) -> Iterator[Trial]:
    """A functional 1x1 convolution against PyTorch's, whose outputs or inputs are multiplied by the mask."""
    torch.manual_seed(0)
    x = _images(case.batch, case.channels, case.size).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(case.filters, case.channels, 1, 1) / case.channels**0.5
    bias = torch.randn(case.filters)
    outputs = case.gated == "outputs"
    masks = list(draw_masks("1x1", case.density, 0, case.batch, case.filters if outputs else case.channels))
    scales = [mask.float()[..., None, None] for mask in masks]

    def gated(mask: Tensor) -> Tensor:
        return gated_conv2d(x, weight, bias, **{"out_mask" if outputs else "in_mask": mask})

    def dense(scale: Tensor) -> Tensor:
        return conv2d(x, weight, bias).mul_(scale) if outputs else conv2d(x * scale, weight, bias)

    with torch.inference_mode():
        check_same("gated_conv2d", gated(masks[0]), dense(scales[0]))
    mask, scale = cycle(masks), cycle(scales)
    kept = float(masks[0].float().mean())
    yield Trial(lambda: gated(next(mask)), {"channels-last": lambda: dense(next(scale))}, kept)


def _gated_conv(x: Tensor, weights: list[Tensor], biases: list[Tensor], mask: Tensor) -> Tensor:
    return gated_conv2d(x, weights[0], biases[0], out_mask=mask, padding=1)


def _dense_conv(x: Tensor, weights: list[Tensor], biases: list[Tensor], scale: Tensor) -> Tensor:
    return conv2d(x, weights[0], biases[0], padding=1).mul_(scale)


def _gated_block(x: Tensor, weights: list[Tensor], biases: list[Tensor], mask: Tensor) -> Tensor:
    return gated_block(x, weights[0], biases[0], weights[1], biases[1], mask, residual=x)


def _dense_block(x: Tensor, weights: list[Tensor], biases: list[Tensor], scale: Tensor) -> Tensor:
    h = conv2d(x, weights[0], biases[0], padding=1).relu_().mul_(scale)
    return conv2d(h, weights[1], biases[1], padding=1).add_(x).relu_()


@lru_cache(maxsize=1)
def _network(case: NetworkCase, complete: bool) -> tuple[nn.Module, Tensor, Baselines]:
    """A network, its batch and its dense baselines, which take long to compile and are the same for all masks."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    model = _settled(models.create_model(case.model, num_classes=None, stem=case.stem, width=case.width)).to(dtype)
    x = _images(case.batch, 3, case.size).to(dtype)
    return model, x, dense_baselines(model, x, compiled=complete, peers=complete)


def _settled(module: Any) -> Any:
    """In evaluation, with normalisations that are not the identity."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None and part.running_var is not None:
            nn.init.uniform_(part.running_mean, -0.2, 0.2)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    return module.eval()


def _images(batch: int, channels: int, size: int) -> Tensor:
    return torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
