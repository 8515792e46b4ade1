"""A residual network from its images to its features, as one operator."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from gatedkernels.nn.packed import NATIVE, check_images
from gatedkernels.nn.packed_blocks import PackedBasicBlock
from gatedkernels.nn.packed_stem import PackedPool, PackedStem

# Without `default` each call would look for the overload, the only one, again: see `python -m bench.dispatch`.
_packed_network = torch.ops.gatedkernels.packed_network.default


class PackedTrunk:
    """Stem, residual blocks and pooling of an optimised network in one call.

    It computes what the modules compute, to the bit, and exists for batch 1: between two layers' weights nothing of the
    interpreter stays in the caches. It holds the network's modules and no weights of its own, and leaves the work to
    them wherever that could be noticed.

    Args:
        network: The network, all packed.
        front: Names of the stem and of what the model calls after it, which it has folded.
        stages: Names of the sequences of blocks that it calls next.
        pooling: Name of the pooling behind them.
    """

    def __init__(self, network: nn.Module, front: Sequence[str], stages: Sequence[str], pooling: str) -> None:
        self._stem = cast(PackedStem, network.get_submodule(front[0]))
        sequences = [cast(nn.Sequential, network.get_submodule(stage)) for stage in stages]
        self._blocks = [cast(PackedBasicBlock, block) for sequence in sequences for block in sequence]
        # Where each module is found and what is asked of it: that it is still there and that nobody listens.
        self._places: list[tuple[Mapping[str, nn.Module | None], str, nn.Module]] = []
        for root in (*front, *stages, pooling):
            self._places.append((network._modules, root, network.get_submodule(root)))
            for parent in network.get_submodule(root).modules():
                self._places += [(parent._modules, name, child) for name, child in parent.named_children()]
        stem = self._stem.shape
        self._numbers = [stem.stride[0], stem.padding[0], int(self._stem.relu), int(self._stem.pool)]
        self._strides = [block.shapes[0].stride[0] for block in self._blocks]
        # Found once: while the modules are the same, so are these, whatever tensors they hold.
        self._stem_places = self._stem.kept_at(("weight", "bias", "tiles"))
        self._parts = [place for block in self._blocks for place in block.places()]

    @staticmethod
    def serves(network: nn.Module, front: Sequence[str], stages: Sequence[str], pooling: str) -> bool:
        """Whether a network is one of these; the arguments are those of the constructor."""
        stem, *folded = (network.get_submodule(name) for name in front)
        sequences = [network.get_submodule(name) for name in stages]
        return (
            isinstance(stem, PackedStem)
            and all(type(module) is nn.Identity for module in folded)
            and all(type(sequence) is nn.Sequential for sequence in sequences)
            and all(isinstance(b, PackedBasicBlock) and b.is_simple() for s in sequences for b in s.children())
            and isinstance(network.get_submodule(pooling), PackedPool)
        )

    def takes(self, x: Tensor) -> bool:
        """Whether to call it for these images: on a CPU, outside of tracing, in a network that nobody changed."""
        if not isinstance(x, Tensor) or not x.is_cpu or torch.compiler.is_compiling():
            return False
        weight = self._stem.weight
        if x.dtype not in NATIVE or x.dtype != weight.dtype or self._stem.stored is not None or not weight.is_cpu:
            return False
        everywhere = nn.modules.module
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            return False
        for modules, name, module in self._places:
            if modules.get(name) is not module or module._forward_hooks or module._forward_pre_hooks:
                return False
        return True

    def __call__(self, x: Tensor) -> Tensor:
        """Features, shape (N, channels of the last block), of images (N, C, H, W) that it takes."""
        stem = [buffers[name] for buffers, name in self._stem_places]
        check_images(x, self._stem.shape.in_channels, cast(Tensor, stem[0]))
        parts = [buffers[name] for buffers, name in self._parts]
        masks = [block.given_mask(x) for block in self._blocks]
        return _packed_network(x, *stem, self._numbers, parts, masks, self._strides)
