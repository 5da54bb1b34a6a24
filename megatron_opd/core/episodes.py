"""Episodes in a list of rollouts: an episode's trajectories follow each other, the first one with `part` 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def once_an_episode(advance: Callable[[], object]) -> Callable[[Rollout], None]:
    """A receiver of finished trajectories that calls `advance` once an episode."""

    def told(rollout: Rollout) -> None:
        if rollout.part == 0:
            advance()

    return told


def last_turn(rollout: Rollout) -> tuple[int, ...]:
    """The last learnt tokens that follow each other without another's in between: of a plain answer, all of it."""
    return next((ids for is_learnt, ids in reversed(runs(rollout)) if is_learnt), ())


def runs(rollout: Rollout) -> list[tuple[bool, tuple[int, ...]]]:
    """(whether they are learnt, their ids) of tokens that follow each other, in order: turns and what is in between."""
    tokens = zip(rollout.learnt, rollout.token_ids, strict=True)
    return [(is_learnt, tuple(i for _, i in run)) for is_learnt, run in groupby(tokens, key=lambda token: token[0])]
