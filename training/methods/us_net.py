"""US-Net: one slimmable network learns from labels at many widths at once."""

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gatedkernels.nn import SlimmableLinear, set_width
from gatedkernels.training.config import USNetConfig
from gatedkernels.training.schedules import warmup_line
from gatedkernels.training.width_sampling import widths_of_step


class USNet(pl.LightningModule):
    """Universally slimmable networks with in-place distillation.

    In an iteration the widest network learns the labels, and the narrower ones what the widest answers; the gradients
    of all widths make one step. With ``config.fixed_width`` there is that one width, which learns the labels.

    Args:
        backbone: A slimmable network; ``backbone(x)`` has ``num_features`` features at full width, and fewer at others
            if ``features_narrow``. Its batch normalisations should use batch statistics, as with
            ``track_running_stats=False``.
        config: The run.
        num_classes: Classes of the images.

    Source:
        Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques", ICCV 2019.
    """

    def __init__(self, backbone: nn.Module, config: USNetConfig, num_classes: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.backbone = backbone
        self.classifier = make_classifier(backbone, num_classes)
        self._set_width(config.fixed_width or 1.0)

    def configure_optimizers(self) -> torch.optim.SGD:
        """Make SGD with Nesterov's momentum; normalisations, biases and depthwise filters do not decay."""
        config = self.config
        decays = {
            module.weight
            for module in self.modules()
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        }
        learns = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [each for each in learns if each in decays], "weight_decay": config.weight_decay},
            {"params": [each for each in learns if each not in decays], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, config.lr, momentum=config.momentum, nesterov=config.momentum > 0)

    def on_train_epoch_start(self) -> None:
        """Set the learning rate of the epoch."""
        config = self.config
        factor = warmup_line(self.current_epoch, epochs=config.epochs, warmup_epochs=config.warmup_epochs)
        for group in self.optimizers(use_pl_optimizer=False).param_groups:
            group["lr"] = config.lr * factor

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Take one step for all widths on images and their labels."""
        images, labels = batch[0].to(memory_format=torch.channels_last), batch[1]
        widths = widths_of_step(self.config, self.current_epoch, self.global_step)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        losses, accuracy = self.backward_all(images, labels, widths)
        optimizer.step()
        self.log("loss", losses[0], prog_bar=True)
        self.log_dict({"narrowest": losses[-1], "width": widths[-1], "accuracy": accuracy})
        self.log("lr", optimizer.param_groups[0]["lr"])
        return {"loss": torch.stack(losses).mean()}

    def backward_all(self, images: Tensor, labels: Tensor, widths: Sequence[float]) -> tuple[list[Tensor], Tensor]:
        """Add up the gradients of all widths.

        Args:
            images: Shape (N, 3, H, W).
            labels: Classes, int64, shape (N,).
            widths: The widths, the widest first.

        Returns:
            The losses of all widths, the widest first, and how many images of the batch it classifies correctly.
        """
        losses, answers = [], []
        for width in widths:
            self._set_width(width)
            logits = self.classifier(self.backbone(images)).float()
            answers.append(logits.detach())
            # The first answers teach the others: probabilities at temperature 1.
            teaches = labels if len(answers) == 1 or not self.config.soft_labels else answers[0].softmax(1)
            loss = F.cross_entropy(logits, teaches)
            losses.append(loss.detach())
            self.manual_backward(loss)
        self._set_width(self.config.fixed_width or 1.0)
        return losses, (answers[0].argmax(1) == labels).float().mean()

    def _set_width(self, width: float) -> None:
        set_width(self.backbone, width)
        set_width(self.classifier, width)


def make_classifier(backbone: nn.Module, num_classes: int) -> SlimmableLinear:
    """Build the classifier of a slimmable backbone: its inputs narrow where the features do."""
    features, narrows = int(backbone.num_features), bool(backbone.features_narrow)  # type: ignore[arg-type]
    return SlimmableLinear(features, num_classes, slice_in=narrows, slice_out=False)
