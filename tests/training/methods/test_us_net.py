"""US-Net's iteration: labels for the widest, its answers for the others, one step of all gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gatedkernels.models import slimmable_mobilenet_v2, slimmable_resnet18
from gatedkernels.training.config import USNetConfig
from gatedkernels.training.methods import USNet

GENERATOR = torch.Generator().manual_seed(1)
IMAGES, LABELS = torch.randn(6, 3, 8, 8, generator=GENERATOR), torch.tensor([0, 1, 2, 0, 1, 2])


class Alone(USNet):
    """Runs without a trainer."""

    def manual_backward(self, loss: Tensor, *args: Any, **options: Any) -> None:
        loss.backward()


def build(**options: Any) -> Alone:
    torch.manual_seed(0)
    backbone = slimmable_resnet18(num_classes=None, stem="cifar", channels=16, track_running_stats=False)
    return Alone(backbone, USNetConfig(epochs=4, lr=0.05, **options), 3)


def logits(module: USNet, width: float) -> Tensor:
    module._set_width(width)
    return module.classifier(module.backbone(IMAGES))


def gradients(module: USNet) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]


def test_the_widest_learns_labels_and_the_others_what_it_answers():
    module = build()
    losses, accuracy = module.backward_all(IMAGES, LABELS, [1.0, 0.5, 0.25])
    by_hand = build()
    wide = logits(by_hand, 1.0)
    torch.testing.assert_close(losses[0], cross_entropy(wide, LABELS))
    torch.testing.assert_close(accuracy, (wide.argmax(1) == LABELS).float().mean())
    total = cross_entropy(wide, LABELS)
    for loss, width in zip(losses[1:], (0.5, 0.25), strict=True):
        # The definition, term by term; nothing flows into the widest from here.
        expected = -(wide.detach().softmax(1) * logits(by_hand, width).log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(loss, expected)
        total = total + expected
    total.backward()
    for ours, theirs in zip(gradients(module), gradients(by_hand), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert module.backbone.width == module.classifier.width == 1.0


def test_without_soft_labels_all_learn_the_labels():
    module = build(soft_labels=False)
    losses, _ = module.backward_all(IMAGES, LABELS, [1.0, 0.5])
    torch.testing.assert_close(losses[1], cross_entropy(logits(build(), 0.5), LABELS))


def test_one_width_alone():
    module = build(fixed_width=0.5)
    assert module.backbone.width == module.classifier.width == 0.5
    module.backward_all(IMAGES, LABELS, [0.5])
    assert module.backbone.width == 0.5
    conv = module.backbone.conv1.weight.grad
    assert conv is not None and conv[:8].any() and not conv[8:].any()


def test_what_decays():
    torch.manual_seed(0)
    module = USNet(slimmable_mobilenet_v2(num_classes=None, stem="cifar"), USNetConfig(weight_decay=0.1), 3)
    decays, stays = module.configure_optimizers().param_groups
    assert (decays["weight_decay"], stays["weight_decay"]) == (0.1, 0.0)
    depthwise = [m for m in module.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert depthwise and all(any(m.weight is p for p in stays["params"]) for m in depthwise)
    assert all(p.ndim > 1 for p in decays["params"])
    assert sum(p.ndim > 1 for p in stays["params"]) == len(depthwise)
    assert len(decays["params"]) + len(stays["params"]) == len(list(module.parameters()))


@pytest.mark.parametrize("width", [0.25, 1.0])
def test_classifiers_read_all_features_that_do_not_narrow(width: float):
    module = USNet(slimmable_mobilenet_v2(num_classes=None, stem="cifar"), USNetConfig(), 3)
    module._set_width(width)
    assert module.classifier.shape_now == (1280, 3)
