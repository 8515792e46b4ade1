"""Images and labels: digits, CIFAR-10, folders of images, and synthetic patterns."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, get_args

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from gatedkernels.training.config import DataName
from gatedkernels.training.errors import DataError

_IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp"}
_CIFAR10_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.228, 0.224, 0.225))
_LARGEST_SMALL_IMAGE = 64  # up to here a folder's images are normalised as CIFAR-10's are, beyond as ImageNet's


class Images(Protocol):
    """A labelled set of images."""

    @property
    def labels(self) -> Tensor:
        """Classes, int64, shape (N,)."""
        ...

    def __len__(self) -> int:
        """Count the images."""
        ...

    def __getitem__(self, index: int) -> Tensor:
        """Return one image, uint8, shape (3, H, W)."""
        ...


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory: uint8 pixels of shape (N, 3, H, W) and int64 labels of shape (N,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]


@dataclass(frozen=True)
class FolderImages:
    """Images in files, decoded when asked for, and int64 labels of shape (N,)."""

    paths: Sequence[Path]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                pixels = np.array(image.convert("RGB"))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise DataError(f"{path} must be a readable image: {error}") from error
        return torch.from_numpy(pixels).permute(2, 0, 1)


@dataclass(frozen=True)
class Data:
    """Training and test images, and the statistics that normalise both."""

    name: DataName
    classes: Sequence[str]
    train: Images
    test: Images
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def load_data(
    name: DataName, data_dir: Path | None = None, *, image_size: int = 32, limit: int | None = None, seed: int = 0
) -> Data:
    """Load a data set.

    Args:
        name: "digits" (scikit-learn's, shipped with it), "cifar10" (torchvision's files in ``data_dir``), "imagefolder"
            (``data_dir/train/<class>/*`` and ``data_dir/test`` or ``data_dir/val`` likewise) or "synthetic".
        data_dir: Folder of the files, for the sets that have any. Nothing is ever downloaded.
        image_size: Side of the digits and of the synthetic images; other images keep theirs until they are augmented.
        limit: Keep so many training and so many test images, balanced over the classes; None keeps all.
        seed: Decides the split of the digits, the synthetic images, and which images ``limit`` keeps.

    Returns:
        The two sets with their statistics.

    Raises:
        DataError: If files are missing or unreadable; the message names them.
    """
    if name in ("cifar10", "imagefolder") and data_dir is None:
        raise DataError(f"data_dir must name the folder of the {name} images, got None")
    if name == "digits":
        data = _digits(image_size, seed)
    elif name == "synthetic":
        data = _synthetic(image_size, seed)
    elif name == "cifar10":
        assert data_dir is not None
        data = _cifar10(Path(data_dir))
    elif name == "imagefolder":
        assert data_dir is not None
        data = _image_folder(Path(data_dir), image_size)
    else:
        raise DataError(f"data must be one of {', '.join(get_args(DataName))}, got {name!r}")
    if limit is None:
        return data
    if limit < len(data.classes):
        raise DataError(f"limit must be at least one image for each of {len(data.classes)} classes, got {limit}")
    train, test = _subset(data.train, limit, seed), _subset(data.test, limit, seed)
    return Data(data.name, data.classes, train, test, data.mean, data.std)


def _digits(size: int, seed: int) -> Data:
    """1,797 handwritten digits of 8 x 8 pixels, enlarged; four fifths of each class train."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    small = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    large = F.interpolate(small, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)
    pixels = (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=digits.target, random_state=seed)
    mean, std = float(large.mean()), float(large.std())
    return Data(
        name="digits",
        classes=[str(digit) for digit in range(10)],
        train=ArrayImages(pixels[train], labels[train]),
        test=ArrayImages(pixels[test], labels[test]),
        mean=(mean, mean, mean),
        std=(std, std, std),
    )


def _synthetic(size: int, seed: int, num_train: int = 512, num_test: int = 128, num_classes: int = 4) -> Data:
    """Noisy coloured waves, one direction and frequency a class: learnable, and free of files."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.linspace(0, 1, size)
    y, x = torch.meshgrid(rows, rows, indexing="ij")

    def draw(count: int) -> ArrayImages:
        labels = torch.arange(count) % num_classes
        angle = labels * torch.pi / num_classes
        phase = torch.rand(count, 1, 1, generator=generator) * 2 * torch.pi
        along = angle.cos().view(-1, 1, 1) * x + angle.sin().view(-1, 1, 1) * y
        wave = torch.sin(2 * torch.pi * (2 + labels.view(-1, 1, 1)) * along + phase)
        tint = torch.rand(count, 3, 1, 1, generator=generator)
        noise = 0.1 * torch.randn(count, 3, size, size, generator=generator)
        pixels = (0.5 + 0.4 * wave.unsqueeze(1) * tint + noise).clamp(0, 1)
        return ArrayImages((pixels * 255).round().to(torch.uint8), labels)

    train, test = draw(num_train), draw(num_test)
    classes = [f"wave {index}" for index in range(num_classes)]
    return Data("synthetic", classes, train, test, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def _cifar10(folder: Path) -> Data:
    """Torchvision's CIFAR-10, already on this machine."""
    from torchvision.datasets import CIFAR10

    def split(train: bool) -> tuple[ArrayImages, list[str]]:
        try:
            images = CIFAR10(str(folder), train=train, download=False)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"data_dir must hold cifar-10-batches-py as torchvision stores it, got {folder} ({error}). "
                "Images in class folders are read with --data imagefolder."
            ) from error
        pixels = torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()
        return ArrayImages(pixels, torch.tensor(images.targets)), images.classes

    (train, classes), (test, _) = split(True), split(False)
    return Data("cifar10", classes, train, test, *_CIFAR10_STATISTICS)


def _image_folder(folder: Path, image_size: int) -> Data:
    """Images in ``train/<class>`` and in ``test/<class>`` or ``val/<class>``."""
    test_folder = folder / "test" if (folder / "test").is_dir() else folder / "val"
    for needed in (folder / "train", test_folder):
        if not needed.is_dir():
            raise DataError(
                f"data_dir must hold train/<class>/ and test/<class>/ (or val/<class>/), {needed} is missing"
            )
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    strangers = sorted({path.name for path in test_folder.iterdir() if path.is_dir()} - set(classes))
    if not classes or strangers:
        what = (
            f"{test_folder} has classes that train lacks: {strangers}" if strangers else "train holds no class folder"
        )
        raise DataError(f"data_dir must hold the same classes in both parts, {what}")
    statistics = _CIFAR10_STATISTICS if image_size <= _LARGEST_SMALL_IMAGE else _IMAGENET_STATISTICS
    train, test = (_files_by_class(part, classes) for part in (folder / "train", test_folder))
    return Data("imagefolder", classes, train, test, *statistics)


def _files_by_class(folder: Path, classes: Sequence[str]) -> FolderImages:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).glob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise DataError(f"{folder} must hold images ({', '.join(sorted(_IMAGE_SUFFIXES))}), got none")
    return FolderImages(paths, torch.tensor(labels))


def _subset(images: Images, limit: int, seed: int) -> Images:
    """Keep ``limit`` images, as equally many of each class as there are, chosen by ``seed``."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty(len(images), dtype=torch.long)
    for label in images.labels.unique():
        members = order[images.labels[order] == label]
        rank[members] = torch.arange(len(members))
    chosen = order[torch.argsort(rank[order], stable=True)][:limit].sort().values
    if isinstance(images, FolderImages):
        return FolderImages([images.paths[index] for index in chosen.tolist()], images.labels[chosen])
    assert isinstance(images, ArrayImages)
    return ArrayImages(images.pixels[chosen], images.labels[chosen])
