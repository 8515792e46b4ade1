"""Memory of large pages, for weights that are gathered row by row: fewer addresses to translate."""

import mmap

import torch
from torch import Tensor

_PAGE = 2 << 20


def on_large_pages(tensor: Tensor) -> Tensor:
    """Copy a tensor into memory that the system is asked to back with pages of 2 MiB.

    It is an ordinary tensor, whose copies lie in ordinary memory. Tensors that are small, not contiguous or not on the
    CPU, and those of systems that do not know such pages are copied as usual.

    Args:
        tensor: Any tensor.

    Returns:
        A copy with the same values, shape, strides and dtype, without a gradient.
    """
    tensor = tensor.detach()
    size = tensor.numel() * tensor.element_size()
    is_worth_it = size >= _PAGE // 4 and tensor.is_contiguous() and tensor.device.type == "cpu"
    if not is_worth_it or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor.clone()
    # Private, so that a forked process writes to a copy; unmapped when the tensor that lies in it goes.
    pages = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        return tensor.clone()
    start = -torch.frombuffer(pages, dtype=torch.uint8).data_ptr() % _PAGE
    copy = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return copy.view(tensor.shape).copy_(tensor)
