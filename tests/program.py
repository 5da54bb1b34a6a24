"""Runs the program as a user does: another process, its exit code, what it prints, what it leaves in run.dir.

The process is a fork of a warm one (`warm.py`), unless `cold=True` asks for a fresh interpreter.
"""

import contextlib
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import psutil
import warm

from megatron_opd.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "examples/quickstart.yaml"
MODELS = ROOT / "examples/quickstart/models"
# The quickstart, as little of it as makes a step, on one rank.
SMALL = [
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=2",
    "train.micro_batch_size=2",
    "train.eval_every=0",
    "train.save_every=0",
    "optim.warmup_steps=0",
    "run.timeout_s=300",
]
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""Makes the program the only rank of its world, as torchrun would."""
PATIENCE_S = 900
"""For whatever takes seconds on an idle machine: it tells a hang from an end."""
_TIMES = re.compile(r"time_s|time/.*|memory/.*|tokens_per_s")
_PROGRAM = ("-m", "megatron_opd")
_TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def environment(**extra):
    """Ours without what would make the program take itself for a rank."""
    hidden = re.compile(r"RANK|LOCAL_RANK|WORLD_SIZE|SLURM_.*|MASTER_.*|TORCHELASTIC_.*")
    own = {name: value for name, value in os.environ.items() if not hidden.fullmatch(name)}
    # A tokenizer's threads in the launcher would keep its ranks from being forks of it (`warm_image.fork_rank`).
    return {**own, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **extra}


def opd(*arguments, timeout=PATIENCE_S, env=None, **how):
    """Run `megatron-opd ARGUMENTS` to its end; `how` is of `warm.start`."""
    return warm.run([*_PROGRAM, *arguments], env=environment(**(env or {})), timeout=timeout, **how)


def tool(*command):
    """Run a script of tools/ in a fresh interpreter to its end."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def here(*arguments):
    """As `opd`, but by the command line's function in this process: for `check`, and for what is refused."""
    out, err = io.StringIO(), io.StringIO()
    alone = mock.patch.dict(os.environ, environment(), clear=True)
    with alone, contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, arguments)])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def train(run_dir, *overrides, launched=False, env=None, **how):
    """Run the small quickstart in `run_dir` to its end. One rank is its own program, because a launcher costs as much
    time as the run; `launched`: through ours, as more ranks are."""
    alone = {} if launched or _several(overrides) else ALONE
    return opd("train", CONFIG, *SMALL, f"run.dir={run_dir}", *overrides, env={**alone, **(env or {})}, **how)


def _several(overrides):
    sizes = dict(setting.split("=", 1) for setting in overrides if setting.startswith("parallel."))
    return any(sizes.get(f"parallel.{kind}", "1") != "1" for kind in ("tensor", "pipeline", "context", "data"))


def torchrun(ranks, *arguments, timeout=PATIENCE_S):
    """The program as the worker of `ranks` ranks that torchrun starts."""
    command = [*_TORCHRUN, "--standalone", "--nproc-per-node", str(ranks), "-m", "megatron_opd"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        timeout=timeout,
        text=True,
        capture_output=True,
    )


class Started:
    """A run in the background, in a session of its own as a terminal would give it."""

    def __init__(self, run_dir, *overrides, env=None, command="train", **how):
        self.dir = Path(run_dir)
        arguments = [*_PROGRAM, command, CONFIG, *SMALL, f"run.dir={run_dir}", *overrides]
        self.process = warm.start(arguments, env=environment(**(env or {})), stderr=subprocess.STDOUT, **how)

    def wait_for_step(self, step):
        """Until train.log tells of the step."""
        self.wait_for_line(f"step {step}/")

    def wait_for_line(self, text):
        """Until train.log has it."""
        until = time.monotonic() + PATIENCE_S
        log = self.dir / "train.log"
        while not (log.is_file() and text in log.read_text()):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < until, "the run does not get on"
            time.sleep(0.002)

    def wait_for_library(self, name):
        """Until the process has loaded a library with `name` in its path."""
        until = time.monotonic() + PATIENCE_S
        maps = Path(f"/proc/{self.process.pid}/maps")
        while name not in maps.read_text():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < until, f"the run does not load {name}"
            time.sleep(0.002)

    def ranks(self):
        """The processes of the ranks, in the order of ranks."""
        children = [p for p in psutil.Process(self.process.pid).children() if "train" in p.cmdline()]
        return sorted(children, key=lambda p: (p.create_time(), p.pid))  # the launcher starts them in this order

    def everyone(self):
        """All processes of the run."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def kill_everyone(self):
        """As a power cut does."""
        processes = self.everyone()
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=120)
        self.process.communicate()

    def end(self, timeout):
        """(exit code, everything printed) when the program ends by itself within `timeout` seconds."""
        printed, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, printed


@contextmanager
def started(run_dir, *overrides, **how):
    """A run in the background that does not outlive the block."""
    run = Started(run_dir, *overrides, **how)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.kill_everyone()


def assert_gone(processes, timeout=120.0):
    """That none of the processes is alive (a zombie is not)."""
    _, alive = psutil.wait_procs(processes, timeout=timeout)
    alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not alive, alive


class Terminal:
    """A terminal with a program in its foreground."""

    def __init__(self, *arguments):
        self._ours, theirs = pty.openpty()
        environ = environment(TERM="xterm", COLUMNS="120")
        self.process = warm.start([*_PROGRAM, *arguments], env=environ, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.shown = ""

    def read_until(self, text=None, timeout=PATIENCE_S):
        """What the program shows, until it has shown `text` or has ended."""
        until = time.monotonic() + timeout
        while text is None or text not in self.shown:
            assert time.monotonic() < until, self.shown
            ready, _, _ = select.select([self._ours], [], [], 0.1)
            try:
                data = os.read(self._ours, 65536) if ready else b""
            except OSError:  # the other end is closed
                data = None
            if data is None:
                assert text is None, self.shown
                return self.process.wait(timeout=120)
            self.shown += data.decode(errors="replace")
        return None

    def type(self, keys):
        os.write(self._ours, keys)

    def close(self):
        if self.process.poll() is None:
            for process in [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(True)]:
                process.kill()
            self.process.wait()
        os.close(self._ours)


def assert_user_error(done, *fragments):
    """That the program ended with a message for people that has the fragments, and with nothing else to wonder at."""
    said = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 1, said
    assert "Traceback" not in said, said
    assert done.stderr.count("error: ") == 1, said
    for fragment in fragments:
        assert fragment in done.stderr, said


def rows(run_dir):
    """metrics.jsonl without what depends on the time."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not _TIMES.fullmatch(k)} for line in lines]


def exported(run_dir):
    """Bytes of the exported weights."""
    return (Path(run_dir) / "hf/model.safetensors").read_bytes()


def checkpoints(run_dir):
    """Names of the directories below checkpoints/ that are complete, oldest first."""
    return sorted(path.parent.name for path in Path(run_dir).glob("checkpoints/*/loop.json"))
