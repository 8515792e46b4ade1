"""What every operation asks of its arguments, and the geometry that follows from them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def pair(name: str, value: int | Sequence[int], at_least: int) -> tuple[int, int]:
    """``value`` for height and width, from one int or two."""
    if type(value) is int and value >= at_least:
        return value, value
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(values) != 2 or not all(isinstance(v, int) for v in values):
        raise TypeError(f"{name} must be an int or two ints, got {value!r}")
    if min(values) < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value!r}")
    return values


def check_images(name: str, x: Tensor) -> None:
    """A floating (N, C, H, W) tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.ndim != 4:
        raise ValueError(f"{name} must have shape (N, C, H, W), got {tuple(x.shape)}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must have a dtype of {', '.join(map(str, FLOATING))}, got {x.dtype}")


def check_tokens(name: str, x: Tensor) -> None:
    """A floating (N, …, C) tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape (N, ..., C), got {tuple(x.shape)}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must have a dtype of {', '.join(map(str, FLOATING))}, got {x.dtype}")


def check_like(name: str, tensor: Tensor, shape: Sequence[int], x: Tensor, x_name: str = "x") -> None:
    """A tensor of this shape, with the dtype and device of ``x``."""
    good = isinstance(tensor, Tensor) and tensor.shape == shape and tensor.dtype is x.dtype
    if good and tensor.device == x.device:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of {x_name}, {x.dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on the device of {x_name}, {x.device}, got {tensor.device}")


def check_weight(
    name: str,
    weight: Tensor,
    bias_name: str,
    bias: Tensor | None,
    in_channels: int,
    groups: int,
    x: Tensor,
    x_name: str = "x",
) -> None:
    """Filters (K, C / groups, R, S) and an optional bias (K,)."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weight).__name__}")
    if weight.ndim != 4:
        raise ValueError(f"{name} must have shape (K, C / groups, R, S), got {tuple(weight.shape)}")
    if not isinstance(groups, int):
        raise TypeError(f"groups must be an int, got {groups!r}")
    if groups < 1 or in_channels % groups or weight.shape[0] % groups:
        raise ValueError(f"groups must divide {in_channels} and {weight.shape[0]} channels, got {groups}")
    filters, _, height, width = weight.shape
    check_like(name, weight, (filters, in_channels // groups, height, width), x, x_name)
    if bias is not None:
        check_like(bias_name, bias, (filters,), x, x_name)


def expand_mask(name: str, mask: Tensor | None, channels: int, group: int, x: Tensor) -> Tensor | None:
    """A (N, channels) mask from one decision for every ``group`` neighbouring channels."""
    if mask is None:
        return None
    _check_decisions(name, mask, channels, group, x)
    if tuple(mask.shape) != (x.shape[0], channels // group):
        raise ValueError(f"{name} must have shape {(x.shape[0], channels // group)}, got {tuple(mask.shape)}")
    return mask if group == 1 else mask.repeat_interleave(group, 1)


def expand_token_mask(name: str, mask: Tensor | None, channels: int, group: int, x: Tensor) -> Tensor | None:
    """A (N, channels) or (N, …, channels) mask from one decision for every ``group`` neighbouring channels."""
    if mask is None:
        return None
    _check_decisions(name, mask, channels, group, x)
    by_sample, by_token = ((*lead, channels // group) for lead in (x.shape[:1], x.shape[:-1]))
    if tuple(mask.shape) not in (by_sample, by_token):  # a tuple: symbolic sizes have no hash
        either = f"{by_sample}" if by_sample == by_token else f"{by_sample} or {by_token}"
        raise ValueError(f"{name} must have shape {either}, got {tuple(mask.shape)}")
    return mask if group == 1 else mask.repeat_interleave(group, -1)


def _check_decisions(name: str, mask: Tensor, channels: int, group: int, x: Tensor) -> None:
    """A bool tensor beside ``x``, and a granularity that its channels have."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype torch.bool, got {mask.dtype}")
    if not isinstance(group, int):
        raise TypeError(f"group must be an int, got {group!r}")
    if group < 1 or channels % group:
        raise ValueError(f"group must divide the {channels} channels that {name} decides on, got {group}")
    if mask.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {mask.device}")


def check_plan(index: Tensor, count: Tensor, channels: int, x: Tensor) -> None:
    """A plan for the samples of ``x`` over this many channels."""
    for name, tensor, shape in (("index", index, (x.shape[0], channels)), ("count", count, (x.shape[0],))):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be an int32 tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of the images, {x.device}, got {tensor.device}")


def output_size(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    (*_, H, W), (*_, R, S) = x.shape, weight.shape
    height = (H + 2 * padding[0] - dilation[0] * (R - 1) - 1) // stride[0] + 1
    width = (W + 2 * padding[1] - dilation[1] * (S - 1) - 1) // stride[1] + 1
    return height, width


def check_fits(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> None:
    """The window must fit into the padded image."""
    height, width = output_size(x, weight, stride, padding, dilation)
    if height < 1 or width < 1:
        raise ValueError(f"x must be at least as large as the window {tuple(weight.shape[2:])}, got {tuple(x.shape)}")


def geometry(
    x: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Stride, padding and dilation of a convolution, for height and width each; its window must fit into ``x``."""
    pairs = pair("stride", stride, 1), pair("padding", padding, 0), pair("dilation", dilation, 1)
    check_fits(x, weight, *pairs)
    return pairs


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype that autocast asks for on the first one's device, where it is on."""
    assert tensors[0] is not None
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor | None) -> Tensor | None:
        eligible = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor  # type: ignore[union-attr]

    return tuple(map(cast, tensors))


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd must know what is computed from these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Raise ``NotImplementedError`` if forward-mode differentiation follows a tensor: nothing here would say so."""
    if forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError("gated operations have no forward-mode derivatives; use reverse mode")


def memory_format(x: Tensor) -> torch.memory_format:
    """Layout of an operation's output, a function of the shape and strides of ``x`` alone; contiguous if ambiguous."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def in_best_layout(x: Tensor, *weights: Tensor) -> Tensor:
    """Images in the layout in which PyTorch's dense convolution is the faster one.

    It converts the smaller of images and weights: channels-last images take their filters along, which on small
    batches are the larger part.
    """
    if x.device.type != "cpu" or x.numel() >= sum(weight.numel() for weight in weights):
        return x
    return x.contiguous()
