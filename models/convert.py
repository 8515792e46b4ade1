"""Gates for a model that you have."""

import copy
import math

import torch
from torch import nn

from gatedkernels._checks import check_int, check_number, check_sizes
from gatedkernels.models.gated_resnet import GatedResNet, Stem
from gatedkernels.models.torchvision_weights import load_torchvision
from gatedkernels.nn import (
    ChannelGate,
    CodebookGate,
    Gate,
    GatedBasicBlock,
    GatedBottleneck,
    gated_flops,
    kept_fraction,
)

# The logits of a codebook's masks start with deviation 1 around their centre, which brings the mean of their sigmoids
# nearer to one half: the centre of a given mean lies so much further out (the probit approximation of a sigmoid).
_AMONG_MASKS = math.sqrt(1 + math.pi / 8)
# Gates that start wider open than this would hardly ever see a closed channel.
_MAX_DENSITY = 0.99


def gate(
    model: nn.Module,
    *,
    budget: float = 0.5,
    group: int = 1,
    separate_norm: bool = True,
    codebook: int | None = None,
) -> GatedResNet:
    """Put gates into a torchvision ResNet.

    Weights are copied, the model is left untouched, and ``fc`` is kept whatever it is. The new gates' last bias is set
    so that in training each channel starts open with the probability, the same everywhere, at which the network keeps
    ``budget`` of its multiply-adds, gates included (at most 0.99; images of 224×224, or 32×32 for a 3×3 stem). That is
    a place to start from: the gates know nothing before they are trained.

    Args:
        model: A torchvision ResNet of basic or bottleneck blocks, of any depth and width, with its usual stem or a
            3×3 one without max-pooling.
        budget: Fraction of the multiply-adds to keep.
        group: Neighbouring channels that share one decision.
        separate_norm: Whether the branches have normalisations of their own.
        codebook: Masks that each gate has, every sample picking one of them; None: gates decide about every channel.

    Returns:
        The gated network, with dtype, device and training mode of ``model``.

    Raises:
        TypeError: If the model is not a torchvision ResNet, or is a variant with no gated twin, or a number is none.
        ValueError: If the budget is not reachable, or ``group`` does not divide a width.
    """
    check_number("budget", budget, above=0, at_most=1)
    check_sizes(group=group)
    check_int("codebook", codebook, optional=True)
    block, stem = _recognise(model)
    stages = [model.get_submodule(f"layer{i}") for i in (1, 2, 3, 4)]
    conv1 = model.get_submodule("conv1")
    assert isinstance(conv1, nn.Conv2d) and not isinstance(conv1.padding, str)
    gated = GatedResNet(
        block,
        [len(list(stage.children())) for stage in stages],
        num_classes=None,
        stem=stem,
        stem_padding=conv1.padding[0] if stem == "cifar" else 2,
        width=conv1.out_channels / 64,
        group=group,
        separate_norm=separate_norm,
        gate_bias=0.0,
        codebook=codebook,
    )
    try:
        load_torchvision(gated, model.state_dict())
    except ValueError as error:
        raise TypeError(f"model must be a torchvision ResNet with a gated twin, got a variant: {error}") from error
    _open_gates(gated, _density(gated, budget, 32 if stem == "cifar" else 224))
    gated.fc = copy.deepcopy(model.get_submodule("fc"))
    reference = conv1.weight
    return gated.to(reference.device, reference.dtype).train(model.training)


def _recognise(model: nn.Module) -> tuple[type[GatedBasicBlock] | type[GatedBottleneck], Stem]:
    """Return the gated block and the stem of a torchvision ResNet's twin."""
    try:
        from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
    except ImportError:
        raise TypeError(f"model must be a torchvision ResNet, got {type(model).__name__}") from None
    if not isinstance(model, ResNet):
        raise TypeError(f"model must be a torchvision ResNet, got {type(model).__name__}")
    kinds = {type(block) for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage}
    twins: dict[type, type[GatedBasicBlock] | type[GatedBottleneck]] = {
        BasicBlock: GatedBasicBlock,
        Bottleneck: GatedBottleneck,
    }
    if len(kinds) != 1 or not kinds <= twins.keys():
        raise TypeError(f"model must have blocks of one kind, basic or bottleneck, got {sorted(map(repr, kinds))}")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and (module.groups != 1 or module.dilation != (1, 1)):
            raise TypeError(f"model must have convolutions without groups and dilation, got {name}: {module}")
    return twins[kinds.pop()], _stem(model.conv1, model.maxpool)


def _stem(conv1: nn.Conv2d, maxpool: nn.Module) -> Stem:
    pools = not isinstance(maxpool, nn.Identity)
    if conv1.kernel_size == (7, 7) and conv1.stride == (2, 2) and conv1.padding == (3, 3) and pools:
        return "imagenet"
    if conv1.kernel_size == (3, 3) and conv1.stride == (1, 1) and not pools:
        return "cifar"
    raise TypeError(
        "model must have a 7×7 stem with max-pooling or a 3×3 stem with maxpool = nn.Identity(), "
        f"got {conv1}, {maxpool}"
    )


def _density(model: GatedResNet, budget: float, size: int) -> float:
    """Find the density, the same for every gate, at which a network keeps a budget."""
    costs = gated_flops(model, torch.zeros(1, 3, size, size))

    def kept(density: float) -> float:
        weight = torch.full((1, 1), density, dtype=torch.float64)
        return kept_fraction(costs, {key: Gate(weight > 0, weight) for key in model.gate_keys()}).item()

    if budget <= kept(0):
        raise ValueError(f"budget must exceed {kept(0):.4f}, what no gate can save, got {budget}")
    low, high = 0.0, _MAX_DENSITY
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) < budget else (low, middle)
    return high


def _open_gates(model: GatedResNet, density: float) -> None:
    logit = math.log(density / (1 - density))
    for module in model.modules():
        if isinstance(module, CodebookGate):
            with torch.no_grad():
                module.masks.add_(logit * _AMONG_MASKS)
        elif isinstance(module, ChannelGate):
            assert module.conv2.bias is not None
            nn.init.constant_(module.conv2.bias, logit)
