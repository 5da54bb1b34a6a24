"""Cross-entropy: supervised fine-tuning on answers that someone else wrote, or that deserve to be repeated."""

from __future__ import annotations

import torch


def cross_entropy(logp_T: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
    """-w log q(y), [T] -> [T]; on answers of a teacher, sequence-level KD (Kim and Rush, arXiv:1606.07947)."""
    return -weight_T * logp_T
