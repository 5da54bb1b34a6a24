"""The launcher's exit code and its restarts, with programs of a line in place of ranks."""

from dataclasses import replace

import pytest
import tiny

from megatron_opd.core import preemption
from megatron_opd.launch import local
from megatron_opd.launch.rank_processes import spawn


def launched(tmp_path, programs, *, ranks=1, max_restarts=0):
    """(the launcher's exit code, how many times it started the ranks): `programs` of rank 0, one a start."""
    config = tiny.config("unused", [], parallel={"data": ranks})
    config = replace(config, run=replace(config.run, dir=str(tmp_path)))
    started = []

    def start(environment, _, stdout, stderr):
        started.append(int(environment["RANK"]))
        program = programs[started.count(0) - 1] if environment["RANK"] == "0" else "pass"
        return spawn(environment, ["-S", "-c", program], stdout, stderr)

    code = local.launch(config, ["unused.yaml"], max_restarts=max_restarts, start=start)
    assert sorted(started) == sorted([*range(ranks)] * started.count(0))
    return code, started.count(0)


FAILS, ENDS = "raise SystemExit(7)", "pass"
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
PREEMPTED = f"raise SystemExit({preemption.EXIT_CODE})"


@pytest.mark.parametrize(
    ("programs", "max_restarts", "code", "starts"),
    [
        ([ENDS], 2, 0, 1),
        ([FAILS], 0, 1, 1),
        ([KILLED], 0, 1, 1),
        ([FAILS, FAILS, ENDS], 2, 0, 3),  # the last one is used
        ([FAILS, KILLED, FAILS], 2, 1, 3),  # and there is no more
        ([FAILS, PREEMPTED], 2, preemption.EXIT_CODE, 2),  # who made room is not started here again
    ],
    ids=str,
)
def test_the_exit_code_after_so_many_starts(tmp_path, capfd, programs, max_restarts, code, starts):
    assert launched(tmp_path, programs, max_restarts=max_restarts) == (code, starts)
    left = [line for line in capfd.readouterr().err.splitlines() if "starting again" in line]
    assert [f"({max_restarts - 1 - i} more time(s)" in line for i, line in enumerate(left)] == [True] * (starts - 1)


@pytest.mark.parametrize("program", [FAILS, KILLED])
def test_one_rank_that_fails_is_a_run_that_fails(tmp_path, capfd, program):
    assert launched(tmp_path, [program], ranks=3) == (1, 1)
    assert "rank 0" in capfd.readouterr().err
