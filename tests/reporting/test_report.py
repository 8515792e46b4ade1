"""The per-layer report, of originals and of what optimize made of them."""

import json

import pytest
import torch
from rich.console import Console
from torch import nn

import gatedkernels as gk
from gatedkernels.reporting.report import LayerReport, Report, _bound, report

QUICK = {"compiled": False, "seconds": 0.02}


@pytest.fixture(params=["original", "optimised"])
def source(request: pytest.FixtureRequest, gated):
    module, x = gated
    return (module, x) if request.param == "original" else (gk.optimize(module, x), x)


def test_every_gated_module_is_reported(source):
    module, x = source
    counts = gk.count_flops(module, x)
    result = report(module, x, **QUICK)
    assert result.total.flops_dense == counts.dense
    assert result.total.flops_executed == pytest.approx(counts.executed, rel=0.02)
    assert sum(layer.flops_dense for layer in result.layers) == counts.dense
    assert sum(layer.flops_executed for layer in result.layers) == pytest.approx(result.total.flops_executed)
    assert all(layer.bound in ("arithmetic", "memory", "overhead") for layer in (*result.layers, result.total))
    assert (result.batch, result.dense_layers) == (len(x), "prepacked")
    json.dumps(result.to_dict())


def test_layers_are_stem_blocks_and_classifier(build):
    model, x = build("resnet18")
    result = gk.report(model, x, threads=1, **QUICK)
    assert [layer.layer for layer in result.layers] == ["conv1", *model.blocks(), "fc"]
    assert result.layers[0].kept == result.layers[-1].kept == 1
    assert result.threads == 1
    assert sum(layer.gated_ms for layer in result.layers) > 0


def test_set_masks_on_the_optimised_model_are_kept(build):
    model, x = build("resnet18")
    fast = gk.optimize(model, x)
    with gk.fix_gates(fast, 0.25):
        want = gk.count_flops(fast, x).kept
        assert report(fast, x, **QUICK).total.kept == pytest.approx(want)
    with (
        gk.fix_gates(model, 0.25),
        pytest.raises(ValueError, match="model must have gates without hooks, got some: optimise it first"),
    ):
        report(model, x, **QUICK)


def test_dense_branch_keeps_everything(build):
    model, x = build("basic")
    assert report(gk.optimize(model, x, branch="dense"), x, **QUICK).total.kept == 1


def test_errors(build):
    model, x = build("resnet18")
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        report(model.train(), x, **QUICK)
    with pytest.raises(ValueError, match="model must hold gated modules, or be a slimmable network, got Conv2d"):
        report(nn.Conv2d(3, 3, 1).eval(), x, **QUICK)
    with pytest.raises(TypeError, match="model must be a GatedResNet, a gated block or a GatedConv2d, got Sequential"):
        report(nn.Sequential(gk.GatedConv2d(3, 4, 3)).eval(), x, **QUICK)
    with pytest.raises(ValueError, match="example must hold at least one sample"):
        report(model.eval(), x[:0], **QUICK)


def _example_report() -> Report:
    layer = LayerReport("layer1.0", 2_000_000, 500_000.0, 3.0, 1.0, "arithmetic")
    total = LayerReport("total", 2_000_000, 500_000.0, 4.0, 1.25, "arithmetic")
    return Report((layer,), total, 16, 2, "cpu", "float32", "prepacked", "compiled", {"compiled": "no compiler"})


def test_numbers_follow():
    layer = _example_report().layers[0]
    assert (layer.kept, layer.speedup, layer.efficiency) == (0.25, 3.0, 0.75)
    assert _example_report().to_dict()["layers"][0]["efficiency"] == 0.75


def test_tables():
    text = str(_example_report())
    assert "Batch 16, float32, cpu, 2 threads" in text
    assert "| layer1.0 | 2.0 M | 0.250 | 3.000 | 1.000 | 3.00× | 0.75 | arithmetic |" in text
    assert "| total | 2.0 M | 0.250 | 4.000 | 1.250 | 3.20× | 0.80 | arithmetic |" in text
    assert "Not tried: compiled (no compiler)." in text
    assert "against those of the dense network, prepacked." in text
    assert "against the fastest dense one found, compiled; layers do not add up to it." in text


def test_table_fits_a_terminal():
    console = Console(width=80)
    with console.capture() as captured:
        console.print(_example_report())
    assert all(word in captured.get() for word in ("layer1.0", "speed-up", "efficiency", "arithmetic"))


@pytest.mark.parametrize(
    ("parts", "bound"),
    [((0.9, 0.2), "arithmetic"), ((0.2, 0.6), "memory"), ((0.4, 0.3), "overhead"), ((1.2, 0.0), "arithmetic")],
)
def test_bound(parts, bound):
    assert _bound(1.0, *parts) == bound


def test_the_model_is_left_alone(build):
    model, x = build("basic")
    fast = gk.optimize(model, x)
    report(fast, x, **QUICK)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in fast.modules())
    assert torch.equal(fast(x), gk.optimize(model, x)(x))
