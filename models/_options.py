"""What the networks ask of their options and images alike, and how their convolutions start."""

from collections.abc import Sequence

from torch import Tensor, nn

from gatedkernels._checks import check_sequence, check_sizes, check_type
from gatedkernels.nn.inputs import check_images


def check_block(block: object, kinds: tuple[type, ...]) -> None:
    """Raise ``TypeError`` unless a network's blocks are of one of these classes, or of one derived from it."""
    if not isinstance(block, type) or not issubclass(block, kinds):
        raise TypeError(f"block must be one of {', '.join(kind.__name__ for kind in kinds)}, got {block!r}")


def check_layers(layers: Sequence[int], stages: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless these are numbers of blocks, one for each stage."""
    check_sequence("layers", layers, "int", stages)
    check_sizes(**{f"layers[{i}]": depth for i, depth in enumerate(layers)})


def check_network_input(x: Tensor, first: nn.Module) -> None:
    """Raise ``TypeError`` or ``ValueError`` for images that a network's first convolution would stumble over.

    Where it was replaced, as `gatedkernels.optimize` does, its successor knows what it takes.
    """
    if isinstance(first, nn.Conv2d):
        check_images(x, first.in_channels, first.weight)
    else:
        check_type("x", x, Tensor, "a tensor")


def start_convolutions(network: nn.Module) -> None:
    """Draw the filters as He et al. do, "Delving Deep into Rectifiers", ICCV 2015: variances kept on the way back."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
