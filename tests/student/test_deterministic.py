"""run.deterministic: what is switched on for a process."""

import os
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from megatron_opd.student import deterministic
from megatron_opd.student.spec import CausalAttention


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


class Attention(torch.autograd.Function):
    """In place of torch's: notes whether kernels without a deterministic form are errors, as its kernels look."""

    seen: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx, q, k, v):
        Attention.seen.append(not torch.is_deterministic_algorithms_warn_only_enabled())
        return q + k + v

    @staticmethod
    def backward(ctx, grad):
        Attention.seen.append(not torch.is_deterministic_algorithms_warn_only_enabled())
        return grad, grad, grad


@pytest.mark.parametrize("frozen", [False, True])
def test_attention_takes_the_form_that_has_one_order(enabled, monkeypatch, frozen):
    """torch's attention has one, and with warnings alone says so and takes another: forward and backward."""
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention", lambda q, k, v, *_, **__: Attention.apply(q, k, v)[:]
    )
    monkeypatch.setattr(Attention, "seen", [])
    settings = SimpleNamespace(context_parallel_size=1, kv_channels=4, attention_dropout=0.0)
    layer = CausalAttention(settings, pg_collection=None)
    q, k, v = (torch.ones(3, 1, 2, 4, requires_grad=not frozen or i == 2) for i in range(3))
    out = layer(q, k, v, None)
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    out.sum().backward()
    assert Attention.seen == [True, True]
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert v.grad is not None
