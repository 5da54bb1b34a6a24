"""How answers are drawn, from the settings."""

from __future__ import annotations

from megatron_opd.config import RolloutConfig
from megatron_opd.core.types import Sampling


def greedy(rollout: RolloutConfig) -> Sampling:
    """One answer a prompt, the likeliest token each time."""
    return Sampling(max_new_tokens=rollout.max_new_tokens, temperature=0.0)


def drawn(rollout: RolloutConfig, *, samples: int, seed: int) -> Sampling:
    """`samples` answers a prompt, drawn as training draws them."""
    return Sampling(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        samples_per_prompt=samples,
        seed=seed,
    )
