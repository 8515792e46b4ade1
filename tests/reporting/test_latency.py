"""Latency rows: the fields of the report, whose numbers fit each other."""

import json

import pytest
import torch

from gatedkernels import count_flops, fix_gates
from gatedkernels.reporting import density_for, latency_rows

FIELDS = [
    *("device", "dtype", "batch", "threads", "width", "masks", "kept"),
    *("dense_eager_ms", "dense_best_ms", "masked_ms", "gated_ms", "speedup", "efficiency"),
]
QUICK = {"compiled": False, "seconds": 0.02}


def test_rows_of_trained_masks(build):
    model, x = build("resnet18")
    rows = latency_rows(model, x, width=0.25, batch_sizes=(1, 3), masks="trained", **QUICK)
    assert [list(row) for row in rows] == [FIELDS, FIELDS]
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        assert (row["device"], row["dtype"], row["width"], row["masks"]) == ("cpu", "float32", 0.25, "trained")
        assert row["threads"] == torch.get_num_threads()
        assert row["kept"] == count_flops(model, x[: row["batch"]]).kept
        assert row["dense_best_ms"] <= row["dense_eager_ms"]
        assert row["speedup"] == pytest.approx(row["dense_best_ms"] / row["gated_ms"])
        assert row["efficiency"] == pytest.approx(row["speedup"] * row["kept"])
    json.dumps(rows)


def test_rows_of_set_masks(build):
    model, _ = build("resnet18")
    rows = latency_rows(model, width=0.25, batch_sizes=(2,), image_size=12, masks="set", kept=0.3, threads=1, **QUICK)
    assert rows[0]["kept"] == pytest.approx(0.3, abs=0.03)
    assert (rows[0]["masks"], rows[0]["threads"]) == ("set", 1)
    rows = latency_rows(model, width=0.25, batch_sizes=(1,), image_size=12, masks="set", density=0.0, **QUICK)
    assert rows[0]["kept"] < 0.2


def test_works_on_blocks(build):
    block, x = build("bottleneck")
    (row,) = latency_rows(block, x, batch_sizes=(2,), masks="set", density=0.5, **QUICK)
    assert list(row) == FIELDS


def test_the_model_stays_as_it_is(build):
    model, x = build("resnet18")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    latency_rows(model, x, batch_sizes=(1,), masks="set", kept=0.5, **QUICK)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kept", [0.2, 0.3, 0.7])
def test_density_keeps_what_was_asked(build, kept):
    model, x = build("resnet18")
    with fix_gates(model, density_for(model, x, kept)):
        assert count_flops(model, x).kept == pytest.approx(kept, abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": "drawn"}, "masks must be 'trained' or 'set', got 'drawn'"),
        ({"masks": "set"}, "kept or density, one of them, must be given with masks 'set' alone"),
        ({"masks": "set", "kept": 0.3, "density": 0.3}, "kept or density, one of them"),
        ({"masks": "trained", "kept": 0.3}, "kept or density, one of them"),
        ({"batch_sizes": (1, 4)}, "example must hold at least 4 images, got 3"),
        ({"masks": "set", "kept": 0.001}, r"kept must lie in \[0\.\d+, 1\.\d+\] for this network, got 0.001"),
        ({"threads": 0}, "threads must be positive or None, got 0"),
    ],
)
def test_bad_arguments(build, options, message):
    model, x = build("resnet18")
    with pytest.raises(ValueError, match=message):
        latency_rows(model, x, **{"batch_sizes": (1,), **QUICK, **options})


def test_gates_that_decide_otherwise_are_refused(build, monkeypatch: pytest.MonkeyPatch):
    from gatedkernels.reporting import latency

    def optimize_wrongly(model, example):
        fast = optimize(model, example)
        for block in fast.blocks().values():
            block.gate.bias2 += 100
        return fast

    model, x = build("resnet18")
    optimize = latency.optimize
    monkeypatch.setattr(latency, "optimize", optimize_wrongly)
    with pytest.raises(RuntimeError, match="the optimised gates must decide as the model's do"):
        latency_rows(model, x, batch_sizes=(1,), **QUICK)
