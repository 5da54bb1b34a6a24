"""An engine whose prompts may have environments: it plays episodes where another engine draws single answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from megatron_opd.core.named_weights import NamedWeights
from megatron_opd.core.protocols import OnFinished, RolloutEngine, Talk
from megatron_opd.core.types import Prompt, Rollout, Sampling
from megatron_opd.rollout import plain_answer
from megatron_opd.rollout.limited import EnvironmentThread
from megatron_opd.rollout.play import Episode
from megatron_opd.rollout.worlds import World


class EpisodeEngine:
    """A RolloutEngine around another one, which draws its turns."""

    def __init__(self, engine: RolloutEngine, worlds: Mapping[str, World]) -> None:
        """`worlds` are those of the sources that have an environment, by name."""
        self.engine, self.worlds = engine, worlds
        self._thread = EnvironmentThread()

    def generate(
        self, prompts: list[Prompt], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        """All episodes of all prompts, prompt-major; an episode's trajectories follow each other. Prompts without an
        environment are answered in one turn."""
        if not any(prompt.source in self.worlds for prompt in prompts):
            return self.engine.generate(prompts, sampling, on_finished)
        talks = list(self._talks(prompts, sampling, on_finished or (lambda _: None)))
        return [rollout for its in self.engine.converse(talks, sampling) for rollout in its]

    def converse(self, talks: list[Talk], sampling: Sampling) -> list[list[Rollout]]:
        """Play episodes that somebody else has made."""
        return self.engine.converse(talks, sampling)

    def load(self, weights: NamedWeights, version: int) -> None:
        """Replace the weights."""
        self.engine.load(weights, version)

    def release(self) -> None:
        """Give back GPU memory until the next `load`."""
        self.engine.release()

    def metrics(self) -> dict[str, float]:
        """The engine's counts."""
        return self.engine.metrics()

    def close(self) -> None:
        """End what runs beside the caller."""
        self.engine.close()
        self._thread.close()

    def _talks(self, prompts: list[Prompt], sampling: Sampling, on_finished: OnFinished) -> Iterator[Talk]:
        for prompt in prompts:
            for sample in range(sampling.samples_per_prompt):
                world = self.worlds.get(prompt.source)
                if world is None:
                    yield partial(plain_answer.play, prompt, sample, sampling, on_finished)
                else:
                    episode = Episode(prompt, sample, sampling, world, self._thread)
                    yield partial(episode.play, on_finished=on_finished)


def with_environments(engine: RolloutEngine, worlds: Mapping[str, World]) -> RolloutEngine:
    """The engine, which plays episodes where sources have environments."""
    return EpisodeEngine(engine, worlds) if worlds else engine
