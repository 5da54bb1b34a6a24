"""The supervisor of ranks, with programs of a line in place of ranks: ends, culprits, signals, and orphans."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from megatron_opd.core import lifeline
from megatron_opd.launch.interruption import until_interrupted
from megatron_opd.launch.rank_processes import Ranks, spawn

SLEEP = "import time; time.sleep(3600)"
TIED = f"""
import os, time
from megatron_opd.core import lifeline
lifeline.tie_to_launcher()
open("up-" + os.environ["RANK"], "w").close()
{SLEEP}
"""
"""A rank that says that it is tied to its launcher."""
AS_LAUNCHER = """
import sys
from pathlib import Path
from megatron_opd.launch.rank_processes import Ranks
Ranks(["-c", sys.argv[1]], int(sys.argv[2]), logs=Path("logs")).run()
"""


def of_rank(**programs):
    """One program text that does what `programs` say of each rank: r0="...", r1="..."."""
    return ["-c", f"import os, sys, time, signal\nexec({programs!r}['r' + os.environ['RANK']])"]


def wait_until(holds, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ranks_are_told_their_place_and_write_where_they_should(tmp_path, capfd):
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "X", lifeline.LAUNCHER
    told = f"import os, sys; print(*(os.environ[n] for n in {names})); print('err', file=sys.stderr)"
    assert Ranks(["-c", told], 2, logs=tmp_path / "logs", environment={"X": "x"}).run() == {}
    out, err = capfd.readouterr()
    assert out == f"0 0 2 2 127.0.0.1 x {os.getpid()}\n"
    assert err == "err\n"
    assert sorted((tmp_path / "logs/rank-1.log").read_text().split("\n")) == [
        "", f"1 1 2 2 127.0.0.1 x {os.getpid()}", "err"
    ]  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("last", [0, 1])
def test_a_rank_whose_start_is_interrupted_is_ended_too(tmp_path, number, code, last):
    """The signal comes when the process is there, and nobody has heard of it yet."""
    begun = []

    def start(*given):
        begun.append(spawn(*given))
        if len(begun) == last + 1:
            signal.raise_signal(number)
        return begun[-1]

    ranks = Ranks(["-c", SLEEP], 2, logs=tmp_path, start=start)
    assert until_interrupted(str(tmp_path), lambda: bool(ranks.run(timeout_s=120.0))) == code
    assert len(begun) == last + 1
    assert [rank.poll() for rank in begun] == [-signal.SIGTERM] * len(begun)


def test_the_first_failure_ends_the_others(tmp_path):
    failures = Ranks(of_rank(r0=SLEEP, r1="sys.exit(7)", r2=SLEEP), 3, logs=tmp_path).run(timeout_s=120.0)
    assert {rank: (failure.code, failure.is_ours) for rank, failure in failures.items()} == {
        0: (-signal.SIGTERM, True),
        1: (7, False),
        2: (-signal.SIGTERM, True),
    }
    assert failures[1].log == tmp_path / "rank-1.log"
    assert failures[0].log is None


def test_a_rank_that_a_user_ends_is_told_from_those_that_the_launcher_ends(tmp_path):
    failures = Ranks(of_rank(r0=SLEEP, r1="os.kill(os.getpid(), signal.SIGTERM)"), 2, logs=tmp_path).run()
    assert {rank: (failure.code, failure.is_ours) for rank, failure in failures.items()} == {
        0: (-signal.SIGTERM, True),
        1: (-signal.SIGTERM, False),
    }


def test_a_rank_that_does_not_end_is_killed_and_that_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_opd.launch.rank_processes._GRACE_S", 0.5)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); open('deaf', 'w'); " + SLEEP
    then = "\nwhile not os.path.exists('deaf'): time.sleep(0.01)\nsys.exit(1)"
    monkeypatch.chdir(tmp_path)
    failures = Ranks(of_rank(r0=deaf, r1=then), 2, logs=tmp_path).run()
    assert (failures[0].code, failures[0].is_ours) == (-signal.SIGKILL, True)
    assert (failures[1].code, failures[1].is_ours) == (1, False)


def test_ranks_that_take_too_long_are_ended(tmp_path):
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        Ranks(["-c", SLEEP], 2, logs=tmp_path).run(timeout_s=0.5)
    assert time.monotonic() - begun < 10


def test_helpers_of_a_rank_end_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    helper = (
        "import subprocess; p = subprocess.Popen(['sleep', '60']); open('helper', 'w').write(str(p.pid)); sys.exit(1)"
    )
    assert Ranks(of_rank(r0=helper), 1, logs=tmp_path).run()[0].code == 1
    pid = int((tmp_path / "helper").read_text())
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_an_exception_from_a_signal_handler_ends_all_ranks(tmp_path):
    class Enough(Exception):
        pass

    def enough(*_):
        raise Enough

    started = []

    def start(*how):
        started.append(spawn(*how))
        return started[-1]

    before = signal.signal(signal.SIGUSR1, enough)

    def signal_when_both_are_there():
        wait_until(lambda: len(started) == 2)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=signal_when_both_are_there)
    try:
        thread.start()
        with pytest.raises(Enough):
            Ranks(["-c", SLEEP], 2, logs=tmp_path, start=start).run()
    finally:
        thread.join(120)
        signal.signal(signal.SIGUSR1, before)
    assert [rank.returncode for rank in started] == [-signal.SIGTERM] * 2


@pytest.fixture
def launcher(tmp_path):
    """`launcher(program, ranks, hold)`: a process that runs ranks, and its ranks once they are there."""
    made = []

    def make(program, ranks, **env):
        where = {"PYTHONPATH": os.pathsep.join(filter(None, [*map(str, env.pop("first", [])), os.getcwd()]))}
        process = subprocess.Popen(
            [sys.executable, "-c", AS_LAUNCHER, program, str(ranks)], cwd=tmp_path, env={**os.environ, **where}
        )
        made.append(process)
        children = psutil.Process(process.pid).children
        wait_until(lambda: len(children()) == ranks)
        made.extend(children())
        return process, children()

    yield make
    for process in made:
        if psutil.pid_exists(process.pid):
            process.kill()
    made[0].wait(120)


def test_ranks_die_with_their_launcher_also_when_they_are_stopped(launcher, tmp_path):
    process, ranks = launcher(TIED, 2)
    wait_until(lambda: len(list(tmp_path.glob("up-*"))) == 2)
    ranks[1].send_signal(signal.SIGSTOP)
    process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=120)
    assert not alive


def test_a_rank_whose_launcher_dies_before_it_imports_anything(launcher, tmp_path):
    """The kernel cannot have been asked by then: the rank itself finds out that it has another parent."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, time\nwhile 'RANK' in os.environ and not os.path.exists('go'): time.sleep(0.01)\n"
    )
    process, ranks = launcher(TIED, 2, first=[site])
    process.kill()
    process.wait(120)
    assert all(rank.is_running() for rank in ranks)
    (tmp_path / "go").touch()
    _, alive = psutil.wait_procs(ranks, timeout=120)
    assert not alive
    assert not list(tmp_path.glob("up-*"))


def test_others_than_ranks_of_the_local_launcher_are_tied_to_nobody():
    lifeline.tie_to_launcher({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    "name", ["megatron_opd.core.lifeline", "megatron_opd.__main__", "megatron_opd.launch.rank_processes"]
)
def test_what_runs_before_a_rank_is_tied_is_light(name):
    heavy = f"import sys, {name}; sys.exit(bool({{'torch', 'numpy', 'pydantic', 'transformers'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", heavy], check=True, timeout=120)
