import copy
import io
import mmap
import os

import pytest
import torch

from gatedkernels.nn.pages import on_large_pages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(700, 900), (3,), (0, 4), (2, 64, 100, 33)], ids=str)
def test_copies_are_equal(shape: tuple[int, ...], dtype: torch.dtype):
    tensor = torch.randn(shape).to(dtype).requires_grad_()
    placed = on_large_pages(tensor)
    assert torch.equal(placed, tensor)
    assert placed.dtype == dtype
    assert placed.stride() == tensor.stride()
    assert not placed.requires_grad
    assert placed.data_ptr() != tensor.data_ptr() or not tensor.numel()


def test_strides_are_kept():
    tensor = torch.randn(64, 64, 9, 17).contiguous(memory_format=torch.channels_last)
    assert on_large_pages(tensor).stride() == tensor.stride()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system does not know large pages")
def test_large_tensors_begin_with_a_page_and_save_what_they_hold():
    tensor = torch.randn(1000, 1000)
    placed = on_large_pages(tensor)
    assert placed.data_ptr() % (2 << 20) == 0
    file = io.BytesIO()
    torch.save(placed, file)
    assert len(file.getvalue()) < 1.01 * tensor.nbytes
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), tensor)
    twin = copy.deepcopy(placed)
    twin.zero_()
    assert torch.equal(placed, tensor)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_a_forked_process_has_its_own():
    placed = on_large_pages(torch.ones(1000, 1000))
    child = os.fork()
    if child == 0:
        placed.numpy()[:] = 2
        os._exit(0)
    os.waitpid(child, 0)
    assert (placed == 1).all()


def test_without_large_pages(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    tensor = torch.randn(1000, 1000)
    assert torch.equal(on_large_pages(tensor), tensor)
