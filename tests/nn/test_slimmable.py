"""Slimmable layers: at every width they are the ordinary layer of their first weights."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import batch_norm, conv2d, layer_norm, linear

import gatedkernels as gk
from gatedkernels.nn import (
    SlimmableBatchNorm2d,
    SlimmableConv2d,
    SlimmableLayerNorm,
    SlimmableLinear,
    SwitchableBatchNorm2d,
    count_flops,
    make_divisible,
)

WIDTHS = (1.0, 0.9, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25)
# Channels of US3L's networks at each of them
CHANNELS = {
    64: (64, 56, 48, 48, 48, 40, 32, 24, 24, 16),
    128: (128, 112, 104, 96, 88, 80, 64, 48, 40, 32),
    256: (256, 232, 208, 192, 176, 152, 128, 104, 80, 64),
    512: (512, 464, 408, 384, 360, 304, 256, 208, 152, 128),
    1024: (1024, 920, 816, 768, 720, 616, 512, 408, 304, 256),
    2048: (2048, 1840, 1640, 1536, 1432, 1232, 1024, 816, 616, 512),
}


@pytest.mark.parametrize("channels", CHANNELS)
def test_channels_of_the_paper(channels: int):
    assert tuple(make_divisible(channels * width) for width in WIDTHS) == CHANNELS[channels]
    conv = SlimmableConv2d(channels, 8, 1, slice_out=False)
    for width, expected in zip(WIDTHS, CHANNELS[channels], strict=True):
        conv.set_width(width)
        assert conv.shape_now == (expected, 8)


def test_make_divisible():
    assert [make_divisible(v) for v in (1, 7, 8, 11, 12, 20)] == [1, 8, 8, 16, 16, 24]
    assert [make_divisible(v, 4) for v in (5, 6)] == [8, 8]
    assert make_divisible(3, least=8) == 8
    with pytest.raises(ValueError, match="divisor must be positive, got 0"):
        make_divisible(8, 0)


def test_never_more_channels_than_there_are():
    layer = SlimmableLinear(3, 10)
    for width in (0.3, 0.7, 0.99):
        layer.set_width(width)
        assert layer.shape_now[0] <= 3 and layer.shape_now[1] <= 10


# -- convolution and linear layer --------------------------------------------------------------------------------------

CONVS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "plain": ((16, 32, 3), {"padding": 1}),
    "strided": ((16, 32, 3), {"stride": 2, "padding": 1, "bias": False}),
    "first": ((3, 32, 3), {"slice_in": False}),
    "last": ((16, 20, 1), {"slice_out": False}),
    "depthwise": ((32, 32, 3), {"groups": 32, "padding": 1}),
    "expanding": ((16, 96, 1), {"out_ratio": 6}),
    "depthwise, expanded": ((96, 96, 3), {"groups": 96, "padding": 1, "in_ratio": 6, "out_ratio": 6}),
    "projecting": ((96, 16, 1), {"in_ratio": 6}),
}


@pytest.mark.parametrize("width", [1.0, 0.7, 0.5, 0.25])
@pytest.mark.parametrize("case", CONVS)
def test_convolution(case: str, width: float):
    arguments, options = CONVS[case]
    conv = SlimmableConv2d(*arguments, **options)
    conv.set_width(width)
    ins, outs = conv.shape_now
    groups = ins if conv.groups > 1 else 1
    x = torch.randn(2, ins, 9, 9)
    bias = None if conv.bias is None else conv.bias[:outs]
    expected = conv2d(x, conv.weight[:outs, : ins // groups], bias, conv.stride, conv.padding, groups=groups)
    torch.testing.assert_close(conv(x), expected)
    narrow = conv.sliced()
    assert type(narrow) is nn.Conv2d and narrow.weight.shape == (outs, ins // groups, *conv.kernel_size)
    torch.testing.assert_close(narrow(x), expected)
    assert count_flops(conv, x).dense == count_flops(narrow, x).dense


def test_gradients_of_the_channels_beyond_are_zero():
    conv = SlimmableConv2d(16, 16, 3)
    conv.set_width(0.5)
    conv(torch.randn(2, 8, 5, 5)).sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad[:8, :8].all()
    assert not conv.weight.grad[8:].any() and not conv.weight.grad[:, 8:].any()


def test_a_wider_input_is_read_in_part():
    conv = SlimmableConv2d(16, 16, 1)
    conv.set_width(0.5)
    x = torch.randn(2, 16, 3, 3)
    x[:, 8:] = torch.nan
    torch.testing.assert_close(conv(x), conv(x[:, :8].clone()))
    with pytest.raises(ValueError, match="x must have at least 8 channels at width"):
        conv(x[:, :7])


def test_groups_are_not_cut():
    conv = SlimmableConv2d(32, 32, 3, groups=2)
    conv.set_width(0.25)
    with pytest.raises(ValueError, match=r"width must end between two groups, got 0\.25"):
        conv.sliced()


@pytest.mark.parametrize("width", [1.0, 0.7, 0.5])
@pytest.mark.parametrize("options", [{}, {"slice_out": False}, {"slice_in": False}, {"bias": False}], ids=str)
def test_linear(options: dict[str, Any], width: float):
    layer = SlimmableLinear(32, 48, **options)
    layer.set_width(width)
    ins, outs = layer.shape_now
    x = torch.randn(2, 5, ins)
    expected = linear(x, layer.weight[:outs, :ins], None if layer.bias is None else layer.bias[:outs])
    torch.testing.assert_close(layer(x), expected)
    narrow = layer.sliced()
    assert type(narrow) is nn.Linear and narrow.weight.shape == (outs, ins)
    torch.testing.assert_close(narrow(x), expected)
    assert count_flops(layer, x).dense == count_flops(narrow, x).dense


def test_queries_keys_and_values_are_sliced_by_themselves():
    layer = SlimmableLinear(32, 96, parts=3)
    layer.set_width(0.5)
    x = torch.randn(2, 5, 16)
    expected = torch.cat([linear(x, layer.weight[i : i + 16, :16], layer.bias[i : i + 16]) for i in (0, 32, 64)], -1)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.sliced()(x), expected)
    with pytest.raises(ValueError, match="parts must divide the 10 out_features, got 3"):
        SlimmableLinear(8, 10, parts=3)


def test_an_input_that_stays_wide():
    layer = SlimmableLinear(32, 16, slice_out=False, wide_input=True)
    layer.set_width(0.5)
    x = torch.randn(2, 32)
    assert layer.sliced().in_features == 16
    torch.testing.assert_close(layer.sliced()(x), layer(x))


@pytest.mark.parametrize(
    ("width", "error", "message"),
    [
        (0, ValueError, r"width must lie in \(0, 1\], got 0"),
        (1.5, ValueError, r"width must lie in \(0, 1\], got 1\.5"),
        ("half", TypeError, "width must be a number, got 'half'"),
        (True, TypeError, "width must be a number, got True"),
    ],
)
def test_widths_are_checked(width: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        SlimmableLinear(8, 8).set_width(width)


def test_layers_say_their_width():
    conv = SlimmableConv2d(3, 16, 3, slice_in=False)
    conv.set_width(0.5)
    assert repr(conv).endswith("slice_in=False, width=0.5)")


def test_padding_by_name():
    with pytest.raises(TypeError, match="padding must be an int or two ints, got 'same'"):
        SlimmableConv2d(3, 16, 3, padding="same")  # type: ignore[arg-type]


# -- normalisation -----------------------------------------------------------------------------------------------------


def filled(norm: nn.Module) -> Any:
    """The layer with parameters that can be told apart."""
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def test_batch_norm_at_full_width_is_torchs():
    norm, torchs = filled(SlimmableBatchNorm2d(8)), nn.BatchNorm2d(8)
    torchs.load_state_dict(norm.state_dict())
    for _ in range(3):
        x = torch.randn(4, 8, 3, 3) * 2 + 1
        torch.testing.assert_close(norm(x), torchs(x))
    assert all(torch.equal(a, b) for a, b in zip(norm.buffers(), torchs.buffers(), strict=True))
    torch.testing.assert_close(norm.eval()(x), torchs.eval()(x))


def test_batch_norm_uses_the_batch_in_training():
    norm = filled(SlimmableBatchNorm2d(32))
    norm.set_width(0.5)
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(4, 16, 3, 3)
    torch.testing.assert_close(norm(x), batch_norm(x, None, None, norm.weight[:16], norm.bias[:16], True))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_batch_norm_without_statistics():
    norm = filled(SlimmableBatchNorm2d(32, track_running_stats=False))
    x = torch.randn(4, 8, 3, 3)
    torch.testing.assert_close(norm.eval()(x), norm.train()(x))
    assert norm.state_dict().keys() == {"weight", "bias"}


def test_evaluation_needs_statistics():
    norm = SlimmableBatchNorm2d(32).eval()
    norm.set_width(0.5)
    message = r"width must have statistics, got 0\.5 without: gatedkernels\.calibrate_norms estimates them"
    with pytest.raises(ValueError, match=message):
        norm(torch.randn(2, 16, 3, 3))
    with pytest.raises(ValueError, match=message):
        norm.sliced()
    assert norm.train().sliced().running_mean.shape == (16,)


def test_batch_norm_refuses_other_shapes():
    norm = SlimmableBatchNorm2d(8)
    with pytest.raises(ValueError, match=r"x must have shape \(N, C, H, W\) with C up to 8, got \(2, 9, 3, 3\)"):
        norm(torch.zeros(2, 9, 3, 3))
    with pytest.raises(ValueError, match=r"x must have shape \(N, C, H, W\) with C up to 8, got \(2, 8\)"):
        norm(torch.zeros(2, 8))


def test_switchable_norms_have_nothing_in_common():
    norm = filled(SwitchableBatchNorm2d(32, [1.0, 0.5]))
    assert norm.width == 1.0 and norm.norms.keys() == {"0_5", "1"}
    x = torch.randn(4, 32, 3, 3)
    for width, channels in ((0.5, 16), (1.0, 32)):
        norm.set_width(width)
        own = norm.norms[f"{width:g}".replace(".", "_")]
        assert own.num_features == channels
        torch.testing.assert_close(norm(x[:, :channels]), copy.deepcopy(own)(x[:, :channels]))
        assert type(norm.sliced()) is nn.BatchNorm2d and norm.sliced() is not own
    with pytest.raises(ValueError, match=r"width must be one of 0\.5, 1, got 0\.7"):
        norm.set_width(0.7)
    with pytest.raises(ValueError, match="widths must hold at least one width, got none"):
        SwitchableBatchNorm2d(8, [])


def test_layer_norm():
    norm = filled(SlimmableLayerNorm(32))
    norm.set_width(0.5)
    x = torch.randn(2, 5, 16)
    expected = layer_norm(x, (16,), norm.weight[:16], norm.bias[:16])
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.sliced()(x), expected)


# -- networks ----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Convolution, normalisation and classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = SlimmableConv2d(3, 32, 3, slice_in=False)
        self.bn = filled(SlimmableBatchNorm2d(32))
        self.fc = SlimmableLinear(32, 4, slice_out=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


BATCHES = [torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def test_width_is_put_back():
    net = Small()
    net.fc.set_width(0.25)
    with pytest.raises(KeyError), gk.width(net, 0.5):
        assert {layer.width for layer in (net.conv, net.bn, net.fc)} == {0.5}
        raise KeyError
    assert (net.conv.width, net.fc.width) == (1.0, 0.25)


def test_a_refused_width_changes_nothing():
    net = nn.Sequential(SlimmableConv2d(3, 8, 1), SwitchableBatchNorm2d(8, [0.5, 1.0]))
    with pytest.raises(ValueError, match="width must be one of"):
        gk.nn.set_width(net, 0.75)
    assert net[0].width == net[1].width == 1.0


def test_a_network_without_slimmable_layers():
    with pytest.raises(ValueError, match="net must hold slimmable layers, got Linear without"):
        gk.nn.set_width(nn.Linear(2, 2), 0.5)


def test_every_sample_has_its_width():
    net = Small().eval()
    gk.calibrate_norms(net, BATCHES, [0.7, 1.0])
    x = BATCHES[0][:3]
    with gk.width(net, 0.7), torch.no_grad():
        narrow = net(x[:2])
        inner = net.bn(net.conv(x[:2]))
        with gk.width(net, torch.tensor([0.7, 0.7, 1.0])):  # of float32, whose 0.7 is a little less
            assert net.bn.sample_widths == (0.7, 0.7, 1.0) and "widths of 3 samples" in repr(net.conv)
            torch.testing.assert_close(net(x)[:2], narrow)
            hidden = net.bn(net.conv(x))
            torch.testing.assert_close(hidden[:2, :24], inner)
            assert hidden.shape[1] == 32 and not hidden[:2, 24:].any() and hidden[2, 24:].any()
            with gk.width(net, [1.0]):
                assert net(x[:1]).shape == (1, 4)
            assert net.conv.sample_widths == (0.7, 0.7, 1.0)
        assert net.conv.width == 0.7 and not net.conv.sample_widths


def test_what_widths_for_every_sample_are_refused():
    net, x = Small().eval(), BATCHES[0][:2]
    for width, message in (
        (torch.tensor([[0.5]]), r"float32 or float64 of shape \(N,\), got torch.float32 \(1, 1\)"),
        (torch.tensor([1, 1]), r"float32 or float64 of shape \(N,\), got torch.int64 \(2,\)"),
        (torch.tensor([0.7, 0.5]).half(), r"float32 or float64 of shape \(N,\), got torch.float16 \(2,\)"),
        ([], "width must be a number or one for every sample, got none"),
        ([0.5, 2.0], r"width must lie in \(0, 1\], got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.nn.set_width(net, width)
    assert net.conv.width == 1.0 and not net.conv.sample_widths and not net.bn.sample_widths
    others = nn.Sequential(SlimmableConv2d(3, 8, 1), SwitchableBatchNorm2d(8, [1.0]))
    with pytest.raises(ValueError, match="width must be one number for SwitchableBatchNorm2d, got one for every"):
        gk.nn.set_width(others, [1.0, 1.0])
    assert not others[0].sample_widths
    with pytest.raises(ValueError, match="width must be one number for a layer of 3 parts"):
        SlimmableLinear(8, 24, parts=3).set_widths((0.5,))

    with gk.width(net, [0.5, 1.0]):
        with pytest.raises(ValueError, match=r"x must hold 2 samples, one for each width, got \(8, 3, 6, 6\)"):
            net(BATCHES[0])
        for nothing in ("x", None):
            with pytest.raises(TypeError, match="x must be a tensor, got"):
                net(nothing)
        with pytest.raises(ValueError, match=r"x must hold 2 samples, one for each width, got \(\)"):
            net(torch.tensor(3.0))
        with pytest.raises(
            ValueError, match=r"x must have 32 channels, as there are statistics at widths of 2 samples"
        ):
            net.bn(torch.ones(2, 1, 5, 5))
        with pytest.raises(ValueError, match=r"width must have statistics, got 0\.5 without"):
            net(x)
        with pytest.raises(ValueError, match="width must be one number in training, got one for each of 2 samples"):
            net.train()(x)
        with pytest.raises(ValueError, match="width must be one number here, got one for each of 2 samples"):
            gk.slice(net)
        with pytest.raises(ValueError, match="width must be one number here, got one for each of 2 samples"):
            gk.nn.count_flops(net.eval(), x)


def test_statistics_of_other_channels_are_refused():
    norm = SlimmableBatchNorm2d(16)
    for mode in (norm, norm.eval()):
        with pytest.raises(
            ValueError, match=r"x must have 16 channels, as there are statistics at width=1, got \(2, 8,"
        ):
            mode(torch.ones(2, 8, 5, 5))
    norm = SlimmableBatchNorm2d(16, track_running_stats=False).eval()
    assert norm(torch.ones(2, 8, 5, 5)).shape == (2, 8, 5, 5)
    norm.set_widths((0.5, 1.0))
    with pytest.raises(ValueError, match="width must be one number for normalisations without statistics"):
        norm(torch.ones(2, 16, 5, 5))


def test_calibration_averages_all_batches():
    net = Small().eval()
    gk.calibrate_norms(net, ((batch, None) for _ in range(2) for batch in BATCHES), [0.5, 1.0], limit=3)
    assert not any(module.training for module in net.modules()) and net.bn.momentum == 0.1
    for width, prefix in ((0.5, "at_0_5."), (1.0, "")):
        channels = 32 if width == 1 else 16
        outs = [conv2d(batch, net.conv.weight[:channels], net.conv.bias[:channels]) for batch in BATCHES]
        mean = torch.stack([y.mean((0, 2, 3)) for y in outs]).mean(0)
        var = torch.stack([y.var((0, 2, 3)) for y in outs]).mean(0)
        torch.testing.assert_close(net.bn.get_buffer(f"{prefix}running_mean")[:channels], mean)
        torch.testing.assert_close(net.bn.get_buffer(f"{prefix}running_var")[:channels], var)
    net.set_width = None  # type: ignore[assignment]
    with gk.width(net, 0.5):
        assert net(BATCHES[0]).shape == (8, 4)


def test_calibration_by_a_running_average():
    net = Small()
    gk.calibrate_norms(net, BATCHES, [0.5], momentum=0.1)
    assert net.training and net.bn.get_buffer("at_0_5.num_batches_tracked") == 3
    first = nn.BatchNorm2d(16)
    for batch in BATCHES:
        first(conv2d(batch, net.conv.weight[:16], net.conv.bias[:16]))
    torch.testing.assert_close(net.bn.get_buffer("at_0_5.running_mean")[:16], first.running_mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"net": nn.Linear(2, 2)}, "net must hold a SlimmableBatchNorm2d with statistics, got Linear without"),
        ({"widths": []}, "widths must hold at least one width, got none"),
        ({"batches": []}, "batches must hold at least one batch for every width, got none"),
    ],
)
def test_calibration_errors(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        gk.calibrate_norms(**{"net": Small(), "batches": BATCHES, "widths": [0.5], **change})
    with pytest.raises(TypeError, match=r"widths must be a sequence of widths, got 0\.5"):
        gk.calibrate_norms(Small(), BATCHES, 0.5)
    for batches, kind in ((BATCHES[0], "Tensor"), (iter(BATCHES), "list_iterator")):
        with pytest.raises(TypeError, match=f"batches must be a list or a loader of batches, .* got a {kind}"):
            gk.calibrate_norms(Small(), batches, [0.5, 1.0])
    with pytest.raises(TypeError, match="batches must yield tensors or begin with one, got str"):
        gk.calibrate_norms(Small(), ["no images"], [0.5])


def test_statistics_travel_with_the_state_dict():
    net, other = Small(), Small()
    gk.calibrate_norms(net, BATCHES, [0.5, 0.75])
    other.load_state_dict(net.state_dict())
    for width in (0.5, 0.75):
        with gk.width(net.eval(), width), gk.width(other.eval(), width):
            assert torch.equal(net(BATCHES[0]), other(BATCHES[0]))
    without = Small()
    gk.nn.set_width(other, 0.5)
    other.load_state_dict(without.state_dict())
    assert other.state_dict().keys() == without.state_dict().keys()
    with pytest.raises(ValueError, match=r"width must have statistics, got 0\.5 without"):
        other(BATCHES[0])


def test_statistics_follow_their_layer():
    """What a layer holds at a narrow width moves, is copied and is replaced with it."""
    net = Small().eval()
    gk.calibrate_norms(net, BATCHES, [0.5, 1.0])
    assert not any(module.training for module in net.modules())
    gk.nn.set_width(net, 0.5)
    before = net(BATCHES[0])
    twin = copy.deepcopy(net)
    torch.testing.assert_close(twin.double()(BATCHES[0].double()), before.double())
    assert torch.equal(net(BATCHES[0]), before)
    doubled = {name: 2 * value for name, value in net.named_buffers()}
    assert {"bn.at_0_5.running_mean", "bn.running_mean"} < doubled.keys()
    other = torch.func.functional_call(net, doubled, (BATCHES[0],))
    net.load_state_dict(doubled, strict=False)
    assert torch.equal(net(BATCHES[0]), other) and not torch.equal(other, before)


def test_slice_is_an_ordinary_network():
    net = Small()
    gk.calibrate_norms(net, BATCHES, [0.5])
    net.eval()
    narrow = gk.slice(net, 0.5)
    assert [type(layer) for layer in narrow.children()] == [nn.Conv2d, nn.BatchNorm2d, nn.Linear]
    assert net.conv.width == 1.0 and type(net.conv) is SlimmableConv2d
    with gk.width(net, 0.5):
        torch.testing.assert_close(narrow(BATCHES[0]), net(BATCHES[0]))
    with torch.no_grad():
        narrow.conv.weight.zero_()
    assert net.conv.weight.any()


def test_slice_exports():
    net = Small()
    gk.calibrate_norms(net, BATCHES, [0.5])
    narrow = gk.slice(net.eval(), 0.5)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(narrow, (BATCHES[0],), dynamic_shapes=shapes)
    torch.testing.assert_close(program.module()(BATCHES[1][:3]), narrow(BATCHES[1][:3]))


def test_compiled_training_makes_few_graphs():
    torch._dynamo.reset()
    net, counter = Small(), CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for width in (1.0, 0.5, 0.75, 0.25, 1.0, 0.3, 0.6, 0.9):
        with gk.width(net, width):
            torch.testing.assert_close(compiled(BATCHES[0]), net(BATCHES[0]))
    assert counter.frame_count <= 3  # full width, with its running averages; other widths; both as one


def test_compiled_evaluation_makes_few_graphs():
    """Calibrated widths, more of them than PyTorch compiles one by one."""
    torch._dynamo.reset()
    net, counter, widths = Small(), CompileCounter(), [1.0, 0.5, 0.75, 0.25, 0.3, 0.6, 0.9, 0.4, 0.7, 0.8]
    gk.calibrate_norms(net, BATCHES, widths)
    compiled = torch.compile(net.eval(), backend=counter, fullgraph=True)
    for width in [*widths, 0.5]:
        with gk.width(net, width), torch.no_grad():
            torch.testing.assert_close(compiled(BATCHES[0]), net(BATCHES[0]))
    assert counter.frame_count <= 3  # full width, whose statistics are its own; the first other; all others
