"""Turn a trained gated network into one for inference."""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from gatedkernels import _extension
from gatedkernels._checks import check_module, check_type
from gatedkernels.nn import (
    Branch,
    GatedBasicBlock,
    GatedBottleneck,
    GatedConv2d,
    SlimmableBasicBlock,
    SlimmableBottleneck,
    SlimmableNetwork,
    check_branch,
    is_slimmable,
)
from gatedkernels.nn import slice as slice_network
from gatedkernels.nn.packed import Packed, PackedConv2d, PackedGatedConv2d
from gatedkernels.nn.packed_blocks import PackedBasicBlock, PackedBottleneck
from gatedkernels.nn.packed_stem import PackedPool, PackedStem
from gatedkernels.nn.packed_trunk import PackedTrunk


def _fold_outside(model: nn.Module) -> None:
    """Fold what the model names in ``foldable``, the convolution before its blocks and what follows it.

    The global average poolings that it names in ``poolings`` are replaced.
    """
    for names in getattr(model, "foldable", ()):
        conv, norm, activation, pool = (getattr(model, name) for name in names)
        is_relu = isinstance(activation, nn.ReLU)
        folded = dict(zip(names, (False, True, is_relu, False), strict=True))
        if PackedStem.serves(conv):
            pools = PackedStem.pools(pool) and (is_relu or isinstance(activation, nn.Identity))
            folded[names[3]] = pools
            packed: Packed = PackedStem(conv, norm, relu=is_relu, pool=pools)
        else:
            packed = PackedConv2d(conv, norm, relu=is_relu)
        setattr(model, names[0], packed)
        for name, is_folded in folded.items():
            if is_folded:
                setattr(model, name, nn.Identity())
    for name in getattr(model, "poolings", ()):
        if PackedPool.serves(getattr(model, name)):
            setattr(model, name, PackedPool())


PACKERS: dict[type[nn.Module], Callable[[Any, Branch], Packed]] = {
    GatedBasicBlock: PackedBasicBlock,
    GatedBottleneck: PackedBottleneck,
    GatedConv2d: lambda conv, branch: PackedGatedConv2d(conv),
    # Cut to their width; without gates there is one branch.
    SlimmableBasicBlock: lambda block, branch: PackedBasicBlock(block, "dense"),
    SlimmableBottleneck: lambda block, branch: PackedBottleneck(block, "dense"),
}


def _fold_sequence(layers: nn.Sequential) -> None:
    """Fold normalisations that follow convolutions, as MobileNet has them, and a ReLU behind."""
    for i in range(len(layers) - 1):
        conv, norm = layers[i], layers[i + 1]
        if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
            has_relu = i + 2 < len(layers) and type(layers[i + 2]) is nn.ReLU
            options: dict[str, Any] = {"norm": norm, "relu": has_relu}
            layers[i] = (
                PackedStem(conv, pool=False, **options) if PackedStem.serves(conv) else PackedConv2d(conv, **options)
            )
            for j in range(i + 1, i + 2 + has_relu):
                layers[j] = nn.Identity()


def _pack(module: nn.Module, branch: Branch) -> nn.Module:
    """The packed form of a module; others keep theirs, with packed children."""
    if type(module) in PACKERS:
        return PACKERS[type(module)](module, branch)
    if type(module) is nn.Sequential:
        _fold_sequence(module)
    for name, child in module.named_children():
        setattr(module, name, _pack(child, branch))
    return module


def _run_once(fast: nn.Module, example: Tensor) -> None:
    """Run a packed network, and drop the weights for tiles where its images have too few of them."""

    def drop(block: PackedBasicBlock, args: tuple[Tensor], y: Tensor) -> None:
        block.drop_tiles(y)

    hooks = [m.register_forward_hook(drop) for m in fast.modules() if isinstance(m, PackedBasicBlock)]
    try:
        fast(example)
    finally:
        for hook in hooks:
            hook.remove()


def _join(fast: nn.Module) -> None:
    """Give a network that names its ``stages`` one operator for all that comes before its classifier."""
    stages: tuple[str, ...] = getattr(fast, "stages", ())
    if stages and _extension.CPU_ERROR is None:
        model = cast(Any, fast)
        parts = model.foldable[0], stages, model.poolings[0]
        model.trunk = PackedTrunk(fast, *parts) if PackedTrunk.serves(fast, *parts) else None


def optimize(model: nn.Module, example: Tensor, branch: Branch = "gated") -> nn.Module:
    """Make a copy of a gated network, block or convolution that runs fast.

    Normalisations are folded, weights packed for the CPU kernels (as ordinary buffers, so that the result saves, moves,
    copies and exports), activations kept channels-last from stem to head. The copy takes any batch and image size, has
    the original's gates under the same names, and shares nothing with it: training the original does not change it.

    Args:
        model: A network of gated modules in evaluation mode, such as `gatedkernels.models.gated_resnet18`, or one gated
            module. It stays as it is.
        example: A batch that the model accepts; the copy is run on it once.
        branch: "gated", or "dense": the network without its gates, from the same kernels.

    Returns:
        A module that computes the same from the same input, for evaluation only: ``train()`` raises.

    Raises:
        TypeError: If the model is no module or the example no tensor, or the model refuses it so.
        ValueError: If the model is in training mode, holds nothing that is gated, or refuses the example so, or the
            branch does not exist.
    """
    check_branch(branch)
    check_module("model", model)
    check_type("example", example, Tensor, "a tensor of images")
    if any(module.training for module in model.modules()):
        raise ValueError("model must be in evaluation mode, got one in training: call model.eval() first")
    if any(isinstance(module, Packed) for module in model.modules()):
        raise ValueError("model must be an original one, got one that is optimised already")
    served = isinstance(model, SlimmableNetwork) or any(type(module) in PACKERS for module in model.modules())
    if not served:
        raise ValueError(f"model must hold gated modules, or be a slimmable network, got {type(model).__name__}")
    fast = slice_network(model) if is_slimmable(model) else copy.deepcopy(model)
    with torch.no_grad():
        _fold_outside(fast)
        fast = _pack(fast, branch)
        if hasattr(fast, "default_branch"):
            cast(Any, fast).default_branch = branch
        for parameter in fast.parameters():
            parameter.requires_grad_(False)
        try:
            _run_once(fast, example)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"example must be a batch that the model takes, got a refusal: {error}") from error
    _join(fast)
    return fast.eval()
