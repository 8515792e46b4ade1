"""What `optimize` promises: the same results, an ordinary module, and clear refusals."""

import contextlib
import copy
import io

import pytest
import torch
from torch import nn

import gatedkernels as gk
from gatedkernels.models.gated_resnet import GatedResNet
from gatedkernels.nn import GatedBasicBlock, GatedBottleneck
from gatedkernels.nn.packed_blocks import PackedBasicBlock


def lively(model: nn.Module) -> nn.Module:
    """Statistics as after some training, so that folding them matters."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.1, generator=generator)
    return model.eval()


def resnet(**options) -> nn.Module:
    torch.manual_seed(0)
    return lively(gk.models.gated_resnet18(num_classes=5, stem="cifar", width=1 / 8, **options))


MODULES = {
    "basic": (lambda: lively(GatedBasicBlock(20, 36, stride=2)), (3, 20, 9, 7)),
    "basic group": (lambda: lively(GatedBasicBlock(16, 16, group=8)), (3, 16, 6, 6)),
    "basic codebook": (lambda: lively(GatedBasicBlock(16, 24, stride=2, group=4, codebook=3)), (7, 16, 6, 6)),
    "bottleneck codebook": (lambda: lively(GatedBottleneck(24, 12, stride=2, codebook=3)), (5, 24, 7, 5)),
    "basic stride 3": (lambda: lively(GatedBasicBlock(8, 12, stride=3)), (3, 8, 7, 7)),
    "bottleneck": (lambda: lively(GatedBottleneck(24, 12, stride=2)), (3, 24, 7, 5)),
    "convolution": (lambda: lively(gk.GatedConv2d(8, 40, 3, padding=1, activation=nn.ReLU())), (3, 8, 6, 6)),
    "grouped": (lambda: lively(gk.GatedConv2d(8, 40, 3, padding=1, groups=4, norm=nn.BatchNorm2d(40))), (3, 8, 6, 6)),
    "depthwise": (lambda: lively(gk.GatedConv2d(8, 8, 3, stride=2, padding=1, groups=8)), (3, 8, 6, 6)),
    "sigmoid": (
        lambda: lively(gk.GatedConv2d(8, 40, 1, norm=nn.BatchNorm2d(40), activation=nn.Sigmoid())),
        (3, 8, 6, 6),
    ),
    "resnet18": (resnet, (3, 3, 16, 16)),
    "resnet18 codebook": (lambda: resnet(codebook=4), (9, 3, 16, 16)),
    "resnet18 imagenet": (
        lambda: lively(gk.models.gated_resnet18(num_classes=None, width=1 / 8, separate_norm=False)),
        (2, 3, 64, 64),
    ),
    "resnet50": (lambda: lively(gk.models.gated_resnet50(num_classes=5, stem="cifar", width=1 / 8)), (2, 3, 16, 16)),
}


@pytest.fixture(params=MODULES)
def pair(request) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    make, shape = MODULES[request.param]
    model, x = make(), torch.randn(shape)
    return model, gk.optimize(model, x), x


@pytest.mark.parametrize("density", [None, 0.0, 0.3, 1.0])
def test_computes_the_same(pair, density: float | None):
    model, fast, x = pair
    with torch.no_grad():
        if density is None:
            torch.testing.assert_close(fast(x), model(x), atol=2e-5, rtol=2e-4)
            return
        with gk.fix_gates(model, density):
            expected = model(x)
        with gk.fix_gates(fast, density):
            torch.testing.assert_close(fast(x), expected, atol=2e-5, rtol=2e-4)


def test_counts_the_same_flops(pair):
    model, fast, x = pair
    ours, theirs = gk.count_flops(fast, x), gk.count_flops(model, x)
    assert (ours.dense, ours.executed) == (theirs.dense, theirs.executed)


def test_any_batch_and_size():
    model = resnet()
    fast = gk.optimize(model, torch.randn(2, 3, 16, 16))
    with torch.no_grad():
        for shape in [(1, 3, 16, 16), (5, 3, 11, 23), (0, 3, 16, 16)]:
            x = torch.randn(shape)
            torch.testing.assert_close(fast(x), model(x), atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("density", [None, 0.3])
def test_blocks_in_a_row_hand_sums_to_the_next_gate(density: float | None, monkeypatch: pytest.MonkeyPatch):
    """As on a GPU, from the definitions of its operators."""
    fast, x = gk.optimize(resnet(), torch.randn(3, 3, 16, 16)), torch.randn(3, 3, 16, 16)
    fixed = (lambda: gk.fix_gates(fast, density)) if density else contextlib.nullcontext
    fast.trunk = None  # which serves CPUs
    with torch.no_grad(), fixed():
        expected = fast(x)
    monkeypatch.setattr(PackedBasicBlock, "chains", lambda self, x, branch: True)
    monkeypatch.setattr(PackedBasicBlock, "forward", lambda *_: pytest.fail("a block ran by itself"))
    with torch.no_grad(), fixed():
        torch.testing.assert_close(fast(x), expected, atol=2e-5, rtol=2e-4)


def test_dense_branch():
    model, x = resnet(), torch.randn(2, 3, 16, 16)
    dense = gk.optimize(model, x, branch="dense")
    with torch.no_grad():
        torch.testing.assert_close(dense(x), model(x, branch="dense"), atol=2e-5, rtol=2e-4)
    with pytest.raises(ValueError, match="branch must be 'dense'"):
        dense(x, branch="gated")
    with pytest.raises(ValueError, match="branch must be 'gated'"):
        gk.optimize(model, x)(x, branch="dense")


def test_brought_masks_and_returned_gates():
    model, x = resnet(), torch.randn(2, 3, 16, 16)
    fast = gk.optimize(model, x)
    mask = torch.rand(2, 8) < 0.5
    with torch.no_grad():
        expected, _ = model(x, masks={"layer1.0": mask}, return_gates=True)
        y, gates = fast(x, masks={"layer1.0": mask}, return_gates=True)
    torch.testing.assert_close(y, expected, atol=2e-5, rtol=2e-4)
    assert torch.equal(gates["layer1.0"].mask, mask)
    assert list(gates) == model.gate_keys()


def test_leaves_the_original_alone():
    model, x = resnet(), torch.randn(2, 3, 16, 16)
    before = copy.deepcopy(model.state_dict())
    fast = gk.optimize(model, x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        y = fast(x)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(fast(x), y)


def test_is_an_ordinary_module():
    fast, x = gk.optimize(resnet(), torch.randn(2, 3, 16, 16)), torch.randn(2, 3, 16, 16)
    other = gk.optimize(lively(gk.models.gated_resnet18(num_classes=5, stem="cifar", width=1 / 8)), x)
    with torch.no_grad():
        y = fast(x)
        assert torch.equal(copy.deepcopy(fast)(x), y)
        buffer = io.BytesIO()
        torch.save(fast.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(other(x), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype):
    model, x = resnet(), torch.randn(2, 3, 16, 16)
    with torch.no_grad(), gk.fix_gates(model, 0.5):
        expected = model(x)
    fast = gk.optimize(model, x).to(dtype)
    with torch.no_grad(), gk.fix_gates(fast, 0.5):
        y = fast(x.to(dtype))
    assert y.dtype == dtype
    error = ((y.float() - expected).norm() / expected.norm()).item()
    assert error < (0.03 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODULES)
def test_narrow_dtypes(name: str, dtype: torch.dtype, density: float):
    """A model of bfloat16 or float16 keeps its own error: the packed one's is at most twice as large, and one eps."""
    make, shape = MODULES[name]
    model, x = make().to(dtype), torch.randn(shape).to(dtype)
    fast, exact = gk.optimize(model, x), copy.deepcopy(model).double()
    with torch.no_grad(), gk.fix_gates(model, density), gk.fix_gates(fast, density), gk.fix_gates(exact, density):
        own, y, expected = model(x), fast(x), exact(x.double())
    assert y.dtype == dtype
    own, y = (error.double() - expected for error in (own, y))
    eps = torch.finfo(dtype).eps
    assert y.norm() <= 2 * own.norm() + eps * expected.norm()


def test_float16_is_stored_and_computed_in_float32():
    block, x = lively(GatedBasicBlock(8, 16, stride=2)).half(), torch.randn(2, 8, 9, 9).half()
    fast = gk.optimize(block, x)
    assert all(buffer.dtype == torch.float32 for buffer in fast.buffers())
    with torch.no_grad():
        y, gate = fast(x, return_gate=True)
        assert y.dtype == torch.float16
        torch.testing.assert_close(gate.mask, block(x, return_gate=True)[1].mask)
        with pytest.raises(TypeError, match=r"dtype of the optimised module, torch\.float16, got torch\.float32"):
            fast(x.float())
        wide = copy.deepcopy(fast).double()
        assert wide(x.double()).dtype == torch.float64


def test_bfloat16_gates_decide_in_float32():
    block, x = lively(GatedBasicBlock(32, 32)).bfloat16(), torch.randn(4, 32, 9, 9).bfloat16()
    fast = gk.optimize(block, x)
    with torch.no_grad():
        mask = fast.gate(x)
        expected = copy.deepcopy(fast.gate).float()(x.float())
    assert torch.equal(mask, expected)


def test_compiles_and_exports():
    fast, x = gk.optimize(resnet(), torch.randn(2, 3, 16, 16)), torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = fast(x)
        torch.testing.assert_close(torch.compile(fast, fullgraph=True, backend="aot_eager")(x), expected)
        batch = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
        exported = torch.export.export(fast, (x,), dynamic_shapes=batch).module()
        torch.testing.assert_close(exported(x), expected)
        torch.testing.assert_close(exported(x[:3]), expected[:3])


def test_refuses_to_train():
    fast = gk.optimize(resnet(), torch.randn(1, 3, 16, 16))
    with pytest.raises(RuntimeError, match="evaluation only"):
        fast.train()
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradients"):
        fast(x)
    with torch.no_grad():
        assert not fast(x).requires_grad


def test_bad_models():
    x = torch.randn(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        gk.optimize(resnet().train(), x)
    with pytest.raises(ValueError, match="must hold gated modules"):
        gk.optimize(nn.Conv2d(3, 3, 1).eval(), x)
    with pytest.raises(ValueError, match="optimised already"):
        gk.optimize(gk.optimize(resnet(), x), x)
    with pytest.raises(ValueError, match="branch must be one of"):
        gk.optimize(resnet(), x, branch="sparse")


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (torch.randn(3, 16, 16), ValueError),
        (torch.randn(2, 4, 16, 16), ValueError),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int32), TypeError),
        (torch.zeros(2, 3, 16, 16, dtype=torch.float64), TypeError),
        (torch.zeros(2, 3, 16, 16, device="meta"), ValueError),
    ],
)
def test_bad_images(bad: torch.Tensor, error: type[Exception]):
    fast = gk.optimize(resnet(), torch.randn(2, 3, 16, 16))
    with torch.no_grad(), pytest.raises(error, match="x must"):
        fast(bad)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(2, 8), TypeError),
        (torch.ones(2, 9, dtype=torch.bool), ValueError),
        (torch.ones(2, 8, dtype=torch.bool, device="meta"), ValueError),
    ],
)
def test_bad_masks(mask: torch.Tensor, error: type[Exception]):
    x = torch.randn(2, 3, 16, 16)
    fast = gk.optimize(resnet(), x)
    with torch.no_grad(), pytest.raises(error, match="mask"):
        fast(x, masks={"layer1.0": mask})


def test_other_poolings_stay():
    model = gk.models.gated_resnet18(width=0.125, num_classes=4).eval()
    model.avgpool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(1)).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(gk.optimize(model, x)(x), model(x), rtol=1e-4, atol=1e-4)


def test_gates_and_shortcuts_can_be_listened_to():
    fast = gk.optimize(gk.models.gated_resnet18(width=0.125, num_classes=4).eval(), X := torch.randn(2, 3, 32, 32))
    expected, calls = fast(X), []
    for module in (fast.layer2[0].gate, fast.layer3[0].downsample):
        module.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(fast(X), expected)
    assert len(calls) == 2


@torch.no_grad()
def test_bottlenecks_write_over_each_others_results_only():
    model = lively(GatedResNet(GatedBottleneck, (3, 2, 1, 2), stem="cifar", width=0.125, num_classes=None))
    x = torch.randn(3, 3, 20, 20)
    fast, before = gk.optimize(model, x), x.clone()
    y = fast(x)
    seen = []
    for block in fast.blocks().values():  # modules that somebody listens to keep what they return
        block.register_forward_hook(lambda module, args, result: seen.append((result, result.clone())))
    torch.testing.assert_close(fast(x), y)
    assert len(seen) == 8
    assert all(torch.equal(result, then) for result, then in seen)
    assert torch.equal(x, before)
    torch.testing.assert_close(y, model(x), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_bottlenecks_leave_what_a_hook_on_a_convolution_has_seen():
    model = lively(GatedResNet(GatedBottleneck, (3, 2, 1, 2), stem="cifar", width=0.125, num_classes=None))
    x = torch.randn(3, 3, 20, 20)
    fast = gk.optimize(model, x)
    y, seen = fast(x), []
    for block in list(fast.blocks().values())[::2]:
        block.conv3.register_forward_hook(lambda module, args, result: seen.append((result, result.clone())))
    torch.testing.assert_close(fast(x), y)
    assert len(seen) == 4
    assert all(torch.equal(result, then) for result, then in seen)


@torch.no_grad()
def test_a_replaced_part_of_a_bottleneck_is_called():
    class Doubled(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, *args, **kwargs):
            return 2 * self.conv(*args, **kwargs)

    model = lively(GatedResNet(GatedBottleneck, (2, 1, 1, 1), stem="cifar", width=0.125, num_classes=None))
    x = torch.randn(2, 3, 12, 12)
    for name in ("conv2", "conv3", "downsample"):
        fast = gk.optimize(model, x)
        before, block = fast(x), fast.layer1[0]
        setattr(block, name, Doubled(getattr(block, name)).eval())
        assert not torch.allclose(fast(x), before)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Tensor"):
        gk.optimize(torch.randn(1, 3, 8, 8), nn.Identity())
    with pytest.raises(TypeError, match="example must be a tensor of images, got tuple"):
        gk.count_flops(gk.GatedConv2d(3, 4, 3).eval(), (1, 3, 8, 8))
