"""Mask models: how dense, how alike, and the recorded ones bit by bit."""

import json
from pathlib import Path

import pytest
import torch

from bench import replay
from gatedkernels import optimize
from gatedkernels.nn import GatedBasicBlock
from gatedkernels.training.evaluation import mask_report


def _agreement(masks: torch.Tensor) -> float:
    """How often two samples of a batch decide alike."""
    return (masks[:, 0] == masks[:, 1]).double().mean().item()


@pytest.mark.parametrize("kind", ["independent", "correlated"])
def test_density(kind: str):
    masks = replay.draw(kind, 0.3, 8, 256)
    assert masks.shape == (replay.DRAWS, 8, 256) and masks.dtype == torch.bool
    assert masks.double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(masks, replay.draw(kind, 0.3, 8, 256))
    assert not torch.equal(masks, replay.draw(kind, 0.3, 8, 256, seed=1))


def test_correlated_samples_agree_more():
    independent, correlated = (_agreement(replay.draw(kind, 0.3, 8, 256)) for kind in ("independent", "correlated"))
    assert independent == pytest.approx(0.3**2 + 0.7**2, abs=0.05)
    assert correlated > independent + 0.1


@pytest.fixture
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A recording of two gates for 64 samples, in a folder that the benchmarks look into."""
    masks = {"layer1.0": torch.rand(64, 13) < 0.5, "layer2.1": torch.rand(64, 20) < 0.3}
    (tmp_path / "run.json").write_text(json.dumps(mask_report(masks, {"steps": 3})))
    monkeypatch.setattr(replay, "RECORDINGS", tmp_path)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    return {name: mask[order] for name, mask in masks.items()}


def test_recorded_masks_come_back(recording):
    masks = replay.draw("run:layer2.1", 0.0, 16, 20)
    assert masks.shape == (3, 16, 20)
    assert torch.equal(masks.flatten(0, 1), recording["layer2.1"][:48])
    assert replay.draw("run:layer1.0", 0.0, 64, 5).shape == (1, 64, 5)


def test_recorded_blocks(recording):
    (path,) = replay.recordings()
    (block,) = replay.recorded_blocks(path)
    assert block[:3] == ("layer2.1", 20, 16)
    assert block.density == pytest.approx(recording["layer2.1"].double().mean().item(), abs=1e-3)


@pytest.mark.usefixtures("recording")
def test_errors():
    with pytest.raises(ValueError, match=r"kind must be 'independent', .* or a recording in .*, got 'none:x'"):
        replay.draw("none:x", 0.3, 1, 8)
    with pytest.raises(ValueError, match="batch must not exceed the 64 recorded samples, got 65"):
        replay.draw("run:layer1.0", 0.3, 65, 8)


@torch.no_grad()
@pytest.mark.parametrize("optimised", [False, True])
def test_gates_answer_in_turn(optimised: bool):
    block, x = GatedBasicBlock(8, 8).eval(), torch.randn(2, 8, 5, 5)
    network = optimize(block, x) if optimised else block
    masks = replay.draw("independent", 0.5, 2, 8)
    with replay.open_as(network.get_submodule("gate"), masks):
        for mask in (*masks, masks[0]):
            torch.testing.assert_close(network(x), block(x, mask=mask), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network(x), block(x), rtol=1e-4, atol=1e-4)
