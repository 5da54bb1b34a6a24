"""run.deterministic: what is switched on for a process."""

import os

import pytest
import torch

from megatron_opd.student import deterministic


@pytest.fixture
def enabled(monkeypatch):
    """The mode, for one test; what it sets is put back."""
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NVTE_ALLOW_NONDETERMINISTIC_ALGO"):
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)
    deterministic.enable()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_libraries_are_told_and_the_users_choice_stays(enabled):
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
    assert os.environ["NCCL_ALGO"] == "Tree"


def test_a_kernel_without_such_a_form_warns_and_works(enabled):
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
