"""Runs Python programs in processes that are forked from one that has done all slow imports.

A fresh `python -m megatron_opd train` imports torch, Megatron and transformers for five seconds before it works. Here a
process per pytest worker does that once, when it is first needed (`warm_image.py`); a program is then a fork of it,
which is there in some milliseconds:

    done = warm.run(["-m", "megatron_opd", "check", "my.yaml"], timeout=60)      # as subprocess.run does
    process = warm.start(["-m", "megatron_opd", "train", "my.yaml"])             # as subprocess.Popen does

The arguments are those of the interpreter. The process is like a fresh one: its own session, environment, working
directory, arguments (also for `ps`), standard streams and random numbers, default signal handlers, no descriptor but
0, 1 and 2. The ranks of a multi-rank `train` are forks too. It differs in what is imported already, and it ends without
tearing the interpreter down (atexit handlers run). Where an import depends on an environment variable that differs from
the warm process's, and where there is no Linux, the program runs in a fresh interpreter; `cold=True` asks for one.

All forks die with the warm process, and that one with whoever started it.
"""

from __future__ import annotations

import array
import os
import pickle
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGE = ROOT / "tests/warm_image.py"
_READ_AT_IMPORT = re.compile(r"PYTHON.*|LD_.*|OMP_.*|MKL_.*|HF_.*|TRANSFORMERS_.*|CUDA_VISIBLE_DEVICES|TRITON_.*")
_START_S = 1200
"""For the imports, on a machine that is busy."""


def run(arguments, *, timeout, **how):
    """Run a program to its end; its output is text. Raises subprocess.TimeoutExpired, and the program is gone then."""
    process = start(arguments, **how)
    try:
        out, err = process.communicate(timeout)
    except BaseException:
        kill_session(process)
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def start(arguments, *, env=None, cwd=ROOT, stdin=None, stdout=None, stderr=None, cold=False, preexec_fn=None):
    """Start a program: a `Process`, or a `subprocess.Popen` where it must be a fresh interpreter.

    `stdin` is a descriptor, default none; `stdout` and `stderr` are descriptors, default files that `communicate`
    reads; `stderr` may be subprocess.STDOUT. A terminal as stdin becomes the one that controls the process. With a
    `preexec_fn` the interpreter is fresh.
    """
    arguments, env = [*map(str, arguments)], dict(_environment() if env is None else env)
    if cold or preexec_fn or sys.platform != "linux" or _at_import(env) != _at_import(_environment()):
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=subprocess.PIPE if stderr is None else stderr,
            text=True,
            start_new_session=True,
            preexec_fn=preexec_fn or (_take_terminal if stdin is not None and os.isatty(stdin) else None),
        )
    outputs = [tempfile.TemporaryFile() if given is None else None for given in (stdout, stderr)]  # noqa: SIM115
    streams = [
        os.open(os.devnull, os.O_RDONLY) if stdin is None else stdin,
        outputs[0].fileno() if outputs[0] else stdout,
        outputs[1].fileno() if outputs[1] else stderr,
    ]
    if stderr == subprocess.STDOUT:
        streams[2], outputs[1] = streams[1], None
    try:
        return Process(arguments, _image().fork((arguments, env, str(cwd)), streams), outputs)
    finally:
        if stdin is None:
            os.close(streams[0])


def kill_session(process):
    """Kill a program with all that it has started in its session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def close():
    """End the warm process and all of its forks. The next program starts a new one."""
    while _images:
        _images.pop().close()


class Process:
    """A fork of the warm process, with the part of subprocess.Popen that tests use."""

    def __init__(self, args, status, outputs):
        self.args, self.returncode = args, None
        self._status, self._outputs = status, outputs
        self._looks = threading.Lock()
        self.pid = int(self._read(None))

    def poll(self):
        """The exit code, negative for a signal; None while the process runs."""
        return self._look(0)

    def wait(self, timeout=None):
        """The exit code, once there is one. Raises subprocess.TimeoutExpired."""
        if self._look(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        """(stdout, stderr) as text once the process has ended; None for a stream that is not ours."""
        self.wait(timeout)
        return tuple(self._text(output) for output in self._outputs)

    def send_signal(self, number):
        """Send it, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def _look(self, timeout):
        """One thread reads the end. Meanwhile others that only ask are told what is known."""
        if not self._looks.acquire(blocking=timeout != 0):
            return self.returncode
        try:
            if self.returncode is None and (line := self._read(timeout)) is not None:
                self.returncode = int(line or -signal.SIGKILL)  # nothing: the warm process is gone, and its forks too
                self._status.close()
            return self.returncode
        finally:
            self._looks.release()

    def _read(self, timeout):
        """The next message of the warm process, b"" if it is gone, None after `timeout` seconds."""
        ready, _, _ = select.select([self._status], [], [], timeout)
        return self._status.recv(64) if ready else None

    def _text(self, output):
        if output is None:
            return None
        output.seek(0)
        return output.read().decode(errors="replace")


class _Image:
    """This side of the warm process."""

    def __init__(self):
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                # Behind the descriptor is room for the arguments of forks, as `ps` shows them.
                [sys.executable, str(IMAGE), str(theirs.fileno()), " " * 8192],
                env=_environment(),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        if not select.select([self._control], [], [], _START_S)[0] or not self._control.recv(64):
            self.close()
            raise RuntimeError("the warm process did not start; what it said is above")

    def is_alive(self):
        return self._process.poll() is None

    def fork(self, program, streams):
        """Has the program started on three descriptors; returns the socket that tells its process id and its end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            rights = array.array("i", [*streams, theirs.fileno()])
            self._control.sendmsg([pickle.dumps(program)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        return ours

    def close(self):
        self._control.close()  # which it takes for the end
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_images = []
"""The warm process, if there is one."""


def _image():
    if not (_images and _images[0].is_alive()):
        close()
        _images.append(_Image())
    return _images[0]


def _environment():
    """The warm process's own: ours, but one thread a process."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _at_import(env):
    return {name: value for name, value in env.items() if _READ_AT_IMPORT.fullmatch(name)}


def _take_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
