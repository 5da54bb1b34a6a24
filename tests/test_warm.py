"""A fork of the warm process is what a fresh interpreter would be: streams, signals, environment, exit code, end."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest
import warm
from program import assert_gone, started

TIMEOUT_S = 120


def run(code, *arguments, **how):
    return warm.run(["-c", code, *arguments], timeout=TIMEOUT_S, **how)


def prints(code, **how):
    """What a program prints, warm, which must be what it prints cold."""
    done = [run(code, "some", "arguments", cold=cold, **how) for cold in (False, True)]
    assert done[0].stdout == done[1].stdout
    assert [one.returncode for one in done] == [0, 0]
    return done[0].stdout


def test_nothing_but_its_standard_streams_is_open():
    # the fourth is the listing itself
    assert prints("import os; print(sorted(map(int, os.listdir('/proc/self/fd'))))") == "[0, 1, 2, 3]\n"


def test_arguments_environment_and_directory(tmp_path):
    told = "import os, sys; print(sys.argv, sys.path[0], os.getcwd(), sorted(os.environ.items()))"
    assert "('WHO', 'me')" in prints(told, env={**os.environ, "WHO": "me"}, cwd=tmp_path)
    told = "import psutil, os; print(psutil.Process().cmdline()[1:4], os.getpid() == os.getsid(0) == os.getpgid(0))"
    assert "'some', 'arguments'" not in prints(told)  # of -c's; the program's text is the second
    assert "True" in prints(told)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGCHLD", "SIGPIPE", "SIGXFSZ"])
def test_signals_do_what_they_do_in_a_fresh_interpreter(name):
    prints(f"import signal; print(signal.getsignal(signal.{name}), signal.pthread_sigmask(signal.SIG_BLOCK, []))")


def test_the_cuda_shim_is_off_until_a_program_asks_for_it():
    assert prints("import torch; print(torch.overrides._len_torch_function_stack())") == "0\n"
    assert "no" in prints("import torch; print('yes' if torch.cuda.current_device.__module__ == 'm' else 'no')")


def test_one_thread():
    assert prints("import os, torch; print(len(os.listdir('/proc/self/task')), torch.get_num_threads())") == "1 1\n"


def test_random_numbers_are_not_those_of_another_fork():
    draw = "import random, numpy; print(random.random(), numpy.random.rand())"
    first, second = (run(draw).stdout.split() for _ in range(2))
    assert not set(first) & set(second)


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("import sys; sys.exit(7)", 7),
        ("import sys; sys.exit()", 0),
        ("import sys; sys.exit('a message')", 1),
        ("raise ValueError('this')", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("import os; os._exit(3)", 3),
        ("import atexit; atexit.register(print, 'at the end'); print('before')", 0),
        ("import threading, time; threading.Thread(target=lambda: time.sleep(0.1) or print('thread')).start()", 0),
        ("print('no new line', end='')", 0),
        ("syntax error", 1),
    ],
)
def test_ends(code, end):
    forked, fresh = run(code), run(code, cold=True)
    assert forked.returncode == fresh.returncode == end
    assert forked.stdout == fresh.stdout
    assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_a_script_and_a_module(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; print(__name__, sys.argv, sys.path[0])")
    for arguments in ([script, "a"], ["-m", "megatron_opd", "--version"]):
        forked, fresh = (warm.run(arguments, timeout=TIMEOUT_S, cold=cold) for cold in (False, True))
        assert (forked.stdout, forked.stderr, forked.returncode) == (fresh.stdout, fresh.stderr, 0)


def test_a_hang_ends_with_an_error_and_leaves_nothing():
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    process = warm.start(["-c", code])
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    assert process.poll() is None
    warm.kill_session(process)
    assert process.returncode == -signal.SIGKILL
    out, _ = process.communicate()
    assert_gone([psutil.Process(int(pid)) for pid in out.split() if psutil.pid_exists(int(pid))], timeout=60)


def test_a_terminal_controls_its_program():
    ours, theirs = pty.openpty()
    try:
        code = "import time; print('ready', flush=True); time.sleep(600)"
        process = warm.start(["-c", code], stdin=theirs, stdout=theirs, stderr=theirs)
        assert os.read(ours, 100).startswith(b"ready")  # Ctrl-C before it has the terminal reaches nobody
        until = time.monotonic() + TIMEOUT_S
        while process.poll() is None and time.monotonic() < until:
            os.write(ours, b"\x03")  # again, because Python loses one that comes within a callback
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
        assert process.returncode == -signal.SIGINT
    finally:
        os.close(ours)
        os.close(theirs)


def test_what_imports_read_of_the_environment_takes_a_fresh_interpreter(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('here')")
    done = run("pass", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.stdout == "here\n"


OWNER = """
import time, warm
sleeper = 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'
process = warm.start(["-c", sleeper], stdout=1)
print(warm._images[0]._process.pid, process.pid, flush=True)
time.sleep(600)
"""


def test_forks_die_with_whoever_started_them():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    owner = subprocess.Popen([sys.executable, "-c", OWNER], env=env, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for _ in range(2) for pid in owner.stdout.readline().split()]
    processes = [psutil.Process(pid) for pid in pids]
    owner.kill()
    owner.wait()
    assert_gone(processes, timeout=TIMEOUT_S)


def test_programs_are_forks_whatever_the_number_of_threads_is_here(monkeypatch):
    for number in ("1", "2", None):
        monkeypatch.setenv("OMP_NUM_THREADS", number) if number else monkeypatch.delenv("OMP_NUM_THREADS")
        process = warm.start(["-c", "import os; print(os.environ['OMP_NUM_THREADS'])"])
        assert isinstance(process, warm.Process)
        assert process.communicate(TIMEOUT_S)[0] == "1\n"


def test_ranks_are_forks_of_their_launcher(tmp_path):
    """The launcher's own default would start interpreters, which import for seconds."""
    code = """
import os
from megatron_opd.launch import local
start = local.launch.keywords["start"]
handle = start({**os.environ, "RANK": "1"}, ["-m", "megatron_opd", "--version"], None, None)
assert (handle.wait(60), handle.poll()) == (0, 0)
print(type(handle).__name__)
"""
    assert run(code).stdout.split()[-1] == "Child"


def test_ranks_of_a_run_are_forks_too(tmp_path):
    """What the launcher has done before, reading models and data, must not have started a thread."""
    with started(tmp_path, "parallel.tensor=2", "train.steps=100000") as run:
        run.wait_for_step(1)
        # A fork shows the environment that the warm process began with; a fresh interpreter that of a rank.
        assert [rank.environ().get("RANK") for rank in run.ranks()] == [None, None]


def test_what_a_rank_imports_is_there():
    """A module of the trainer that the warm process does not import makes every fork slower."""
    code = "import sys; print(*sys.modules)"
    there = run(code).stdout.split()
    lazy = {"megatron_opd.student.checkpoint", "megatron_opd.student.model", "megatron_opd.loss.fused.native"}
    assert lazy < set(there)


def test_time_of_a_fork_is_not_that_of_the_imports():
    """Counted in modules, as times are another matter: a fork finds what a fresh interpreter must import."""
    count = "import sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert run(count).stdout == "True True\n"
    assert run(count, cold=True).stdout == "False False\n"


def test_one_thread_may_ask_while_another_waits():
    for code in range(20):
        process = warm.start(["-c", f"raise SystemExit({code})"])
        asked = []

        def ask(process=process, asked=asked):
            while (found := process.poll()) is None:
                pass
            asked.append(found)

        thread = threading.Thread(target=ask)
        thread.start()
        assert process.wait(TIMEOUT_S) == code
        thread.join(TIMEOUT_S)
        assert asked == [code]
