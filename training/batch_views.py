"""Views of a whole batch at once, where the network is: all images in its memory, augmented with kornia."""

from collections.abc import Callable, Iterator

import torch
from kornia import augmentation
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from gatedkernels.training.augment import EpochSampler, Statistics
from gatedkernels.training.config import AugmentationName
from gatedkernels.training.data import Images
from gatedkernels.training.errors import DataError
from gatedkernels.training.seeds import derived_seed

# Crops are resampled without smoothing, which skips pixels of larger images: how many times a view's side.
LARGEST_IMAGE = 2


class _ResizedCrop(nn.Module):
    """Crops as kornia draws them. Beyond an image's edge lie its own colours, where kornia's filter has zeros."""

    def __init__(self, size: int, scale: tuple[float, float], mode: str) -> None:
        super().__init__()
        self.draw = augmentation.RandomResizedCrop((size, size), scale=scale, cropping_mode="resample")
        self.size, self.mode = size, mode

    def forward(self, images: Tensor) -> Tensor:
        corners = self.draw.forward_parameters(images.shape)["src"].to(images)  # first and last pixels, (x, y)
        low, extent = corners[:, 0], torch.tensor(images.shape[:1:-1]).to(images)
        share = (corners[:, 2] - low + 1) / extent
        theta = torch.cat([torch.diag_embed(share), (2 * low / extent + share - 1)[:, :, None]], dim=2)
        grid = F.affine_grid(theta, [*images.shape[:2], self.size, self.size], align_corners=False)
        return F.grid_sample(images, grid, self.mode, "border", align_corners=False).clamp(0, 1)


def batch_photo_view(size: int, mean: Statistics, std: Statistics, *, blur: float = 0.0) -> nn.Module:
    """Augment photographs as `photo_view` does, each by itself; colours change in an order drawn once a batch."""
    side = max(3, size // 10 * 2 + 1)
    return nn.Sequential(
        v2.ToDtype(torch.float32, scale=True),
        _ResizedCrop(size, (0.2, 1.0), "bicubic"),
        augmentation.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        augmentation.RandomGrayscale(p=0.2),
        *([augmentation.RandomGaussianBlur((side, side), (0.1, 2.0), p=blur)] if blur else []),
        augmentation.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=0.1),
        augmentation.RandomHorizontalFlip(p=0.5),
        v2.Normalize(mean, std),
    )


def batch_digit_view(size: int, mean: Statistics, std: Statistics) -> nn.Module:
    """Augment handwritten digits as `digit_view` does, each by itself."""
    deform = augmentation.RandomAffine(12.0, (0.08, 0.08), (0.85, 1.15), (-10.0, 10.0, -10.0, 10.0), p=1.0)
    return nn.Sequential(
        v2.ToDtype(torch.float32, scale=True), v2.Resize((size, size), antialias=True), deform, v2.Normalize(mean, std)
    )


def batch_crop_view(size: int, mean: Statistics, std: Statistics) -> nn.Module:
    """Augment images where labels teach as `crop_view` does, each by itself."""
    return nn.Sequential(
        v2.ToDtype(torch.float32, scale=True),
        _ResizedCrop(size, (0.08, 1.0), "bilinear"),
        augmentation.RandomHorizontalFlip(p=0.5),
        v2.Normalize(mean, std),
    )


BATCH_VIEWS: dict[AugmentationName, Callable[..., nn.Module]] = {
    "photos": batch_photo_view,
    "digits": batch_digit_view,
    "crops": batch_crop_view,
}


class BatchViews:
    """Batches of random views, a pure function of (seed, epoch, step), made on a device.

    Iterated once an epoch, each batch is one tensor of shape (N, 3, H, W) for each view, and behind them the images'
    classes if they are asked for; the last, smaller batch is left out. Lightning sets the epoch of the ``sampler``.
    What is random is drawn on the CPU, so that the device does not change it.

    Args:
        images: The images, all of one size; they are kept in the device's memory.
        view: Augments a batch, uint8, shape (N, 3, H, W).
        num_views: Views of an image.
        batch_size: Images in a batch.
        seed: The run's seed.
        device: Where to work.
        labelled: Whether classes are wanted.

    Raises:
        DataError: If images differ in size, or are more than a GPU has memory for.
    """

    def __init__(
        self,
        images: Images,
        view: nn.Module,
        num_views: int,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        labelled: bool = False,
    ) -> None:
        self.pixels = _in_memory(images, device)
        self.labels = images.labels.to(device) if labelled else None
        self.view, self.num_views, self.batch_size, self.seed = view, num_views, batch_size, seed
        self.sampler = EpochSampler(len(images), seed)

    def __len__(self) -> int:
        return len(self.pixels) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        epoch = self.sampler.epoch
        order = torch.tensor([index for _, index in self.sampler], device=self.pixels.device)
        for step in range(len(self)):
            yield self._batch(epoch, step, order[step * self.batch_size :][: self.batch_size])

    def _batch(self, epoch: int, step: int, chosen: Tensor) -> tuple[Tensor, ...]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derived_seed("batch", self.seed, epoch, step))
            views = self.view(self.pixels[chosen].repeat(self.num_views, 1, 1, 1)).chunk(self.num_views)
        return views if self.labels is None else (*views, self.labels[chosen])


def _in_memory(images: Images, device: torch.device) -> Tensor:
    first = images[0]
    needed = len(images) * first.numel()
    if device.type == "cuda" and needed > (free := torch.cuda.mem_get_info(device)[0]):
        raise DataError(
            f"augment_on must be workers for more images than the device has memory for, got device for "
            f"{needed / 1e9:.1f} GB where {free / 1e9:.1f} GB are free"
        )
    pixels = torch.empty((len(images), *first.shape), dtype=torch.uint8)
    for index in range(len(images)):
        image = images[index]
        if image.shape != first.shape:
            sizes = " and ".join(f"{each.shape[1]} x {each.shape[2]}" for each in (first, image))
            raise DataError(f"augment_on must be workers for images of several sizes, got device for {sizes}")
        pixels[index] = image
    return pixels.to(device)
