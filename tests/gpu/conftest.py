"""Skips where there is no GPU."""

import pytest


@pytest.fixture(autouse=True)
def needs_cuda():
    """Nothing here means anything on a CPU."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
