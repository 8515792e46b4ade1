"""The definitions of what gates decide at inference, in plain PyTorch."""

from torch import Tensor
from torch.nn.functional import linear


def gate_logits(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Logits (N, D): the means of ``x`` (N, C, H, W) through layers (M, C), ReLU, and (D, M)."""
    mean = x.mean((2, 3)).to(weight1.dtype)
    return linear(linear(mean, weight1, bias1).relu(), weight2, bias2)


def channel_gate_reference(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Bool (N, D): open where the logit is at least 0."""
    return gate_logits(x, weight1, bias1, weight2, bias2) >= 0


def code_gate_reference(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Int32 (N,): the number of the largest logit, the first of several."""
    return gate_logits(x, weight1, bias1, weight2, bias2).argmax(1).int()
