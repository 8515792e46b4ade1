"""The learning rate at the epochs where it is known."""

import pytest

from gatedkernels.training.schedules import warmup_cosine


@pytest.mark.parametrize(
    ("epoch", "factor"), [(0, 0.01), (5, 0.505), (10, 1.0), (255, 0.5), (500, 0.0)], ids=lambda value: str(value)
)
def test_points(epoch: int, factor: float):
    assert warmup_cosine(epoch, epochs=500, warmup_epochs=10) == pytest.approx(factor)


def test_without_warmup_it_starts_at_the_base():
    assert warmup_cosine(0, epochs=5, warmup_epochs=0) == 1


def test_it_only_falls_after_the_warmup():
    factors = [warmup_cosine(epoch, epochs=20, warmup_epochs=3) for epoch in range(3, 21)]
    assert factors == sorted(factors, reverse=True)
