"""Views of whole batches are drawn as those of single images are, and depend on seed, epoch and step alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gatedkernels.training.augment import VIEWS
from gatedkernels.training.batch_views import BATCH_VIEWS, BatchViews
from gatedkernels.training.config import AugmentationName
from gatedkernels.training.data import ArrayImages, FolderImages, load_data
from gatedkernels.training.errors import DataError
from gatedkernels.training.loop import view_loader
from gatedkernels.training.recipes import make_config

STATISTICS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def smooth_image(size: int) -> torch.Tensor:
    """A coloured slope, so that where a pixel is sampled hardly matters and what is done to it does."""
    ramp = torch.linspace(30, 220, size).round().to(torch.uint8)
    return torch.stack([ramp.expand(size, size), ramp[:, None].expand(size, size), ramp.flip(0).expand(size, size)])


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in BATCH_VIEWS), ("photos", {"blur": 1.0})],
    ids=[*BATCH_VIEWS, "blurred photos"],
)
def test_views_are_distributed_as_those_of_single_images(name: AugmentationName, options: dict[str, float]):
    count, image = 640, smooth_image(32)
    torch.manual_seed(0)
    single = VIEWS[name](32, *STATISTICS, **options)
    expected = torch.stack([single(image) for _ in range(count)])
    batch = BATCH_VIEWS[name](32, *STATISTICS, **options)
    found = torch.cat([batch(image.expand(64, -1, -1, -1)) for _ in range(count // 64)])
    assert found.shape == expected.shape and found.dtype == torch.float32
    spread = expected.std(0)
    # The means of two samples differ by the root of two standard errors; those of neighbouring pixels together.
    errors = (found.mean(0) - expected.mean(0)) / (spread * (2 / count) ** 0.5)
    assert errors.square().mean().sqrt() < 2.2
    assert 0.9 < (found.std(0) / spread).mean() < 1.1
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    quantiles = [sample.flatten()[::40].quantile(levels) for sample in (found, expected)]
    torch.testing.assert_close(*quantiles, rtol=0, atol=0.15)


@pytest.mark.parametrize("name", BATCH_VIEWS)
def test_images_are_augmented_each_by_itself(name: AugmentationName):
    view = BATCH_VIEWS[name](32, *STATISTICS)
    views = view(smooth_image(40).expand(8, -1, -1, -1))
    assert views.shape == (8, 3, 32, 32)
    assert len(views.flatten(1).unique(dim=0)) == 8
    assert views.abs().max() <= 2.0 + 1e-6


def loaded(seed: int = 0, epoch: int = 0, **options: Any) -> list[tuple[torch.Tensor, ...]]:
    images = load_data("synthetic", limit=20).train
    view = BATCH_VIEWS["photos"](32, *STATISTICS)
    chosen = {"batch_size": 8, "seed": seed, "device": torch.device("cpu"), **options}
    views = BatchViews(images, view, 2, **chosen)
    views.sampler.set_epoch(epoch)
    assert len(views) == 2
    return list(views)


def test_views_are_a_function_of_seed_epoch_and_step():
    first, second = loaded()
    again, _ = loaded()
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    for other in (second, loaded(epoch=1)[0], loaded(seed=1)[0]):
        assert not torch.equal(first[0], other[0])


def test_views_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    loaded()
    assert torch.equal(torch.rand(1), expected)


def test_every_image_comes_once_with_its_class():
    """Of constant images a view that keeps every pixel shows which one it is."""
    pixels = torch.arange(12, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    options = {"batch_size": 4, "seed": 0, "device": torch.device("cpu"), "labelled": True}
    views = BatchViews(ArrayImages(pixels, 2 * torch.arange(12)), torch.nn.Identity(), 1, **options)
    seen = []
    for images, labels in views:
        assert torch.equal(2 * images[:, 0, 0, 0].long(), labels)
        seen += labels.tolist()
    assert sorted(seen) == list(range(0, 24, 2)) != seen


@pytest.mark.parametrize("recipe", ["vicreg-dual", "us-net"])
def test_both_places_load_the_same_images(recipe: str):
    """In one order, in tensors of one form; with labels where a method learns from them."""
    config = make_config(recipe, data="synthetic", limit=32, batch_size=8)
    data = load_data("synthetic", limit=32)
    workers, device = (view_loader(data, replace(config, augment_on=place)) for place in ("workers", "device"))
    assert len(workers) == len(device) == 4
    for one, other in zip(workers, device, strict=True):
        assert [t.shape for t in one] == [t.shape for t in other] and [t.dtype for t in one] == [t.dtype for t in other]
        if recipe == "us-net":
            assert torch.equal(one[-1], other[-1])


def test_images_of_several_sizes_are_refused(tmp_path: Path):
    from torchvision.utils import save_image

    paths = [tmp_path / f"{side}.png" for side in (4, 5)]
    for path, side in zip(paths, (4, 5), strict=True):
        save_image(torch.zeros(3, side, side), path)
    images = FolderImages(paths, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match="augment_on must be workers for images of several sizes, got device for 4 x 4"):
        BatchViews(images, torch.nn.Identity(), 1, batch_size=2, seed=0, device=torch.device("cpu"))
