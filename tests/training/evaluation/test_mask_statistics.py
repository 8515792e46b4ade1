"""Statistics of masks whose unions are known, and masks that survive being stored."""

import json

import pytest
import torch

from gatedkernels.training.evaluation import mask_report, stored_masks
from gatedkernels.training.evaluation.mask_statistics import gate_statistics, similarity_order, union_density


def random_masks(samples: int, channels: int, density: float) -> torch.Tensor:
    return torch.rand(samples, channels, generator=torch.Generator().manual_seed(samples)) < density


def test_union_of_known_masks():
    mask = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]).bool()
    assert union_density(mask, 1) == 0.25
    assert union_density(mask, 2) == (0.5 + 0.25) / 2
    assert union_density(mask, 4) == 0.5


def test_similar_samples_are_sorted_together():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    assert similarity_order(mask).tolist() in ([0, 2, 1, 3], [0, 2, 3, 1])
    mixed = mask.repeat(4, 1)
    union = gate_statistics(mixed)["union"]
    assert union["in_order"]["2"] == 1
    assert union["sorted"]["8"] == 0.5


def test_order_is_a_permutation():
    assert sorted(similarity_order(random_masks(33, 16, 0.5)).tolist()) == list(range(33))


def test_always_on_and_off():
    mask = random_masks(64, 8, 0.5)
    mask[:, 0], mask[:, 1] = True, False
    statistics = gate_statistics(mask)
    assert statistics["always_on"] == statistics["always_off"] == 0.125
    assert statistics["rates"][:2] == [1.0, 0.0]
    assert statistics["density"] == pytest.approx(float(mask.double().mean()), abs=1e-4)


def test_independent_channels_have_the_union_of_independent_channels():
    union = gate_statistics(random_masks(4096, 32, 0.3))["union"]
    for size in ("2", "4", "8"):
        assert union["in_order"][size] == pytest.approx(union["independent"][size], abs=0.01)
        assert union["independent"][size] == pytest.approx(1 - 0.7 ** int(size), abs=0.01)


def test_report_survives_json_and_gives_masks_back():
    masks = {"a": random_masks(100, 13, 0.3), "b": random_masks(100, 64, 0.6)}
    report = json.loads(json.dumps(mask_report(masks, {"steps": 7})))
    assert report["run"] == {"steps": 7}
    unpacked = stored_masks(report)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:64]
    for name, mask in masks.items():
        assert torch.equal(unpacked[name], mask[order])


def test_report_of_a_full_resnet18_is_small():
    widths = [64, 64, 128, 128, 256, 256, 512, 512]
    masks = {f"gate{index}": random_masks(64, width, 0.3) for index, width in enumerate(widths)}
    assert len(json.dumps(mask_report(masks, {}))) < 100_000


def test_too_few_samples():
    with pytest.raises(ValueError, match="at least 8 samples, got 7"):
        mask_report({"a": random_masks(7, 4, 0.5)}, {})
