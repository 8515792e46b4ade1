"""The gate's Triton kernel against its definition: on a GPU, or interpreted (test_triton.py starts that)."""

import os

import pytest
import torch
from torch import Tensor, nn

from gatedkernels.ops import packed, packed_codes, packed_sums
from gatedkernels.ops.channel_gate.reference import channel_gate_reference, code_gate_reference, gate_logits
from gatedkernels.ops.plan.reference import plan_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"),
    pytest.mark.usefixtures("exact_float32"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
# N, C, hidden, decisions, group, H, W
SIZES = [
    (2, 64, 16, 64, 1, 8, 8),
    (1, 7, 5, 3, 4, 1, 1),
    (3, 130, 33, 70, 1, 5, 4),
    (5, 20, 5, 12, 3, 3, 3),
    (1, 1, 1, 1, 1, 1, 1),
    (300, 8, 2, 9, 1, 2, 2),  # two samples a program, the last one with an empty place
    (0, 8, 4, 8, 1, 2, 2),
]


def layers(channels: int, hidden: int, decisions: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    shapes = (hidden, channels), (hidden,), (decisions, hidden), (decisions,)
    return tuple(torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes)


def lists_of(x: Tensor, own: tuple[Tensor, ...], group: int) -> Tensor:
    """What the kernel decides, its lists being those of a plan."""
    from gatedkernels.ops.channel_gate import launch

    mask, lists = launch.channel_gate(x, own, group)
    for found, exact in zip(lists[:2], plan_reference(mask.repeat_interleave(group, 1)), strict=True):
        assert torch.equal(found, exact)
    return mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_decides_as_float64_does(size: tuple[int, ...], dtype: torch.dtype):
    """But for logits so near the threshold that rounding decides, of which the CPU draws none."""
    n, c, hidden, decisions, group, h, w = size
    x, own = torch.randn(n, c, h, w, device=DEVICE).to(dtype), layers(c, hidden, decisions, dtype)
    logits = gate_logits(x.double(), *(layer.double() for layer in own))
    clear = logits.abs() > 1e-5 * logits.abs().amax() if n else torch.ones_like(logits, dtype=torch.bool)
    assert torch.equal(lists_of(x, own, group)[clear], (logits >= 0)[clear])
    assert clear.sum() >= (1 if INTERPRETED else 0.99) * clear.numel()


@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_all_closed_and_all_open(bias: float):
    x, (weight1, bias1, weight2, bias2) = torch.randn(3, 10, 4, 4, device=DEVICE), layers(10, 3, 21)
    mask = lists_of(x, (weight1, bias1, weight2, bias2 + bias), 1)
    assert mask.all() if bias > 0 else not mask.any()


def test_zero_is_open():
    zeros = torch.zeros(2, 3), torch.zeros(2), torch.zeros(5, 2)
    x, own = torch.zeros(1, 3, 2, 2, device=DEVICE), tuple(each.to(DEVICE) for each in zeros)
    assert lists_of(x, (*own, torch.zeros(5, device=DEVICE)), 1).all()
    assert not lists_of(x, (*own, torch.full((5,), -1e-6, device=DEVICE)), 1).any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted", "expanded"])
def test_layouts(images, layout: str):
    """Around the sliced ones lies NaN."""
    x, own = images((3, 10, 4, 5), layout, device=DEVICE), layers(10, 3, 21)
    assert torch.equal(lists_of(x, own, 1), channel_gate_reference(x, *own))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none(value: float):
    x, own = torch.randn(3, 10, 2, 2, device=DEVICE), layers(10, 3, 21)
    x[1, 4, 0, 1] = value
    assert torch.equal(lists_of(x, own, 1), channel_gate_reference(x, *own))
    codes, exact = codes_of(x, own), code_gate_reference(x, *own)
    assert torch.equal(codes[[0, 2]], exact[[0, 2]])
    assert 0 <= codes[1] < 21
    assert value == value or torch.equal(codes, exact)


def codes_of(x: Tensor, own: tuple[Tensor, ...]) -> Tensor:
    from gatedkernels.ops.channel_gate import launch

    return launch.code_gate(x, own)[0]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_codes_are_numbers_of_the_largest_logits(size: tuple[int, ...]):
    n, c, hidden, decisions, _, h, w = size
    x, own = torch.randn(n, c, h, w, device=DEVICE), layers(c, hidden, decisions)
    assert torch.equal(codes_of(x, own), code_gate_reference(x, *own))


def test_the_first_of_equal_logits_is_taken():
    x, (weight1, bias1, _, _) = torch.randn(2, 6, 3, 3, device=DEVICE), layers(6, 3, 5)
    same = torch.zeros(5, 3, device=DEVICE), torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0], device=DEVICE)
    assert codes_of(x, (weight1, bias1, *same)).tolist() == [1, 1]


def test_partial_sums_are_images_of_few_pixels():
    from gatedkernels.ops.channel_gate import launch

    x, own = torch.randn(2, 10, 6, 4, device=DEVICE), layers(10, 3, 21)
    sums = x.view(2, 10, 3, 8).sum(3)[..., None]
    mask, _ = launch.channel_gate(sums, own, area=24)
    assert torch.equal(mask, channel_gate_reference(x, *own))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("group", [1, 4])
def test_residual_blocks_from_packed_weights(given: bool, group: int, stride: int):
    n, c, k, hidden = 2, 12, 20 if stride == 2 else 12, 4
    x = torch.randn(n, c, 6, 5, device=DEVICE).to(memory_format=torch.channels_last)
    filters = torch.randn(k, c, 3, 3, device=DEVICE), torch.randn(k, k, 3, 3, device=DEVICE)
    biases = torch.randn(k, device=DEVICE), torch.randn(k, device=DEVICE)
    weights = packed.pack_rows(filters[0]), biases[0], packed.pack_blocks(filters[1]), biases[1]
    shortcut = (packed.pack_blocks(torch.randn(k, c, 1, 1, device=DEVICE)), biases[0]) if stride == 2 else (None, None)
    mask = torch.rand(n, k // group, device=DEVICE) < 0.5 if given else None
    arguments = (x, *layers(c, hidden, k // group), *weights, None, None, *shortcut, mask, stride)
    own, exact = packed.residual_on_gpu(*arguments), packed.DEFINITIONS["packed_residual"](*arguments)
    torch.testing.assert_close(own, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [12, 3])  # samples apart, and grouped
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("given", [True, False])
def test_residual_blocks_of_a_codebook(given: bool, stride: int, side: int):
    n, c, k, hidden, masks = 7, 6, 10 if stride == 2 else 6, 3, 4
    x = torch.randn(n, c, side, side, device=DEVICE).to(memory_format=torch.channels_last)
    filters = torch.randn(k, c, 3, 3, device=DEVICE), torch.randn(k, k, 3, 3, device=DEVICE)
    biases = torch.randn(k, device=DEVICE), torch.randn(k, device=DEVICE)
    weights = packed.pack_rows(filters[0]), biases[0], packed.pack_blocks(filters[1]), biases[1]
    shortcut = (packed.pack_blocks(torch.randn(k, c, 1, 1, device=DEVICE)), biases[0]) if stride == 2 else (None, None)
    table = torch.rand(masks, k, device=DEVICE) < 0.5
    table[1] = False
    codes = torch.tensor([0, 3, 3, 1, 3, 0, 1], device=DEVICE) if given else None
    arguments = (x, *layers(c, hidden, masks), *weights, *plan_reference(table), codes, *shortcut, stride)
    own, exact = packed_codes.coded_residual_on_gpu(*arguments), packed_codes._coded_residual(*arguments)
    torch.testing.assert_close(own[0], exact[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(own[1], exact[1])
    torch.library.opcheck(torch.ops.gatedkernels.packed_coded_residual.default, arguments)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 7), (9, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_convolution_leaves_sums_of_what_it_stores(size: tuple[int, int], dtype: torch.dtype):
    """Whatever its tile, its splits and its schedule; the same bits where the same units multiply."""
    from gatedkernels.ops.ragged import launch
    from gatedkernels.ops.ragged.configurations import Configuration, Tile

    n, c, k = 2, 20, 37
    x = torch.randn(n, c, *size, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(k, c, 3, 3, device=DEVICE).to(dtype)
    found = []
    for rows, splits, programs in ((16, 1, 0), (64, 1, 0), (16, 2, 0), (32, 1, 1)):
        y = torch.empty(n, *size, k, dtype=dtype, device=DEVICE).permute(0, 3, 1, 2)
        sums = launch.sums_like(y)
        chosen = Configuration(Tile(rows, 32, 16, 4, 2), splits, programs)
        launch.convolve(x, weight, None, y, sums=sums, padding=(1, 1), relu=True, configuration=chosen)
        exact = packed_sums.sums_of(y)
        assert sums.stride() == exact.stride()
        torch.testing.assert_close(sums, exact, rtol=1e-5, atol=1e-5)
        found.append(sums)
    assert torch.equal(found[0], found[3])
    assert not INTERPRETED or torch.equal(found[0], found[1])  # 64 rows are multiplied by other units of a chip


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_blocks_in_a_row_look_at_sums(first: bool, given: bool, stride: int):
    n, c, k, hidden = 2, 12, 20 if stride == 2 else 12, 4
    x = torch.randn(n, c, 6, 5, device=DEVICE).to(memory_format=torch.channels_last)
    filters = torch.randn(k, c, 3, 3, device=DEVICE), torch.randn(k, k, 3, 3, device=DEVICE)
    biases = torch.randn(k, device=DEVICE), torch.randn(k, device=DEVICE)
    weights = packed.pack_rows(filters[0]), biases[0], packed.pack_blocks(filters[1]), biases[1]
    shortcut = (packed.pack_blocks(torch.randn(k, c, 1, 1, device=DEVICE)), biases[0]) if stride == 2 else (None, None)
    mask = torch.rand(n, k, device=DEVICE) < 0.5 if given else None
    arguments = (None if first else packed_sums.sums_of(x), *layers(c, hidden, k), *weights, *shortcut, mask, stride)
    own, exact = packed_sums.summed_on_gpu(x, *arguments), packed_sums._summed(x, *arguments)
    for index in (0, 2):
        torch.testing.assert_close(own[index], exact[index], rtol=1e-4, atol=1e-4)
    assert torch.equal(own[1], exact[1])
    alone = packed.residual_on_gpu(x, *arguments[1:9], None, None, *arguments[9:])
    assert torch.equal(own[0], alone)
    torch.library.opcheck(torch.ops.gatedkernels.packed_residual_summed.default, (x, *arguments))


def test_a_block_with_its_gate_is_three_launches(monkeypatch: pytest.MonkeyPatch):
    from gatedkernels.ops.channel_gate import kernels as gates
    from gatedkernels.ops.plan import kernels as plans
    from gatedkernels.ops.ragged import kernels

    launched: list[str] = []

    class Counted:
        def __init__(self, kernel: object, name: str) -> None:
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: object) -> object:
            launched.append(self.name)
            return self.kernel[grid]  # type: ignore[index]

    for module in (gates, plans, kernels):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counted(getattr(module, name), name))
    k = 8
    x = torch.randn(2, k, 4, 4, device=DEVICE).to(memory_format=torch.channels_last)
    rows, blocks = packed.pack_rows(torch.randn(k, k, 3, 3)), packed.pack_blocks(torch.randn(k, k, 3, 3))
    weights = (each.to(DEVICE) for each in (rows, torch.randn(k), blocks, torch.randn(k)))
    packed.residual_on_gpu(x, *layers(k, 2, k), *weights, None, None, None, None, None, 1)
    assert launched == ["gate_kernel", "ragged_conv_kernel", "ragged_conv_kernel"]


def test_gates_too_wide_for_a_program_are_pytorchs(monkeypatch: pytest.MonkeyPatch):
    from gatedkernels.ops.channel_gate import configurations, launch

    monkeypatch.setattr(configurations, "MOST", 9)
    monkeypatch.setattr(launch, "channel_gate", None)
    x, own = torch.randn(2, 10, 3, 3, device=DEVICE), layers(10, 3, 5)
    assert torch.equal(packed.gate_on_gpu(x, *own), channel_gate_reference(x, *own))


@pytest.mark.parametrize("channels", [1, 65, 512, 4096])
def test_tiles_fit(channels: int):
    from gatedkernels.ops.channel_gate.configurations import STEP, gate_tile

    for samples in (1, 128, 300, 1 << 20):
        for pixels in (1, 49, 3136):
            tile = gate_tile(samples, pixels, channels, max(channels // 4, 1), 4096)
            assert tile.samples * tile.hidden * max(tile.channels, tile.decisions) <= STEP
            assert tile.samples * tile.pixels * tile.channels <= STEP
            assert tile.channels >= channels and tile.decisions >= 4096


def test_a_batch_norm_folded_into_the_gate_decides_alike():
    """What `optimize` hands to the kernel decides as the module does."""
    from gatedkernels.nn import ChannelGate
    from gatedkernels.nn.packed import PackedGate

    gate = ChannelGate(12, 32, group=2, bias_init=0.1)
    nn.init.normal_(gate.bn.running_mean, std=0.1)
    gate = gate.to(DEVICE).eval()
    own = tuple(PackedGate(gate)._buffers[name] for name in ("weight1", "bias1", "weight2", "bias2"))
    x = torch.randn(6, 12, 5, 3, device=DEVICE)
    assert torch.equal(lists_of(x, own, 2), gate(x).mask)
