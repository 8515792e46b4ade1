"""Augmentations, and views of images that depend only on the seed, the epoch and the image."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2

from gatedkernels.training.config import AugmentationName
from gatedkernels.training.data import Images
from gatedkernels.training.seeds import derived_seed

Transform = Callable[[Tensor], Tensor]
Statistics = tuple[float, float, float]

_RESIZE_MARGIN = 8 / 7  # larger images are resized to 8/7 of the side before the central crop: 256 for 224


def _normalise(mean: Statistics, std: Statistics) -> list[Any]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]


def photo_view(size: int, mean: Statistics, std: Statistics, *, blur: float = 0.0) -> Transform:
    """Augment a photograph as VICReg-Dual-Gating does (arXiv 2301.09164), in its order.

    Args:
        size: Side of the view.
        mean: What is subtracted, per colour, on the scale from 0 to 1.
        std: What it is then divided by.
        blur: Probability of a Gaussian blur.
    """
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(kernel_size=max(3, size // 10 * 2 + 1), sigma=(0.1, 2.0))], p=blur),
            v2.RandomSolarize(threshold=128, p=0.1),
            v2.RandomHorizontalFlip(),
            *_normalise(mean, std),
        ]
    )


def digit_view(size: int, mean: Statistics, std: Statistics) -> Transform:
    """Augment a handwritten digit: turn, shift, scale and shear it, never flip or recolour it."""
    deform = v2.RandomAffine(
        degrees=12,
        translate=(0.08, 0.08),
        scale=(0.85, 1.15),
        shear=(-10, 10, -10, 10),
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    return v2.Compose([v2.Resize((size, size), antialias=True), deform, *_normalise(mean, std)])


def crop_view(size: int, mean: Statistics, std: Statistics) -> Transform:
    """Augment an image where labels teach, a linear probe or a network: a crop of 8 to 100 % and a flip alone."""
    crop = v2.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *_normalise(mean, std)])


def plain_view(size: int, mean: Statistics, std: Statistics) -> Transform:
    """Prepare an image for evaluation: its central square if it is larger than ``size``, normalised."""
    normalise = v2.Compose(_normalise(mean, std))
    shrink = v2.Compose([v2.Resize(round(size * _RESIZE_MARGIN), antialias=True), v2.CenterCrop(size)])

    def prepare(image: Tensor) -> Tensor:
        return normalise(image if image.shape[-2:] == (size, size) else shrink(image))

    return prepare


VIEWS: dict[AugmentationName, Callable[..., Transform]] = {
    "photos": photo_view,
    "digits": digit_view,
    "crops": crop_view,
}


class Views(Dataset[tuple[Tensor, ...]]):
    """Random views of images, a pure function of (seed, epoch, index).

    Workers, restarts and the order of the images change nothing: a resumed run sees what an uninterrupted one would.

    Args:
        images: The images.
        transforms: One for each view of an image.
        seed: The run's seed.
    """

    def __init__(self, images: Images, transforms: tuple[Transform, ...], seed: int) -> None:
        self.images, self.transforms, self.seed = images, transforms, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, ...]:
        epoch, index = key
        image = self.images[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derived_seed("view", self.seed, epoch, index))
            return tuple(transform(image) for transform in self.transforms)


class LabelledViews(Views):
    """Random views of images, and the images' classes behind them."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, ...]:
        return *super().__getitem__(key), self.images.labels[key[1]]


class EpochSampler(Sampler[tuple[int, int]]):
    """Every image once an epoch, in an order drawn from (seed, epoch), as (epoch, index).

    Lightning calls :meth:`set_epoch` before each epoch.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(derived_seed("order", self.seed, self.epoch))
        for index in torch.randperm(self.size, generator=generator).tolist():
            yield self.epoch, index
