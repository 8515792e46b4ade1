"""The schemas of every operator, once: compiled into the library, and defined from here where there is none."""

import hashlib

_GEOMETRY = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation"

SCHEMAS = (
    "plan(Tensor mask) -> (Tensor, Tensor)",
    f"conv_out(Tensor x, Tensor weight, Tensor? bias, Tensor index, Tensor count, {_GEOMETRY}, bool relu, str backend)"
    " -> Tensor",
    f"conv_in(Tensor packed, Tensor weight, Tensor? bias, Tensor index, Tensor count, {_GEOMETRY},"
    " bool dense_input_grad, str backend) -> Tensor",
    f"gated_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? in_mask, Tensor? out_mask, {_GEOMETRY},"
    " SymInt groups, bool dense_input_grad, str backend, float threshold) -> Tensor",
    f"gated_conv2d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? in_mask, Tensor? out_mask, {_GEOMETRY},"
    " SymInt groups, bool dense_input_grad, bool[3] output_mask, str backend, float threshold)"
    " -> (Tensor, Tensor, Tensor)",
    "gated_block(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor mask,"
    " Tensor? residual, SymInt[2] stride, str backend) -> Tensor",
    # The block where gradients are wanted: it keeps the hidden activation for them, as its kernels left it.
    "gated_block_kept(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor mask,"
    " Tensor? residual, SymInt[2] stride, float threshold) -> (Tensor, Tensor)",
    "gated_block_backward(Tensor dy, Tensor y, Tensor x, Tensor hidden, Tensor weight1, Tensor weight2, Tensor mask,"
    " SymInt[2] stride, bool[3] output_mask, float threshold)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "gated_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? in_mask, Tensor? out_mask, bool dense_input_grad,"
    " str backend, float threshold) -> Tensor",
    "gated_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? in_mask, Tensor? out_mask,"
    " bool dense_input_grad, bool[3] output_mask, str backend, float threshold) -> (Tensor, Tensor, Tensor)",
    f"sliced_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? in_width, Tensor? out_width, {_GEOMETRY},"
    " SymInt groups, str backend) -> Tensor",
    f"sliced_conv2d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? in_width, Tensor? out_width, {_GEOMETRY},"
    " SymInt groups, bool[3] output_mask, str backend) -> (Tensor, Tensor, Tensor)",
    "sliced_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? in_width, Tensor? out_width, str backend) -> Tensor",
    "sliced_linear_backward(Tensor dy, Tensor x, Tensor weight, Tensor? in_width, Tensor? out_width,"
    " bool[3] output_mask, str backend) -> (Tensor, Tensor, Tensor)",
    # The compiled kernels behind the launchers of the same stem, and those that `optimize` calls with packed weights.
    "plan_cpu(Tensor mask) -> (Tensor, Tensor)",
    "plan_cuda(Tensor mask) -> (Tensor, Tensor)",
    "conv_out_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor index, Tensor count, int stride, bool relu) -> Tensor",
    "conv_in_cpu(Tensor packed, Tensor weight, Tensor? bias, Tensor index, Tensor count, int stride) -> Tensor",
    # What has a default costs nothing where it is left out, and time where it is handed over, None or not: see
    # `python -m bench.dispatch`.
    "gated_conv2d_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor? in_mask, Tensor? out_mask, float threshold=2.0,"
    " SymInt stride=1) -> Tensor",
    "gated_linear_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor? in_mask, Tensor? out_mask) -> Tensor",
    "sliced_conv2d_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor? in_width, Tensor? out_width, int stride)"
    " -> Tensor",
    "sliced_linear_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor? in_width, Tensor? out_width) -> Tensor",
    "gated_conv2d_cuda(Tensor x, Tensor weight, Tensor? bias, Tensor? in_mask, Tensor? out_mask,"
    " int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor",
    "gated_block_cpu(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor mask,"
    " Tensor? residual, float threshold=2.0, SymInt stride=1) -> Tensor",
    "gated_conv2d_backward_cpu(Tensor dy, Tensor x, Tensor weight, Tensor? in_mask, Tensor? out_mask, int stride,"
    " bool dense_input_grad, bool input, bool filters) -> (Tensor, Tensor)",
    "gated_block_kept_cpu(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor mask,"
    " Tensor? residual, int stride) -> (Tensor, Tensor)",
    "gated_block_backward_cpu(Tensor dy, Tensor y, Tensor x, Tensor hidden, Tensor weight1, Tensor weight2,"
    " Tensor mask, int stride, bool input, bool filters1, bool filters2)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "channel_gate(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2) -> Tensor",
    "packed_block(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor? tiles1, Tensor? tiles2,"
    " Tensor mask, Tensor? residual, SymInt stride=1) -> Tensor",
    "packed_residual(Tensor x, Tensor gate_weight1, Tensor gate_bias1, Tensor gate_weight2, Tensor gate_bias2,"
    " Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor? tiles1=None, Tensor? tiles2=None,"
    " Tensor? shortcut_weight=None, Tensor? shortcut_bias=None, Tensor? mask=None, SymInt stride=1) -> Tensor",
    # A bottleneck with its gates: weights and biases of the gates' layers (four each, or None), of the convolutions,
    # and of the shortcut, or None; masks that are given; what the gates decided.
    "packed_bottleneck(Tensor x, Tensor?[] parts, Tensor? mask1, Tensor? mask2, SymInt stride)"
    " -> (Tensor, Tensor, Tensor)",
    # The same of stride 1 without a shortcut, over its images.
    "packed_bottleneck_(Tensor(a!) x, Tensor?[] parts, Tensor? mask1, Tensor? mask2) -> (Tensor, Tensor)",
    "packed_conv2d(Tensor x, Tensor weight, Tensor bias, Tensor? in_mask, Tensor? out_mask, Tensor? residual,"
    " SymInt out_channels, SymInt stride, bool relu) -> Tensor",
    "packed_stem(Tensor x, Tensor weight, Tensor bias, SymInt stride, SymInt padding, bool relu, bool pool,"
    " Tensor? tiles=None) -> Tensor",
    "packed_pool(Tensor x) -> Tensor",
    # Stem, residual blocks and pooling: stride, padding, ReLU and pooling of the stem; the tensors of each block from
    # gate_weight1 to shortcut_bias as packed_residual has them, its mask if it is given, and its stride.
    "packed_network(Tensor images, Tensor stem_weight, Tensor stem_bias, Tensor? stem_tiles, int[] stem,"
    " Tensor?[] parts, Tensor?[] masks, int[] strides) -> Tensor",
)


def digest() -> str:
    """Hash of the schemas; a library that carries another one was built from other sources."""
    return hashlib.sha256("\n".join(SCHEMAS).encode()).hexdigest()[:16]
