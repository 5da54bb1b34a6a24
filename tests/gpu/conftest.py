"""Lets these tests use the helpers of tests/dist, their twins; ranks inherit the path."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "dist"))


@pytest.fixture(autouse=True)
def needs_cuda():
    """Nothing here means anything on a CPU."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
