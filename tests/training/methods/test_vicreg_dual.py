"""The training step is the paper's: which view goes where, what is shared, what the loss is made of."""

import pytest
import torch

from gatedkernels.nn import bound_loss, kept_fraction, sparsity_loss
from gatedkernels.training.config import TrainConfig
from gatedkernels.training.losses import VICRegLoss
from gatedkernels.training.methods import VICRegDual
from gatedkernels.training.recipes import build_method, make_config


def method(**options: object) -> VICRegDual:
    chosen = {"data": "synthetic", "image_size": 16, "width": 0.0625, "embedding": 8, "seed": 1, **options}
    return build_method(make_config("vicreg-dual", **chosen))


def views() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 16, 16, generator=generator), torch.randn(6, 3, 16, 16, generator=generator)


def test_loss_is_the_sum_of_its_terms():
    first, second = views()
    module = method()
    torch.manual_seed(3)
    losses = module.losses(first, second, epoch=4)

    same = method()
    torch.manual_seed(3)
    features, gates = same.backbone(first, branch="gated", return_gates=True)
    others = same.backbone(second, branch="dense")
    vicreg = VICRegLoss()(same.expander(features), same.expander(others))["loss"]
    kept = kept_fraction(same.costs, gates)
    expected = vicreg + sparsity_loss(kept, 0.3, 5.0) + bound_loss(gates, 0.3, 4, 0.02, 1.0)
    torch.testing.assert_close(losses["loss"], expected)
    torch.testing.assert_close(losses["kept"], kept)


def test_first_view_is_gated_and_second_dense():
    module = method()
    first, second = views()
    calls = []
    module.backbone.register_forward_pre_hook(
        lambda network, args, kwargs: calls.append((args[0] is first, kwargs["branch"])), with_kwargs=True
    )
    module.losses(first, second, epoch=0)
    assert calls == [(True, "gated"), (False, "dense")]


def test_each_branch_updates_its_own_statistics():
    module = method()
    module.losses(*views(), epoch=0)
    counts = {name: int(value) for name, value in module.state_dict().items() if name.endswith("num_batches_tracked")}
    for name, count in counts.items():
        shared = name.startswith(("backbone.bn1", "expander")) or "downsample" in name
        assert count == (2 if shared else 1), name


def test_warmup_leaves_gates_alone():
    module = method(gate_warmup_epochs=2)
    losses = module.losses(*views(), epoch=1)
    assert losses.keys() == {"loss", "invariance", "variance", "covariance"}
    losses["loss"].backward()
    for name, parameter in module.backbone.named_parameters():
        assert (parameter.grad is None) == (".gate" in name or "_gated" in name), name


def test_bound_counts_epochs_after_the_warmup():
    first, second = views()
    bounds = []
    for warmup, epoch in ((0, 3), (2, 5)):
        module = method(gate_warmup_epochs=warmup)
        torch.manual_seed(0)
        bounds.append(module.losses(first, second, epoch)["bound"])
    assert torch.equal(bounds[0], bounds[1])


def test_every_parameter_learns():
    module = method()
    module.losses(*views(), epoch=0)["loss"].backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_gates_are_not_decayed():
    module = method()
    rest, gates = module.configure_optimizers().param_groups
    assert gates["weight_decay"] == 0
    assert rest["weight_decay"] == 1e-4
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert all(".gate" in names[id(parameter)] for parameter in gates["params"])
    assert not any(".gate" in names[id(parameter)] for parameter in rest["params"])
    assert len(gates["params"]) + len(rest["params"]) == len(names)


@pytest.mark.parametrize(("budget", "sign"), [(0.05, 1), (1.0, -1)], ids=["closes", "opens"])
def test_budget_moves_the_gates(budget: float, sign: int):
    """With nothing but the sparsity loss, a step of gradient descent changes the kept share towards the budget."""
    module = method(budget=budget, invariance=0.0, variance=0.0, covariance=0.0, bound_weight=0.0)
    torch.manual_seed(0)
    before = module.losses(*views(), epoch=0)
    before["loss"].backward()
    with torch.no_grad():
        for name, parameter in module.backbone.named_parameters():
            if ".gate" in name:
                parameter -= 0.5 * parameter.grad
    torch.manual_seed(0)
    after = module.losses(*views(), epoch=0)
    assert sign * float((before["kept"] - after["kept"]).detach()) > 0


def test_configuration_reaches_the_loss():
    config = TrainConfig(invariance=1.0, variance=2.0, covariance=3.0, embedding=8, width=0.0625)
    assert build_method(config).criterion.weights == {"invariance": 1.0, "variance": 2.0, "covariance": 3.0}
