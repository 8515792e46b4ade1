"""Other engines compute the dense twin, in memory of ours, on our number of threads; or say why not.

In a run of their own (`make test-slow`): a process that has run these engines may crash when it starts another one.
"""

import gc
import sys

import pytest
import torch
from torch import nn

from gatedkernels.reporting import peers
from gatedkernels.reporting.baselines import Baselines, dense_baselines, verify
from gatedkernels.reporting.timing import use_threads
from gatedkernels.reporting.twins import build_twin

pytestmark = pytest.mark.slow
PACKAGES = {"onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino", "onnxscript")}


def _skip_without(peer: str) -> None:
    for package in PACKAGES[peer]:
        pytest.importorskip(package)


@pytest.mark.parametrize("name", ["resnet18", "bottleneck"])
@pytest.mark.parametrize("peer", peers.PEERS)
def test_computes_the_same(peer: str, name: str, build):
    _skip_without(peer)
    module, x = build(name)
    call = peers.PEERS[peer](build_twin(module), x.clone())
    gc.collect()
    verify(build_twin(module, gated=True), {}, Baselines({peer: call}, (), {}), x)
    assert call().data_ptr() == call().data_ptr()


@pytest.mark.parametrize("peer", peers.PEERS)
def test_bfloat16_or_a_reason(peer: str, build):
    _skip_without(peer)
    module, x = build("basic")
    module, x = module.to(torch.bfloat16), x.to(torch.bfloat16)
    try:
        call = peers.PEERS[peer](build_twin(module), x)
    except RuntimeError as error:
        assert (
            str(error)
            == {
                "onnxruntime": "ONNX Runtime convolves float32 on the CPU, got torch.bfloat16 on cpu",
                "openvino": "OpenVINO computes in f32 on this processor, not in bf16",
            }[peer]
        )
    else:
        verify(build_twin(module, gated=True), {}, Baselines({peer: call}, (), {}), x)
        wide, wide_call = build_twin(module).float(), peers.PEERS[peer](build_twin(module).float(), x.float())
        assert not torch.equal(call(), wide_call())  # it did not compute in float32
        torch.testing.assert_close(wide_call(), wide(x.float()), rtol=1e-4, atol=1e-4)


def test_onnxruntime_gets_our_threads(build, monkeypatch: pytest.MonkeyPatch):
    _skip_without("onnxruntime")
    import onnxruntime

    seen = []
    session = onnxruntime.InferenceSession

    def spy(model, options, **others):
        seen.append((options.intra_op_num_threads, options.inter_op_num_threads))
        return session(model, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    module, x = build("basic")
    with use_threads(3):
        peers.bind_onnxruntime(build_twin(module), x)
    assert seen == [(3, 1)]


def test_openvino_gets_our_threads(build, monkeypatch: pytest.MonkeyPatch):
    _skip_without("openvino")
    import openvino

    seen = []

    class Core(openvino.Core):
        def compile_model(self, model, device, properties):
            seen.append(properties)
            return super().compile_model(model, device, properties)

    monkeypatch.setattr(openvino, "Core", Core)
    module, x = build("basic")
    with use_threads(1):
        peers.bind_openvino(build_twin(module), x)
    (properties,) = seen
    assert (properties["INFERENCE_NUM_THREADS"], properties["INFERENCE_PRECISION_HINT"]) == (1, "f32")


def test_missing_engines_are_said(build, monkeypatch: pytest.MonkeyPatch):
    for package in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    module, x = build("basic")
    dense = dense_baselines(module, x, compiled=False, peers=True)
    assert dense.calls.keys() == {"contiguous", "channels-last", "prepacked"}
    assert dense.missing["onnxruntime"].startswith("ONNX Runtime is not installed: import of onnxruntime")
    assert dense.missing["openvino"].startswith("OpenVINO is not installed: import of openvino")


def test_a_missing_exporter_is_said(monkeypatch: pytest.MonkeyPatch):
    _skip_without("openvino")

    def export(*args, **options):
        raise ModuleNotFoundError("No module named 'onnxscript'")

    monkeypatch.setattr(torch.onnx, "export", export)
    said = "OpenVINO does not take this network: PyTorch's exporter lacks a package: No module named 'onnxscript'"
    with pytest.raises(RuntimeError, match=said):
        peers.bind_openvino(nn.Identity(), torch.randn(1, 3, 4, 4))


class _Undecided(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("peer", peers.PEERS)
def test_what_cannot_be_converted_is_said(peer: str):
    _skip_without(peer)
    with pytest.raises(RuntimeError, match=r"(ONNX Runtime|OpenVINO) does not take this network: .+"):
        peers.PEERS[peer](_Undecided().eval(), torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("peer", peers.PEERS)
def test_other_dtypes_are_refused(peer: str):
    with pytest.raises(RuntimeError, match=r"got torch.float64 on cpu"):
        peers.PEERS[peer](nn.Identity().eval(), torch.randn(1, 3, 4, 4, dtype=torch.float64))
