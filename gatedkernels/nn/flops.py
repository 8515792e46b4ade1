"""Multiply-adds of convolutions and linear layers: of the dense network, and of what the gates left to do.

Every ``nn.Conv2d`` and ``nn.Linear`` that runs is counted from the shapes it sees. A module that computes its
convolutions itself says so: it defines

    conv_costs(input_shape: tuple[int, ...]) -> Sequence[ConvCost]

which receives the shape of its first argument and returns the cost of everything in it except gates, with names
relative to itself, "" for its own; nothing inside it is counted again. ``in_gate`` and ``out_gate`` are names of gate
modules, relative to itself as well.

A gate is a module with ``is_gate = True`` that returns a `Gate` or a bool mask (N, C / group). It is asked itself,
wherever it is; its ``conv_costs`` say ``is_overhead``: executed, but no part of the dense network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gatedkernels._checks import check_module, check_type
from gatedkernels.nn.blocks import Branch
from gatedkernels.nn.costs import ConvCost, conv_cost
from gatedkernels.nn.gate import Gate, check_gates, gate_key


@dataclass(frozen=True)
class LayerFlops:
    """Multiply-adds of one layer, for one sample.

    Attributes:
        name: Name of the layer.
        dense: In the dense network; 0 for the layers of gates.
        executed: With closed channels left out, mean over samples.
        in_gate: Key of the gate on its input channels, or None.
        out_gate: Key of the gate on its output channels, or None.
    """

    name: str
    dense: int
    executed: float
    in_gate: str | None
    out_gate: str | None


@dataclass(frozen=True)
class FlopCount:
    """Multiply-adds of a network, for one sample.

    Attributes:
        per_layer: The layers, in the order of the modules.
    """

    per_layer: tuple[LayerFlops, ...]

    @property
    def dense(self) -> int:
        """Multiply-adds of the dense network, without gates."""
        return sum(layer.dense for layer in self.per_layer)

    @property
    def executed(self) -> float:
        """Multiply-adds executed, gates included, mean over samples."""
        return sum(layer.executed for layer in self.per_layer)

    @property
    def kept(self) -> float:
        """The fraction executed / dense: what gates leave, 1 without them, at any width of a slimmable network too."""
        return self.executed / self.dense


def count_flops(
    model: nn.Module, example: Tensor, branch: Branch = "gated", masks: Mapping[str, Tensor] | None = None
) -> FlopCount:
    """Count the multiply-adds of a network on an example.

    The network runs once, in evaluation and without gradients; training flags are put back. Works on any module, dense
    ones and the result of `optimize` included. Masks brought to a single layer or block are not seen: only those of
    gates, and ``masks``.

    A slimmable network is counted at the width that it has: that is its dense network, of which it keeps everything.
    What a width leaves of the whole network is the ratio of two counts, ``count_flops(net, x).dense`` at either width.

    Args:
        model: A module that takes ``example``.
        example: A batch; the executed count is the mean over its samples.
        branch: Passed on if it is not "gated".
        masks: Passed on if given: masks by gate key, as in `GatedResNet.forward`.

    Returns:
        The counts, in all and of every layer.

    Raises:
        TypeError: If the model is no module, the example no tensor, or the masks no mapping.
        ValueError: If the example is empty or nothing countable ran.
    """
    options: dict[str, Any] = {} if branch == "gated" else {"branch": branch}
    if masks is not None:
        check_type("masks", masks, Mapping, "a mapping of masks by gate key")
        options["masks"] = dict(masks)
    costs, decided = _trace(model, example, options)
    decided |= masks or {}
    batch = example.shape[0]
    layers = []
    for cost in costs:
        executed = float(cost.full)
        if cost.in_gate in decided or cost.out_gate in decided:
            pairs = _active(cost.in_channels, decided.get(cost.in_gate or ""), batch)
            pairs = pairs * _active(cost.out_channels, decided.get(cost.out_gate or ""), batch)
            executed = cost.macs_per_pair * pairs.sum().item() / batch
        layers.append(LayerFlops(cost.name, cost.dense, executed, cost.in_gate, cost.out_gate))
    return FlopCount(tuple(layers))


def gated_flops(model: nn.Module, example: Tensor) -> list[ConvCost]:
    """List what every layer of a gated network costs, for `kept_fraction`.

    The network runs once on the first sample, in evaluation and without gradients; training flags are put back.

    Args:
        model: A module with gates.
        example: Images of the size to count for, shape (N, C, H, W) with N at least 1.

    Returns:
        The costs, gates' own layers included, for one sample.

    Raises:
        TypeError: If the model is no module or the example no tensor.
        ValueError: If the example is empty or nothing countable ran.
    """
    check_type("example", example, Tensor, "a tensor of images")
    return _trace(model, example[:1], {})[0]


def kept_fraction(costs: Sequence[ConvCost], gates: Mapping[str, Gate]) -> Tensor:
    """Compute the fraction of the dense multiply-adds that gates keep, differentiable in their weights.

    Executed over dense: the executed ones include the gates' own layers and everything that is never gated, and are
    the mean over samples.

    Args:
        costs: What `gated_flops` found for this network and image size.
        gates: The decisions by gate key, as the network returns them.

    Returns:
        A scalar; slightly above 1 with all channels open.

    Raises:
        TypeError: If the costs are none or the gates no decisions by key.
        ValueError: If a gate that the costs name is missing, or there are no gates.

    Source:
        Krishna et al., "Unifying Synergies between Self-supervised Learning and Dynamic Computation", BMVC 2023.
    """
    check_type("costs", costs, Sequence, "a sequence of costs, from gated_flops")
    for i, cost in enumerate(costs):
        check_type(f"costs[{i}]", cost, ConvCost, "a ConvCost")
    check_gates(gates)
    wanted = {key for cost in costs for key in (cost.in_gate, cost.out_gate) if key is not None}
    if not wanted:
        raise ValueError("costs must name gates, got none that are named")
    if missing := ", ".join(sorted(wanted - gates.keys())):
        raise ValueError(f"gates must hold every gate of the network, got none for {missing}")
    dense = sum(cost.dense for cost in costs)
    kept: Tensor | float = 0.0
    for cost in costs:
        fraction: Tensor | float = cost.full / dense
        for key in (cost.in_gate, cost.out_gate):
            if key is not None:
                fraction = fraction * gates[key].weight.mean(1)
        kept = kept + (fraction.mean() if isinstance(fraction, Tensor) else fraction)
    assert isinstance(kept, Tensor)
    return kept


def _active(channels: int, mask: Tensor | None, batch: int) -> Tensor:
    """Active channels of every sample, int64, shape (N,)."""
    if mask is None:
        return torch.full((batch,), channels)
    return mask.sum(1).cpu() * (channels // mask.shape[1])


def _trace(model: nn.Module, example: Tensor, options: dict[str, Any]) -> tuple[list[ConvCost], dict[str, Tensor]]:
    """Run a model and return its costs, in the order of its modules, and the masks of its gates by key."""
    check_module("model", model)
    check_type("example", example, Tensor, "a tensor of images")
    if example.shape[0] == 0:
        raise ValueError(f"example must hold at least one sample, got shape {tuple(example.shape)}")
    costs: dict[str, list[ConvCost]] = {}
    masks: dict[str, Tensor] = {}
    handles = []
    claimed: tuple[str, ...] = ()
    for name, module in model.named_modules():
        costs[name] = []
        if getattr(module, "is_gate", False):
            handles.append(module.register_forward_hook(partial(_note_mask, masks, gate_key(name))))
        elif name and name.startswith(claimed):
            continue
        if hasattr(module, "conv_costs"):
            handles.append(module.register_forward_hook(partial(_note_own_costs, costs[name], name)))
            claimed = (*claimed, _join(name, ""))
        elif isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_hook(partial(_note_layer, costs[name], name)))
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            model(example, **options)
    finally:
        for module, mode in modes:
            module.training = mode
        for handle in handles:
            handle.remove()
    found = [cost for layer in costs.values() for cost in layer]
    if not found:
        raise ValueError(f"model must run convolutions or linear layers, got {type(model).__name__} without")
    return found, masks


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _note_mask(masks: dict[str, Tensor], key: str, module: nn.Module, args: Any, output: Gate | Tensor) -> None:
    masks[key] = output.mask if isinstance(output, Gate) else output


def _note_own_costs(costs: list[ConvCost], prefix: str, module: Any, args: tuple[Tensor, ...], output: Any) -> None:
    for cost in module.conv_costs(tuple(args[0].shape)):
        in_gate, out_gate = (
            None if gate is None else gate_key(_join(prefix, gate)) for gate in (cost.in_gate, cost.out_gate)
        )
        name = _join(prefix, cost.name).removesuffix(".")
        costs.append(replace(cost, name=name, in_gate=in_gate, out_gate=out_gate))


def _note_layer(
    costs: list[ConvCost], name: str, module: nn.Conv2d | nn.Linear, args: tuple[Tensor, ...], output: Tensor
) -> None:
    if isinstance(module, nn.Conv2d):
        costs.append(conv_cost(name, module, (output.shape[-2], output.shape[-1])))
    else:
        rows = output.numel() // (module.out_features * output.shape[0])
        costs.append(ConvCost(name, rows, module.in_features, module.out_features))
