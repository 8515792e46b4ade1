"""A network's first convolution for inference, and the pooling behind it."""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d

from gatedkernels.nn.costs import ConvCost, ConvShape, conv_cost, output_size
from gatedkernels.nn.fold import fold_norm
from gatedkernels.nn.packed import NATIVE, Packed, check_images, computed
from gatedkernels.ops.packed import pack_stem, pack_stem_tiles, unpack_stem

_MOST_CHANNELS = 8  # beyond, the taps of one row of the window are long enough for the general kernels


class PackedPool(Packed):
    """The mean of an image's pixels."""

    @staticmethod
    def serves(module: nn.Module) -> bool:
        """Whether a module is one of these: an average over the whole image, and a flattening."""
        if not isinstance(module, nn.Sequential) or len(module) != 2:
            return False
        pool, flatten = module
        is_global = isinstance(pool, nn.AdaptiveAvgPool2d) and pool.output_size in (1, (1, 1))
        return is_global and isinstance(flatten, nn.Flatten) and (flatten.start_dim, flatten.end_dim) == (1, -1)

    def forward(self, x: Tensor) -> Tensor:
        """Pool images (N, C, H, W) to (N, C)."""
        return torch.ops.gatedkernels.packed_pool.default(x) if x.dtype in NATIVE else x.mean((2, 3))


class PackedStem(Packed):
    """A convolution of few input channels and any window, with its normalisation, its ReLU and its pooling if any."""

    weight: Tensor
    bias: Tensor
    tiles: Tensor | None

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None, relu: bool, pool: bool) -> None:
        super().__init__()
        conv, self.stored = computed(conv)
        self.shape = ConvShape.of(conv)
        self.relu, self.pool = relu, pool
        weight, bias = fold_norm(conv.weight, conv.bias, norm)
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        on_tiles = self.shape.kernel_size == (7, 7) and self.shape.stride == (2, 2) and weight.dtype == torch.float32
        self._keep(weight=pack_stem(weight), bias=bias, tiles=pack_stem_tiles(weight) if on_tiles else None)
        self.eval()

    @staticmethod
    def serves(conv: nn.Conv2d) -> bool:
        """Whether a convolution is one of these."""
        square = all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.padding))
        return (
            conv.in_channels <= _MOST_CHANNELS
            and square
            and conv.dilation == (1, 1)
            and conv.groups == 1
            and conv.weight.dtype in (*NATIVE, torch.float16)
        )

    @staticmethod
    def pools(module: nn.Module) -> bool:
        """Whether a module pools as these do: by 3 x 3 windows of stride 2 and padding 1."""
        if not isinstance(module, nn.MaxPool2d):
            return False
        numbers = [(n, n) if isinstance(n, int) else n for n in (module.kernel_size, module.stride, module.padding)]
        plain = module.dilation in (1, (1, 1)) and not module.ceil_mode and not module.return_indices
        return plain and numbers == [(3, 3), (2, 2), (1, 1)]

    def forward(self, x: Tensor) -> Tensor:
        """Convolve images (N, C, H, W)."""
        shape, relu, pool = self.shape, self.relu, self.pool
        check_images(x, shape.in_channels, self.weight, self.stored)
        stride, padding = shape.stride[0], shape.padding[0]
        if self.weight.dtype in NATIVE:
            own = self.weight, self.bias, stride, padding, relu, pool, self.tiles
            return self._as_stored(torch.ops.gatedkernels.packed_stem.default(self._as_computed(x), *own))
        y = conv2d(x, unpack_stem(self.weight, shape.out_channels), self.bias, stride, padding)
        y = y.relu() if relu else y
        return max_pool2d(y, 3, 2, 1) if pool else y

    def conv_costs(self, input_shape: tuple[int, ...]) -> list[ConvCost]:
        """Cost of the convolution; see `gatedkernels.nn.flops`."""
        return [conv_cost("", self.shape, output_size(self.shape, (input_shape[-2], input_shape[-1])))]
