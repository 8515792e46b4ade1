"""The width of a whole network: set it, estimate what its normalisations need there, cut it out."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from gatedkernels._checks import check_int, check_module, check_number
from gatedkernels.nn.slimmable import Slimmable, check_widths
from gatedkernels.nn.slimmable_norm import SlimmableBatchNorm2d


def _layers(net: nn.Module) -> list[Slimmable]:
    check_module("net", net)
    layers = [module for module in net.modules() if isinstance(module, Slimmable)]
    if not layers:
        raise ValueError(f"net must hold slimmable layers, got {type(net).__name__} without")
    return layers


def _set(layer: Slimmable, width: float | tuple[float, ...]) -> None:
    if isinstance(width, tuple):
        layer.set_widths(width)
    else:
        layer.set_width(width)


def _checked(width: Any) -> float | tuple[float, ...]:
    """One width, or those of a tensor or a sequence; numbers are checked by the layers."""
    if isinstance(width, Tensor):
        if width.ndim != 1 or width.dtype not in (torch.float32, torch.float64):  # others have too few digits
            raise ValueError(
                f"width must be a number or float32 or float64 of shape (N,), got {width.dtype} {tuple(width.shape)}"
            )
        # 0.7 of float32 is less than 0.7, and no width that anybody calibrated.
        width = [float(f"{value:g}") for value in width.tolist()] if width.dtype == torch.float32 else width.tolist()
    if isinstance(width, (list, tuple)):
        if not width:
            raise ValueError("width must be a number or one for every sample, got none")
        return tuple(width)
    return width


def set_width(net: nn.Module, width: float | Sequence[float] | Tensor) -> None:
    """Set the width of every slimmable layer of a network, nothing if one of them refuses it.

    Args:
        net: A network with slimmable layers.
        width: The width, in (0, 1]; or, for evaluation, one for every sample of a batch, a sequence or floats of shape
            (N,): each sample's results are those of the network at its width, beside samples of other widths. Where
            the result narrows, as without a classifier, it has zeros behind a sample's own channels.

    Raises:
        TypeError: If the network is no module or a width no number.
        ValueError: If one is out of range or a layer does not have it, or the network has no slimmable layers.
    """
    layers, wanted = _layers(net), _checked(width)
    before = [layer.sample_widths or layer.width for layer in layers]
    try:
        for layer in layers:
            _set(layer, wanted)
    except (TypeError, ValueError):
        for layer, old in zip(layers, before, strict=True):
            if (layer.sample_widths or layer.width) != old:
                _set(layer, old)
        raise


class SlimmableNetwork(nn.Module):
    """A network of slimmable layers.

    Attributes:
        features_narrow: Whether what comes out before a classifier narrows with the width.
    """

    features_narrow: bool = True

    def set_width(self, width: float | Sequence[float] | Tensor) -> None:
        """Set the width of every layer; see `gatedkernels.nn.set_width`."""
        set_width(self, width)

    @property
    def width(self) -> float | tuple[float, ...]:
        """The width of its layers; those of all samples where each has its own."""
        first = _layers(self)[0]
        return first.sample_widths or first.width


@contextmanager
def width(net: nn.Module, width: float | Sequence[float] | Tensor) -> Iterator[None]:
    """Run a network at a width, and give every layer the one it had back.

    Args:
        net: A network with slimmable layers.
        width: The width, in (0, 1], or one for every sample of a batch: see `gatedkernels.nn.set_width`.

    Yields:
        Nothing.

    Raises:
        TypeError: If the network is no module or a width no number.
        ValueError: If one is out of range or a layer does not have it, or the network has no slimmable layers.
    """
    before = [(layer, layer.sample_widths or layer.width) for layer in _layers(net)]
    set_width(net, width)
    try:
        yield
    finally:
        for layer, old in before:
            _set(layer, old)


def is_slimmable(net: nn.Module) -> bool:
    """Whether a network holds slimmable layers.

    Raises:
        TypeError: If it is no module.
    """
    check_module("net", net)
    return any(isinstance(module, Slimmable) for module in net.modules())


def slice(net: nn.Module, width: float | None = None) -> nn.Module:
    """Cut a narrow network out of a slimmable one: ordinary layers, with copied weights, that know no width.

    For export, and for whatever else wants convolutions and linear layers as PyTorch has them. The result has the
    original's class, names and mode; in evaluation it computes the same as the original at this width.

    Args:
        net: A network with slimmable layers; it stays as it is.
        width: The width, in (0, 1]; None: the one that each layer has.

    Returns:
        The narrow network.

    Raises:
        TypeError: If the network is no module or the width no number.
        ValueError: If it is out of range, a layer cannot be cut there, or a normalisation has no statistics for it in
            evaluation mode; or if the network has no slimmable layers.
    """
    _layers(net)
    narrow = copy.deepcopy(net)
    if width is not None:
        set_width(narrow, width)
    return _sliced(narrow)


def _sliced(module: nn.Module) -> nn.Module:
    if isinstance(module, Slimmable):
        return module.sliced()
    if hasattr(module, "slice_own"):
        cast(Any, module).slice_own()  # parameters that belong to no layer
    for name, child in module.named_children():
        setattr(module, name, _sliced(child))
    return module


def calibrate_norms(
    net: nn.Module,
    batches: Iterable[Any],
    widths: Sequence[float],
    *,
    limit: int | None = None,
    momentum: float | None = None,
) -> None:
    """Estimate what a network's batch normalisations need at some widths, from images.

    Each width has statistics of its own, since narrow layers see other inputs. Every `SlimmableBatchNorm2d` runs in
    training mode, everything else in evaluation mode and without gradients; modes and width are put back. Earlier
    statistics of these widths are forgotten.

    Args:
        net: A network with slimmable layers.
        batches: Images (N, C, H, W), or tuples and lists that begin with them: a list or a loader, gone through once
            for each width; an iterator serves several widths with a limit.
        widths: The widths to estimate for.
        limit: Use only so many batches; five of 1024 serve ImageNet.
        momentum: Of a running average; None: the average over all batches, each weighing the same.

    Raises:
        TypeError: If batches are a tensor, or an iterator that the first width would exhaust, ``net`` is no module,
            ``widths`` no sequence, or a number none.
        ValueError: If there are no batches or widths, a width is out of range, or nothing in the network has
            statistics.

    Source:
        Yu et al., "Universally Slimmable Networks and Improved Training Techniques", ICCV 2019, section 3.3.
    """
    check_module("net", net)
    check_int("limit", limit, optional=True)
    check_number("momentum", momentum, at_least=0, at_most=1, optional=True)
    norms = [m for m in net.modules() if isinstance(m, SlimmableBatchNorm2d) and m.track_running_stats]
    if not norms:
        raise ValueError(f"net must hold a SlimmableBatchNorm2d with statistics, got {type(net).__name__} without")
    check_widths(widths)
    runs_dry = isinstance(batches, Iterator) and limit is None and len(widths) > 1
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable) or runs_dry:
        kind = type(batches).__name__
        raise TypeError(f"batches must be a list or a loader of batches, read once for every width, got a {kind}")
    modes = [(module, module.training) for module in net.modules()]
    momenta = [norm.momentum for norm in norms]
    try:
        net.eval()
        for norm in norms:
            norm.train()
            norm.momentum = momentum
        for each in widths:
            with width(net, each), torch.no_grad():
                _average(net, norms, islice(batches, limit))
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, old in zip(norms, momenta, strict=True):
            norm.momentum = old


def _average(net: nn.Module, norms: Sequence[SlimmableBatchNorm2d], batches: Iterable[Any]) -> None:
    """Average the statistics of some batches at the present width."""
    empty = True
    for batch in batches:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(images, Tensor):
            raise TypeError(f"batches must yield tensors or begin with one, got {type(images).__name__}")
        if empty:  # until there is a batch, earlier statistics stay
            for norm in norms:
                norm.start_statistics()
        net(images)
        empty = False
    if empty:
        raise ValueError("batches must hold at least one batch for every width, got none")
