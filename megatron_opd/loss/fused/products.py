"""Matrix products with output heads: all of the hidden-state form are made here, into memory that is there already.

A teacher's head may be one that makes its product itself (`OwnHead`: FP8); the student's, which has gradients, is
a tensor. Sums into a head's gradient are in that gradient's own type.

Shape suffixes: C tokens of a chunk, L local columns, D hidden size.
"""

from __future__ import annotations

import torch

from megatron_opd.core.scores import Head


def logits(hidden_CD: torch.Tensor, head_LD: Head, out_CL: torch.Tensor) -> torch.Tensor:
    """out = h Wᵀ, in the type of the three."""
    if not isinstance(head_LD, torch.Tensor):
        return head_LD.logits(hidden_CD, out_CL)
    return torch.mm(hidden_CD, head_LD.T, out=out_CL)


def project(hidden_CD: torch.Tensor, head_LD: Head) -> torch.Tensor:
    """h Wᵀ of hidden states of any type, in the head's, into memory of its own."""
    hidden_CD = hidden_CD.to(head_LD.dtype)
    return hidden_CD @ head_LD.T if isinstance(head_LD, torch.Tensor) else head_LD.logits(hidden_CD)


def add_logits(hidden_CD: torch.Tensor, head_LD: torch.Tensor, out_CL: torch.Tensor) -> torch.Tensor:
    """out += h Wᵀ."""
    return out_CL.addmm_(hidden_CD, head_LD.T)


def hidden_gradient(grad_CL: torch.Tensor, head_LD: torch.Tensor, out_CD: torch.Tensor) -> torch.Tensor:
    """out = g W: this shard's part of the hidden states' gradient."""
    return torch.mm(grad_CL, head_LD, out=out_CD)


def add_head_gradient(grad_CL: torch.Tensor, hidden_CD: torch.Tensor, into_LD: torch.Tensor) -> None:
    """into += gᵀ h, summed in the type of `into`, float32 as a rule, whatever the others are."""
    if grad_CL.dtype == into_LD.dtype:
        into_LD.addmm_(grad_CL.T, hidden_CD)
    elif into_LD.is_cuda:
        torch.addmm(into_LD, grad_CL.T, hidden_CD, out_dtype=into_LD.dtype, out=into_LD)
    else:
        into_LD.addmm_(grad_CL.T.to(into_LD.dtype), hidden_CD.to(into_LD.dtype))
