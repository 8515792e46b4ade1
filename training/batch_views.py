"""Views of a whole batch at once, where the network is: all images in its memory, augmented by kornia."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from gatedkernels.training.augment import EpochSampler, Statistics
from gatedkernels.training.config import AugmentationName
from gatedkernels.training.data import Images
from gatedkernels.training.errors import DataError
from gatedkernels.training.seeds import derived_seed


def photo_views(size: int, mean: Statistics, std: Statistics, *, blur: float = 0.0) -> nn.Module:
    """Augment photographs like `photo_view`, each by itself; colours change in one order for all of a call.

    Crops are resampled from corner to corner without smoothing, which serves images up to some twice the ``size``.
    """
    from kornia import augmentation as kornia

    side = max(3, size // 10 * 2 + 1)
    return nn.Sequential(
        *_cropped(size, (0.2, 1.0), "bicubic"),
        kornia.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        kornia.RandomGrayscale(p=0.2),
        *([kornia.RandomGaussianBlur((side, side), (0.1, 2.0), p=blur)] if blur else []),
        kornia.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=0.1),
        kornia.RandomHorizontalFlip(p=0.5),
        v2.Normalize(mean, std),
    )


def digit_views(size: int, mean: Statistics, std: Statistics) -> nn.Module:
    """Augment handwritten digits like `digit_view`, each by itself."""
    from kornia import augmentation as kornia

    deform = kornia.RandomAffine(12.0, (0.08, 0.08), (0.85, 1.15), (-10.0, 10.0, -10.0, 10.0), p=1.0)
    return nn.Sequential(
        v2.ToDtype(torch.float32, scale=True), v2.Resize((size, size), antialias=True), deform, v2.Normalize(mean, std)
    )


def crop_views(size: int, mean: Statistics, std: Statistics) -> nn.Module:
    """Augment images where labels teach like `crop_view`, each by itself; crops are those of `photo_views`."""
    from kornia import augmentation as kornia

    return nn.Sequential(
        *_cropped(size, (0.08, 1.0), "bilinear"), kornia.RandomHorizontalFlip(p=0.5), v2.Normalize(mean, std)
    )


class _Clamp(nn.Module):
    """Bring what a bicubic filter leaves outside of the range of colours back into it."""

    def forward(self, images: Tensor) -> Tensor:
        return images.clamp(0, 1)


def _cropped(size: int, scale: tuple[float, float], filter: str) -> Sequence[nn.Module]:
    from kornia import augmentation as kornia

    crop = kornia.RandomResizedCrop((size, size), scale=scale, resample=filter, cropping_mode="resample")
    return v2.ToDtype(torch.float32, scale=True), crop, _Clamp()


BATCH_VIEWS: dict[AugmentationName, Callable[..., nn.Module]] = {
    "photos": photo_views,
    "digits": digit_views,
    "crops": crop_views,
}


class BatchViews:
    """Batches of random views, a pure function of (seed, epoch, step), made on a device.

    Iterated once an epoch, each batch is one tensor of shape (N, 3, H, W) for each view, and behind them the images'
    classes if they are asked for; the last, smaller batch is left out. Lightning sets the epoch of the ``sampler``.

    Args:
        images: The images, all of one size; they are kept in the device's memory.
        view: Augments a batch, uint8, shape (N, 3, H, W).
        views: Views of an image.
        batch_size: Images in a batch.
        seed: The run's seed.
        device: Where to work.
        labelled: Whether classes are wanted.

    Raises:
        DataError: If images differ in size.
    """

    def __init__(
        self,
        images: Images,
        view: nn.Module,
        views: int,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        labelled: bool = False,
    ) -> None:
        pixels = [images[index] for index in range(len(images))]
        if len(shapes := {tuple(image.shape[1:]) for image in pixels}) > 1:
            sizes = " and ".join(f"{height} x {width}" for height, width in sorted(shapes)[:2])
            raise DataError(f"augment_on must be workers for images of several sizes, got device for {sizes}")
        self.pixels = torch.stack(pixels).to(device)
        self.labels = images.labels.to(device) if labelled else None
        self.view, self.views, self.batch_size, self.seed = view, views, batch_size, seed
        self.sampler = EpochSampler(len(images), seed)

    def __len__(self) -> int:
        return len(self.pixels) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        epoch = self.sampler.epoch
        order = torch.tensor([index for _, index in self.sampler], device=self.pixels.device)
        for step in range(len(self)):
            yield self._batch(epoch, step, order[step * self.batch_size :][: self.batch_size])

    def _batch(self, epoch: int, step: int, chosen: Tensor) -> tuple[Tensor, ...]:
        device = self.pixels.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(derived_seed("batch", self.seed, epoch, step))
            views = self.view(self.pixels[chosen].repeat(self.views, 1, 1, 1)).chunk(self.views)
        return views if self.labels is None else (*views, self.labels[chosen])
