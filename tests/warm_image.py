"""The warm process of `warm.py`: it imports what a rank of a training run does, and forks a process a program.

It has one thread, no process group and no GPU context, so a fork of it is a whole process. Ranks are forks of their
launcher, which is their parent in a real run too.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import os
import pickle
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "WARM_BEFORE"
"""Variable that names a Python file, which each fork runs before its program."""
_MODULES = (
    "megatron_opd.core.arguments",  # as `__main__` does, which runpy wants to import itself
    "megatron_opd.planner.options",
    "megatron_opd.trainer.loop",
    "megatron_opd.trainer.evaluate",
    "megatron_opd.rollout.embedded_engine",
    "megatron_opd.teachers.megatron_teacher",
    "megatron.core.dist_checkpointing.strategies.torch",
    "rich._emoji_codes",
    "sentencepiece",
    "transformers.models.auto.tokenization_auto",
)
"""With all that they import."""
_FROM_TRANSFORMERS = ("Qwen3ForCausalLM", "LlamaForCausalLM", "PreTrainedTokenizerFast", "GenerationConfig")
"""It imports the module of a name when the name is first asked for."""
_LIBC = ctypes.CDLL(None)
_unused = []
"""The parent's streams: kept, because they would write what is in their buffers when they are dropped."""


def main():
    control = socket.socket(fileno=int(sys.argv[1]))
    sys.path[0] = str(ROOT)  # not the folder of this file
    from megatron_opd.core import lifeline

    lifeline.end_with_parent()
    import_what_a_rank_does()
    from megatron_opd.launch import local

    local.launch = functools.partial(local.launch, start=fork_rank)
    gc.collect()
    gc.freeze()  # collections leave the pages alone that forks share
    if _native_threads():
        raise SystemExit("an import has started a thread, which forks would not have")
    control.send(b"ready")
    serve(control)


def import_what_a_rank_does():
    """All modules of a training run. Megatron needs our CPU shim meanwhile; a fork that wants it must ask again."""
    import torch

    from megatron_opd.student import cpu

    current_device = torch.cuda.current_device
    cpu.enable()
    for name in _MODULES:
        __import__(name)
    import transformers

    for name in _FROM_TRANSFORMERS:
        getattr(transformers, name)
    while torch.overrides._len_torch_function_stack():
        torch.overrides._pop_mode()
    torch.cuda.current_device = current_device


def serve(control):
    """Fork a process for every message, and tell each one's sender of its end, until the control socket is closed."""
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    running = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj is not control:
                selector.unregister(key.fileobj)
                os.close(key.fileobj)
                _tell_the_end(*running.pop(key.fileobj))
            elif (begun := _begin(control)) is not None:
                watch = os.pidfd_open(begun[0])
                running[watch] = begun
                selector.register(watch, selectors.EVENT_READ)
            else:
                return  # the kernel ends the forks: each has asked for it


def _begin(control):
    """(process id, socket of whoever asked for it) of a new fork; None when nobody will ask for one any more."""
    data, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 4)
    if not data:
        return None
    *streams, status = descriptors
    status = socket.socket(fileno=status)
    arguments, environment, cwd = pickle.loads(data)
    pid = fork(functools.partial(_program, arguments, environment, cwd, streams))
    for descriptor in streams:
        os.close(descriptor)
    _say(status, pid)
    return pid, status


def _tell_the_end(pid, status):
    _, how = os.waitpid(pid, 0)
    _say(status, os.waitstatus_to_exitcode(how))
    status.close()


def _say(status, number):
    with suppress(OSError):  # nobody wants to know it
        status.send(str(number).encode())


def _program(arguments, environment, cwd, streams):
    from megatron_opd.core import lifeline

    lifeline.end_with_parent()
    become(arguments, environment, cwd, streams)


def fork_rank(environment, arguments, stdout, stderr):
    """Starts a rank in place of `rank_processes.spawn`, which takes over where a fork would lack something."""
    from megatron_opd.launch import rank_processes

    if _native_threads():
        return rank_processes.spawn(environment, arguments, stdout, stderr)
    gc.collect()
    gc.freeze()  # nothing of the launcher is cleaned up in the rank, where its descriptors are other files
    with open(os.devnull, "rb") as nothing:
        streams = [nothing.fileno(), stdout.fileno() if stdout else 1, stderr.fileno() if stderr else 2]
        return Child(fork(functools.partial(become, list(arguments), dict(environment), os.getcwd(), streams)))


class Child:
    """A child of this process, with the part of subprocess.Popen that the supervisor of ranks uses."""

    def __init__(self, pid):
        self.pid, self.returncode = pid, None

    def poll(self):
        if self.returncode is None:
            pid, how = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(how) if pid else None
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            watch = os.pidfd_open(self.pid)
            with selectors.DefaultSelector() as selector:
                selector.register(watch, selectors.EVENT_READ)
                selector.select(timeout)
            os.close(watch)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


def fork(child):
    """The id of a new process that runs `child`, with the signal handlers of a fresh interpreter."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # no signal meets our own in the child
    with warnings.catch_warnings():
        # Python 3.12 knows that libraries have threads; they are idle here, and this is no warning of the program's.
        warnings.filterwarnings(
            "ignore", message=r".*use of fork\(\) may lead to deadlocks", category=DeprecationWarning
        )
        pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return pid
    try:
        _reset_signals()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        child()
    except BaseException:
        traceback.print_exc()
    os._exit(1)  # what is on the stack is the parent's, and never unwound


def become(arguments, environment, cwd, streams):
    """Make this fork the process that a fresh interpreter with `arguments` would be. Never returns."""
    os.setsid()
    _take(streams)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    _show([sys.executable, *arguments])
    random.seed()
    tempfile.tempdir = None  # it follows from the environment when it is first asked for
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    sys.orig_argv = [sys.executable, *arguments]
    if before := environment.get(BEFORE):
        runpy.run_path(before)
    _end(_code_of(arguments))


def _reset_signals():
    """Ignored signals stay so, as in whatever a process starts."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _take(streams):
    """Have these descriptors for 0, 1 and 2, no other ones, and Python's streams on top."""
    for number, descriptor in enumerate([os.dup(stream) for stream in streams]):
        os.dup2(descriptor, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    if os.isatty(0):
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    _unused.extend([sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__])
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115


def _show(arguments):
    """Let `ps` show these arguments: the kernel reads them from where our own were, and `warm.py` has left room."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = map(int, fields[45:47])
    text = b"\0".join(map(os.fsencode, arguments))[: end - begin - 1]
    ctypes.memset(begin, 0, end - begin)
    ctypes.memmove(begin, text, len(text))


def _code_of(arguments):
    """The exit code of a program."""
    try:
        _execute(arguments)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        return 1
    return 0


def _execute(arguments):
    """The program of an interpreter's command line: -m MODULE, -c CODE, or a file."""
    match arguments:
        case ["-m", module, *rest]:
            sys.argv, sys.path[0] = [module, *rest], os.getcwd()
            warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning, module="runpy")
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *rest]:
            sys.argv, sys.path[0] = ["-c", *rest], ""
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case [script, *rest]:
            sys.argv, sys.path[0] = [script, *rest], str(Path(script).resolve().parent)
            runpy.run_path(script, run_name="__main__")


def _end(code):
    """End as an interpreter does, but for the destructors of what there still is."""
    threading._shutdown()
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    _LIBC.fflush(None)
    os._exit(code & 0xFF)


def _native_threads():
    """The number of threads that Python does not know. A fork has none of them, and their pools believe that it has."""
    return len(os.listdir("/proc/self/task")) - threading.active_count()


if __name__ == "__main__":
    main()
