"""Dense networks in other engines: ONNX Runtime and OpenVINO, on as many threads as PyTorch computes with.

Both are extras, and neither is imported before it is asked for. Both read ONNX, in which PyTorch writes the network:
OpenVINO's own converter would be as good, but reports over the network that it was used.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

# Element types of OpenVINO, which computes in them whatever the weights are stored in.
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class _Bound:
    """A call that reads ``x`` and writes ``y``, which live as long as it does."""

    run: Callable[[], object]
    x: Tensor
    y: Tensor

    def __call__(self) -> Tensor:
        self.run()
        return self.y


def bind_onnxruntime(twin: nn.Module, example: Tensor) -> Callable[[], Tensor]:
    """Hand a dense network to ONNX Runtime, input and output bound to memory.

    Args:
        twin: A module of plain PyTorch in evaluation, on the CPU.
        example: The batch to run on, contiguous, float32.

    Returns:
        A function that computes the network on the batch, into the same tensor at each call.

    Raises:
        RuntimeError: If ONNX Runtime, or what exports to it, is missing or does not take this network; the message
            says why.
    """
    if example.dtype != torch.float32 or example.device.type != "cpu":
        raise RuntimeError(f"ONNX Runtime convolves float32 on the CPU, got {example.dtype} on {example.device.type}")
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state
    except ImportError as error:
        raise RuntimeError(f"ONNX Runtime is not installed: {error}") from error
    # They have no base class of their own.
    kinds = vars(onnxruntime_pybind11_state).values()
    failures: tuple[type[Exception], ...] = (
        RuntimeError,
        *(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception)),
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its threads wait busily within a call, not between calls, where others compute.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(_as_onnx(twin, example), options, providers=["CPUExecutionProvider"])
    except failures as error:
        raise RuntimeError(f"ONNX Runtime does not take this network: {_first_line(error)}") from error
    (source,), (target,) = session.get_inputs(), session.get_outputs()
    y = torch.empty(target.shape)
    binding = session.io_binding()
    for bind, name, tensor in ((binding.bind_input, source.name, example), (binding.bind_output, target.name, y)):
        bind(name, "cpu", 0, np.float32, tuple(tensor.shape), tensor.data_ptr())
    return _Bound(lambda: session.run_with_iobinding(binding), example, y)


def bind_openvino(twin: nn.Module, example: Tensor) -> Callable[[], Tensor]:
    """Hand a dense network to OpenVINO, input and output bound to memory.

    OpenVINO is told to compute in the dtype of ``example``, and must; what goes in and comes out is float32.

    Args:
        twin: A module of plain PyTorch in evaluation, on the CPU.
        example: The batch to run on, contiguous, float32 or bfloat16.

    Returns:
        A function that computes the network on the batch, into the same float32 tensor at each call.

    Raises:
        RuntimeError: If OpenVINO is missing or does not take this network; the message says why.
    """
    if example.dtype not in _PRECISIONS or example.device.type != "cpu":
        raise RuntimeError(
            f"OpenVINO is asked for float32 or bfloat16 on the CPU, got {example.dtype} on {example.device.type}"
        )
    try:
        import openvino
    except ImportError as error:
        raise RuntimeError(f"OpenVINO is not installed: {error}") from error
    precision, x = _PRECISIONS[example.dtype], example.float()
    properties = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
    }
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(_as_onnx(copy.deepcopy(twin).float(), x)), "CPU", properties)
        used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    except RuntimeError as error:
        raise RuntimeError(f"OpenVINO does not take this network: {_first_line(error)}") from error
    if used != precision:
        raise RuntimeError(f"OpenVINO computes in {used} on this processor, not in {precision}")
    y = torch.empty(tuple(compiled.output(0).shape))
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(openvino.Tensor(y.numpy(), shared_memory=True))
    return _Bound(lambda: request.infer(share_outputs=True), x, y)


# Engines by the names of their baselines.
PEERS: dict[str, Callable[[nn.Module, Tensor], Callable[[], Tensor]]] = {
    "onnxruntime": bind_onnxruntime,
    "openvino": bind_openvino,
}


def _as_onnx(module: nn.Module, example: Tensor) -> bytes:
    try:
        with torch.no_grad():
            program = torch.onnx.export(module, (example,), dynamo=True, verbose=False)
    except ImportError as error:
        raise RuntimeError(f"PyTorch's exporter lacks a package: {error}") from error
    assert program is not None  # it is, if there is a file to write to
    return program.model_proto.SerializeToString()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
