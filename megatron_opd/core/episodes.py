"""Episodes in a list of rollouts: an episode's trajectories follow each other, the first one with `part` 0."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from megatron_opd.core.types import Rollout


def episodes(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """The positions of each episode's trajectories, in order. Together they are all positions.

    Where a list begins in the middle of an episode, what there is of it counts as one. Raises ValueError for a further
    trajectory that does not follow one of the same sample.
    """
    found: list[list[int]] = []
    for i, rollout in enumerate(rollouts):
        if rollout.part == 0 or not found:
            found.append([i])
            continue
        before, place = rollouts[i - 1], (rollout.prompt.group, rollout.sample)
        if (before.prompt.group, before.sample) != place or before.part + 1 != rollout.part:
            where = f"sample {rollout.sample} of prompt {rollout.prompt.group}"
            raise ValueError(f"trajectory {rollout.part} of {where} does not follow trajectory {rollout.part - 1}")
        found[-1].append(i)
    return found


def last_turn(rollout: Rollout) -> tuple[int, ...]:
    """The last learnt tokens that follow each other without another's in between: of a plain answer, all of it."""
    tokens = zip(rollout.learnt, rollout.token_ids, strict=True)
    runs = [[i for _, i in run] for is_learnt, run in groupby(tokens, key=lambda token: token[0]) if is_learnt]
    return tuple(runs[-1]) if runs else ()
