"""Widths: how many channels, from the first one on, are there for everybody or for every sample."""

from collections.abc import Iterator

import torch
from torch import Tensor

Width = int | Tensor | None
# Some samples of a batch: neighbours as a slice, whose views cost nothing, others by their numbers.
Samples = slice | Tensor


def check_width(name: str, width: Width, channels: int, x: Tensor) -> tuple[int, Tensor | None]:
    """How many channels are there for everybody, and int32 (N,), how many of them every sample has, if they differ.

    The values of a tensor are not looked at, which on a GPU would wait for it: more than there are means all of them.
    """
    if width is None:
        return channels, None
    if isinstance(width, Tensor):
        if width.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must have dtype torch.int32 or torch.int64, got {width.dtype}")
        if tuple(width.shape) != (x.shape[0],):
            raise ValueError(f"{name} must have shape {(x.shape[0],)}, one for every sample, got {tuple(width.shape)}")
        if width.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {width.device}")
        return channels, width.to(torch.int32)
    if not isinstance(width, (int, torch.SymInt)) or isinstance(width, bool):
        raise TypeError(f"{name} must be an int, a tensor of ints or None, got {width!r}")
    if width < 1 or width > channels:
        raise ValueError(f"{name} must lie between 1 and {channels}, got {width}")
    return width, None


def equal_widths(
    in_width: Tensor | None, out_width: Tensor | None, samples: int, channels: tuple[int, int]
) -> Iterator[tuple[Samples, int, int]]:
    """Groups of samples of equal widths, each with its widths.

    It looks at the values: for the CPU, where that is free.
    """
    pairs = zip(
        *(
            [most] * samples if width is None else width.clamp(0, most).tolist()
            for width, most in zip((in_width, out_width), channels, strict=True)
        ),
        strict=True,
    )
    groups: dict[tuple[int, int], list[int]] = {}
    for sample, pair in enumerate(pairs):
        groups.setdefault(pair, []).append(sample)
    for (ins, outs), members in groups.items():
        first, last = members[0], members[-1]
        together = last - first + 1 == len(members)
        yield (slice(first, last + 1) if together else torch.tensor(members)), ins, outs


def take(x: Tensor, samples: Samples, dim: int, width: int) -> Tensor:
    """The first ``width`` channels, along ``dim``, of some samples."""
    return x.narrow(dim, 0, width)[samples]  # which keeps channels-last images so; index_select does not


def put(y: Tensor, samples: Samples, dim: int, part: Tensor) -> None:
    """Write what belongs where ``take`` takes."""
    y.narrow(dim, 0, part.shape[dim])[samples] = part
