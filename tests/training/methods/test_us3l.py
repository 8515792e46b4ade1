"""US3L's iteration is the paper's: which width goes when, against which targets, and what makes a step."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatedkernels.models import slimmable_resnet18
from gatedkernels.training.config import US3LConfig
from gatedkernels.training.contrastive import negative_cosine, nt_xent
from gatedkernels.training.methods import US3L

SMALL: dict[str, Any] = {"hidden": 16, "embedding": 8, "epochs": 4, "lr": 0.05}


def build(**options: Any) -> US3L:
    torch.manual_seed(0)
    backbone = slimmable_resnet18(num_classes=None, stem="cifar", channels=16, track_running_stats=False)
    return US3L(backbone, US3LConfig(**{**SMALL, **options}))


class Steps(US3L):
    """Takes its steps without a trainer, and notes them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sgd = self.configure_optimizers()
        self.taken: list[list[Tensor | None]] = []
        step = self.sgd.step

        def note() -> None:
            self.taken.append([None if p.grad is None else p.grad.clone() for p in self.backbone.parameters()])
            step()

        self.sgd.step = note  # type: ignore[assignment]

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return self.sgd

    def manual_backward(self, loss: Tensor, *args: Any, **options: Any) -> None:
        loss.backward()


def alone(**options: Any) -> Steps:
    torch.manual_seed(0)
    backbone = slimmable_resnet18(num_classes=None, stem="cifar", channels=16, track_running_stats=False)
    return Steps(backbone, US3LConfig(**{**SMALL, **options}))


VIEWS = [torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


def test_each_width_makes_a_step_or_all_make_one():
    module = alone()
    losses, _ = module.iterate(VIEWS, [1.0, 0.5, 0.25], epoch=3)
    assert len(losses) == len(module.taken) == 3
    assert module.backbone.width == 1.0
    summed = alone(sum_gradients=True)
    summed.iterate(VIEWS, [1.0, 0.5, 0.25], epoch=3)
    assert len(summed.taken) == 1


def test_losses_of_the_final_recipe():
    module = alone(weight_decay=0)
    with torch.no_grad():
        taught = [module.head(module.backbone(view)) for view in VIEWS]  # the momentum encoder begins as a copy
    losses, _ = module.iterate(VIEWS, [1.0], epoch=0)
    expected = (nt_xent(taught[0], taught[1], 0.5) + nt_xent(taught[1], taught[0], 0.5)) / 2
    torch.testing.assert_close(losses[0], expected)

    again = alone(weight_decay=0, lr=1e-9)
    narrow = again.iterate(VIEWS, [1.0, 0.5], epoch=0)[0][1]
    with torch.no_grad():
        again.backbone.set_width(0.5)
        for layer in again.head.layers[:1]:
            layer.set_width(0.5)
        heads = [again.auxiliary(again.head(again.backbone(view))) for view in VIEWS]
    crosswise = (negative_cosine(heads[0], taught[1]) + negative_cosine(heads[1], taught[0])) / 2
    torch.testing.assert_close(narrow, crosswise)


def test_the_momentum_encoder_follows_once_an_iteration_at_full_width():
    module = alone(ema=0.9)
    assert module.teacher is not None
    before = [p.clone() for p in module.teacher.parameters()]
    online = [p.detach().clone() for p in (*module.backbone.parameters(), *module.head.parameters())]
    for parameter in online:
        assert any(torch.equal(parameter, mean) for mean in before)
    module.iterate(VIEWS, [1.0, 0.25], epoch=3)
    moved = [p.detach().clone() for p in (*module.backbone.parameters(), *module.head.parameters())]
    module.iterate(VIEWS, [1.0], epoch=3)
    for mean, start, now in zip(module.teacher.parameters(), before, moved, strict=True):
        torch.testing.assert_close(mean, 0.9 * start + 0.1 * now)
        assert not mean.requires_grad
    assert module.teacher[0].width == 1.0


def test_a_narrow_step_teaches_the_first_channels_only():
    module = alone(weight_decay=0)
    module.iterate(VIEWS, [1.0, 0.5], epoch=3)
    full, narrow = (taken[0] for taken in module.taken)
    assert full is not None and narrow is not None
    assert full[8:].any() and narrow[:8].any() and not narrow[8:].any()


@pytest.mark.parametrize("base", ["relative", "absolute", "keys", "queue"])
@pytest.mark.parametrize("distill", ["relative", "absolute", "keys", "none"])
@pytest.mark.parametrize("momentum", [(False, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("auxiliary", [False, True])
def test_every_case_of_the_ablation_runs(base: str, distill: str | None, momentum: tuple[bool, bool], auxiliary: bool):
    options = {"base": base, "distill": distill, "auxiliary_head": auxiliary}
    module = alone(base_momentum=momentum[0], distill_momentum=momentum[1], **options)
    assert (module.teacher is not None) == any(momentum)
    losses, _ = module.iterate(VIEWS, [1.0, 0.25], epoch=3)
    assert all(loss.isfinite() for loss in losses) and len(module.taken) == 2


def test_only_absolute_losses_have_a_predictor():
    assert isinstance(build(base="absolute").predictor, nn.Sequential)
    assert isinstance(build(base="absolute", predictor=False).predictor, nn.Identity)
    assert isinstance(build(base="relative").predictor, nn.Identity)


def test_adamw_decays_by_itself():
    """As MoCo v3 trains vision transformers; the penalty would decay what AdamW scales."""
    module = alone(optimizer="adamw", group_strength=0.0, weight_decay=0.1)
    assert isinstance(module.sgd, torch.optim.AdamW) and module.sgd.param_groups[0]["weight_decay"] == 0.1
    assert module._penalty(0, with_auxiliary=False) == 0


def test_the_momentum_encoder_slows_down_along_a_cosine():
    module = alone(ema=0.9, ema_end=1.0, lr=1e-9)
    assert module.teacher is not None
    for parameter in module.teacher.parameters():
        parameter.data.zero_()
    weight = module.backbone.conv1.weight.detach().clone()
    for epoch, share in ((0, 0.1), (2, 0.1 + 0.9 * 0.05)):  # half of the way after half of the epochs
        module._follow(epoch)
        torch.testing.assert_close(module.teacher[0].conv1.weight, share * weight)


@pytest.mark.parametrize(("narrows", "inputs"), [(True, 64), (False, 128)])
def test_heads_narrow_where_the_features_do(narrows: bool, inputs: int):
    torch.manual_seed(0)
    backbone = slimmable_resnet18(num_classes=None, stem="cifar", channels=16, track_running_stats=False)
    backbone.features_narrow = narrows
    module = US3L(backbone, US3LConfig(**SMALL))
    module._set_width(0.5)
    assert module.head.layers[0].shape_now == (inputs, 16)
