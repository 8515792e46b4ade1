"""Masks: what is refused, and how decisions spread."""

import pytest
import torch

from gatedkernels.nn.masks import check_group, check_mask, spread


def test_spread_repeats_each_decision():
    mask = torch.tensor([[True, False, True]])
    assert spread(mask, 1).shape == (1, 3, 1, 1)
    assert spread(mask, 2).flatten().tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 4), TypeError, "mask must be a bool tensor, got torch.float32"),
        (torch.ones(2, 4, dtype=torch.uint8), TypeError, "mask must be a bool tensor, got torch.uint8"),
        (None, TypeError, "mask must be a bool tensor, got NoneType"),
        (torch.ones(2, 8) > 0, ValueError, r"mask must have shape \(2, 4\), got \(2, 8\)"),
        (torch.ones(3, 4) > 0, ValueError, r"mask must have shape \(2, 4\), got \(3, 4\)"),
        (torch.ones(4) > 0, ValueError, r"mask must have shape \(2, 4\), got \(4,\)"),
    ],
)
def test_refused_masks(mask, error: type[Exception], message: str):
    check_mask("mask", torch.ones(2, 4) > 0, torch.ones(2, 8), 8, 2)
    with pytest.raises(error, match=message):
        check_mask("mask", mask, torch.ones(2, 8), 8, 2)


@pytest.mark.parametrize(("channels", "group"), [(8, 3), (0, 1), (-4, 2), (8, 0), (8, -2)])
def test_refused_groups(channels: int, group: int):
    check_group("channels", 8, 4)
    with pytest.raises(ValueError, match="must be"):
        check_group("channels", channels, group)
