"""Some injections of the fault campaign, and that its judge sees what is wrong."""

import importlib
import json
import operator
import os
import signal
import sys
import time

import program
import pytest
import warm
from faults import campaign, inject, judge
from faults.kind import KINDS
from faults.points import FILE_POINTS, POINTS
from faults.stage import RUN, Ended, Stage, reference

SEED = int(os.environ.get("FAULT_SEED", "0"))
COUNT = 8
MESSAGE = "12:00:00 step 1/4\nerror: interrupted; the same command continues from here\n"


PLAN = campaign.plan(SEED, COUNT, list(KINDS))


def injections():
    """Numbers and kinds. A rank that is stopped is found by a time-out alone, so that the run has to wait for it."""
    return [
        pytest.param(i, kind, marks=[pytest.mark.slow] * (kind == "rank_is_stopped")) for i, kind in enumerate(PLAN)
    ]


@pytest.mark.parametrize(("number", "kind"), injections())
def test_an_injection(number, kind):
    result = campaign.play(SEED, number, kind)
    assert not result["wrong"], json.dumps(result, indent=1)


def test_every_kind_comes_before_one_comes_again():
    plan = campaign.plan(3, 2 * len(KINDS) + 1, list(KINDS))
    assert sorted(plan[: len(KINDS)]) == sorted(plan[len(KINDS) : -1]) == sorted(KINDS)
    assert plan != campaign.plan(4, len(plan), list(KINDS))
    assert len(KINDS) >= 25


@pytest.mark.parametrize(
    ("printed", "complaint"),
    [
        ("", "0 messages"),
        ("step 1/4\n", "0 messages"),
        (MESSAGE + "error: rank 1 lost another rank\n", "2 messages"),
        (MESSAGE + "one more word\n", "not last"),
        ("Traceback (most recent call last):\n" + MESSAGE, "for developers"),
        ("terminate called after throwing an instance of 'std::bad_alloc'\n" + MESSAGE, "for developers"),
    ],
)
def test_the_judge_of_messages(printed, complaint):
    assert complaint in " ".join(judge.one_message(Ended(1, printed, 0.0)))


def test_one_message_is_right():
    assert judge.one_message(Ended(1, MESSAGE, 0.0)) == []


def test_the_judge_of_ends():
    assert "exit code 0" in judge.ended(Ended(0, "", 1.0), codes=(1,))[0]
    assert "hung" in judge.ended(Ended(None, "", 1.0), codes=(1,))[0]
    assert judge.ended(Ended(143, "", 1.0), codes=(143, 130)) == []


def test_the_judge_of_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "_GONE_S", 0.5)
    stage = Stage(1, tmp_path)
    (stage.tmp / "left").write_text("x")
    sleeper = warm.start(["-c", "import time; time.sleep(1000)", str(stage.dir)])
    until = time.monotonic() + program.PATIENCE_S
    while not stage.processes() and time.monotonic() < until:  # a fork shows its arguments a moment later
        time.sleep(0.01)
    wrong = judge.all_gone(stage)
    assert "left running" in wrong[0]
    assert "left in TMPDIR: ['left']" in wrong[1]
    assert sleeper.wait(60) == -signal.SIGKILL  # what it finds it ends
    (stage.tmp / "left").unlink()
    assert judge.all_gone(stage) == []


@pytest.fixture
def stage(tmp_path):
    """A whole run without its export, which the next start writes again."""
    stage = Stage(1, tmp_path)
    reference(1).before_export(stage)
    return stage


def test_the_judge_of_numbers(stage):
    assert judge.continues(stage, reference(1)) == []
    rows = program.rows(stage.run_dir)
    lines = (stage.run_dir / "metrics.jsonl").read_text().splitlines()
    (stage.run_dir / "metrics.jsonl").write_text("\n".join([*lines, lines[-1]]) + "\n")
    (stage.run_dir / "more").touch()
    wrong = judge.same_as(reference(1), stage)
    assert len(wrong) == 2
    assert f"steps {[row['step'] for row in rows] + [rows[-1]['step']]}" in wrong[0]
    assert "more" in wrong[1]


@pytest.mark.parametrize("weight", [0, -1])
def test_the_judge_of_weights(stage, weight):
    assert stage.run().code == 0
    file = stage.run_dir / "hf/model.safetensors"
    data = bytearray(file.read_bytes())
    data[weight] ^= 1
    file.write_bytes(data)
    assert judge.same_as(reference(1), stage) == ["hf/model.safetensors differs"]


def test_the_reference_has_what_is_compared():
    run_dir = reference(1).run_dir
    assert [row["step"] for row in program.rows(run_dir) if "loss" in row] == [1, 2, 3, 4]
    assert (run_dir / "completions.jsonl").stat().st_size
    assert "train.save_every=1" in RUN


def test_a_fault_happens_at_its_call_and_for_its_rank(tmp_path):
    code = "import os\nfor i in range(3): print(i); os.getcwd()"
    fault = {"rank": "1", "point": "os:getcwd", "call": 3, "do": {"signal": int(signal.SIGKILL)}}

    def run(**changes):
        mark = tmp_path / "-".join(map(str, changes.values() or ["plain"]))
        told = {"FAULT": json.dumps({**fault, **changes, "mark": str(mark)}), "RANK": "1"}
        done = warm.run(["-c", code], env={**os.environ, **told, "WARM_BEFORE": inject.__file__}, timeout=60)
        return done.returncode, mark.exists()

    assert run() == (-signal.SIGKILL, True)
    assert run(rank="0") == (0, False)
    assert run(call=4) == (0, False)
    assert run(rank="any") == (-signal.SIGKILL, True)


@pytest.mark.parametrize("point", sorted({*POINTS, *FILE_POINTS}))
def test_every_point_is_there(point):
    module, _, name = point.partition(":")
    assert callable(operator.attrgetter(name)(importlib.import_module(module)))


def test_results_are_kept_and_go_on(tmp_path):
    out = tmp_path / "found.jsonl"
    first = list(campaign.run(5, 2, ["fuzzed_overrides"], out))
    with out.open("a") as lines:
        lines.write('{"seed": 5, "num')  # as a kill leaves it
    assert campaign.results(out) == json.loads(json.dumps(first))
    again = list(campaign.run(5, 3, ["fuzzed_overrides"], out))
    assert [one["number"] for one in again] == [2]


def test_the_tool_lists_its_kinds():
    command = [sys.executable, str(program.ROOT / "tools/fault_campaign.py"), "--list"]
    done = warm.run(command[1:], env=program.environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(KINDS) <= {line.split()[0] for line in done.stdout.splitlines()}
