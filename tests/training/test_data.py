"""Images come out whole, balanced and reproducible, or with a message that names the culprit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gatedkernels.training.data import load_data
from gatedkernels.training.errors import DataError


def write_folder(root: Path, *, parts: tuple[str, str] = ("train", "test"), images: int = 3) -> Path:
    """A tree of small JPEGs, one grey level a class."""
    for part in parts:
        for label, name in enumerate(("ant", "bee")):
            (root / part / name).mkdir(parents=True)
            for index in range(images):
                pixels = np.full((10, 12, 3), 100 * label + index, np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{index}.jpg")
    return root


def test_digits():
    data = load_data("digits")
    assert (len(data.train), len(data.test), len(data.classes)) == (1437, 360, 10)
    assert data.train[0].shape == (3, 32, 32)
    assert data.train[0].dtype == torch.uint8
    assert data.test.labels.bincount().min() >= 34
    again = load_data("digits")
    assert torch.equal(again.train[5], data.train[5])
    assert not torch.equal(load_data("digits", seed=1).train.labels, data.train.labels)


def test_synthetic_is_reproducible_and_balanced():
    first, second = load_data("synthetic", seed=3), load_data("synthetic", seed=3)
    assert torch.equal(first.train[7], second.train[7])
    assert first.train.labels.bincount().tolist() == [128] * 4


@pytest.mark.parametrize("parts", [("train", "test"), ("train", "val")], ids=["test", "val"])
def test_image_folder(tmp_path: Path, parts: tuple[str, str]):
    data = load_data("imagefolder", write_folder(tmp_path, parts=parts))
    assert data.classes == ["ant", "bee"]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test[4].shape == (3, 10, 12)
    assert abs(int(data.test[4].float().mean()) - 101) <= 1


def test_statistics_of_folders_follow_the_size(tmp_path: Path):
    write_folder(tmp_path)
    assert load_data("imagefolder", tmp_path, image_size=32).std[0] == 0.2470
    assert load_data("imagefolder", tmp_path, image_size=224).std[0] == 0.228


def test_limit_keeps_the_balance():
    data = load_data("digits", limit=100)
    assert data.train.labels.bincount().tolist() == [10] * 10
    assert len(data.test) == 100
    assert len(load_data("digits", limit=5000).train) == 1437


def test_limit_keeps_files_and_labels_together(tmp_path: Path):
    data = load_data("imagefolder", write_folder(tmp_path), limit=4)
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert all(
        (image.float().mean() > 50) == bool(label) for image, label in zip(data.train, [0, 0, 1, 1], strict=False)
    )


def test_corrupt_image_is_named(tmp_path: Path):
    write_folder(tmp_path)
    path = tmp_path / "train" / "bee" / "1.jpg"
    path.write_bytes(path.read_bytes()[:40])
    data = load_data("imagefolder", tmp_path)
    with pytest.raises(DataError, match=r"bee/1\.jpg must be a readable image"):
        data.train[4]


def test_missing_folders(tmp_path: Path):
    with pytest.raises(DataError, match="data_dir must name the folder of the imagefolder images, got None"):
        load_data("imagefolder")
    with pytest.raises(DataError, match="train is missing"):
        load_data("imagefolder", tmp_path / "nowhere")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="val is missing"):
        load_data("imagefolder", tmp_path)
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="train holds no class folder"):
        load_data("imagefolder", tmp_path)


def test_empty_and_strange_classes(tmp_path: Path):
    write_folder(tmp_path, images=0)
    with pytest.raises(DataError, match="must hold images"):
        load_data("imagefolder", tmp_path)
    (tmp_path / "test" / "cat").mkdir()
    with pytest.raises(DataError, match=r"classes that train lacks: \['cat'\]"):
        load_data("imagefolder", tmp_path)


def test_missing_cifar10(tmp_path: Path):
    with pytest.raises(DataError, match="must hold cifar-10-batches-py"):
        load_data("cifar10", tmp_path)


def test_unknown_name():
    with pytest.raises(DataError, match="data must be one of digits, cifar10, imagefolder, synthetic, got 'mnist'"):
        load_data("mnist")


def test_limit_below_the_classes():
    with pytest.raises(DataError, match="at least one image for each of 10 classes, got 9"):
        load_data("digits", limit=9)
