"""Whole runs over stand-in servers, as another process: what is asked and trained, and what happens when they die."""

import asyncio
import json
import sys
import threading

import pytest
import tiny
from program import CONFIG, MODELS, PATIENCE_S, ROOT, assert_user_error, checkpoints, opd, rows
from standin import VOCAB_SIZE, StandIn, wait_for

STEPS, PROMPTS, SAMPLES = 4, 4, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with the vocabulary of the stand-ins, and a tokenizer of fewer words."""
    return tiny.save_with_tokenizer(MODELS / "student", tmp_path_factory.mktemp("models"), vocab_size=VOCAB_SIZE)


@pytest.fixture
def servers():
    started = []

    def make(count=1, **settings):
        started.extend(StandIn(**settings) for _ in range(count))
        return started[-count:]

    yield make
    for server in started:
        server.close()


def listed(servers):
    return f"[{', '.join(server.url for server in servers)}]"


def arguments(run_dir, model, rollout, teacher, *overrides):
    """One rank; the student samples on `rollout`, one teacher is in-process and one on `teacher`, by its top-k."""
    served = {"retries": 1, "patience_s": 1, "request_timeout_s": 300}
    settings = {
        **{"parallel.tensor": 1, "parallel.pipeline": 1, "run.dir": run_dir, "run.timeout_s": 60},
        **{"student.model": model, "teachers.0.model": model, "teachers.1.model": model},
        **{"rollout.engine": "sglang", "rollout.sync": "disk", "rollout.servers.urls": listed(rollout)},
        **{"teachers.1.backend": "sglang", "teachers.1.carrier": "topk", "teachers.1.top_k": 8},
        **{"teachers.1.servers.urls": listed(teacher), "loss.ensemble": "probs"},
        **{f"{where}.servers.{name}": value for where in ("rollout", "teachers.1") for name, value in served.items()},
        **{"rollout.prompts_per_step": PROMPTS, "rollout.samples_per_prompt": SAMPLES, "train.micro_batch_size": 4},
        **{"train.steps": STEPS, "train.eval_every": 0, "train.save_every": 0, "train.eval_teachers": False},
        "optim.warmup_steps": 0,
    }
    return [CONFIG, *(f"{name}={value}" for name, value in settings.items()), *overrides]


def train(*given, **how):
    return opd("train", *arguments(*given), **how)


def test_a_run_on_servers(tmp_path, model, servers):
    rollout, teacher = servers(2), servers(1)
    done = train(tmp_path / "run", model, rollout, teacher)
    assert done.returncode == 0, done.stderr
    trained = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4]
    assert all(row["rollout/version_lag"] == 0 for row in trained)
    assert sum(row["rollout/requests"] for row in trained) == STEPS * PROMPTS * SAMPLES
    assert sum(row["teacher/compare/requests"] for row in trained) == STEPS * PROMPTS * SAMPLES
    assert {server.version for server in rollout} == {str(STEPS)}
    assert all(0 < row["topk/compare/mass_outside"] < 1 for row in trained)
    assert not (tmp_path / "run" / "weights").exists(), "weights for the servers are left behind"


def test_sampling_ahead_lags_by_one_version_and_uses_the_same_prompts(tmp_path, model, servers):
    """Its checkpoints end behind what was trained: a resumed run loses none of what was drawn ahead."""
    asked = []
    for staleness in (0, 1):
        rollout, teacher = servers(1), servers(1)
        saves = "train.save_every=1", f"train.keep_last={STEPS}", f"rollout.max_staleness={staleness}"
        done = train(tmp_path / str(staleness), model, rollout, teacher, *saves)
        assert done.returncode == 0, done.stderr
        saved = sorted(tmp_path.joinpath(str(staleness), "checkpoints").glob("*/loop.json"))
        trained_on = [sum(json.loads(file.read_text())["prompts"].values()) for file in saved]
        assert trained_on == [PROMPTS * step for step in range(1, STEPS + 1)]
        trained = [row for row in rows(tmp_path / str(staleness)) if "loss" in row]
        assert [row["rollout/version_lag"] for row in trained] == [0] + [staleness] * (STEPS - 1)
        asked.append(sorted(json.dumps(body["input_ids"]) for body in rollout[0].seen))
    assert asked[0] == asked[1]


def test_a_run_that_lost_its_servers_saves_stops_and_goes_on(tmp_path, model, servers):
    rollout, teacher = servers(1, token_s=0.02), servers(1)
    run_dir = tmp_path / "run"
    whole = STEPS * PROMPTS * SAMPLES

    def die_in_the_third_step():
        wait_for(lambda: len(rollout[0].seen) > 2 * PROMPTS * SAMPLES + 3, 200)
        rollout[0].kill()

    killer = threading.Thread(target=die_in_the_third_step)
    killer.start()
    done = train(run_dir, model, rollout, teacher)
    killer.join()
    assert_user_error(done, "the same command continues from")
    assert rollout[0].url in done.stderr
    assert checkpoints(run_dir) == ["step_00000002"]
    rollout[0].start()
    done = train(run_dir, model, rollout, teacher)
    assert done.returncode == 0, done.stderr
    trained = [row for row in rows(run_dir) if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4]
    assert len(rollout[0].seen) >= whole


class DiesInAnUpdate(StandIn):
    """Dies when it is to take weights for the third time, which are those of the second step."""

    async def _from_disk(self, request):
        if self.paths.count(request.path) == 3:
            asyncio.get_running_loop().create_task(self._stop())
            await asyncio.sleep(10)
        return await super()._from_disk(request)


def test_a_step_whose_weights_no_server_takes_keeps_its_metrics(tmp_path, model, servers):
    (teacher,), rollout = servers(1), DiesInAnUpdate()
    try:
        done = train(tmp_path / "run", model, [rollout], [teacher])
        assert_user_error(done, "no server has taken the weights", rollout.url, "the same command continues from")
        assert checkpoints(tmp_path / "run") == ["step_00000002"]
        rollout.start()
        done = train(tmp_path / "run", model, [rollout], [teacher])
    finally:
        rollout.close()
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.slow
def test_launch_starts_a_server_that_died_again_and_the_run_ends(tmp_path, model, servers):
    python = tmp_path / "python"
    once = f"STANDIN_DIES_ONCE={tmp_path}/died"
    python.write_text(f'#!/bin/sh\n{once} exec {sys.executable} {ROOT}/tests/slurm/standin_server.py "$@"\n')
    python.chmod(0o755)
    run_dir = tmp_path / "run"
    servers_of = {"python": python, "port": 25300, "patience_s": PATIENCE_S}
    ours = [*(f"rollout.servers.{name}={value}" for name, value in servers_of.items()), "run.max_restarts=1"]
    done = opd("launch", *arguments(run_dir, model, [], servers(1), *ours))
    assert done.returncode == 0, done.stderr
    assert "the server http://127.0.0.1:25300 was ended by SIGKILL" in done.stderr
    assert "it starts again (0 more restart(s)" in done.stderr
    assert "starting again" not in done.stderr, "the ranks were started again too"
    trained = [row for row in rows(run_dir) if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4]
    assert sum(row["rollout/returns"] for row in trained if "rollout/returns" in row) == 1


@pytest.mark.parametrize("on_failure", ["fail", "renormalise"])
def test_a_teacher_that_never_answers(tmp_path, model, servers, on_failure):
    rollout, teacher = servers(1), servers(1)
    teacher[0].kill()
    done = train(tmp_path / "run", model, rollout, teacher, f"teachers.1.on_failure={on_failure}")
    if on_failure == "fail":
        assert_user_error(done, "teacher 'compare'")
        assert teacher[0].url in done.stderr
        return
    assert done.returncode == 0, done.stderr
    trained = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert len(trained) == STEPS
    assert all("kl/compare" not in row and row["kl/ensemble"] == pytest.approx(row["kl/carry"]) for row in trained)


@pytest.mark.parametrize("data", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_beside_its_servers_on_the_same_gpus(tmp_path, model, servers, data):
    """The numbers are those of servers with GPUs of their own; they sample only with memory, we train only without."""
    common = f"parallel.data={data}", "train.eval_every=2", "rollout.temperature=1.0"
    losses = []
    for is_colocated in (False, True):
        rollout, teacher = servers(2), servers(1)
        run_dir = tmp_path / str(is_colocated)
        done = train(run_dir, model, rollout, teacher, *common, f"rollout.servers.colocated={is_colocated}".lower())
        assert done.returncode == 0, done.stderr
        trained = [row for row in rows(run_dir) if "loss" in row]
        losses.append([(row["loss"], row["kl/ensemble"]) for row in trained])
        said = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [row.get("time/release", 0) > 0 for row in said if "loss" in row] == [is_colocated] * STEPS
    assert losses[0] == losses[1]
    assert len([row for row in rows(run_dir) if "eval/accuracy/all" in row]) == 3  # before, in the middle, at the end
    rounds = STEPS + 3  # and evaluations
    for server in rollout:
        released = [kinds for path, kinds in server.memory if path == "/release_memory_occupation"]
        assert len(released) == 1 + rounds  # and before the models are loaded
        assert (server.deaths, server.released, server.version) == (0, set(), str(STEPS))
