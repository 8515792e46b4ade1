"""Shared fixtures. Where gatedkernels is installed, the tests exercise the installed copy, not the checkout."""

import random
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

CHECKOUT = Path(__file__).resolve().parent.parent


def _is_checkout(folder: str | Path) -> bool:
    return Path(folder or ".").resolve() == CHECKOUT


def _has_package(distribution: metadata.Distribution) -> bool:
    return Path(str(distribution.locate_file("gatedkernels/__init__.py"))).is_file()


# An editable install has no copy of its own: then the checkout stays where it is.
if any(
    _has_package(found) and not _is_checkout(str(found.locate_file("")))
    for found in metadata.distributions(name="gatedkernels")
):
    sys.path[:] = [entry for entry in sys.path if not _is_checkout(entry)]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill fresh floating-point buffers with NaN, so that an element a kernel never wrote cannot pass for a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeds():
    """The same random numbers in every run, whichever tests run before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def nothing_measured(tmp_path_factory: pytest.TempPathFactory):
    """The shipped thresholds, whatever was calibrated on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATEDKERNELS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
