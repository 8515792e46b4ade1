"""Launches of the gate: shapes in, grids out. Nothing here looks at a value on the device."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from gatedkernels.ops.channel_gate import kernels
from gatedkernels.ops.channel_gate.configurations import gate_tile
from gatedkernels.ops.ragged.launch import ARRIVED, List

Layers = Sequence[Tensor]  # weights and bias of the hidden layer and of the last one


def channel_gate(
    x: Tensor, layers: Layers, group: int = 1, listed: bool = True, area: int | None = None
) -> tuple[Tensor, List]:
    """What a gate decides for images (N, C, H, W), and the list of every sample's open channels, in one launch.

    Args:
        x: Images, or partial sums of images: then ``area`` tells how many pixels an image has.
        layers: Weights (M, C) and bias of the hidden layer, weights (D, M) and bias of the last one.
        group: Neighbouring channels that share a decision.
        listed: Whether the lists are wanted.
        area: Pixels that were added up to ``x``; None: it is the images.

    Returns:
        Bool (N, D), and the list of D * group channels, empty without ``listed``.
    """
    samples, decisions = x.shape[0], len(layers[3])
    mask = torch.empty((samples, decisions), dtype=torch.bool, device=x.device)
    lists = List()
    if listed:
        lists = List(_integers(x, samples, decisions * group), _integers(x, samples), _integers(x, ARRIVED))
    _launch(x, layers, group, area, mask, lists, None)
    return mask, lists


def code_gate(x: Tensor, layers: Layers, area: int | None = None) -> tuple[Tensor, Tensor]:
    """The number of every sample's largest logit, int32 (N,), and the counters of a `List`.

    Arguments are those of `channel_gate`.
    """
    codes, arrived = _integers(x, x.shape[0]), _integers(x, ARRIVED)
    _launch(x, layers, 1, area, None, List(arrived=arrived), codes)
    return codes, arrived


def _integers(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=x.device)


def _launch(
    x: Tensor, layers: Layers, group: int, area: int | None, mask: Tensor | None, lists: List, codes: Tensor | None
) -> None:
    samples, channels, height, width = x.shape
    weight1, bias1, weight2, bias2 = (layer.contiguous() for layer in layers)
    hidden, decisions = len(bias1), len(bias2)
    if not samples:
        return
    tile = gate_tile(samples, height * width, channels, hidden, decisions)
    with torch.cuda.device_of(x):
        kernels.gate_kernel[(triton.cdiv(samples, tile.samples),)](
            x, weight1, bias1, weight2, bias2, mask, lists.indices, lists.counts, codes, lists.arrived,
            samples, height * width, width, channels, hidden, decisions, group, area or height * width,
            x.stride(0), x.stride(2), x.stride(3), x.stride(1),
            SAMPLES=tile.samples, PIXELS=tile.pixels, CHANNELS=tile.channels, HIDDEN=tile.hidden,
            DECISIONS=tile.decisions, GROUP=triton.next_power_of_2(group),
            ARRIVED=ARRIVED, num_warps=tile.warps,
        )  # fmt: skip
