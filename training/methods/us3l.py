"""US3L: one slimmable network learns at many widths at once, without labels."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatedkernels.nn import set_width
from gatedkernels.training.config import US3LConfig
from gatedkernels.training.contrastive import (
    deviation,
    info_nce,
    negative_cosine,
    nt_xent,
    queue_nce,
    similarity_distillation,
)
from gatedkernels.training.group_penalty import group_penalty, ramped
from gatedkernels.training.heads import projector, two_layers
from gatedkernels.training.schedules import cosine_between, warmup_cosine
from gatedkernels.training.width_sampling import widths_of_step

# Losses of which a predictor of the network's own side is part.
_WITH_PREDICTOR = ("absolute", "keys")
_WITH_QUEUE = ("queue", "similarities")


class US3L(pl.LightningModule):
    """Universally slimmable self-supervised learning.

    In an iteration the widest network goes first, with the base loss between two views. The narrower ones follow, each
    drawn to what the momentum encoder, always at full width, makes of the other view. Each width makes a step of its
    own (the targets are those from before the first), or all make one. The momentum encoder follows once an iteration.

    The methods that US3L is compared with are settings of it: see `gatedkernels.training.recipes`. With
    ``config.fixed_width`` there is that one width, momentum encoder included.

    Args:
        backbone: A slimmable network; ``backbone(x)`` has ``num_features`` features at full width, and fewer at others
            if ``features_narrow``. Its batch normalisations should use batch statistics, as with
            ``track_running_stats=False``.
        config: The run.
        teacher: Backbone and head that stay as they are and take the momentum encoder's place, as in SEED; their
            normalisations use batch statistics too. Its embeddings are as wide as ``config.embedding``.

    Source:
        Cao et al., "Three Guidelines You Should Know for Universally Slimmable Self-Supervised Learning", CVPR 2023
        (the steps, the targets and the penalty are those of the authors' code).
    """

    def __init__(
        self, backbone: nn.Module, config: US3LConfig, teacher: tuple[nn.Module, nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.backbone = backbone
        size = config.embedding
        self.head = projector(backbone, config)
        predicts = config.predictor and config.base in _WITH_PREDICTOR
        self.predictor = two_layers(size, config.hidden) if predicts else nn.Identity()
        # Where a predictor stands before the base loss, the narrow networks use it too, or one of their own.
        self.auxiliary = two_layers(size, config.hidden) if config.auxiliary_head else self.predictor
        self._set_width(config.fixed_width or 1.0)
        self.teacher: nn.ModuleList | None = None
        self.teacher_is_frozen = teacher is not None
        if teacher is not None:
            self.teacher = nn.ModuleList(teacher).requires_grad_(False)
        elif config.base_momentum or config.distill_momentum:
            self.teacher = copy.deepcopy(nn.ModuleList([self.backbone, self.head])).requires_grad_(False)
        if config.base in _WITH_QUEUE:
            self.register_buffer("queue", F.normalize(torch.randn(config.queue, size), dim=1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make SGD without weight decay, for `group_penalty` takes its place, or AdamW."""
        config = self.config
        learns = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if config.optimizer == "adamw":
            return torch.optim.AdamW(learns, config.lr, weight_decay=config.weight_decay)
        return torch.optim.SGD(learns, config.lr, momentum=config.momentum)

    def on_train_epoch_start(self) -> None:
        """Set the learning rate of the epoch."""
        config = self.config
        factor = warmup_cosine(self.current_epoch, epochs=config.epochs, warmup_epochs=config.warmup_epochs)
        for group in self._optimizer().param_groups:
            group["lr"] = config.lr * factor

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Take the steps of all widths on two views of the same images."""
        views = [view.to(memory_format=torch.channels_last) for view in batch[:2]]
        widths = widths_of_step(self.config, self.current_epoch, self.global_step)
        losses, spread = self.iterate(views, widths, self.current_epoch)
        self.log("loss", losses[0], prog_bar=True)
        self.log_dict({"narrowest": losses[-1], "width": widths[-1], "deviation": spread})
        self.log("lr", self._optimizer().param_groups[0]["lr"])
        return {"loss": torch.stack(losses).mean()}

    def iterate(self, views: Sequence[Tensor], widths: Sequence[float], epoch: int) -> tuple[list[Tensor], Tensor]:
        """Take the steps of all widths.

        Args:
            views: Two views of the same images, each of shape (N, 3, H, W).
            widths: The widths, the base first.
            epoch: The zero-based epoch.

        Returns:
            The losses of all widths, the base first, and the `deviation` of the base's embeddings.
        """
        self._follow(epoch)
        taught = self._teach(views)
        base: list[Tensor] = []
        losses = []
        optimizer = self._optimizer()
        optimizer.zero_grad()
        for i, width in enumerate(widths):
            self._set_width(width)
            embeddings = [self.head(self.backbone(view)) for view in views]
            if i == 0 or self.config.distill == "none":
                loss = self._base_loss(embeddings, taught)
                base = base or [embedding.detach() for embedding in embeddings]
            else:
                targets = taught if self.config.distill_momentum else base
                loss = self._crosswise(self.config.distill, [self.auxiliary(each) for each in embeddings], targets)
            losses.append(loss.detach())
            self.manual_backward(loss + self._penalty(epoch, with_auxiliary=i > 0))
            if i + 1 == len(widths) or not self.config.sum_gradients:
                # Lightning counts one step an iteration, whatever the number of widths.
                (self.optimizers() if i + 1 == len(widths) else optimizer).step()
                optimizer.zero_grad()
        self._set_width(self.config.fixed_width or 1.0)
        if self.config.base in _WITH_QUEUE:
            self._enqueue((taught or base)[1])
        return losses, deviation(base[0])

    def _set_width(self, width: float) -> None:
        set_width(self.backbone, width)
        set_width(self.head, width)

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.optimizers(use_pl_optimizer=False)

    def _base_loss(self, embeddings: Sequence[Tensor], taught: Sequence[Tensor]) -> Tensor:
        config = self.config
        if config.base == "relative" and not config.base_momentum:
            return nt_xent(embeddings[0], embeddings[1], config.temperature)  # both sides learn
        targets = taught if config.base_momentum else [embedding.detach() for embedding in embeddings]
        if config.base == "queue":
            return queue_nce(embeddings[0], targets[1], self.get_buffer("queue"), config.temperature)
        if config.base == "similarities":
            options = (self.get_buffer("queue"), config.temperature, config.teacher_temperature)
            both = zip(embeddings, targets, strict=True)
            return torch.stack([similarity_distillation(own, taught, *options) for own, taught in both]).mean()
        return self._crosswise(config.base, [self.predictor(each) for each in embeddings], targets)

    def _crosswise(self, name: str, predictions: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """The mean over the views of the loss between each and the target of the other."""
        losses: dict[str, Any] = {"relative": nt_xent, "absolute": negative_cosine, "keys": info_nce}
        loss = losses[name]
        extra = () if name == "absolute" else (self.config.temperature,)
        return (loss(predictions[0], targets[1], *extra) + loss(predictions[1], targets[0], *extra)) / 2

    def _penalty(self, epoch: int, *, with_auxiliary: bool) -> Tensor:
        config = self.config
        if config.optimizer == "adamw":
            return torch.zeros((), device=self.device)
        strength = ramped(epoch, config.epochs, config.group_strength, config.group_warmup_epochs)
        modules: list[nn.Module] = [self.backbone, self.head, self.predictor]
        if with_auxiliary and config.auxiliary_head:
            modules.append(self.auxiliary)
        parameters: Iterable[Tensor] = (p for module in modules for p in module.parameters() if p.requires_grad)
        return group_penalty(parameters, config.weight_decay / 2, strength)

    @torch.no_grad()
    def _teach(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Embed the views by the momentum encoder; nothing where there is none."""
        if self.teacher is None:
            return []
        backbone, head = self.teacher
        return [head(backbone(view)) for view in views]

    @torch.no_grad()
    def _follow(self, epoch: int) -> None:
        """Move the momentum encoder towards the network."""
        if self.teacher is None or self.teacher_is_frozen:
            return
        config = self.config
        kept = config.ema
        if config.ema_end is not None:
            kept = cosine_between(config.ema, config.ema_end, epoch, config.epochs)
        online = [*self.backbone.parameters(), *self.head.parameters()]
        for mean, parameter in zip(self.teacher.parameters(), online, strict=True):
            mean.lerp_(parameter, 1 - kept)

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        """Put new targets before the earlier ones, and forget the oldest."""
        queue = self.get_buffer("queue")
        queue.copy_(torch.cat([F.normalize(keys.float(), dim=1), queue])[: len(queue)])
