"""What modules ask of their arguments, in words instead of those of the first operation that stumbles over them."""

import torch
from torch import Tensor, nn

from gatedkernels._checks import check_module, check_type
from gatedkernels.ops._arguments import pair


def check_geometry(kernel_size: object, stride: object, padding: object, dilation: object) -> None:
    """Refuse what is no geometry of a convolution: an int or two ints each.

    Raises:
        TypeError: If one is something else, such as padding by name.
        ValueError: If one is too small.
    """
    pairs = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    for name, value in pairs.items():
        pair(name, value, 0 if name == "padding" else 1)  # type: ignore[arg-type]


def check_parts(**parts: nn.Module | None) -> None:
    """Refuse parts of a module, each of which may be missing, that are none.

    Raises:
        TypeError: If one is neither a module nor None.
    """
    for name, part in parts.items():
        if part is not None:
            check_module(name, part)


def check_images(x: Tensor, channels: int, weight: Tensor) -> None:
    """Refuse images that a module cannot take.

    Args:
        x: What should be images.
        channels: Channels that they should have.
        weight: The first weight that they meet.

    Raises:
        TypeError: If it is no tensor, or one of another dtype.
        ValueError: If it has another shape or lies on another device.
    """
    check_image_shape(x, channels)
    _check_beside(x, weight)


def check_image_shape(x: Tensor, channels: int) -> None:
    """Refuse what are no images (N, channels, H, W), of whatever dtype and wherever.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it has another shape.
    """
    check_type("x", x, Tensor, "a tensor")
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x must have shape (N, {channels}, H, W), got {tuple(x.shape)}")


def check_tokens(x: Tensor, channels: int, weight: Tensor) -> None:
    """Refuse samples (N, …, C) that a module cannot take; arguments and errors are those of `check_images`."""
    check_type("x", x, Tensor, "a tensor")
    if x.ndim < 2 or x.shape[-1] != channels:
        raise ValueError(f"x must have shape (N, ..., {channels}), got {tuple(x.shape)}")
    _check_beside(x, weight)


def _check_beside(x: Tensor, weight: Tensor) -> None:
    """What operations on both ask for: one device and, but for autocast, which casts, one dtype."""
    if x.device != weight.device:
        raise ValueError(f"x must be on the device of the module, {weight.device}, got {x.device}")
    if x.dtype != weight.dtype and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
        raise TypeError(f"x must have the dtype of the module, {weight.dtype}, got {x.dtype}")


def check_normalisable(x: Tensor, weight: Tensor) -> None:
    """Refuse what a normalisation cannot take: it takes numbers as wide as its own, and narrower ones.

    Raises:
        TypeError: If it is no tensor, or one of a wider dtype or of no floating point.
        ValueError: If it lies on another device.
    """
    check_type("x", x, Tensor, "a tensor")
    if x.device != weight.device:
        raise ValueError(f"x must be on the device of the module, {weight.device}, got {x.device}")
    narrow = torch.promote_types(x.dtype, weight.dtype) == weight.dtype or torch.is_autocast_enabled(x.device.type)
    if not (x.is_floating_point() and narrow):
        raise TypeError(f"x must have a floating dtype up to {weight.dtype}, the module's, got {x.dtype}")
