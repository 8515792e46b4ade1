"""Whatever is called with an argument that it cannot take says so: which one, what it got and what it accepts."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18
from torchvision.models.resnet import BasicBlock

import gatedkernels as gk
from gatedkernels import models, policy, thresholds

N, C, K, SIDE = 2, 8, 16, 8


class Call(NamedTuple):
    """A call that works, and what to put in the place of one of its arguments so that it does not.

    Attributes:
        function: What is called; a module is called by its forward.
        arguments: Those that work.
        bad: Bad values by argument; for other arguments those of `BAD`.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    bad: Mapping[str, Sequence[Any]] = {}


X, TOKENS = torch.ones(N, C, SIDE, SIDE), torch.ones(N, 3, C)
IN_MASK, OUT_MASK = torch.ones(N, C, dtype=torch.bool), torch.ones(N, K, dtype=torch.bool)

SIZES = ("3", 0, -1, 2.5)
PAIRS = ("3", 0, (1, 2, 3), 2.5)
NAMES = ("none of them", 3)
FRACTIONS = ("0.5", -0.5, 1.5, float("nan"))
POSITIVE = ("0.5", 0.0, -1.0)
NO_MODULE = ("resnet18", None, {})


def no_tensor(like: Tensor) -> list[Any]:
    return [like.numpy(), like.tolist(), None, like.to("meta")]


def no_floats(like: Tensor) -> list[Any]:
    """What no floating tensor of these dimensions is."""
    return [*no_tensor(like), like[0], like[None], like.to(torch.int64), like.to(torch.float64)]


def no_masks(like: Tensor) -> list[Any]:
    return [like.numpy(), like.tolist(), like.float(), like[:, 1:], like[:1], like[0], like.to("meta")]


# What no argument of this name takes.
BAD: dict[str, Sequence[Any]] = {
    **dict.fromkeys(("in_channels", "out_channels", "in_features", "out_features", "num_features", "features"), SIZES),
    **dict.fromkeys(("channels", "planes", "divisor", "group", "groups", "parts", "reduction", "masks"), SIZES),
    **dict.fromkeys(("codebook", "num_classes", "dim", "depth", "heads", "patch_size", "image_size"), SIZES),
    **dict.fromkeys(("kernel_size", "stride", "dilation"), PAIRS),
    **dict.fromkeys(("backend", "stem", "norm", "slicing", "branch", "name"), NAMES),
    **dict.fromkeys(("temperature", "seconds", "in_ratio", "out_ratio", "ratio", "eps"), POSITIVE),
    **dict.fromkeys(("gate_bias", "bias_init"), ("0.5",)),
    **dict.fromkeys(("density", "momentum", "dropout"), FRACTIONS),
    **dict.fromkeys(("width", "target", "budget"), (*FRACTIONS, 0)),
    **dict.fromkeys(("model", "net"), NO_MODULE),
    "padding": ("same", -1, (1, 2, 3), 2.5),
    "activation": ("relu", 3),
    "stem_padding": ("1", -1, 2.5),
    "block": (nn.Conv2d, "basic", None),
    "layers": (2, (1, 1), (0, 1, 1, 1), "2222", (1, 1, 1, "1")),
    "x": no_floats(X),
    "packed": no_floats(X),
    "in_mask": no_masks(IN_MASK),
    "out_mask": no_masks(OUT_MASK),
    "mask": no_masks(OUT_MASK),
    "example": (X.numpy(), X.tolist(), None, X[:0]),
    "widths": (0.5, (), (2.0,), ("0.5",)),
    "seed": ("0", 0.5),
    "threads": SIZES,
    "limit": ("3", 0, 2.5),
}


@cache
def gated() -> models.GatedResNet:
    return models.gated_resnet18(num_classes=3, stem="cifar", width=1 / 16).eval()


@cache
def slimmable() -> models.SlimmableResNet:
    return models.slimmable_resnet18(num_classes=3, stem="cifar", channels=16).eval()


IMAGES = torch.ones(N, 3, 16, 16)
PLAN = dict(zip(("index", "count"), gk.plan(OUT_MASK), strict=True))
IN_PLAN = dict(zip(("index", "count"), gk.plan(IN_MASK), strict=True))


def weights(outs: int, ins: int, side: int = 3) -> dict[str, Any]:
    return {"weight": torch.ones(outs, ins, side, side), "bias": torch.ones(outs)}


def no_weights(like: Tensor) -> list[Any]:
    return [like.numpy(), like.tolist(), like[0], like[:, 1:], like.to(torch.float64), like.to("meta")]


def fewer_channels_are_fine(weights: Sequence[Any]) -> list[Any]:
    """Without the narrow ones: to sliced operations the images are too wide for those."""
    return [each for i, each in enumerate(weights) if i != 3]


def no_plan(index: Tensor, count: Tensor) -> dict[str, Sequence[Any]]:
    return {name: [t.numpy(), t.long(), t[1:], t.to("meta")] for name, t in {"index": index, "count": count}.items()}


BAD_WEIGHTS = {"weight": [*no_weights(torch.ones(K, C, 3, 3)), None], "bias": no_weights(torch.ones(K, 1))}
LINEAR = {"weight": torch.ones(K, C), "bias": torch.ones(K)}
BAD_LINEAR = {"weight": [*no_weights(torch.ones(K, C)), None], "bias": no_weights(torch.ones(K, 1))}
BAD_WIDTHS = {"in_width": ("3", 0, C + 1, 2.5, torch.ones(N)), "out_width": ("3", 0, K + 1, torch.ones(1).long())}
GATES = {"layer1.0": gk.Gate(OUT_MASK, OUT_MASK.float())}

CALLS: dict[str, Callable[[], Call]] = {
    "gated_conv2d": lambda: Call(
        gk.gated_conv2d,
        {"x": X, **weights(K, C), "in_mask": IN_MASK, "out_mask": OUT_MASK},
        BAD_WEIGHTS,
    ),
    "gated_linear": lambda: Call(
        gk.gated_linear,
        {"x": TOKENS, **LINEAR, "in_mask": IN_MASK, "out_mask": OUT_MASK},
        {"x": [*no_tensor(TOKENS), TOKENS[0, 0], TOKENS.long(), TOKENS.double()], **BAD_LINEAR},
    ),
    "gated_block": lambda: Call(
        gk.gated_block,
        {
            "x": X,
            **{f"{name}1": value for name, value in weights(K, C).items()},
            **{f"{name}2": value for name, value in weights(C, K).items()},
            "mask": OUT_MASK,
            "residual": X,
        },
        {
            "weight1": BAD_WEIGHTS["weight"],
            "bias1": BAD_WEIGHTS["bias"],
            "weight2": no_weights(torch.ones(C, K, 3, 3)),
            "bias2": BAD_WEIGHTS["bias"],
            "residual": [each for each in no_floats(X) if each is not None],
            "shared": SIZES,
        },
    ),
    "sliced_conv2d": lambda: Call(
        gk.sliced_conv2d,
        {"x": X, **weights(K, C), "in_width": 4, "out_width": 4},
        {"weight": fewer_channels_are_fine(BAD_WEIGHTS["weight"]), "bias": BAD_WEIGHTS["bias"], **BAD_WIDTHS},
    ),
    "sliced_linear": lambda: Call(
        gk.sliced_linear,
        {"x": TOKENS, **LINEAR, "in_width": 4, "out_width": 4},
        {
            "x": [*no_tensor(TOKENS), TOKENS[0, 0], TOKENS.long(), TOKENS.double()],
            "weight": fewer_channels_are_fine(BAD_LINEAR["weight"]),
            "bias": BAD_LINEAR["bias"],
            **BAD_WIDTHS,
        },
    ),
    "plan": lambda: Call(gk.plan, {"mask": OUT_MASK}, {"mask": [None, OUT_MASK.tolist(), OUT_MASK[0], X]}),
    "conv_out": lambda: Call(gk.conv_out, {"x": X, **weights(K, C), **PLAN}, {**BAD_WEIGHTS, **no_plan(**PLAN)}),
    "conv_in": lambda: Call(
        gk.conv_in, {"packed": X, **weights(K, C), **IN_PLAN}, {**BAD_WEIGHTS, **no_plan(**IN_PLAN)}
    ),
    "GatedConv2d": lambda: Call(gk.GatedConv2d, {"in_channels": C, "out_channels": K, "kernel_size": 3}),
    "GatedConv2d.forward": lambda: Call(
        gk.GatedConv2d(C, K, 3).eval(), {"x": X, "in_mask": IN_MASK, "out_mask": OUT_MASK}
    ),
    "GatedConv2d.forward, alone": lambda: Call(gk.GatedConv2d(C, K, 3).eval(), {"x": X}),
    "GatedConv2d.forward, ungated": lambda: Call(gk.GatedConv2d(C, K, 3, gate=False), {"x": X}),
    "GatedLinear": lambda: Call(gk.GatedLinear, {"in_features": C, "out_features": K}),
    "GatedLinear.forward": lambda: Call(
        gk.GatedLinear(C, K).eval(),
        {"x": TOKENS, "in_mask": IN_MASK, "out_mask": OUT_MASK},
        {"x": [*no_tensor(TOKENS), TOKENS[0, 0], TOKENS.long(), TOKENS.double(), TOKENS[..., 1:]]},
    ),
    "ChannelGate": lambda: Call(gk.ChannelGate, {"in_channels": C, "out_channels": K}),
    "ChannelGate.forward": lambda: Call(gk.ChannelGate(C, K).eval(), {"x": X}),
    "CodebookGate": lambda: Call(gk.nn.CodebookGate, {"in_channels": C, "out_channels": K}),
    "CodebookGate.forward": lambda: Call(gk.nn.CodebookGate(C, K).eval(), {"x": X}),
    "GatedBasicBlock": lambda: Call(gk.nn.GatedBasicBlock, {"in_channels": C, "out_channels": K}, {"stride": SIZES}),
    "GatedBasicBlock.forward": lambda: Call(gk.nn.GatedBasicBlock(C, K).eval(), {"x": X, "mask": OUT_MASK}),
    "GatedBasicBlock.forward, dense": lambda: Call(gk.nn.GatedBasicBlock(C, K).eval(), {"x": X, "branch": "dense"}),
    "GatedBottleneck": lambda: Call(gk.nn.GatedBottleneck, {"in_channels": C, "planes": K}, {"stride": SIZES}),
    "GatedBottleneck.forward": lambda: Call(
        gk.nn.GatedBottleneck(C, K).eval(),
        {"x": X, "mask": (OUT_MASK, OUT_MASK)},
        {"mask": [OUT_MASK, *((each, OUT_MASK) for each in no_masks(OUT_MASK))]},
    ),
    "SlimmableConv2d": lambda: Call(gk.SlimmableConv2d, {"in_channels": C, "out_channels": K, "kernel_size": 3}),
    "SlimmableConv2d.forward": lambda: Call(gk.SlimmableConv2d(C, K, 3), {"x": X}),
    "SlimmableLinear": lambda: Call(gk.SlimmableLinear, {"in_features": C, "out_features": K}),
    "SlimmableLinear.forward": lambda: Call(
        gk.SlimmableLinear(C, K),
        {"x": TOKENS},
        {"x": [*no_tensor(TOKENS), TOKENS[0, 0], TOKENS.long(), TOKENS.double(), TOKENS[..., 1:]]},
    ),
    "SlimmableBatchNorm2d": lambda: Call(gk.nn.SlimmableBatchNorm2d, {"num_features": C}),
    "SlimmableBatchNorm2d.forward": lambda: Call(gk.nn.SlimmableBatchNorm2d(C), {"x": X}),
    "SwitchableBatchNorm2d": lambda: Call(gk.nn.SwitchableBatchNorm2d, {"num_features": C, "widths": (0.5, 1.0)}),
    "SwitchableBatchNorm2d.forward": lambda: Call(gk.nn.SwitchableBatchNorm2d(C, [0.5, 1.0]), {"x": X}),
    "SlimmableLayerNorm": lambda: Call(gk.nn.SlimmableLayerNorm, {"features": C}),
    "SlimmableLayerNorm.forward": lambda: Call(
        gk.nn.SlimmableLayerNorm(C),
        {"x": TOKENS},
        {"x": [*no_tensor(TOKENS), TOKENS.long(), TOKENS.double(), torch.ones(N, 2 * C)]},
    ),
    "SlimmableBasicBlock": lambda: Call(
        gk.nn.SlimmableBasicBlock,
        {"in_channels": C, "out_channels": K, "stride": 1, "norm": gk.nn.SlimmableBatchNorm2d},
        {"stride": SIZES, "norm": ("batch", None)},
    ),
    "SlimmableBasicBlock.forward": lambda: Call(
        gk.nn.SlimmableBasicBlock(C, K, 1, gk.nn.SlimmableBatchNorm2d), {"x": X}
    ),
    "SlimmableBottleneck": lambda: Call(
        gk.nn.SlimmableBottleneck,
        {"in_channels": C, "planes": K, "stride": 1, "norm": gk.nn.SlimmableBatchNorm2d},
        {"stride": SIZES, "norm": ("batch", None)},
    ),
    "SlimmableBottleneck.forward": lambda: Call(
        gk.nn.SlimmableBottleneck(C, K, 1, gk.nn.SlimmableBatchNorm2d), {"x": X}
    ),
    "make_divisible": lambda: Call(
        gk.nn.make_divisible, {"value": 30}, {"value": ("30", None, float("nan")), "least": SIZES}
    ),
    "width": lambda: Call(lambda net, width: gk.width(net, width).__enter__(), {"net": slimmable(), "width": 0.5}),
    "set_width": lambda: Call(gk.nn.set_width, {"net": slimmable(), "width": 1.0}),
    "slice": lambda: Call(gk.slice, {"net": slimmable(), "width": 1.0}),
    "is_slimmable": lambda: Call(gk.nn.is_slimmable, {"net": slimmable()}),
    "calibrate_norms": lambda: Call(
        gk.calibrate_norms,
        {"net": slimmable(), "batches": [IMAGES], "widths": [0.5]},
        {"batches": (IMAGES, [], [IMAGES.numpy()], 3)},
    ),
    "fix_gates": lambda: Call(
        lambda model, density, seed=0: gk.fix_gates(model, density, seed).__enter__(),
        {"model": gated(), "density": 0.5},
        {"density": (*FRACTIONS, {"nothing": 0.5}, {"layer1.0": "0.5"}, None)},
    ),
    "count_flops": lambda: Call(
        gk.count_flops, {"model": gated(), "example": IMAGES}, {"masks": ({"nothing": OUT_MASK}, [OUT_MASK])}
    ),
    "gated_flops": lambda: Call(gk.nn.gated_flops, {"model": gated(), "example": IMAGES}),
    "kept_fraction": lambda: Call(
        gk.nn.kept_fraction,
        {"costs": gk.nn.gated_flops(gated(), IMAGES), "gates": gated()(IMAGES, return_gates=True)[1]},
        {"costs": ([], None, [3]), "gates": ({}, None, {"layer1.0": OUT_MASK})},
    ),
    "fold_norm": lambda: Call(
        gk.nn.fold_norm,
        {**weights(K, C), "norm": nn.BatchNorm2d(K).eval()},
        {
            "weight": (None, [1.0], np.ones((K, C, 3, 3))),
            "bias": ([1.0], torch.ones(3)),
            "norm": (nn.BatchNorm2d(K), nn.LayerNorm(K), "norm", nn.BatchNorm2d(K + 1).eval()),
        },
    ),
    "straight_through": lambda: Call(
        gk.nn.straight_through, {"logits": torch.ones(3)}, {"logits": ([1.0], None, torch.ones(3).long())}
    ),
    "sparsity_loss": lambda: Call(
        gk.nn.sparsity_loss, {"kept": torch.ones(()), "target": 0.5}, {"kept": ("0.5", None), "weight": ("5",)}
    ),
    "bound_loss": lambda: Call(
        gk.nn.bound_loss,
        {"gates": GATES, "target": 0.5, "epoch": 0},
        {
            "gates": ({}, None, {"layer1.0": OUT_MASK}),
            "epoch": ("0", -1),
            "decay": ("0", -1.0),
            "weight": ("5",),
        },
    ),
    "check_branch": lambda: Call(gk.nn.check_branch, {"branch": "gated"}),
    "gate_key": lambda: Call(gk.nn.gate_key, {"name": "layer1.0.gate"}, {"name": (3, None)}),
    "gate": lambda: Call(gk.gate, {"model": ResNet(BasicBlock, [1, 1, 1, 1])}),
    "optimize": lambda: Call(gk.optimize, {"model": gated(), "example": IMAGES}),
    "optimize, slimmable": lambda: Call(gk.optimize, {"model": slimmable(), "example": IMAGES}),
    "optimized.forward": lambda: Call(
        gk.optimize(gated(), IMAGES), {"x": IMAGES}, {"x": no_floats(IMAGES), "masks": ({"nothing": OUT_MASK},)}
    ),
    "report": lambda: Call(gk.report, {"model": gated(), "example": IMAGES, "seconds": 0.01, "compiled": False}),
    "calibrate": lambda: Call(
        gk.calibrate,
        {"channels": [8], "pixels": [16], "seconds": 0.001},
        {
            "channels": ((), (0,), ("8",), 8),
            "pixels": ((), (0,), ("8",), 8),
            "device": ("gpu", 3.5, "meta"),
        },
    ),
    "tune": lambda: Call(gk.tune, {"model": gated(), "example": IMAGES}, {"example": ("x", None, ())}),
    "create_model": lambda: Call(
        models.create_model, {"name": "gated_resnet18", "width": 1 / 16}, {"name": ("resnet", None, ["x"])}
    ),
    "register_model": lambda: Call(
        models.register_model, {"constructor": models.gated_resnet18}, {"constructor": ("resnet", None)}
    ),
    "GatedResNet": lambda: Call(
        models.GatedResNet,
        {"block": gk.nn.GatedBasicBlock, "layers": (1, 1, 1, 1), "width": 1 / 16},
        {"width": ("1", 0, -1.0)},
    ),
    "GatedResNet.forward": lambda: Call(
        gated(),
        {"x": IMAGES},
        {"x": no_floats(IMAGES), "masks": ({"nothing": OUT_MASK}, [OUT_MASK])},
    ),
    "GatedResNet.forward, dense": lambda: Call(gated(), {"x": IMAGES, "branch": "dense"}, {"x": no_floats(IMAGES)}),
    "SlimmableResNet": lambda: Call(
        models.SlimmableResNet, {"block": gk.nn.SlimmableBasicBlock, "layers": (1, 1, 1, 1), "channels": 8}
    ),
    "SlimmableResNet.forward": lambda: Call(slimmable(), {"x": IMAGES}, {"x": no_floats(IMAGES)}),
    "SlimmableMobileNetV2": lambda: Call(models.SlimmableMobileNetV2, {}),
    "SlimmableMobileNetV2.forward": lambda: Call(
        models.SlimmableMobileNetV2(stem="cifar").eval(), {"x": IMAGES}, {"x": no_floats(IMAGES)}
    ),
    "SlimmableViT": lambda: Call(
        models.SlimmableViT, {"dim": 16, "depth": 1, "heads": 2, "image_size": 16, "patch_size": 8}
    ),
    "SlimmableViT.forward": lambda: Call(
        models.SlimmableViT(16, 1, 2, image_size=16, patch_size=8), {"x": IMAGES}, {"x": no_floats(IMAGES)}
    ),
    "load_torchvision": lambda: Call(
        models.load_torchvision,
        {"model": models.gated_resnet18(), "state_dict": resnet18().state_dict()},
        {"state_dict": ({}, None, "resnet18.pth")},
    ),
    "to_torchvision_state_dict": lambda: Call(models.to_torchvision_state_dict, {"model": gated()}),
}


# Public, and called with nothing that could be wrong: types, and functions that take what others made.
TAKE_ANYTHING = {"Gate", "Codes", "ConvCost", "FlopCount", "LayerFlops", "Slimmable", "SlimmableNetwork"}
TAKE_ANYTHING |= {"Branch", "list_models", "run_blocks"}
# Arguments that say yes or no, and functions that are called in turn.
UNCHECKED = {"progress", "timer"}
# Those that cannot be shown to work here: one needs a GPU, the other leaves a name behind.
NOT_RUN = {"tune", "register_model"}


def parameters(call: Call) -> Mapping[str, inspect.Parameter]:
    function = call.function.forward if isinstance(call.function, nn.Module) else call.function
    return inspect.signature(function).parameters


def is_checked(parameter: inspect.Parameter) -> bool:
    is_flag = parameter.annotation is bool or isinstance(parameter.default, bool)
    return not is_flag and parameter.kind is not parameter.VAR_KEYWORD and parameter.name not in UNCHECKED


def bad(call: Call, argument: str) -> Sequence[Any]:
    return call.bad.get(argument, BAD.get(argument, ()))


CASES = {name: make() for name, make in CALLS.items()}


@pytest.fixture
def nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a call measures is for that call alone."""
    monkeypatch.setenv(thresholds.FOLDER_VARIABLE, str(tmp_path))
    policy.forget()
    yield
    monkeypatch.undo()
    policy.forget()


@pytest.mark.parametrize("module", [gk, gk.nn, models], ids=lambda module: module.__name__)
def test_everything_public_is_here(module: Any):
    named = {name.split(".")[0] for name in CASES} | TAKE_ANYTHING
    public = {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
    factories = {name for name in models.list_models() if name in public}  # of networks that are here
    assert public - factories <= named


@pytest.mark.parametrize("name", CASES)
def test_every_argument_has_bad_values(name: str):
    call = CASES[name]
    assert [each.name for each in parameters(call).values() if is_checked(each) and not bad(call, each.name)] == []


@pytest.mark.parametrize("name", sorted(CASES.keys() - NOT_RUN))
def test_good_arguments(name: str, nothing_kept: None):
    CASES[name].function(**CASES[name].arguments)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        pytest.param(name, argument, value, id=f"{name}-{argument}-{i}")
        for name, call in CASES.items()
        for argument in parameters(call)
        for i, value in enumerate(bad(call, argument))
    ],
)
def test_bad_arguments(name: str, argument: str, value: Any):
    call = CASES[name]
    with pytest.raises((TypeError, ValueError), match=rf"(?s)\b{argument}\b.* got "):
        call.function(**{**call.arguments, argument: value})
