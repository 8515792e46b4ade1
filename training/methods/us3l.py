"""US3L: one slimmable network learns at many widths at once, without labels."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from gatedkernels.nn import set_width
from gatedkernels.training.contrastive import negative_cosine, nt_xent
from gatedkernels.training.group_penalty import group_penalty, ramped
from gatedkernels.training.heads import SlimmableProjector, two_layers
from gatedkernels.training.schedules import warmup_cosine
from gatedkernels.training.seeds import derived_seed
from gatedkernels.training.width_sampling import least_width, sample_widths

Distance = Literal["relative", "absolute"]


@dataclass(frozen=True, kw_only=True)
class US3LOptions:
    """What US3L can be told; the defaults are the final recipe for ResNet-18 on CIFAR.

    The paper's ablation and its slimmable baselines are settings of the first five: US+SimCLR is
    ``distill="relative", auxiliary_head=False, base_momentum=False, distill_momentum=False, dynamic_sampling=False,
    group_strength=0``, US+SimSiam the same with ``base="absolute", distill="absolute"``.

    Attributes:
        base: Loss of the widest network: "relative" (InfoNCE) or "absolute" (cosine, with a predictor).
        distill: Loss of the others against it: the same, or None: each has the base loss by itself.
        auxiliary_head: Whether the others have a head of their own before that loss.
        base_momentum: Whether the base loss's targets come from the momentum encoder.
        distill_momentum: Whether those of the others do; else from the widest network of the iteration.
        passes: Widths in an iteration.
        least: The narrowest width.
        sandwich: Whether the widest and narrowest are always among them.
        dynamic_sampling: Whether the range of widths opens in the course of the run.
        sum_gradients: Whether the gradients of all widths make one step, as in US-Net; else each makes its own.
        group_strength: How much less the decay of each eighth of the channels is than that of the one before.
        group_warmup_epochs: Epochs in which all decay alike.
        temperature: Of the relative losses.
        ema: Share of the momentum encoder that is kept in a step.
        hidden: Width of the heads' hidden layers.
        embedding: Width of the embeddings.
        epochs: Length of the run.
        lr: Base learning rate, which falls along half a cosine.
        momentum: Momentum of SGD.
        weight_decay: Weight decay, as a penalty with groups.
        seed: Decides the widths.
    """

    base: Distance = "relative"
    distill: Distance | None = "absolute"
    auxiliary_head: bool = True
    base_momentum: bool = True
    distill_momentum: bool = True
    passes: int = 3
    least: float = 0.25
    sandwich: bool = True
    dynamic_sampling: bool = True
    sum_gradients: bool = False
    group_strength: float = 0.05
    group_warmup_epochs: int = 0
    temperature: float = 0.5
    ema: float = 0.99
    hidden: int = 2048
    embedding: int = 256
    epochs: int = 400
    lr: float = 0.5
    momentum: float = 0.9
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what no layer or loss does.

        Raises:
            ValueError: If a value is none of its choices or out of range.
        """
        for name, choices in (("base", get_args(Distance)), ("distill", (*get_args(Distance), None))):
            if getattr(self, name) not in choices:
                listed = ", ".join(map(repr, choices))
                raise ValueError(f"{name} must be one of {listed}, got {getattr(self, name)!r}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and below 1, got {self.ema}")
        if self.epochs < 1:
            raise ValueError(f"epochs must be positive, got {self.epochs}")


class US3L(pl.LightningModule):
    """Universally slimmable self-supervised learning.

    In an iteration the widest network goes first, with the base loss between two views. The narrower ones follow, each
    drawn to what the momentum encoder, always at full width, makes of the other view. Each width makes a step of its
    own (the targets are those from before the first), or all make one. The momentum encoder follows once an iteration.

    Source: Cao et al., "Three Guidelines You Should Know for Universally Slimmable Self-Supervised Learning", CVPR 2023
    (the steps, the targets and the penalty are those of the authors' code).

    Args:
        backbone: A slimmable network; ``backbone(x)`` has ``num_features`` features at full width. Its normalisations
            should use batch statistics, as with ``track_running_stats=False``.
        options: The run.
    """

    def __init__(self, backbone: nn.Module, options: US3LOptions) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.options = options
        self.backbone = backbone
        size = options.embedding
        self.head = SlimmableProjector(int(backbone.num_features), options.hidden, size)  # type: ignore[arg-type]
        self.predictor = two_layers(size, options.hidden) if options.base == "absolute" else nn.Identity()
        # Where a predictor stands before the base loss, the narrow networks use it too, or one of their own.
        self.auxiliary = two_layers(size, options.hidden) if options.auxiliary_head else self.predictor
        self.teacher: nn.ModuleList | None = None
        if options.base_momentum or options.distill_momentum:
            self.teacher = copy.deepcopy(nn.ModuleList([self.backbone, self.head])).requires_grad_(False)

    def configure_optimizers(self) -> torch.optim.SGD:
        """Make SGD without weight decay: `group_penalty` takes its place."""
        learns = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(learns, self.options.lr, momentum=self.options.momentum)

    def on_train_epoch_start(self) -> None:
        """Set the learning rate of the epoch."""
        factor = warmup_cosine(self.current_epoch, epochs=self.options.epochs, warmup_epochs=0)
        for group in self._optimizer().param_groups:
            group["lr"] = self.options.lr * factor

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Take the steps of all widths on two views of the same images."""
        views = [view.to(memory_format=torch.channels_last) for view in batch[:2]]
        widths = self.widths(self.current_epoch, self.global_step)
        losses = self.iterate(views, widths, self.current_epoch)
        self.log("loss", losses[0], prog_bar=True)
        self.log_dict({"narrowest": losses[-1], "width": widths[-1], "lr": self._optimizer().param_groups[0]["lr"]})
        return {"loss": torch.stack(losses).mean()}

    def widths(self, epoch: int, step: int) -> list[float]:
        """Draw the widths of an iteration, the base first: a function of seed, epoch and step."""
        options = self.options
        least = least_width(epoch, options.epochs, options.least) if options.dynamic_sampling else options.least
        generator = torch.Generator().manual_seed(derived_seed("widths", options.seed, step))
        return sample_widths(least, options.passes, generator, sandwich=options.sandwich)

    def iterate(self, views: Sequence[Tensor], widths: Sequence[float], epoch: int) -> list[Tensor]:
        """Compute the losses of all widths, the base first, and take their steps; the losses come out."""
        self._follow()
        taught = self._teach(views)
        base: list[Tensor] = []
        losses = []
        optimizer = self._optimizer()
        optimizer.zero_grad()
        for i, width in enumerate(widths):
            set_width(self.backbone, width)
            set_width(self.head, width)
            embeddings = [self.head(self.backbone(view)) for view in views]
            if i == 0 or self.options.distill is None:
                loss = self._base_loss(embeddings, taught)
                base = base or [embedding.detach() for embedding in embeddings]
            else:
                loss = self._distill_loss(embeddings, taught if self.options.distill_momentum else base)
            losses.append(loss.detach())
            self.manual_backward(loss + self._penalty(epoch, with_auxiliary=i > 0))
            if i + 1 == len(widths) or not self.options.sum_gradients:
                # Lightning counts one step an iteration, whatever the number of widths.
                (self.optimizers() if i + 1 == len(widths) else optimizer).step()
                optimizer.zero_grad()
        set_width(self.backbone, 1.0)
        set_width(self.head, 1.0)
        return losses

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.optimizers(use_pl_optimizer=False)

    def _base_loss(self, embeddings: Sequence[Tensor], taught: Sequence[Tensor]) -> Tensor:
        first, second = embeddings
        targets = taught if self.options.base_momentum else embeddings
        if self.options.base == "relative":
            if not self.options.base_momentum:
                return nt_xent(first, second, self.options.temperature)
            return self._crosswise(nt_xent, embeddings, targets)
        return self._crosswise(negative_cosine, [self.predictor(e) for e in embeddings], [t.detach() for t in targets])

    def _distill_loss(self, embeddings: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        loss = nt_xent if self.options.distill == "relative" else negative_cosine
        return self._crosswise(loss, [self.auxiliary(embedding) for embedding in embeddings], targets)

    def _crosswise(self, loss: Any, embeddings: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """The mean over the views of the loss between each and the target of the other."""
        extra = (self.options.temperature,) if loss is nt_xent else ()
        return (loss(embeddings[0], targets[1], *extra) + loss(embeddings[1], targets[0], *extra)) / 2

    def _penalty(self, epoch: int, *, with_auxiliary: bool) -> Tensor:
        options = self.options
        strength = ramped(epoch, options.epochs, options.group_strength, options.group_warmup_epochs)
        modules: list[nn.Module] = [self.backbone, self.head, self.predictor]
        if with_auxiliary and options.auxiliary_head:
            modules.append(self.auxiliary)
        parameters: Iterable[Tensor] = (p for module in modules for p in module.parameters() if p.requires_grad)
        return group_penalty(parameters, options.weight_decay / 2, strength)

    @torch.no_grad()
    def _teach(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Embed the views by the momentum encoder; nothing where there is none."""
        if self.teacher is None:
            return []
        backbone, head = self.teacher
        return [head(backbone(view)) for view in views]

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the momentum encoder towards the network."""
        if self.teacher is None:
            return
        online = [*self.backbone.parameters(), *self.head.parameters()]
        for mean, parameter in zip(self.teacher.parameters(), online, strict=True):
            mean.lerp_(parameter, 1 - self.options.ema)
