"""Faults of SGLang servers, played by the tests' stand-ins: a failing request, a dead server, a wrong answer."""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import program
import tiny
from standin import VOCAB_SIZE, StandIn
from standin_faults import AFTER, BEFORE

from faults import judge
from faults.kind import Played, kind
from faults.stage import Stage

_PATHS = (
    "/begin_weight_update",
    "/end_weight_update",
    "/update_weights_from_disk",
    "/pause_generation",
    "/flush_cache",
)
_SERVED = {"retries": 2, "patience_s": 5, "request_timeout_s": 5}
_STEPS = 3


@kind
def requests_fail(rng: random.Random, directory: Path) -> Played:
    """Single requests to one of two rollout servers fail in any way: they go elsewhere, and nothing changes."""
    faults = [rng.choice([*BEFORE, *AFTER]) for _ in range(rng.randint(1, 3))]
    played = Played({"faults": faults, "after": rng.randrange(12)})
    with _servers(2) as (first, second, teacher):
        first.faults = [None] * played.facts["after"] + list(faults)
        stage = _stage(directory, [first, second], teacher)
        how = stage.run()
        played.reached = not first.faults
    if played.reached:
        played.wrong = judge.ended(how, codes=(0,)) + judge.all_gone(stage)
        played.wrong += _same_weights(stage) if how.code == 0 else []
    return played


@kind
def server_always_fails(rng: random.Random, directory: Path) -> Played:
    """One of two rollout servers fails every request while it says that it is healthy: the other one does the work."""
    played = Played({"fault": rng.choice(["error", "full", "garbage", "half", "drop", "wrong_ids", "nan", "no_meta"])})
    with _servers(2) as (first, second, teacher):
        rng.choice([first, second]).always = played.facts["fault"]
        stage = _stage(directory, [first, second], teacher)
        how = stage.run()
    played.wrong = judge.ended(how, codes=(0,)) + judge.all_gone(stage)
    played.wrong += _same_weights(stage) if how.code == 0 else []
    return played


@kind
def only_server_dies(rng: random.Random, directory: Path) -> Played:
    """The only server for rollouts, or of a teacher, dies at a random time, and is there again at the next start."""
    victim = rng.choice(["rollout", "teacher"])
    played = Played({"victim": victim, "after_requests": rng.randrange(1, 20)})
    with _servers(1) as (rollout, teacher):
        server = rollout if victim == "rollout" else teacher
        stage = _stage(directory, [rollout], teacher)
        running = stage.start()
        until = time.monotonic() + 120
        while len(server.seen) < played.facts["after_requests"] and running.is_alive() and time.monotonic() < until:
            time.sleep(0.002)
        server.kill()
        how = stage.end(running)
        played.reached = how.code != 0
        if played.reached:
            played.wrong = judge.ended(how, codes=(1,)) + judge.one_message(how) + judge.all_gone(stage)
            played.wrong += [] if server.url in how.printed else [f"{server.url} is not named"]
        server.start()
        how = stage.run()
        played.wrong += judge.ended(how, codes=(0,))
        played.wrong += _same_weights(stage) if how.code == 0 else []
    return played


@kind
def server_comes_and_goes(rng: random.Random, directory: Path) -> Played:
    """One of two rollout servers dies and comes back, as it was before all updates, while the run goes on."""
    played = Played({"after_requests": rng.randrange(1, 20), "away_s": round(rng.uniform(0, 1), 3)})
    with _servers(2) as (first, second, teacher):
        stage = _stage(directory, [first, second], teacher)
        running = stage.start()

        def blink() -> None:
            while len(first.seen) < played.facts["after_requests"] and running.is_alive():
                time.sleep(0.002)
            first.kill()
            first.version = "default"
            time.sleep(played.facts["away_s"])
            first.start()

        thread = threading.Thread(target=blink)
        thread.start()
        how = stage.end(running)
        thread.join()
    played.wrong = judge.ended(how, codes=(0,)) + judge.all_gone(stage)
    played.wrong += _same_weights(stage) if how.code == 0 else []
    return played


@kind
def weight_update_fails(rng: random.Random, directory: Path) -> Played:
    """A request of a weight update fails on one of two servers: it is left out or updated anew, never sampled stale."""
    played = Played({"path": rng.choice(_PATHS), "call": rng.randint(1, _STEPS)})
    with _servers(2) as (first, second, teacher):
        first.broken = {(played.facts["path"], played.facts["call"])}
        stage = _stage(directory, [first, second], teacher)
        how = stage.run()
        played.reached = first.paths.count(played.facts["path"]) >= played.facts["call"]
    if played.reached:
        played.wrong = judge.ended(how, codes=(0, 1)) + judge.all_gone(stage)
        played.wrong += _same_weights(stage) if how.code == 0 else judge.one_message(how)
    return played


@contextmanager
def _servers(rollout: int) -> Iterator[list[StandIn]]:
    """So many servers for rollouts, and one for a teacher."""
    made = [StandIn() for _ in range(rollout + 1)]
    try:
        yield made
    finally:
        for server in made:
            server.close()


def _stage(directory: Path, rollout: list[StandIn], teacher: StandIn) -> Stage:
    model = _model()
    settings = {
        **{"student.model": model, "teachers.0.model": model, "teachers.1.model": model},
        **{"rollout.engine": "sglang", "rollout.sync": "disk"},
        "rollout.servers.urls": f"[{', '.join(server.url for server in rollout)}]",
        **{"teachers.1.backend": "sglang", "teachers.1.carrier": "topk", "teachers.1.top_k": 8},
        **{"teachers.1.servers.urls": f"[{teacher.url}]", "loss.ensemble": "probs"},
        **{f"{where}.servers.{name}": value for where in ("rollout", "teachers.1") for name, value in _SERVED.items()},
        **{"train.steps": _STEPS, "train.save_every": 1, "train.eval_teachers": False, "run.timeout_s": 60},
    }
    return Stage(1, directory, tuple(f"{name}={value}" for name, value in settings.items()))


@cache
def _model() -> Path:
    """A model with the vocabulary of the stand-ins, and a tokenizer of fewer words."""
    directory = Path(tempfile.mkdtemp(prefix="faults_model_")) / "tiny"
    tiny.save(tiny.build("qwen3", vocab_size=VOCAB_SIZE, max_position_embeddings=64), directory)
    for file in program.MODELS.joinpath("student").iterdir():
        if "token" in file.name:
            shutil.copy(file, directory)
    return directory


@cache
def _expected() -> bytes:
    """The weights of a run whose servers do nothing wrong."""
    with _servers(1) as (rollout, teacher):
        stage = _stage(Path(tempfile.mkdtemp(prefix="faults_served_")), [rollout], teacher)
        how = stage.run()
        if how.code:
            raise RuntimeError(f"the run fails without any fault:\n{how.printed}")
    return program.exported(stage.run_dir)


def _same_weights(stage: Stage) -> list[str]:
    steps = [row["step"] for row in program.rows(stage.run_dir) if "loss" in row]
    wrong = [] if steps == [*range(1, _STEPS + 1)] else [f"steps {steps}"]
    return wrong + ([] if program.exported(stage.run_dir) == _expected() else ["the weights differ"])
