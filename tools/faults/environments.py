"""Faults of environments, between the turns of episodes."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import program

from faults import judge
from faults.kind import Played, kind
from faults.stage import RUN, Stage, reference

_WORLD = (
    "environment.name=tools.faults.world:World",
    *("environment.max_tokens=56", "environment.max_turns=4", "environment.turn_timeout_s=0.5"),
)
_FAILED = ("episode/ended/failed", "episode/ended/timeout")


@kind
def environment_misbehaves(rng: random.Random, directory: Path) -> Played:
    """Environments raise, hang, exit, flood and talk nonsense: episodes end with a reason, and the run goes on."""
    seed, share = rng.randrange(1000), rng.choice([0.2, 0.5, 1.0])
    stage = Stage(rng.choice([1, 1, 2]), directory)
    played = Played({"seed": seed, "share": share, "ranks": stage.ranks})
    how = stage.run(*_WORLD, f"environment.options={{seed: {seed}, share: {share}}}")
    played.wrong = judge.ended(how, codes=(0,)) + judge.all_gone(stage)
    if how.code == 0:
        rows = program.rows(stage.run_dir)
        played.reached = any(row.get(name, 0) > 0 for row in rows for name in _FAILED)
        played.wrong += [] if any(row.get("episode/turns", 0) > 1 for row in rows) or share == 1 else ["no second turn"]
    return played


@kind
def killed_between_turns(rng: random.Random, directory: Path) -> Played:
    """SIGKILL while an environment answers, in the middle of episodes: the same command ends bitwise as without it."""
    seed, at = rng.randrange(3), rng.randrange(1, 60)
    settings = (*RUN, *_WORLD, f"environment.options={{seed: {seed}}}")
    undisturbed, stage = reference(1, settings), Stage(1, directory, settings)
    played = Played({"seed": seed, "at": at})
    options = f"environment.options={{seed: {seed}, kill_at: {at}, mark: {stage.mark}}}"
    how = stage.run(options)
    played.reached = stage.happened()
    if played.reached:
        played.wrong = judge.ended(how, codes=(-signal.SIGKILL,)) + judge.all_gone(stage)
        played.wrong += judge.continues(stage, undisturbed)
    return played
