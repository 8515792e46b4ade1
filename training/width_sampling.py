"""Which widths a training step goes through."""

import torch

from gatedkernels.training.config import SlimmableConfig
from gatedkernels.training.seeds import derived_seed

_QUARTERS = 4


def least_width(epoch: int, epochs: int, least: float = 0.25) -> float:
    """Return the narrowest width of an epoch under US3L's dynamic sampling.

    In the first quarter of a run only the full network learns; the range then widens by equal steps, down to ``least``
    in the last quarter: 1, 0.75, 0.5, 0.25. With three widths an iteration that is 2.5 passes on the mean, not 3.

    Args:
        epoch: The zero-based epoch.
        epochs: Length of the run.
        least: The narrowest width of all.

    Returns:
        The width.

    Raises:
        ValueError: If ``epoch`` lies outside the run, or ``least`` outside (0, 1].

    Source:
        Cao et al., US3L, CVPR 2023 (schedule A of the authors' code).
    """
    if not 0 <= epoch < epochs:
        raise ValueError(f"epoch must lie in [0, {epochs}), got {epoch}")
    if not 0 < least <= 1:
        raise ValueError(f"least must lie in (0, 1], got {least}")
    # Runs whose length is no multiple of four: the epochs left over belong to the last quarter.
    quarter = min(epoch // max(epochs // _QUARTERS, 1), _QUARTERS - 1)
    return 1 - quarter * (1 - least) / (_QUARTERS - 1)


def sample_widths(least: float, count: int, generator: torch.Generator, *, sandwich: bool = True) -> list[float]:
    """Draw the widths of one iteration, in descending order; the first one is the base.

    By the sandwich rule the widest and the narrowest are always among them, and the others uniform in between; without
    it all are uniform. A range of one width needs one pass.

    Args:
        least: The narrowest width, in (0, 1].
        count: How many; by the sandwich rule at least two.
        generator: Where the random numbers come from.
        sandwich: Whether the widest and the narrowest are always there.

    Returns:
        The widths.

    Raises:
        ValueError: If a number is out of range.

    Source:
        Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques", ICCV 2019 (the sandwich rule).
    """
    if not 0 < least <= 1:
        raise ValueError(f"least must lie in (0, 1], got {least}")
    fewest = 2 if sandwich else 1
    if count < fewest:
        raise ValueError(f"count must be at least {fewest}, got {count}")
    if least == 1:
        return [1.0]
    ends = [1.0, least] if sandwich else []
    drawn = torch.rand(count - len(ends), generator=generator, dtype=torch.float64) * (1 - least) + least
    return sorted([*ends, *drawn.tolist()], reverse=True)


def widths_of_step(config: SlimmableConfig, epoch: int, step: int) -> list[float]:
    """Draw the widths of an iteration of a run, the widest first: a function of seed, epoch and step."""
    if config.fixed_width is not None:
        return [config.fixed_width]
    least = least_width(epoch, config.epochs, config.least) if config.dynamic_sampling else config.least
    generator = torch.Generator().manual_seed(derived_seed("widths", config.seed, step))
    return sample_widths(least, config.passes, generator, sandwich=config.sandwich)
