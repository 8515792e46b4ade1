"""What masks keep, and zeros elsewhere, in the fastest way that PyTorch has for it."""

import torch
from torch import Tensor

# On the CPU a selection by bits takes half the time of `where` and less than a tenth of `masked_fill`; and no NaN gets
# through, as it does a product.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def select(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where ``mask``, bool and broadcast against it, is True, else zero."""
    if x.device.type != "cpu":
        return torch.where(mask, x, 0)
    return (x.view(_bits(x)) & mask.to(_bits(x)).neg_()).view(x.dtype)


def select_(x: Tensor, mask: Tensor) -> Tensor:
    """``select`` in place."""
    if x.device.type != "cpu":
        return x.masked_fill_(~mask, 0)
    x.view(_bits(x)).bitwise_and_(mask.to(_bits(x)).neg_())
    return x


def _bits(x: Tensor) -> torch.dtype:
    return _BITS[x.element_size()]
