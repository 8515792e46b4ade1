"""Views have the right form and depend on seed, epoch and image alone."""

import pytest
import torch
from torch.utils.data import DataLoader

from gatedkernels.training.augment import EpochSampler, Views, crop_view, digit_view, photo_view, plain_view
from gatedkernels.training.data import load_data

STATISTICS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
TRANSFORMS = {
    "photos": photo_view(32, *STATISTICS),
    "blurred": photo_view(32, *STATISTICS, blur=1.0),
    "digits": digit_view(32, *STATISTICS),
    "probe": crop_view(32, *STATISTICS),
    "plain": plain_view(32, *STATISTICS),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("size", [(32, 32), (50, 40)], ids=str)
def test_views_are_normalised_squares(transform, size: tuple[int, int]):
    view = transform(torch.randint(0, 256, (3, *size), dtype=torch.uint8))
    assert view.shape == (3, 32, 32)
    assert view.dtype == torch.float32
    assert view.abs().max() <= 2.0 + 1e-6


def test_plain_view_keeps_every_pixel():
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(TRANSFORMS["plain"](image), (image / 255 - 0.5) / 0.25)


def views(seed: int = 0) -> Views:
    return Views(load_data("synthetic", limit=16).train, (TRANSFORMS["photos"], TRANSFORMS["photos"]), seed)


def test_views_are_a_function_of_seed_epoch_and_index():
    first, second = views()[3, 5]
    again, _ = views()[3, 5]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, views()[4, 5][0])
    assert not torch.equal(first, views(seed=1)[3, 5][0])


def test_views_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    _ = views()[0, 0]
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(workers: int):
    sampler = EpochSampler(16, seed=0)
    sampler.set_epoch(2)
    loader = DataLoader(views(), batch_size=8, sampler=sampler, num_workers=workers)
    first = next(iter(loader))[0]
    expected = torch.stack([views()[key][0] for key in list(sampler)[:8]])
    assert torch.equal(first, expected)


def test_sampler_visits_every_image_in_a_new_order():
    sampler = EpochSampler(10, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == [(0, index) for index in range(10)]
    assert sorted(second) == [(1, index) for index in range(10)]
    assert [index for _, index in first] != [index for _, index in second]
