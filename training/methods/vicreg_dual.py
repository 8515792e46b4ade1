"""VICReg-Dual-Gating: a dense and a gated branch of one network learn from each other, without labels."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from gatedkernels.nn import ConvCost, bound_loss, kept_fraction, sparsity_loss
from gatedkernels.training.config import TrainConfig
from gatedkernels.training.heads import Expander
from gatedkernels.training.lars import LARS
from gatedkernels.training.losses import VICRegLoss
from gatedkernels.training.schedules import warmup_cosine
from gatedkernels.training.seeds import derived_seed


class VICRegDual(pl.LightningModule):
    """One view through the gated branch, the other through the dense one; VICReg pulls the two together.

    The loss is VICReg + sparsity + bound, the last two on the gates of the first view. Nothing is detached and nothing
    is symmetrised: the first view is always the gated one. The gates' noise is a function of the seed and the step.

    Args:
        backbone: Called as ``backbone(x, branch="gated" | "dense", return_gates=True)``, it returns features of shape
            (N, ``num_features``) and the gates by name; parameters of gates have ``.gate`` in their name.
        costs: What the backbone's layers cost, from `gatedkernels.nn.gated_flops`.
        config: The run.

    Source:
        Krishna et al., "Unifying Synergies between Self-supervised Learning and Dynamic Computation", BMVC 2023
        (algorithm 1; the bound loss, the weights 25/25/1 and LARS are those of the authors' code).
    """

    def __init__(self, backbone: nn.Module, costs: Sequence[ConvCost], config: TrainConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.expander = Expander(int(backbone.num_features), config.embedding)  # type: ignore[arg-type]
        self.criterion = VICRegLoss(config.invariance, config.variance, config.covariance)
        self.costs = costs
        self.config = config

    def configure_optimizers(self) -> LARS:
        """Put gates into a group without weight decay, and everything else into the other."""
        named = list(self.named_parameters())
        gates = [parameter for name, parameter in named if ".gate" in name]
        rest = [parameter for name, parameter in named if ".gate" not in name]
        config = self.config
        groups = [{"params": rest}, {"params": gates, "weight_decay": 0.0}]
        return LARS(groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay, trust=config.trust)

    def on_train_epoch_start(self) -> None:
        """Set the learning rate of the epoch."""
        config = self.config
        factor = warmup_cosine(self.current_epoch, epochs=config.epochs, warmup_epochs=config.warmup_epochs)
        for group in self.optimizers().param_groups:
            group["lr"] = config.lr * factor

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Seed the gates' noise of the step."""
        torch.manual_seed(derived_seed("noise", self.config.seed, self.global_step))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss of two views of the same images."""
        first, second = (view.to(memory_format=torch.channels_last) for view in batch)
        losses = self.losses(first, second, self.current_epoch)
        self.log("loss", losses["loss"].detach(), prog_bar=True)
        self.log_dict({name: value.detach() for name, value in losses.items() if name != "loss"})
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        return losses["loss"]

    def losses(self, first: Tensor, second: Tensor, epoch: int) -> dict[str, Tensor]:
        """Compare two views.

        Args:
            first: The gated branch's view, shape (N, 3, H, W).
            second: The dense branch's view of the same images.
            epoch: The zero-based epoch; while it is below ``gate_warmup_epochs`` both branches are dense.

        Returns:
            The total under "loss", its terms, and the fraction of FLOPs kept under "kept" once the gates are at work.
        """
        config = self.config
        gating_epoch = epoch - config.gate_warmup_epochs
        branch = "dense" if gating_epoch < 0 else "gated"
        features, gates = self.backbone(first, branch=branch, return_gates=True)
        other_features = self.backbone(second, branch="dense")
        losses = self.criterion(self.expander(features), self.expander(other_features))
        if gating_epoch < 0:
            return losses
        kept = kept_fraction(self.costs, gates)
        sparsity = sparsity_loss(kept, config.budget, config.sparsity_weight)
        bound = bound_loss(gates, config.budget, gating_epoch, config.bound_decay, config.bound_weight)
        vicreg = losses.pop("loss")
        return {
            "loss": vicreg + sparsity + bound,
            "vicreg": vicreg,
            **losses,
            "sparsity": sparsity,
            "bound": bound,
            "kept": kept,
        }
