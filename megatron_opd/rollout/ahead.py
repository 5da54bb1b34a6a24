"""Batches of rollouts, sampled up to `max_staleness` steps ahead of the training.

With 0 a batch is sampled when it is asked for: strictly on-policy. With n the batches of the next n steps are being
sampled, in threads of the replica's leader, while the student trains. Which prompts and which seed a batch has follows
from its step alone, never from timing. The cursor belongs to the batch that was taken last, so a resumed run samples
again what was only under way: no prompt is lost, none is trained twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

from megatron_opd.core.types import Prompt, Rollout
from megatron_opd.prompts.mix import PromptMix

Sample = Callable[[int, list[Prompt]], list[Rollout]]
"""(step, the prompts of all replicas) -> this replica's rollouts; called on leaders only."""


class Ahead:
    """The batches of a run, in order of steps. Every rank draws the prompts; only one with `sample` samples."""

    def __init__(
        self, prompts: PromptMix, sample: Sample | None, *, num_prompts: int, max_staleness: int, num_steps: int
    ) -> None:
        self.prompts, self.sample = prompts, sample
        self.num_prompts, self.max_staleness, self.num_steps = num_prompts, max_staleness, num_steps
        self.cursor = prompts.state()
        self._started: deque[tuple[dict[str, int], Callable[[], list[Rollout]]]] = deque()
        self._under_way: set[Future[list[Rollout]]] = set()
        self._threads = ThreadPoolExecutor(max_staleness + 1, "rollouts") if max_staleness and sample else None

    def take(self, step: int) -> Callable[[], list[Rollout]]:
        """Start every batch that is due, and return what waits for the batch of `step` (steps come one by one)."""
        last = min(step + self.max_staleness, self.num_steps - 1)
        for ahead in range(step + len(self._started), last + 1):
            self._start(ahead)
        self.cursor, result = self._started.popleft()
        return result

    def settle(self) -> None:
        """Wait until nothing is being sampled. What failed says so when it is taken."""
        wait(self._under_way)

    def close(self) -> None:
        """Start nothing more. What is being sampled ends when its engine is closed."""
        if self._threads:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _start(self, step: int) -> None:
        prompts = self.prompts.next(self.num_prompts)
        if self.sample is None:
            result: Callable[[], list[Rollout]] = list
        elif self._threads is None:
            result = partial(self.sample, step, prompts)
        else:
            future = self._threads.submit(self.sample, step, prompts)
            self._under_way = {f for f in self._under_way if not f.done()} | {future}
            result = future.result
        self._started.append((self.prompts.state(), result))
