"""The trunk of an optimised network is its modules in one call, and steps aside wherever that would be noticed."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import gatedkernels as gk
from gatedkernels import _extension
from gatedkernels.models import create_model
from gatedkernels.nn.packed_trunk import PackedTrunk

pytestmark = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason="needs the compiled CPU kernels")


@contextmanager
def without_trunk(fast: nn.Module) -> Iterator[None]:
    trunk, fast.trunk = fast.trunk, None
    yield
    fast.trunk = trunk


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What trunks were called with."""
    seen: list[Tensor] = []
    original = PackedTrunk.__call__
    monkeypatch.setattr(PackedTrunk, "__call__", lambda self, x: seen.append(x) or original(self, x))
    return seen


def build(
    name: str = "gated_resnet18",
    branch: str = "gated",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    stem: str = "cifar",
) -> nn.Module:
    torch.manual_seed(seed)
    options = {"channels": 8} if name.startswith("slimmable") else {"width": 0.125, "gate_bias": 0.0}
    model = create_model(name, num_classes=5, stem=stem, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    if name.startswith("slimmable"):
        gk.calibrate_norms(model, [torch.randn(8, 3, 16, 16)], [1.0])
    return gk.optimize(model.to(dtype), torch.randn(1, 3, 16, 16).to(dtype), branch)


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize(
    ("name", "branch", "dtype"),
    [
        ("gated_resnet18", "gated", torch.float32),
        ("gated_resnet18", "gated", torch.bfloat16),
        ("gated_resnet18", "dense", torch.float32),
        ("gated_resnet34", "gated", torch.float32),
        ("slimmable_resnet18", "gated", torch.float32),
    ],
)
def test_it_is_the_modules(name: str, branch: str, dtype: torch.dtype, n: int, calls: list[Tensor]):
    fast = build(name, branch, dtype)
    x = torch.randn(n, 3, 21, 16).to(dtype)
    y = fast(x)
    assert len(calls) == 1
    with without_trunk(fast):
        assert torch.equal(y, fast(x))
    assert len(calls) == 1


def test_fixed_masks_are_the_modules(calls: list[Tensor]):
    fast, x = build(), torch.randn(2, 3, 16, 16)
    with gk.fix_gates(fast, 0.4):
        y = fast(x)
    with without_trunk(fast), gk.fix_gates(fast, 0.4):
        assert torch.equal(y, fast(x))
    assert len(calls) == 1
    assert not torch.equal(y, fast(x))


def test_who_listens_hears(calls: list[Tensor]):
    fast, x = build(), torch.randn(1, 3, 16, 16)
    for name in ("conv1", "layer2.0", "layer2.0.gate", "layer3.0.downsample", "avgpool"):
        heard: list[nn.Module] = []
        module = fast.get_submodule(name)
        with module.register_forward_hook(lambda module, *_, heard=heard: heard.append(module)):
            fast(x)
        assert heard == [module]
    with nn.modules.module.register_module_forward_pre_hook(lambda *_: None):
        fast(x)
    assert not calls
    fast(x)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["conv1", "maxpool", "layer3", "layer3.1", "layer2.0.gate", "layer2.0.downsample"])
def test_a_replaced_module_counts(name: str, calls: list[Tensor]):
    fast, x = build(), torch.randn(1, 3, 16, 16)
    before = fast(x)
    fast.set_submodule(name, nn.Tanh() if name == "maxpool" else build(seed=1).get_submodule(name))
    assert not torch.equal(before, fast(x))
    assert len(calls) == 1


def test_gates_and_masks_are_the_modules_business(calls: list[Tensor]):
    fast, x = build(), torch.randn(2, 3, 16, 16)
    y, gates = fast(x, return_gates=True)
    torch.testing.assert_close(fast(x, masks={key: gate.mask for key, gate in gates.items()}), y)
    assert not calls
    with pytest.raises(ValueError, match="branch must be 'gated'"):
        fast(x, branch="dense")


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(1, 4, 16, 16), ValueError, r"x must have shape \(N, 3, H, W\)"),
        (torch.randn(3, 16, 16), ValueError, r"x must have shape \(N, 3, H, W\)"),
        (torch.randn(1, 3, 16, 16).double(), TypeError, "x must have the dtype"),
        ([1.0], TypeError, "x must be a tensor"),
    ],
)
def test_errors(x: object, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        build()(x)


def test_networks_without_one():
    assert build("gated_resnet50").trunk is None
    grouped = create_model("gated_resnet18", num_classes=None, stem="cifar", width=0.125, group=4).eval()
    assert gk.optimize(grouped, torch.randn(1, 3, 16, 16)).trunk is None


def test_copies_have_their_own(calls: list[Tensor]):
    fast, x = build(), torch.randn(1, 3, 16, 16)
    other = copy.deepcopy(fast)
    with torch.no_grad():
        other.layer1[0].bias1.add_(1)
        other.layer1[0].bias2.add_(1)
    assert not torch.equal(fast(x), other(x))
    assert len(calls) == 2


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 3])
def test_a_large_first_window_is_the_module(n: int, calls: list[Tensor]):
    fast, x = build(stem="imagenet"), torch.randn(n, 3, 45, 38)
    assert fast.conv1.tiles is not None
    with without_trunk(fast):
        expected = fast(x)
    assert torch.equal(fast(x), expected)
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv1.bias", "layer1.0.gate.bias2", "layer1.0.bias2", "layer2.0.downsample.bias"])
def test_a_replaced_tensor_counts(name: str, calls: list[Tensor]):
    fast, x = build(), torch.randn(1, 3, 16, 16)
    before = fast(x)
    module, _, tensor = name.rpartition(".")
    owner = fast.get_submodule(module)
    setattr(owner, tensor, getattr(owner, tensor) - 3)
    with without_trunk(fast):
        expected = fast(x)
    assert torch.equal(fast(x), expected)
    assert not torch.equal(expected, before)
    assert len(calls) == 2
