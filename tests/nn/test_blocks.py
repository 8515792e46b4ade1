"""Gated blocks against masked dense ones, in both branches."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from gatedkernels.nn import Gate, GatedBasicBlock, GatedBottleneck

Block = GatedBasicBlock | GatedBottleneck
Decide = Callable[[str, Tensor], Tensor]

KINDS = pytest.mark.parametrize("kind", [GatedBasicBlock, GatedBottleneck])
GATES = pytest.mark.parametrize("codebook", [None, 3], ids=["channels", "codebook"])
SHAPES = pytest.mark.parametrize(("in_channels", "stride", "group"), [(16, 1, 1), (16, 2, 1), (8, 1, 4), (64, 1, 16)])


def randomise(module: nn.Module) -> nn.Module:
    """Give normalisations statistics and parameters that matter."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.3)
    return module.double()


def masked_dense(block: Block, x: Tensor, decide: Decide) -> Tensor:
    """The gated branch, every channel computed, masks multiplied in; what the block must equal."""
    basic = isinstance(block, GatedBasicBlock)
    norms = block.norms("gated")
    shortcut = x if block.downsample is None else block.downsample(x)
    h = conv2d(x, block.conv1.weight, stride=block.conv1.stride, padding=block.conv1.padding)
    h = norms[0](h).relu() * decide("gate" if basic else "gate1", x)
    h = norms[1](conv2d(h, block.conv2.weight, stride=block.conv2.stride, padding=1))
    if not basic:
        first = h.relu()
        h = first * decide("gate2", masked_dense_first(block, x, decide))
        h = norms[2](conv2d(h, block.conv3.weight))
    return (h + shortcut).relu()


def masked_dense_first(block: GatedBottleneck, x: Tensor, decide: Decide) -> Tensor:
    h = conv2d(x, block.conv1.weight)
    return block.norms("gated")[0](h).relu() * decide("gate1", x)


def weights(block: Block, gates: Gate | tuple[Gate, Gate]) -> Decide:
    """Decide as these gates did."""
    pair = gates if isinstance(block, GatedBottleneck) else (gates,)
    by_name = dict(zip(block.gate_names, pair, strict=True))
    return lambda name, x: by_name[name].weight.repeat_interleave(block.group, 1)[..., None, None]


def expected_shape(block: Block, x: Tensor) -> tuple[int, ...]:
    stride = (block.conv1.stride[0]) * (block.conv2.stride[0])
    return (x.shape[0], 16 * block.expansion, -(-x.shape[2] // stride), -(-x.shape[3] // stride))


@KINDS
@GATES
@SHAPES
@pytest.mark.parametrize("training", [True, False])
def test_gated_branch_equals_masked_dense(
    kind: type, codebook: int | None, in_channels: int, stride: int, group: int, training: bool
):
    block = randomise(kind(in_channels, 16, stride, group=group, codebook=codebook)).train(training)
    x = torch.randn(4, in_channels, 7, 9, dtype=torch.float64)
    y, gates = block(x, return_gate=True)
    assert y.shape == expected_shape(block, x)
    torch.testing.assert_close(y, masked_dense(block, x, weights(block, gates)))


@KINDS
@GATES
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("frozen", [False, True], ids=["batch statistics", "frozen statistics"])
def test_gradients_equal_the_masked_dense_ones(kind: type, codebook: int | None, stride: int, frozen: bool):
    block = randomise(kind(16, 16, stride, group=2, codebook=codebook)).train()
    if frozen:
        for norm in block.norms("gated"):
            norm.eval()
    dense = copy.deepcopy(block)
    x = torch.randn(4, 16, 6, 6, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    torch.manual_seed(5)
    y = block(x)
    upstream = torch.randn_like(y)
    (y * upstream).sum().backward()

    torch.manual_seed(5)
    decided: dict[str, Tensor] = {}

    def decide(name: str, features: Tensor) -> Tensor:
        if name not in decided:
            decided[name] = getattr(dense, name)(features).weight.repeat_interleave(2, 1)[..., None, None]
        return decided[name]

    (masked_dense(dense, z, decide) * upstream).sum().backward()
    torch.testing.assert_close(x.grad, z.grad)
    for (name, ours), theirs in zip(block.named_parameters(), dense.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
    for name in block.gate_names:
        assert getattr(block, name).conv2.weight.grad.any()


@KINDS
@pytest.mark.parametrize("training", [True, False])
def test_brought_masks(kind: type, training: bool):
    block = randomise(kind(16, 16)).train(training)
    x = torch.randn(3, 16, 5, 5, dtype=torch.float64)
    for density in (0.0, 0.4, 1.0):
        masks = tuple(torch.rand(3, 16) < density for _ in block.gate_names)
        y, gates = block(x, mask=masks if len(masks) == 2 else masks[0], return_gate=True)
        torch.testing.assert_close(y, masked_dense(block, x, weights(block, gates)))
        brought = gates if len(masks) == 2 else (gates,)
        assert all(torch.equal(gate.mask, mask) for gate, mask in zip(brought, masks, strict=True))


def test_bottleneck_takes_one_mask_and_decides_the_other():
    block = randomise(GatedBottleneck(16, 16)).eval()
    x = torch.randn(3, 16, 5, 5, dtype=torch.float64)
    mask = torch.rand(3, 16) < 0.5
    y, (first, second) = block(x, mask=(mask, None), return_gate=True)
    assert torch.equal(first.mask, mask)
    torch.testing.assert_close(y, block(x, mask=(mask, second.mask)))


@KINDS
def test_open_gates_with_copied_norms_equal_the_dense_branch(kind: type):
    block = randomise(kind(8, 16, 2)).eval()
    for name in ("bn1", "bn2", "bn3")[: len(block.convs())]:
        getattr(block, f"{name}_gated").load_state_dict(getattr(block, name).state_dict())
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    opened = torch.ones(3, 16, dtype=torch.bool)
    y = block(x, mask=opened if kind is GatedBasicBlock else (opened, opened))
    torch.testing.assert_close(y, block(x, branch="dense"))


def buffers(block: Block) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in block.named_buffers()}


def changed(block: Block, before: dict[str, Tensor]) -> set[str]:
    """Names of the normalisations whose running statistics moved."""
    return {name.rpartition(".")[0] for name, value in block.named_buffers() if not torch.equal(value, before[name])}


@KINDS
def test_branches_keep_their_own_statistics(kind: type):
    block = kind(8, 16, 2).train()
    numbers = range(1, len(block.convs()) + 1)
    x, before = torch.randn(4, 8, 6, 6), buffers(block)
    block(x, branch="dense")
    assert changed(block, before) == {"downsample.1", *(f"bn{i}" for i in numbers)}
    before = buffers(block)
    block(x, branch="gated")
    gated = {"downsample.1", *(f"bn{i}_gated" for i in numbers), *(f"{gate}.bn" for gate in block.gate_names)}
    assert changed(block, before) == gated


@KINDS
def test_shared_norms(kind: type):
    block = kind(8, 16, separate_norm=False)
    assert not any("_gated" in name for name, _ in block.named_modules())
    assert block.norms("gated") == block.norms("dense")
    before = buffers(block)
    block(torch.randn(4, 8, 6, 6))
    assert "bn1" in changed(block, before)


@KINDS
def test_dense_branch_leaves_gates_alone(kind: type):
    block = kind(8, 16)
    for name in block.gate_names:
        getattr(block, name).register_forward_hook(lambda *_: pytest.fail("a gate ran"))
    y, gates = block(torch.randn(4, 8, 6, 6), branch="dense", return_gate=True)
    y.sum().backward()
    assert gates is None
    assert all(p.grad is None for name, p in block.named_parameters() if "gate" in name)


@KINDS
@GATES
def test_empty_batch(kind: type, codebook: int | None):
    assert kind(8, 16, codebook=codebook).eval()(torch.zeros(0, 8, 6, 6)).shape == (0, 16 * kind.expansion, 6, 6)


@KINDS
@GATES
@pytest.mark.parametrize("training", [True, False])
def test_autocast(kind: type, codebook: int | None, training: bool):
    block = kind(8, 16, codebook=codebook).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(torch.randn(4, 8, 6, 6))
    assert y.dtype == torch.bfloat16
    if training:
        y.float().sum().backward()
        assert block.conv1.weight.grad.isfinite().all()


def test_names():
    names = {name for name, _ in GatedBasicBlock(8, 16).named_children()}
    assert names >= {"conv1", "bn1", "bn1_gated", "conv2", "bn2", "bn2_gated", "gate", "downsample", "relu"}
    assert GatedBasicBlock(16, 16).downsample is None
    names = {name for name, _ in GatedBottleneck(64, 16).named_children()}
    assert names >= {"conv3", "bn3", "bn3_gated", "gate1", "gate2"}


@KINDS
def test_bad_inputs(kind: type):
    block, x = kind(8, 16), torch.randn(2, 8, 6, 6)
    with pytest.raises(ValueError, match="branch must be one of 'gated', 'dense', got 'both'"):
        block(x, branch="both")
    with pytest.raises(ValueError, match='mask must be None in branch "dense"'):
        block(x, branch="dense", mask=torch.ones(2, 16, dtype=torch.bool))
    wrong = torch.ones(2, 17, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask(\[0\])? must have shape \(2, 16\), got \(2, 17\)"):
        block(x, mask=wrong if kind is GatedBasicBlock else (wrong, None))
    with pytest.raises(TypeError, match=r"mask(\[0\])? must be a bool tensor, got torch.int64"):
        block(x, mask=wrong.long() if kind is GatedBasicBlock else (wrong.long(), None))
    with pytest.raises(ValueError, match="stride must be positive, got 0"):
        kind(8, 16, 0)
    with pytest.raises(ValueError, match=r"(out_channels|planes) must be a positive multiple of group=5, got 16"):
        kind(8, 16, group=5)
    with pytest.raises(ValueError, match="codebook must be positive or None, got 0"):
        kind(8, 16, codebook=0)


def test_bottleneck_wants_a_pair():
    with pytest.raises(TypeError, match="mask must be a pair, one for each gate, got Tensor"):
        GatedBottleneck(8, 16)(torch.randn(2, 8, 6, 6), mask=torch.ones(2, 16, dtype=torch.bool))
