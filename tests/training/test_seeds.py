"""Seeds are fixed for all time and differ where they are used for different things."""

from gatedkernels.training.seeds import derived_seed


def test_seeds_are_the_same_everywhere():
    assert derived_seed("view", 0, 1, 2) == 3527668153101029845


def test_seeds_differ():
    seeds = {derived_seed(purpose, *numbers) for purpose in ("a", "b") for numbers in ((), (0,), (0, 0), (1, 0), (10,))}
    assert len(seeds) == 10
