"""Dynamic sampling and the sandwich rule: the schedule of the paper, and what a run costs."""

import pytest
import torch

from gatedkernels.training.config import US3LConfig
from gatedkernels.training.width_sampling import least_width, sample_widths, widths_of_step


@pytest.mark.parametrize(
    ("epoch", "least"),
    [(0, 1.0), (99, 1.0), (100, 0.75), (199, 0.75), (200, 0.5), (299, 0.5), (300, 0.25), (399, 0.25)],
)
def test_schedule_of_the_paper(epoch: int, least: float):
    assert least_width(epoch, 400) == pytest.approx(least)


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 7, 10, 401])
def test_any_length(epochs: int):
    widths = [least_width(epoch, epochs) for epoch in range(epochs)]
    assert widths[0] == 1 and all(0.25 <= width <= 1 for width in widths)
    assert widths == sorted(widths, reverse=True)


def test_passes_of_a_run():
    """Exactly 2.5 T with dynamic sampling, 3 T without."""
    generator = torch.Generator().manual_seed(0)
    passes = [len(sample_widths(least_width(epoch, 400), 3, generator)) for epoch in range(400)]
    assert sum(passes) == 2.5 * 400
    assert sum(len(sample_widths(0.25, 3, generator)) for _ in range(400)) == 3 * 400


def test_sandwich():
    generator = torch.Generator().manual_seed(0)
    drawn = [sample_widths(0.5, 4, generator) for _ in range(50)]
    assert all(widths[0] == 1 and widths[-1] == 0.5 and widths == sorted(widths, reverse=True) for widths in drawn)
    assert min(widths[2] for widths in drawn) < 0.6 and max(widths[1] for widths in drawn) > 0.9


def test_without_sandwich():
    drawn = [sample_widths(0.25, 3, torch.Generator().manual_seed(seed), sandwich=False) for seed in range(50)]
    assert all(len(widths) == 3 and 0.25 <= widths[2] <= widths[1] <= widths[0] < 1 for widths in drawn)
    assert drawn[0] == sample_widths(0.25, 3, torch.Generator().manual_seed(0), sandwich=False)


def test_errors():
    generator = torch.Generator()
    with pytest.raises(ValueError, match=r"epoch must lie in \[0, 4\), got 4"):
        least_width(4, 4)
    with pytest.raises(ValueError, match=r"least must lie in \(0, 1\], got 0"):
        least_width(0, 4, 0)
    with pytest.raises(ValueError, match=r"least must lie in \(0, 1\], got 2"):
        sample_widths(2, 3, generator)
    with pytest.raises(ValueError, match="count must be at least 2, got 1"):
        sample_widths(0.5, 1, generator)


def test_widths_of_a_run():
    config = US3LConfig(epochs=8)
    assert widths_of_step(config, 0, 0) == [1.0]
    assert [widths_of_step(config, epoch, 5)[-1] for epoch in (2, 4, 6)] == pytest.approx([0.75, 0.5, 0.25])
    assert widths_of_step(config, 6, 5) == widths_of_step(config, 6, 5) != widths_of_step(config, 6, 6)
    assert len(widths_of_step(US3LConfig(dynamic_sampling=False, passes=4), 0, 0)) == 4
    assert widths_of_step(US3LConfig(fixed_width=0.5), 0, 0) == [0.5]
