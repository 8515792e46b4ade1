"""Normalisations that serve any width."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, layer_norm

from gatedkernels._checks import check_number, check_sizes
from gatedkernels.nn.inputs import check_normalisable
from gatedkernels.nn.slimmable import Slimmable, channels_at, check_width, check_widths

_STATISTICS = "running_mean", "running_var", "num_batches_tracked"
_PREFIX = "at_"  # of what holds the statistics of a narrow width


def width_label(width: float) -> str:
    """The name of a width where dots are not allowed.

    Example:
        >>> width_label(0.25), width_label(1.0)
        ('0_25', '1')
    """
    return f"{width:g}".replace(".", "_")


class _SlicedFeatures(Slimmable):
    """A layer of as many channels as belong to the width."""

    def _init_width(self, channels: int, is_sliced: bool, ratio: float, divisor: int) -> None:
        check_number("ratio", ratio, above=0)
        check_sizes(divisor=divisor)
        self.full, self.is_sliced, self.ratio, self.divisor = channels, is_sliced, ratio, divisor
        self.set_width(1.0)

    @property
    def channels_now(self) -> int:
        """Channels at the present width."""
        return self._channels_at(self.width)

    def _channels_at(self, width: float) -> int:
        return channels_at(self.full, width, self.ratio, self.divisor) if self.is_sliced else self.full


class _Statistics(nn.Module):
    """What a narrow width needs in evaluation, under the names of `nn.BatchNorm2d`.

    A module by itself, and as long as at full width: torch.compile makes one graph for all such modules, where it would
    make one for every name, and for every length, of a width's own buffers.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros_like(like))
        self.register_buffer("running_var", torch.ones_like(like))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64, device=like.device))


class SlimmableBatchNorm2d(_SlicedFeatures, nn.BatchNorm2d):
    """Batch normalisation of any width: one scale and shift for all, statistics for each.

    It normalises as many channels as its input has, the first ones; where it has statistics, these are its width's. In
    training it uses the batch's statistics at every width, and keeps a running average of them at full width, under the
    usual names. What other widths need in evaluation, `gatedkernels.calibrate_norms` estimates after training, into
    buffers of their own (``at_0_25.running_mean``); a state dict brings them along.

    Args:
        num_features: Channels at full width.
        eps: Added to the variance.
        momentum: Of the running average; None: the average of all batches.
        track_running_stats: Whether there are statistics; without, evaluation uses those of its batch too, as US3L's
            pre-training does.
        is_sliced: Whether the channels narrow with the width; not those of a last layer, whose statistics still do.
        ratio: How many times as many channels as the layer that they expand, whose number is rounded.
        divisor: Numbers of channels are rounded to multiples of it.

    Raises:
        TypeError: If a number is none.
        ValueError: If a size is not positive, or ``momentum`` does not lie in [0, 1].

    Source:
        Yu et al., "Universally Slimmable Networks and Improved Training Techniques", ICCV 2019 (statistics after
        training); Cao et al., US3L, CVPR 2023 (no statistics in training).

    Example:
        >>> norm = SlimmableBatchNorm2d(16)
        >>> norm.set_width(0.5)
        >>> norm(torch.ones(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        track_running_stats: bool = True,
        is_sliced: bool = True,
        ratio: float = 1,
        divisor: int = 8,
    ) -> None:
        check_sizes(num_features=num_features)
        check_number("eps", eps, above=0)
        check_number("momentum", momentum, at_least=0, at_most=1, optional=True)
        nn.BatchNorm2d.__init__(self, num_features, eps, momentum, track_running_stats=track_running_stats)
        self._init_width(num_features, is_sliced, ratio, divisor)

    def set_width(self, width: float) -> None:
        """Use the statistics that belong to ``width``, in (0, 1]."""
        super().set_width(width)
        self._is_full = self.width == 1
        self._shape = torch.empty(self.channels_now, 0)  # as in layers with weights: a number that graphs do not keep
        # Statistics of a narrow network are those that calibration asked for, not what training comes across.
        self._averages = self.track_running_stats and self._is_full
        self._find_statistics()

    def set_widths(self, widths: tuple[float, ...]) -> None:
        """Normalise every sample of a batch by the statistics of its width; zeros stay behind its channels.

        In evaluation mode, in which a batch's samples have nothing to do with one another.
        """
        self.set_width(1.0)
        self.sample_widths = tuple(map(check_width, widths))

    def _find_statistics(self) -> None:
        """Hold those of the present width, if it is narrow and there are any; in a tuple, which makes no submodule."""
        found = None if self._is_full else self._modules.get(_PREFIX + width_label(self.width))
        self._narrow: tuple[nn.Module, ...] = () if found is None else (found,)

    def start_statistics(self) -> None:
        """Begin new statistics of the present width; training mode averages them until a width is set again."""
        new = _Statistics(self.weight.detach()).eval()
        if self._is_full:
            self._buffers.update(new._buffers)
        else:
            self.add_module(_PREFIX + width_label(self.width), new)
            self._find_statistics()
        self._averages = True

    def statistics(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Mean, variance and number of batches at the present width; None where there are none."""
        if not self._is_full and not self._narrow:
            return None, None, None
        held: Any = self if self._is_full else self._narrow[0]
        if held.running_mean is None:
            return None, None, None
        channels = self._shape.shape[0]
        return held.running_mean[:channels], held.running_var[:channels], held.num_batches_tracked

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images (N, C, H, W) of up to ``num_features`` channels.

        Raises:
            TypeError: If ``x`` is no floating tensor, or one of a wider dtype than the layer's.
            ValueError: If ``x`` has another number of dimensions, more channels, or others than there are statistics
                for, or this is evaluation and there are no statistics for this width.
        """
        check_normalisable(x, self.weight)
        if x.ndim != 4 or x.shape[1] > self.num_features:
            raise ValueError(f"x must have shape (N, C, H, W) with C up to {self.num_features}, got {tuple(x.shape)}")
        if self.sample_widths:
            return self._normalise_each(x)
        channels = x.shape[1]
        weight, bias = self.weight[:channels], self.bias[:channels]
        if not self.track_running_stats or (self.training and not self._averages):
            return batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        mean, var, count = self.statistics()
        if mean is None:
            raise ValueError(self._missing(self.width))
        self._check_channels(x, mean.shape[0])
        momentum = self.momentum
        if self.training:
            assert count is not None
            count.add_(1)
            momentum = 1.0 / float(count) if momentum is None else momentum
        return batch_norm(x, mean, var, weight, bias, self.training, momentum or 0.0, self.eps)

    def _check_channels(self, x: Tensor, channels: int) -> None:
        if x.shape[1] != channels:
            of = self._describe_width()
            raise ValueError(f"x must have {channels} channels, as there are statistics at {of}, got {tuple(x.shape)}")

    def _normalise_each(self, x: Tensor) -> Tensor:
        """Every sample by a scale and a shift of its own, both zero behind its channels."""
        self.check_samples(x)
        self._check_channels(x, self.num_features)
        if self.training:
            raise ValueError(
                f"width must be one number in training, got one for each of {len(self.sample_widths)} samples"
            )
        kinds = list(dict.fromkeys(self.sample_widths))
        factors = torch.stack([self._scale_and_shift(width) for width in kinds])
        which = torch.tensor([kinds.index(width) for width in self.sample_widths], device=x.device)
        scale, shift = factors.to(x.dtype)[which, :, :, None, None].unbind(1)
        return torch.addcmul(shift, x, scale)

    def _scale_and_shift(self, width: float) -> Tensor:
        """Shape (2, num_features)."""
        held: Any = self if width == 1 else self._modules.get(_PREFIX + width_label(width))
        if not self.track_running_stats:
            raise ValueError("width must be one number for normalisations without statistics, got one for each sample")
        if held is None or held.running_mean is None:
            raise ValueError(self._missing(width))
        scale = self.weight * (held.running_var + self.eps).rsqrt()
        both = torch.stack([scale, self.bias - held.running_mean * scale])
        beyond = torch.arange(self.num_features, device=both.device) >= self._channels_at(width)
        return both.masked_fill(beyond, 0)

    @staticmethod
    def _missing(width: float) -> str:
        return f"width must have statistics, got {width:g} without: gatedkernels.calibrate_norms estimates them"

    def sliced(self) -> nn.BatchNorm2d:
        """Make an ordinary batch normalisation of the present width, with copied parameters and statistics.

        In training mode a width without statistics gets new ones.

        Raises:
            ValueError: If this is evaluation mode and there are no statistics for this width.
        """
        mean, var, count = self.statistics()
        if self.track_running_stats and mean is None and not self.training:
            raise ValueError(self._missing(self.width))
        tracks, device = self.track_running_stats, self.weight.device
        options: dict[str, Any] = {"track_running_stats": tracks, "device": device, "dtype": self.weight.dtype}
        norm = nn.BatchNorm2d(self.channels_now, self.eps, self.momentum, **options)
        with torch.no_grad():
            norm.weight.copy_(self.weight[: self.channels_now])
            norm.bias.copy_(self.bias[: self.channels_now])
            for name, value in zip(_STATISTICS, (mean, var, count), strict=True):
                if value is not None:
                    norm.get_buffer(name).copy_(value)
        return norm.train(self.training)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Keep statistics of the widths that a state dict brings, and of no others: they belong to other weights."""
        brought = {key.removeprefix(prefix).split(".")[0] for key in state_dict if key.startswith(prefix + _PREFIX)}
        for name in [name for name in self._modules if name not in brought and f"{prefix}weight" in state_dict]:
            del self._modules[name]
        for name in sorted(brought - self._modules.keys()):
            self.add_module(name, _Statistics(self.weight.detach()).train(self.training))
        self._find_statistics()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Say what the parts do not show."""
        return f"{super().extra_repr()}, {self._describe_width()}"


class SwitchableBatchNorm2d(_SlicedFeatures):
    """Batch normalisation for a fixed list of widths, each with a scale, a shift and statistics of its own.

    Args:
        num_features: Channels at full width.
        widths: The widths there are.
        is_sliced: Whether the channels narrow with the width.
        ratio: How many times as many channels as the layer that they expand, whose number is rounded.
        divisor: Numbers of channels are rounded to multiples of it.

    Raises:
        TypeError: If a number is none.
        ValueError: If there are no widths, one does not lie in (0, 1], or a size is not positive.

    Source:
        Yu et al., "Slimmable Neural Networks", ICLR 2019.

    Example:
        >>> norm = SwitchableBatchNorm2d(16, [0.5, 1.0])
        >>> norm.set_width(0.5)
        >>> norm(torch.ones(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        num_features: int,
        widths: Sequence[float],
        *,
        is_sliced: bool = True,
        ratio: float = 1,
        divisor: int = 8,
    ) -> None:
        super().__init__()
        check_sizes(num_features=num_features, divisor=divisor)
        check_number("ratio", ratio, above=0)
        check_widths(widths)
        self.widths = tuple(sorted({check_width(width) for width in widths}))
        self.norms = nn.ModuleDict()
        self.width = self.widths[-1]
        self.full, self.is_sliced, self.ratio, self.divisor = num_features, is_sliced, ratio, divisor
        for width in self.widths:
            self.set_width(width)
            self.norms[width_label(width)] = nn.BatchNorm2d(self.channels_now)

    def set_width(self, width: float) -> None:
        """Switch to another width.

        Raises:
            ValueError: If it is none of the list.
        """
        if width not in self.widths:
            raise ValueError(f"width must be one of {', '.join(f'{w:g}' for w in self.widths)}, got {width}")
        super().set_width(width)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images (N, C, H, W) of as many channels as belong to the width.

        Raises:
            TypeError: If ``x`` is no floating tensor, or one of a wider dtype than the layer's.
            ValueError: If ``x`` has another number of dimensions or channels, or lies on another device.
        """
        norm = cast(nn.BatchNorm2d, self.norms[width_label(self.width)])
        check_normalisable(x, norm.weight)
        if x.ndim != 4 or x.shape[1] != norm.num_features:
            raise ValueError(f"x must have shape (N, {norm.num_features}, H, W), got {tuple(x.shape)}")
        return norm(x)

    def sliced(self) -> nn.Module:
        """Copy the normalisation of the present width."""
        return copy.deepcopy(self.norms[width_label(self.width)])


class SlimmableLayerNorm(_SlicedFeatures, nn.LayerNorm):
    """Layer normalisation of as many channels as its input has: the first ones of its scale and shift.

    Args:
        features: Channels at full width.
        eps: Added to the variance.
        divisor: Numbers of channels are rounded to multiples of it.

    Raises:
        TypeError: If a number is none.
        ValueError: If it is not positive.
    """

    def __init__(self, features: int, eps: float = 1e-5, *, divisor: int = 8) -> None:
        check_sizes(features=features)
        check_number("eps", eps, above=0)
        nn.LayerNorm.__init__(self, features, eps)
        self._init_width(features, True, 1, divisor)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x``, shape (…, C) with C up to ``features``.

        Raises:
            TypeError: If ``x`` is no floating tensor, or one of a wider dtype than the layer's.
            ValueError: If ``x`` has more channels, or lies on another device.
        """
        check_normalisable(x, self.weight)
        channels = x.shape[-1]
        if channels > len(self.weight):
            raise ValueError(f"x must have at most {len(self.weight)} channels, got {tuple(x.shape)}")
        return layer_norm(x, (channels,), self.weight[:channels], self.bias[:channels], self.eps)

    def sliced(self) -> nn.LayerNorm:
        """Make an ordinary layer normalisation of the present width, with copied parameters."""
        norm = nn.LayerNorm(self.channels_now, self.eps, device=self.weight.device, dtype=self.weight.dtype)
        with torch.no_grad():
            norm.weight.copy_(self.weight[: self.channels_now])
            norm.bias.copy_(self.bias[: self.channels_now])
        return norm.train(self.training)
