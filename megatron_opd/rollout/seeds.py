"""Where the random numbers of an answer come from: one integer, in whichever engine."""

from __future__ import annotations

import hashlib

from megatron_opd.core.types import Prompt, Sampling


def seed_of(sampling: Sampling, prompt: Prompt, sample: int) -> int:
    """In [0, 2^63), of the rollout alone; a prompt that is drawn again in its step has others."""
    again = f"/repeat {prompt.repeat}" if prompt.repeat else ""
    text = f"{sampling.seed}/{prompt.source}/{prompt.index}/{sample}{again}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
