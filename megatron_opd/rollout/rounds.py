"""Episodes of several turns for an engine that draws many answers at once: all first turns, all second ones.

A round begins when every episode that goes on waits for its next turn. An environment works as soon as its own turn has
ended, beside those that are still being drawn; but what is drawn together follows from the turns alone, never from how
long an environment takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeAlias

from megatron_opd.core.event_loop import Loop
from megatron_opd.core.protocols import DrawTurn, Talk, TurnAsked, TurnDrawn
from megatron_opd.core.types import Rollout

DrawTurns: TypeAlias = Callable[[Sequence[TurnAsked], Callable[[int, TurnDrawn], None]], None]
"""(turns, told) draws them all, on the caller's thread, and tells each one's number and tokens as soon as it ends."""


def play_rounds(talks: Sequence[Talk], draw: DrawTurns) -> list[list[Rollout]]:
    """The results of the episodes, in order. The first failure, or an interrupt, ends all of them."""
    rounds = _Rounds(len(talks))
    try:
        return rounds.play(talks, draw)
    finally:
        rounds.close()


class _Rounds:
    """Episodes under way. They run on a thread with an event loop; their turns are drawn on the caller's."""

    def __init__(self, count: int) -> None:
        self._loop = Loop("episodes")
        self._playing = set(range(count))
        self._waiting: dict[int, tuple[TurnAsked, asyncio.Future[TurnDrawn]]] = {}
        self._news: SimpleQueue[tuple[int, tuple[TurnAsked, asyncio.Future[TurnDrawn]] | None]] = SimpleQueue()
        """(episode, the turn that it waits for), or (episode, None) when it is over."""

    def play(self, talks: Sequence[Talk], draw: DrawTurns) -> list[list[Rollout]]:
        games = [self._begin(number, talk) for number, talk in enumerate(talks)]
        while self._playing:
            while len(self._waiting) < len(self._playing):
                self._hear(games)
            its = [self._waiting.pop(number) for number in sorted(self._waiting)]
            if its:
                draw([asked for asked, _ in its], lambda i, drawn, its=its: self._loop.soon(_settle, its[i][1], drawn))
        return [game.result() for game in games]

    def close(self) -> None:
        """End the episodes that are under way, and their thread."""
        self._loop.close()

    def _begin(self, number: int, talk: Talk) -> Future[list[Rollout]]:
        game = self._loop.start(talk(self._drawer(number)))
        game.add_done_callback(lambda _: self._news.put((number, None)))
        return game

    def _drawer(self, number: int) -> DrawTurn:
        async def draw(asked: TurnAsked) -> TurnDrawn:
            future: asyncio.Future[TurnDrawn] = asyncio.get_running_loop().create_future()
            self._news.put((number, (asked, future)))
            return await future

        return draw

    def _hear(self, games: Sequence[Future[list[Rollout]]]) -> None:
        number, asked = self._news.get()
        if asked is not None:
            self._waiting[number] = asked
            return
        self._playing.discard(number)
        games[number].result()  # a failure of one ends all, now


def _settle(future: asyncio.Future[TurnDrawn], drawn: TurnDrawn) -> None:
    if not future.done():
        future.set_result(drawn)
