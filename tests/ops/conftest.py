"""What the tests of the operations share: inputs of every layout, and the error budget."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted", "expanded")


def _images(
    shape: Sequence[int], layout: str = "contiguous", dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    n, c, h, w = shape
    if layout == "expanded":  # one sample for all
        return torch.randn(1, c, h, w, device=device).to(dtype).expand(n, c, h, w)
    x = torch.randn(n, c, h, w, device=device).to(dtype)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # every other channel and a part of every image, NaN around them
        wide = torch.full((n, 2 * c, h + 2, w + 3), torch.nan, dtype=dtype, device=device)
        return wide[:, ::2, 1 : h + 1, 2 : w + 2].copy_(x)
    if layout == "permuted":
        return x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    assert layout == "contiguous"
    return x


def _error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm())


def _assert_within_budget(
    actual: Tensor, exact: Tensor, *torchs: Tensor, name: str = "result", rounding: float = 1
) -> None:
    assert exact.dtype == torch.float64
    assert actual.shape == exact.shape, name
    assert all(actual.dtype == own.dtype for own in torchs), name
    # In float64 there is no exact result to compare with: only another order of summation.
    rounding = 100 if actual.dtype == torch.float64 else rounding
    own = max(_error(t, exact) for t in torchs)
    budget = 2 * own + rounding * torch.finfo(actual.dtype).eps * float(exact.norm())
    error = _error(actual, exact)  # NaN, where an element is, and then no budget holds
    assert error <= budget, f"{name}: error {error:.3g} of a norm of {float(exact.norm()):.3g}, budget {budget:.3g}"


def _gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor | None], rounded_to: torch.dtype | None = None
) -> list[Tensor | None]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(rounded_to or y.dtype)
    y.backward(dy.to(y.device, y.dtype))
    return [y.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


@pytest.fixture(scope="session", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    """Every layout of memory an image batch comes in."""
    return request.param


@pytest.fixture(scope="session")
def images() -> Callable[..., Tensor]:
    """``images(shape, layout, dtype)``: normal random images of that layout."""
    return _images


@pytest.fixture(scope="session")
def assert_within_budget() -> Callable[..., None]:
    """``assert_within_budget(actual, exact, *torchs)``: at most twice PyTorch's own error, and one eps."""
    return _assert_within_budget


@pytest.fixture(scope="session")
def gradients() -> Callable[..., list[Tensor | None]]:
    """``gradients(function, tensors)``: the result and the gradient of every tensor, for one random dy."""
    return _gradients


@pytest.fixture(scope="session")
def compare() -> Callable[..., None]:
    """``compare(function, definition, tensors)``: the result and every gradient are within budget.

    PyTorch's own error depends on the layout of images, as its algorithms do: the larger one counts.
    ``rounding``: steps of rounding granted besides; a result of few elements needs more, for its errors do not average.
    """

    def _compare(
        function: Callable[..., Tensor],
        definition: Callable[..., Tensor],
        tensors: Sequence[Tensor | None],
        rounding: float = 1,
    ) -> None:
        actual = _gradients(function, tensors)
        x, *rest = tensors
        assert x is not None
        layouts = [x.contiguous(), x.contiguous(memory_format=torch.channels_last)] if x.ndim == 4 else [x]
        torchs = [_gradients(definition, [laid, *rest]) for laid in layouts]
        assert actual[0] is not None
        wide = [None if t is None else t.double() for t in tensors]
        exact = _gradients(definition, wide, rounded_to=actual[0].dtype)
        for i, (a, e, *own) in enumerate(zip(actual, exact, *torchs, strict=True)):
            assert (a is None) == (e is None)
            if a is not None and e is not None:
                _assert_within_budget(a, e, *own, name=f"gradient {i}" if i else "forward", rounding=rounding)

    return _compare


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """On a GPU float32 numbers are not rounded to tf32, so that a wrong index cannot hide in the error budget."""
    flags = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [flag.fp32_precision for flag in flags]
    for flag in flags:
        flag.fp32_precision = "ieee"
    yield
    for flag, old in zip(flags, before, strict=True):
        flag.fp32_precision = old


@pytest.fixture(scope="session")
def called() -> Callable[[Callable[[], Tensor]], tuple[Tensor, set[str]]]:
    """Run a function: its result, and the names of the operators that it called."""

    def run(function: Callable[[], Tensor]) -> tuple[Tensor, set[str]]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            y = function()
        return y, {event.key for event in profile.key_averages()}

    return run
