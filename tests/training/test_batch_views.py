"""Views of whole batches are drawn as those of single images are, and depend on seed, epoch and step alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

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
    # In standard errors of a difference of two means: 1 is expected, but neighbouring pixels err together.
    errors = (found.mean(0) - expected.mean(0)) / (spread * (2 / count) ** 0.5)
    assert errors.square().mean().sqrt() < 1.5
    assert 0.95 < (found.std(0) / spread).mean() < 1.05
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    quantiles = [sample.flatten()[::40].quantile(levels) for sample in (found, expected)]
    torch.testing.assert_close(*quantiles, rtol=0, atol=0.1)


def steps(view: torch.nn.Module) -> dict[str, Any]:
    """The random steps of a batch's view, by name."""
    return {type(step).__name__.strip("_"): step for step in view}


def drawn(step: Any, key: str, count: int = 4000) -> torch.Tensor:
    torch.manual_seed(0)
    return step.forward_parameters(torch.Size([count, 3, 32, 32]))[key]


def assert_uniform(values: torch.Tensor, low: float, high: float) -> None:
    """Of several thousand numbers, the ends and the first two moments."""
    assert low <= values.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < values.max() <= high
    assert abs(values.mean() - (low + high) / 2) < 0.03 * (high - low)
    assert abs(values.std() / (high - low) - 12**-0.5) < 0.01


def test_colours_change_within_the_ranges_of_single_images():
    """And by the same functions, in the order that was drawn."""
    jitter = steps(BATCH_VIEWS["photos"](32, *STATISTICS))["ColorJitter"]
    for name, (low, high) in {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2)}.items():
        assert_uniform(drawn(jitter, f"{name}_factor"), low, high)
    assert_uniform(drawn(jitter, "hue_factor"), -0.1, 0.1)
    images = torch.rand(32, 3, 8, 8)
    found = jitter(images)
    drawn_now, functions = jitter._params, ("brightness", "contrast", "saturation", "hue")
    changed = drawn_now["batch_prob"].bool()
    assert 0 < changed.sum() < 32  # four fifths, in the long run
    expected = images.clone()
    for index in changed.nonzero().flatten().tolist():
        for which in drawn_now["order"].tolist():
            factor = float(drawn_now[f"{functions[which]}_factor"][index])
            expected[index] = getattr(functional, f"adjust_{functions[which]}")(expected[index], factor)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_chances_are_those_of_single_images():
    found = {name: step.p for name, step in steps(BATCH_VIEWS["photos"](32, *STATISTICS, blur=0.3)).items()
             if hasattr(step, "p")}  # fmt: skip
    assert found == {
        "ColorJitter": 0.8, "RandomGrayscale": 0.2, "RandomGaussianBlur": 0.3, "RandomSolarize": 0.1,
        "RandomHorizontalFlip": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "scale"), [("photos", (0.2, 1.0)), ("crops", (0.08, 1.0))])
def test_boxes_are_drawn_as_those_of_single_images(name: AugmentationName, scale: tuple[float, float]):
    crop = steps(BATCH_VIEWS[name](32, *STATISTICS))["ResizedCrop"]
    corners = drawn(crop.draw, "src")
    extents = corners[:, 2] - corners[:, 0] + 1
    found = torch.cat([corners[:, 0].flip(1), extents.flip(1), extents.prod(1, keepdim=True)], dim=1)
    boxes = [v2.RandomResizedCrop.make_params(v2.RandomResizedCrop(32, scale=scale), [torch.zeros(3, 32, 32)])
             for _ in range(len(found))]  # fmt: skip
    expected = torch.tensor([[b["top"], b["left"], b["height"], b["width"], b["height"] * b["width"]] for b in boxes])
    expected = expected.float()
    errors = (found.mean(0) - expected.mean(0)) / (expected.std(0) * (2 / len(found)) ** 0.5)
    assert errors.abs().max() < 3.5
    assert ((found.std(0) / expected.std(0)).log().abs() < 0.06).all()


def test_a_crop_is_its_box_resized():
    """But along its border, where a crop that is cut out first knows nothing of what lies beside it."""
    images = torch.rand(16, 3, 20, 28)
    crop = steps(BATCH_VIEWS["crops"](16, *STATISTICS))["ResizedCrop"]
    torch.manual_seed(1)
    found = crop(images)
    torch.manual_seed(1)
    corners = crop.draw.forward_parameters(images.shape)["src"].long()
    for own, image, box in zip(found, images, corners, strict=True):
        (left, top), (right, bottom) = box[0].tolist(), box[2].tolist()
        part = image[None, :, top : bottom + 1, left : right + 1]
        exact = torch.nn.functional.interpolate(part, (16, 16), mode="bilinear")[0]
        margin = 2  # pixels of the view that the next pixel of a box may reach
        torch.testing.assert_close(own[:, margin:-margin, margin:-margin], exact[:, margin:-margin, margin:-margin])


@pytest.mark.parametrize("name", ["photos", "crops"])
def test_a_crop_of_one_colour_has_it(name: AugmentationName):
    images = torch.full((256, 3, 32, 32), 0.6)
    torch.testing.assert_close(steps(BATCH_VIEWS[name](32, *STATISTICS))["ResizedCrop"](images), images)


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
    message = "augment_on must be workers for images of several sizes, got device for 4 x 4 and 5 x 5"
    with pytest.raises(DataError, match=message):
        BatchViews(images, torch.nn.Identity(), 1, batch_size=2, seed=0, device=torch.device("cpu"))


def test_too_many_images_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**8, 10**9))
    images = ArrayImages(torch.empty(1, 3, 1, 1, dtype=torch.uint8).expand(10**9, 3, 1, 1), torch.zeros(1))
    with pytest.raises(DataError, match=r"got device for 3\.0 GB where 0\.1 GB are free"):
        BatchViews(images, torch.nn.Identity(), 1, batch_size=2, seed=0, device=torch.device("cuda"))


def test_large_images_are_refused_and_idle_workers_named():
    config = make_config("vicreg-dual", data="synthetic", limit=8, batch_size=4, image_size=12, augment_on="device")
    data = load_data("synthetic", image_size=32, limit=8)
    with pytest.raises(DataError, match="augment_on must be workers for images of more than 24 pixels a side, got 32"):
        view_loader(data, config)
    with pytest.warns(UserWarning, match="workers=2 do nothing where augment_on is device"):
        view_loader(data, replace(config, image_size=16, workers=2))
