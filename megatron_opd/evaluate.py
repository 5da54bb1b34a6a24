"""Greedy accuracy by prompt source. An answer is right when the decoded response is exactly the reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from megatron_opd.tokenizer import Tokenizer
from megatron_opd.types import Prompt, Rollout, RolloutEngine, Sampling

Counts = Mapping[str, tuple[int, int]]
"""By source: answers that are right, answers."""


def greedy(engine: RolloutEngine, prompts: list[Prompt], *, max_new_tokens: int) -> list[Rollout]:
    """One greedy answer for each prompt."""
    return engine.generate(prompts, Sampling(max_new_tokens=max_new_tokens, temperature=0.0)) if prompts else []


def count_right(rollouts: Iterable[Rollout], tokenizer: Tokenizer) -> Counts:
    """How many answers of each source are right."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for rollout in rollouts:
        source = rollout.prompt.source
        total[source] += 1
        right[source] += tokenizer.decode(rollout.response_ids).strip() == (rollout.prompt.answer or "").strip()
    return {source: (right[source], total[source]) for source in total}


def accuracies(parts: Iterable[Counts], prefix: str) -> dict[str, float]:
    """`<prefix>/<source>` and `<prefix>/all` (over all answers) from the counts of several replicas."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for part in parts:
        for source, (r, n) in part.items():
            for name in (source, "all"):
                right[name] += r
                total[name] += n
    return {f"{prefix}/{name}": right[name] / total[name] for name in total}
