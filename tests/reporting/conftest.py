"""Small gated modules whose normalisations are not the identity."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gatedkernels import GatedConv2d, models
from gatedkernels.nn import GatedBasicBlock, GatedBottleneck


def _conv() -> nn.Module:
    return GatedConv2d(16, 32, 3, stride=2, padding=1, group=4, norm=nn.BatchNorm2d(32), activation=nn.ReLU())


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: models.gated_resnet18(num_classes=10, stem="cifar", width=0.25), (3, 3, 16, 16)),
    "resnet50": (lambda: models.gated_resnet50(num_classes=None, stem="imagenet", width=0.125), (2, 3, 33, 33)),
    "basic": (lambda: GatedBasicBlock(16, 16, group=2), (3, 16, 9, 7)),
    "basic_stride": (lambda: GatedBasicBlock(16, 32, 2), (2, 16, 9, 7)),
    "bottleneck": (lambda: GatedBottleneck(16, 8, 2), (2, 16, 9, 7)),
    "conv": (_conv, (2, 16, 8, 8)),
}


@pytest.fixture
def build() -> Callable[[str], tuple[nn.Module, Tensor]]:
    """Build one of the modules and a batch for it."""

    def build_one(name: str) -> tuple[nn.Module, Tensor]:
        make, shape = MODULES[name]
        module = make()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.running_mean, -0.2, 0.2)
                nn.init.uniform_(part.running_var, 0.5, 1.5)
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.uniform_(part.bias, -0.2, 0.2)
        return module.eval(), torch.randn(shape)

    return build_one


@pytest.fixture(params=MODULES)
def gated(request: pytest.FixtureRequest, build) -> tuple[nn.Module, Tensor]:
    """Every module in turn, and a batch for it."""
    return build(request.param)
