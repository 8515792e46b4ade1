"""Vision transformers of any width, with timm's names (torchvision has none so small)."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from gatedkernels._checks import check_choice, check_int, check_sizes, check_type
from gatedkernels.models._registry import register_model
from gatedkernels.nn import SlimmableConv2d, SlimmableLayerNorm, SlimmableLinear, SlimmableNetwork

Slicing = Literal["inputs", "full"]
_EXPANSION = 4


class _PatchEmbed(nn.Module):
    """Patches to tokens."""

    def __init__(self, dim: int, patch_size: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.proj = SlimmableConv2d(3, dim, patch_size, patch_size, slice_in=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class _Attention(nn.Module):
    """Multi-head self-attention; as many heads as there are channels for."""

    def __init__(self, dim: int, heads: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.qkv = _linear(dim, 3 * dim, options, parts=3)
        self.proj = _linear(dim, dim, options)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, dim: int, options: dict[str, Any]) -> None:
        super().__init__()
        # Hidden units are rounded as a multiple of the channels where those narrow too, else by themselves.
        ratio = _EXPANSION if options["slice_out"] else 1
        self.fc1 = _linear(dim, _EXPANSION * dim, options, out_ratio=ratio)
        self.fc2 = _linear(_EXPANSION * dim, dim, options, in_ratio=ratio)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, options: dict[str, Any]) -> None:
        super().__init__()
        divisor = options["divisor"]
        norm = SlimmableLayerNorm if options["slice_out"] else None
        self.norm1 = _norm(dim, norm, divisor)
        self.attn = _Attention(dim, heads, options)
        self.norm2 = _norm(dim, norm, divisor)
        self.mlp = _MLP(dim, options)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _linear(ins: int, outs: int, options: dict[str, Any], **rest: Any) -> SlimmableLinear:
    return SlimmableLinear(ins, outs, wide_input=not options["slice_out"], **options, **rest)


def _norm(dim: int, norm: type[SlimmableLayerNorm] | None, divisor: int) -> nn.Module:
    return nn.LayerNorm(dim, 1e-6) if norm is None else norm(dim, 1e-6, divisor=divisor)


def sincos_position(rows: int, columns: int, dim: int) -> Tensor:
    """Fixed position embeddings of a grid of patches and of the class token before them, shape (1, 1 + patches, dim).

    Raises:
        ValueError: If ``dim`` is no multiple of four: sine and cosine for each direction.

    Source:
        Chen et al., "An Empirical Study of Training Self-Supervised Vision Transformers" (MoCo v3), ICCV 2021.
    """
    if dim % 4:
        raise ValueError(f"dim must be a multiple of 4, got {dim}")
    frequency = 10000 ** -(torch.arange(dim // 4) / (dim // 4))
    row, column = (axis.flatten()[:, None] * frequency for axis in torch.meshgrid(
        torch.arange(rows, dtype=torch.float32), torch.arange(columns, dtype=torch.float32), indexing="ij"
    ))  # fmt: skip
    table = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1)
    return torch.cat([torch.zeros(1, dim), table])[None]


class SlimmableViT(SlimmableNetwork):
    """A vision transformer of any width from one set of weights.

    ``slicing="inputs"`` is what US3L's code does: the linear layers of the blocks read the first inputs only, and
    everything else is as wide as ever, the features included; multiply-adds fall with w. ``slicing="full"`` narrows the
    whole network: channels, heads (each as wide as ever), hidden units; they fall with w².

    Args:
        dim: Channels of a token.
        depth: Blocks.
        heads: Attention heads.
        num_classes: Outputs of the classifier; None: no classifier, the normalised class token comes out.
        image_size: Side of the images.
        patch_size: Side of a patch.
        slicing: "inputs" or "full".
        learned_position: Whether position embeddings are learned, or fixed sines and cosines as in MoCo v3.

    Raises:
        TypeError: If a number is none.
        ValueError: If the slicing does not exist, a size is not positive, or a size does not divide another.

    Source:
        Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021; Cao et al., US3L, CVPR 2023.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        *,
        num_classes: int | None = 1000,
        image_size: int = 224,
        patch_size: int = 16,
        slicing: Slicing = "inputs",
        learned_position: bool = False,
    ) -> None:
        super().__init__()
        check_choice("slicing", slicing, Slicing)
        check_sizes(dim=dim, depth=depth, heads=heads, image_size=image_size, patch_size=patch_size)
        check_int("num_classes", num_classes, optional=True)
        if dim % heads:
            raise ValueError(f"heads must divide dim={dim}, got {heads}")
        if image_size % patch_size:
            raise ValueError(f"patch_size must divide image_size={image_size}, got {patch_size}")
        narrows = slicing == "full"
        divisor = dim // heads if narrows else 8  # whole heads
        options: dict[str, Any] = {"slice_out": narrows, "divisor": divisor}
        grid = image_size // patch_size
        self.image_size = image_size
        self.num_features = dim
        self.features_narrow = narrows
        self.patch_embed = _PatchEmbed(dim, patch_size, options)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=1e-6))
        self.pos_embed = nn.Parameter(sincos_position(grid, grid, dim), requires_grad=learned_position)
        self.blocks = nn.Sequential(*(_Block(dim, heads, options) for _ in range(depth)))
        self.norm = _norm(dim, SlimmableLayerNorm if narrows else None, divisor)
        self.head: nn.Module = nn.Identity()
        if num_classes is not None:
            self.head = SlimmableLinear(dim, num_classes, slice_in=narrows, slice_out=False, divisor=divisor)
        self._initialise(patch_size, learned_position)

    def _initialise(self, patch_size: int, learned_position: bool) -> None:
        """Draw the weights as MoCo v3 does: Xavier-uniform, queries, keys and values each by itself."""
        if learned_position:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, SlimmableLinear):
                nn.init.zeros_(module.bias)
                for part in module.weight.chunk(module.parts):
                    nn.init.xavier_uniform_(part)
        proj = self.patch_embed.proj
        bound = math.sqrt(6 / (3 * patch_size**2 + proj.out_channels))
        nn.init.uniform_(proj.weight, -bound, bound)
        if proj.bias is not None:
            nn.init.zeros_(proj.bias)
        if isinstance(self.head, SlimmableLinear):
            nn.init.zeros_(self.head.weight)

    def slice_own(self) -> None:
        """Cut the parameters that belong to no layer to the present width, for `gatedkernels.slice`."""
        channels = self.patch_embed.proj.shape_now[1]
        self.cls_token = nn.Parameter(self.cls_token.detach()[..., :channels].clone())
        position = self.pos_embed
        self.pos_embed = nn.Parameter(position.detach()[..., :channels].clone(), position.requires_grad)
        self.num_features = channels

    def forward(self, x: Tensor) -> Tensor:
        """Run the network at its width.

        Args:
            x: Images, shape (N, 3, image_size, image_size).

        Returns:
            Logits, shape (N, num_classes), or features, the class token's channels.

        Raises:
            TypeError: If ``x`` is no tensor of the network's dtype.
            ValueError: If the images have another size.
        """
        check_type("x", x, Tensor, "a tensor")
        if x.ndim != 4 or x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"x must have shape (N, 3, {self.image_size}, {self.image_size}), got {tuple(x.shape)}")
        tokens = self.patch_embed(x)
        channels = tokens.shape[2]
        tokens = torch.cat([self.cls_token[..., :channels].expand(len(tokens), -1, -1), tokens], 1)
        tokens = self.blocks(tokens + self.pos_embed[..., :channels])
        return self.head(self.norm(tokens)[:, 0])


@register_model
def slimmable_vit_tiny(**options: Any) -> SlimmableViT:
    """Build a slimmable ViT-Tiny as US3L has it, with 6 heads; the options are those of `SlimmableViT`."""
    return SlimmableViT(192, 12, **{"heads": 6, **options})


@register_model
def slimmable_vit_small(**options: Any) -> SlimmableViT:
    """Build a slimmable ViT-Small as US3L has it, with 12 heads; the options are those of `SlimmableViT`."""
    return SlimmableViT(384, 12, **{"heads": 12, **options})
