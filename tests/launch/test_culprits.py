"""Ranks that fail for real, of every cause that we know: the launcher names the rank and the cause, once, at the end.

The launcher is the program's own; in place of the trainer its ranks run a few lines.
"""

import errno
import re
import signal

import pytest
import warm
from program import environment

from megatron_opd.core import causes
from megatron_opd.launch import culprit, oom
from megatron_opd.launch.rank_processes import Failure

TIMEOUT_S = 600
LAUNCHER = """
import sys
from megatron_opd.config.file import load
from megatron_opd.launch import local, rank_processes
rank_processes._GRACE_S = 0.5
program, ranks, run_dir = sys.argv[1:]
start = local.launch.keywords["start"]
layout = [f"parallel.tensor={ranks}", "parallel.pipeline=1", "student.vocab_multiple=12"]
config = load("examples/quickstart.yaml", [f"run.dir={run_dir}", *layout])
sys.exit(local.launch(config, [], start=lambda env, _, out, err: start(env, ["-c", program], out, err)))
"""
RANK = """
import ctypes, errno, mmap, os, resource, signal, socket, subprocess, sys, threading, time
import torch, torch.distributed as dist
from datetime import timedelta
from megatron_opd.core import rendezvous
from megatron_opd.core.parallel import PeerError
from megatron_opd.launch import one_rank

rank = int(os.environ["RANK"])

def limit(what, more=0):
    resource.setrlimit(what, (more, more))

def memory():
    limit(resource.RLIMIT_AS, int(open("/proc/self/statm").read().split()[0]) * 4096 + (100 << 20))

def files():
    limit(resource.RLIMIT_NOFILE, 24)
    return [open("/dev/null") for _ in range(24)]

def as_nobody():
    os.setuid(65511)
    limit(resource.RLIMIT_NPROC, 1)

def main(notice):
    if rank not in CULPRITS:
        time.sleep(3600)
    BODY

CULPRITS = set(WHO)
sys.exit(one_rank.live(main))
"""


def launched(tmp_path, body, *, who, ranks=2):
    """The launcher's exit code and all that was on the terminal when the ranks `who` do `body`; others wait."""
    program = RANK.replace("BODY", body.replace("\n", "\n    ")).replace("WHO", repr(list(who)))
    given = ["-c", LAUNCHER, program, str(ranks), str(tmp_path / "run")]
    done = warm.run(given, env=environment(), timeout=TIMEOUT_S)
    return done.returncode, done.stdout + done.stderr


def alone(body, **env):
    """(exit code, stdout, stderr) of a rank that does `body` and has no launcher of ours."""
    program = RANK.replace("BODY", body.replace("\n", "\n    ")).replace("WHO", "[0]")
    done = warm.run(["-c", program], env=environment(RANK="0", WORLD_SIZE="1", **env), timeout=TIMEOUT_S)
    return done.returncode, done.stdout, done.stderr


def message(terminal):
    """The one error on the terminal, which is at its end."""
    before, *told = re.split("^error: ", terminal, flags=re.MULTILINE)
    assert len(told) == 1, terminal
    assert re.fullmatch(r"(\d\d:\d\d:\d\d  starting .*\n)*", before), terminal  # nothing but progress
    return told[0]


OF_A_TABLE = {
    "EMFILE": ("files()", "this process may have no more open files than 24; raise the limit (`ulimit -n`)"),
    "EMFILE in gloo": (
        "limit(resource.RLIMIT_NOFILE, len(os.listdir('/proc/self/fd')))\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)",
        "this process may have no more open files than ",
    ),
    "ENFILE": ("raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))", "this machine can have no more open files"),
    "EADDRINUSE": (
        "a = socket.create_server(('127.0.0.1', 0))\nsocket.create_server(a.getsockname())",
        "another program has this address; end it",
    ),
    "EADDRINUSE in torch's store": (
        "a = socket.create_server(('0.0.0.0', 0))\ndist.TCPStore('127.0.0.1', a.getsockname()[1], is_master=True)",
        "another program has this address; end it",
    ),
    "ENOSPC": ("with open('/dev/full', 'w') as full: full.write('x')", "No space left on device: the disk is full"),
    "EFBIG": (
        "limit(resource.RLIMIT_FSIZE, 1000)\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "os.write(os.open(os.environ['HERE'] + '/big', os.O_WRONLY | os.O_CREAT), b'x' * 1000)\n"
        "with open(os.environ['HERE'] + '/big', 'ab') as big: big.write(b'x')",
        "this process may write no larger files than 1,000 bytes",
    ),
    "EROFS": ("raise OSError(errno.EROFS, os.strerror(errno.EROFS), '/here')", "'/here': nothing can be written there"),
    "EDQUOT": ("raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))", "may take no more of the disk"),
    "memory, Python": (
        "memory()\nbytearray(1 << 30)",
        "memory ran out: the machine's, or what this process may have (",
    ),
    "memory, torch": ("memory()\ntorch.zeros(1 << 30)", "you tried to allocate 4294967296 bytes. Error code 12"),
    "memory, numpy": ("import numpy\nmemory()\nnumpy.zeros(1 << 30)", "memory ran out: the machine's"),
    "memory, mapped": ("memory()\nmmap.mmap(-1, 1 << 30)", "memory ran out: the machine's"),
    "CUDA": (
        "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')",
        "a GPU's memory is full; `megatron-opd check --plan`",
    ),
    "processes": ("as_nobody()\nos.fork()", "no more processes and threads than 1,"),
    "processes of a program": ("as_nobody()\nsubprocess.run(['true'])", "no more processes and threads than 1,"),
    "threads": ("as_nobody()\nthreading.Thread(target=print).start()", "no more processes and threads than 1,"),
    "threads of gloo": (
        "as_nobody()\ndist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)",
        "no more processes and threads than 1,",
    ),
    "input/output": ("raise OSError(errno.EIO, os.strerror(errno.EIO), '/data')", "'/data': the disk or the network's"),
    "no such file": ("open('/no/such')", "[Errno 2] No such file or directory: '/no/such'"),
    "a user's mistake": ("raise ValueError('data.train is empty')", "data.train is empty"),
}


@pytest.mark.parametrize("cause", OF_A_TABLE)
def test_a_cause_that_we_know_is_told_with_what_to_do(tmp_path, cause):
    body, said = OF_A_TABLE[cause]
    code, _, terminal = alone(body, HERE=str(tmp_path))
    assert code == 1
    assert said in message(terminal)
    assert "Traceback" not in terminal
    assert "lost another rank" not in terminal


@pytest.mark.parametrize("cause", ["EMFILE in gloo", "a user's mistake"])
@pytest.mark.parametrize("rank", [0, 3])
def test_the_launcher_tells_the_cause_and_the_rank(tmp_path, rank, cause):
    body, said = OF_A_TABLE[cause]
    code, terminal = launched(tmp_path, body, who=[rank], ranks=4)
    assert code == 1
    assert said in message(terminal)
    assert message(terminal).endswith(f"\nrank {rank} failed with exit code 1; the run has stopped\n")
    assert "Traceback" not in terminal


OF_AN_END = {
    "SIGKILL": ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL"),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", "was ended by SIGTERM; the run has stopped\n"),
    "SIGSEGV": ("ctypes.string_at(0)", "was ended by SIGSEGV; the run has stopped\n"),
    "SIGBUS": (
        "fd = os.memfd_create('cut')\nos.truncate(fd, 1 << 20)\nm = mmap.mmap(fd, 1 << 20)\nos.truncate(fd, 0)\nm[9]",
        "was ended by SIGBUS (a file that it had mapped was cut, or the disk or /dev/shm is full); the run has",
    ),
    "SIGABRT": ("os.abort()", "was ended by SIGABRT; the run has stopped\n"),
    "a signal without a name": (
        "os.kill(os.getpid(), signal.SIGRTMIN + 3)",
        f"was ended by signal {signal.SIGRTMIN + 3}; the run has stopped\n",
    ),
    "sys.exit(5)": ("sys.exit(5)", "failed with exit code 5; the run has stopped\n"),
    "os._exit(7)": ("os._exit(7)", "failed with exit code 7; the run has stopped\n"),
}


@pytest.mark.parametrize("end", OF_AN_END)
def test_a_rank_that_ends_without_a_word_is_told(tmp_path, end):
    body, said = OF_AN_END[end]
    rank = len(end) % 3
    code, terminal = launched(tmp_path, body, who=[rank], ranks=3)
    assert code == 1
    assert message(terminal).startswith(f"rank {rank} {said}")


def test_an_error_that_nobody_has_foreseen_comes_with_its_place(tmp_path):
    for rank in (0, 3):
        code, terminal = launched(tmp_path / str(rank), "{}['the key']", who=[rank], ranks=4)
        assert code == 1
        said = message(terminal).splitlines()
        assert said[:2] == ["KeyError: 'the key'", f"rank {rank} failed with exit code 1; the run has stopped"]
        assert said[2] == "where it was:"
        assert said[-1] == "KeyError: 'the key'"
        (log,) = (tmp_path / str(rank)).glob(f"run/logs/*/rank-{rank}.log")
        assert "Traceback" in log.read_text()


@pytest.mark.parametrize(("size", "rank"), [(0, 0), (700, 1), (12_000, 0)])
def test_a_rank_that_can_write_no_file_is_heard(tmp_path, size, rank):
    body = f"limit(resource.RLIMIT_FSIZE, {size})\nraise KeyError('x' * 15_000)"
    code, terminal = launched(tmp_path, body, who=[rank])
    assert code == 1
    first, second, third, *_, last = message(terminal).splitlines()
    assert first == last == f"KeyError: '{'x' * 15_000}'"
    assert second == f"rank {rank} failed with exit code 1; the run has stopped"
    assert third == "where it was:"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_may_open_no_file_more_is_heard(tmp_path, rank):
    body = "limit(resource.RLIMIT_NOFILE, len(os.listdir('/proc/self/fd')) - 1)\nopen('/dev/null')"
    code, terminal = launched(tmp_path, body, who=[rank])
    assert code == 1
    assert "raise the limit (`ulimit -n`)\nrank" in message(terminal)


@pytest.mark.parametrize("size", [9_000, 30_000])
def test_where_nobody_can_write_large_files_words_are_shortened(tmp_path, size, monkeypatch):
    """Nine thousand bytes are a page for each of two ranks, and every sign here takes six of it."""
    monkeypatch.setattr(f"{__name__}.LAUNCHER", f"import resource\nresource.setrlimit(1, ({size},) * 2)\n{LAUNCHER}")
    code, terminal = launched(tmp_path, "raise ValueError('\\u2009' * 15_000)", who=[1])
    assert code == 1
    first, second = message(terminal).splitlines()
    assert set(first) == {"\u2009"}
    assert size / 30 < len(first) < size / 12
    assert second == "rank 1 failed with exit code 1; the run has stopped"


@pytest.mark.parametrize("first", [0, 1, 2])
def test_of_ranks_that_fail_together_the_first_is_told(tmp_path, first):
    """Also if it is the last to be gone."""
    body = f"""
tell = one_rank.Teller.tell
def tell_and_show_it(*given, **more):
    tell(*given, **more)
    open(f"{tmp_path}/{{rank}}", "w").close()
one_rank.Teller.tell = tell_and_show_it
if rank == {first}: import atexit; atexit.register(time.sleep, 3600)
while rank != {first} and not os.path.exists(f"{tmp_path}/{{(rank - 1) % 3}}"): time.sleep(0.01)
raise ValueError(f"this is rank {{rank}}")"""
    code, terminal = launched(tmp_path, body, who=[0, 1, 2], ranks=3)
    assert code == 1
    assert message(terminal).startswith(f"this is rank {first}\nrank {first} failed with exit code 1; the run has")


def test_those_who_only_lost_a_rank_are_not_the_culprits(tmp_path):
    """Whether gloo or a peer's message tells them, and although they have more to say."""
    body = (
        "if rank == 0: raise RuntimeError('[/x/gloo/pair.cc:5] Connection closed by peer [127.0.0.1]:4')\n"
        "if rank == 1: raise PeerError('ValueError: what rank 2 said')\n"
        "time.sleep(1)\nbytearray(1 << 62)"
    )
    code, terminal = launched(tmp_path, body, who=[0, 1, 2], ranks=3)
    assert code == 1
    assert message(terminal).startswith("MemoryError: memory ran out")
    assert "rank 2 failed with exit code 1; the run has stopped" in terminal


TOGETHER = (
    "one_rank._GRACE_S = 0.1\nrendezvous.join('gloo', timedelta(seconds=TIME_OUT))\n"
    "if rank == 1: STOP\ndist.all_reduce(torch.zeros(1))\ndist.barrier()\ndist.barrier()"
)


def test_a_rank_that_hangs_is_told_and_not_taken_for_killed(tmp_path):
    body = TOGETHER.replace("STOP", "os.kill(os.getpid(), signal.SIGSTOP)").replace("TIME_OUT", "2.5")
    code, terminal = launched(tmp_path, body, who=[0, 1])
    assert code == 1
    assert message(terminal).startswith("rank 1 did not get on: rank 0 waited for more (")
    assert "2500ms" in terminal
    assert "SIGKILL" not in terminal
    assert "memory" not in terminal


def test_a_rank_that_leaves_as_if_all_were_well_is_told(tmp_path):
    connected = TOGETHER.replace("if rank", "dist.barrier()\nif rank")  # torch itself tells of those that cannot be
    body = connected.replace("STOP", "os._exit(0)").replace("TIME_OUT", "60")
    code, terminal = launched(tmp_path, body, who=[0, 1])
    assert code == 1
    assert message(terminal).startswith("rank 1 ended with exit code 0 before the run was over: rank 0 waited for more")


def test_without_a_launcher_of_ours_a_rank_says_it_itself():
    code, out, err = alone("memory()\nbytearray(1 << 30)")
    assert (code, out) == (1, "")
    assert err.startswith("error: MemoryError: memory ran out")
    code, _, err = alone("{}[5]")
    assert code == 1
    assert "Traceback" in err
    assert err.endswith("KeyError: 5\n")


def kernel(root, **counts):
    """proc and sys of a kernel that has killed so many processes, machine-wide and by control group."""
    files = {
        "proc/self/cgroup": "4:memory:/job/1\n1:name=systemd:/x\n0::/slice\n",
        "proc/vmstat": f"pgfault 17\noom_kill {counts['machine']}\n",
        "sys/fs/cgroup/memory/job/1/memory.oom_control": f"under_oom 0\noom_kill {counts['first']}\n",
        "sys/fs/cgroup/slice/memory.events": f"max 3\noom 9\noom_kill {counts['second']}\noom_group_kill 0\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize("grows", ["machine", "first", "second"])
def test_what_the_kernel_kills_for_want_of_memory_is_told_from_what_others_kill(tmp_path, grows):
    counts = {"machine": 5, "first": 0, "second": 2}
    kernel(tmp_path, **counts)
    kills = oom.Kills(tmp_path)
    assert kills.since() is False
    kernel(tmp_path, **{**counts, grows: counts[grows] + 1})
    assert kills.since() is True
    assert oom.Kills(tmp_path / "another system").since() is None


def test_a_kill_is_explained_by_what_the_kernel_says(tmp_path):
    failures = {3: Failure(code=-signal.SIGKILL, when=1.0)}
    said = [culprit.explain(failures, tmp_path, by_kernel=by_kernel) for by_kernel in (True, False, None)]
    assert "the kernel killed a process meanwhile, because memory ran out" in said[0]
    assert "somebody sent it: memory did not run out" in said[1]
    assert "did this machine run out of memory?" in said[2]


def test_the_table_knows_an_error_behind_another_one():
    def fail():
        try:
            raise OSError(errno.EMFILE, "Too many open files")
        except OSError as error:
            raise RuntimeError("the library could not begin") from error

    with pytest.raises(RuntimeError) as failed:
        fail()
    assert "raise the limit (`ulimit -n`)" in causes.explain(failed.value)
    assert causes.explain(RuntimeError("something else")) is None


def test_files_of_the_machine_are_told_from_those_of_a_process():
    for text, advice in (("Too many open files", "ulimit -n"), ("Too many open files in system", "fs.file-max")):
        assert advice in causes.explain(RuntimeError(f"[enforce fail at gloo/loop.cc:105] epoll_create: {text}"))
