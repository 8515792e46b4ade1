"""The machine: what it is, what runs on it, and how fast it can be."""

import platform
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch
from torch.nn.functional import conv2d

from gatedkernels._extension import instruction_set as instruction_set
from gatedkernels.reporting.timing import interleave
from gatedkernels.thresholds import cpu_name as cpu_name

_PROBE_SECONDS = 0.15
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_level_cache() -> int | None:
    """Bytes of the largest cache of the first processor, or None where the system does not say."""
    sizes = []
    for path in _CACHES.glob("index*/size"):
        try:
            text = path.read_text().strip()
            sizes.append(int(text[:-1]) * _UNITS[text[-1]])
        except (OSError, ValueError, LookupError):
            continue
    return max(sizes, default=None)


def versions(*others: str) -> dict[str, str]:
    """Versions of what decides the numbers, and of other packages; "missing" for what is not installed."""
    found = {"python": platform.python_version()}
    for name in ("gatedkernels", "torch", "numpy", *others):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def peak_macs(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Multiply-adds a second of the fastest dense arithmetic we know: matrix products and large convolutions.

    Measured at the first call for a device, dtype and number of threads; the caller has set the threads.
    """
    return _peak_macs(str(device), dtype, threads)


def bandwidth(device: torch.device, num_bytes: float, threads: int) -> float:
    """Bytes a second that a copy moves, read and written, when it works on about so many bytes.

    Measured at the first call for a device, power of two and number of threads; the caller has set the threads.
    """
    size = max(1 << 20, min(1 << 28, 1 << round(num_bytes).bit_length()))
    return _bandwidth(str(device), size, threads)


@lru_cache
def _peak_macs(device: str, dtype: torch.dtype, threads: int) -> float:
    a, b = (torch.randn(768, 768, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(1, 128, 56, 56, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    calls = {"product": lambda: a @ b, "convolution": lambda: conv2d(x, weight, padding=1)}
    macs = {"product": 768**3, "convolution": 9 * 128 * 128 * 56 * 56}
    samples = interleave(calls, seconds=_PROBE_SECONDS, device=device)
    return max(macs[name] / min(times) for name, times in samples.items())


@lru_cache
def _bandwidth(device: str, size: int, threads: int) -> float:
    source = torch.zeros(size // 8, device=device)
    target = torch.empty_like(source)
    samples = interleave({"copy": lambda: target.copy_(source)}, seconds=_PROBE_SECONDS, device=device)
    return size / min(samples["copy"])
