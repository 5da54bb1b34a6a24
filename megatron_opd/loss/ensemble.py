"""Several teachers, one target: per-token weighted averages of logits or of probabilities.

Weights [T, N] come per prompt source and sum to 1 a row, so routing by task is the same thing with one-hot rows, and
a teacher with weight 0 has no influence, whatever its row holds (it is never scored there).
Shape suffixes: T tokens, L local vocabulary columns, N teachers.
"""

from __future__ import annotations

import torch

from megatron_opd.core.vocab import VocabShard


def mean_logits(logits: list[torch.Tensor], weights_TN: torch.Tensor, vocab: VocabShard) -> torch.Tensor:
    """Normalised geometric mean: log p = log_softmax(sum_n w_n z_n). N tensors [T, L] of logits -> [T, L].

    A teacher's normaliser shifts all its logits alike, so averaging logits and averaging log-probabilities are one.
    """
    total_TL = sum(w_T[:, None] * z_TL for w_T, z_TL in zip(weights_TN.unbind(-1), logits, strict=True))
    assert isinstance(total_TL, torch.Tensor)
    return vocab.log_softmax(total_TL)


def mean_probs(logps: list[torch.Tensor], weights_TN: torch.Tensor) -> torch.Tensor:
    """Arithmetic mean: log p = logsumexp_n(log w_n + log p_n). N tensors [T, L] of log-probabilities -> [T, L]."""
    if len(logps) == 1:
        return logps[0]
    weighted = [w_T.log()[:, None] + logp_TL for w_T, logp_TL in zip(weights_TN.unbind(-1), logps, strict=True)]
    return torch.logsumexp(torch.stack(weighted), dim=0)
