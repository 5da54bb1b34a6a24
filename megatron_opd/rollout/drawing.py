"""Tokens from logits and random numbers that are given, so that a rollout can be drawn again anywhere."""

from __future__ import annotations

import torch

from megatron_opd.core.types import Prompt, Sampling


def uniforms(sampling: Sampling, prompt: Prompt, sample: int, turn: int = 0) -> list[float]:
    """The random numbers in [0, 1) of one turn, one for each token that it may have; a plain answer is turn 0."""
    generator = torch.Generator().manual_seed(sampling.seed_of(prompt, sample, turn))
    return torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64).tolist()


def draw(logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(token, its log-probability in nats), [B] each, by inverting the cumulative distribution at `uniform_B`.

    `logits_BV` is float32, `uniform_B` float64. Log-probabilities are those of the tempered distribution; greedy
    (temperature 0) reports those of temperature 1.
    """
    logp_BV = torch.log_softmax(logits_BV / (temperature or 1.0), dim=-1)
    if temperature == 0:
        ids_B = logits_BV.argmax(-1)
    else:
        # Summed in float64: in float32 the sum of a large vocabulary loses its unlikely tokens.
        cumulative_BV = logp_BV.exp().cumsum(-1, dtype=torch.float64)
        at_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
        last = logits_BV.shape[-1] - 1
        ids_B = torch.searchsorted(cumulative_BV, at_B1, right=True)[:, 0].clamp(max=last)
    return ids_B, logp_BV.gather(-1, ids_B[:, None])[:, 0]
