"""Calls that were checked before run without a second look, and nothing else does."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gatedkernels as gk
from gatedkernels import _extension, policy
from gatedkernels.ops import _arguments as arguments
from gatedkernels.ops import _known

pytestmark = pytest.mark.skipif(_extension.CPU_ERROR is not None, reason=str(_extension.CPU_ERROR))

X, WEIGHT, BIAS = torch.randn(2, 8, 5, 7), torch.randn(8, 8, 3, 3), torch.randn(8)
MASK = torch.arange(16).view(2, 8) % 3 == 0


def conv(x: Any = X, weight: Any = WEIGHT, bias: Any = BIAS, mask: Any = MASK, **options: Any) -> Tensor:
    return gk.gated_conv2d(x, weight, bias, None, mask, **{"padding": 1, "backend": "cpu", **options})


def block(x: Any = X, weight: Any = WEIGHT, bias: Any = BIAS, mask: Any = MASK, **options: Any) -> Tensor:
    return gk.gated_block(x, weight, bias, weight, bias, mask, **{"backend": "cpu", **options})


@pytest.fixture(params=[conv, block])
def call(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """An operation, called once before."""
    policy.forget()
    request.param()
    return request.param


def forbid(*_: object) -> None:
    raise AssertionError("the call was looked at")


def test_a_known_call_is_not_looked_at(call, monkeypatch: pytest.MonkeyPatch):
    expected = call()
    monkeypatch.setattr(arguments, "check_images", forbid)
    torch.testing.assert_close(call(), expected, rtol=0, atol=0)
    other = call(X + 1, mask=~MASK)
    monkeypatch.undo()
    torch.testing.assert_close(other, call(X + 1, mask=~MASK, backend="reference"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"x": X[:1], "mask": MASK[:1]},
        {"x": X.contiguous(memory_format=torch.channels_last)},
        {"bias": None},
        {"stride": 2},
        {"group": 2, "mask": MASK[:, :4]},
        {"backend": "auto"},
    ],
    ids=str,
)
def test_other_calls_are(call, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arguments, "check_images", forbid)
    with pytest.raises(AssertionError, match="looked at"):
        call(**change)


def test_thresholds_and_threads_are_looked_at_again(call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arguments, "check_images", forbid)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    with pytest.raises(AssertionError, match="looked at"):
        call()
    monkeypatch.undo()
    call()
    monkeypatch.setattr(arguments, "check_images", forbid)
    policy.forget()
    with pytest.raises(AssertionError, match="looked at"):
        call()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": MASK.float()}, TypeError, "must have dtype torch.bool"),
        ({"mask": MASK[:1]}, ValueError, "must have shape"),
        ({"bias": BIAS.double()}, TypeError, "must have the dtype of x"),
        ({"x": "x"}, TypeError, "x must be a tensor"),
        ({"stride": [1]}, TypeError, "stride must be an int or two ints"),
    ],
)
def test_errors_are_the_same_as_at_the_first_call(call, change: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call(**change)


def test_lists_are_no_keys_but_good_strides(call):
    torch.testing.assert_close(call(stride=[1, 1]), call())


def test_gradients_of_a_known_call(call):
    x = X.clone().requires_grad_()
    y = call(x)
    y.sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert not call(x).requires_grad


def test_autocast_of_a_known_call(call):
    policy.forget()
    call(backend="auto")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(backend="auto").dtype == torch.bfloat16


def test_no_tensor_is_kept(call):
    x = torch.randn(2, 8, 6, 6)
    gone = weakref.ref(x)
    call(x)
    del x
    gc.collect()
    assert gone() is None


def test_not_more_than_so_many_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_known, "_MOST", 3)
    known = _known.KnownCalls(lambda x, stride, threshold: x)
    for n in range(1, 9):
        x = torch.zeros(n)
        assert known.run((x,), ()) is None
        known.note((x,), (), 1, 0.5)
        assert known.run((x,), ()) is x
        assert len(known._known) <= 3
