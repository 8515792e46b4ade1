"""The learning rate at the epochs where it is known."""

import pytest

from gatedkernels.training.schedules import cosine_between, warmup_cosine, warmup_line


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


def test_a_line_after_the_warmup():
    factors = [warmup_line(epoch, epochs=6, warmup_epochs=2) for epoch in range(7)]
    assert factors == pytest.approx([0.01, 0.505, 1, 0.75, 0.5, 0.25, 0])


def test_between_two_values():
    values = [cosine_between(0.99, 1.0, epoch, 4) for epoch in range(5)]
    assert values == pytest.approx([0.99, 0.99146447, 0.995, 0.99853553, 1.0])
