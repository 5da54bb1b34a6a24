"""The sandbox against code that wants out, and against code that wants to pass without being right."""

import resource
import socket
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from megatron_opd.rewards import sandbox
from megatron_opd.rewards.sandbox import GUARDS, SandboxError, SandboxLimits, Task, run

TESTS = "assert add(2, 3) == 5\nassert add(-1, 1) == 0"
RIGHT = "def add(a, b):\n    return a + b\n"
QUICK, PATIENT = SandboxLimits(timeout_s=2.0, memory_mb=256), SandboxLimits(timeout_s=60.0)
HERE = run(Task(programs=("",), tests=""), PATIENT).guards
"""The guards of this machine."""


def verdict(code, tests=TESTS, *, limits=None, guards=GUARDS, entry_point="add"):
    task = Task(programs=(textwrap.dedent(code),), tests=tests, entry_point=entry_point)
    return run(task, limits or PATIENT, guards=guards)


def jails():
    """Processes of tasks that are still there; those that were killed get a while to be gone."""
    deadline = time.monotonic() + 120
    while True:
        arguments = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
        found = [a for a in arguments if str(sandbox.JAIL) in a]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def needs(guard):
    return pytest.mark.skipif(guard not in HERE, reason=f"this kernel has no {guard}")


def test_right_and_wrong():
    assert verdict(RIGHT).passed
    assert verdict(RIGHT).why == ""
    assert not verdict("def add(a, b): return a - b").passed
    assert verdict("def add(a, b): return a - b").why.startswith("AssertionError")
    assert "defines no function add" in verdict("def sub(a, b): return a - b").why
    assert "SyntaxError" in verdict("def add(a, b: return").why
    assert "NameError" in verdict("def add(a, b): return a + c").why
    assert not verdict(RIGHT, "assert add(1, 1) == 2; raise SystemExit(0)").passed, "tests must come to their end"


def test_the_first_program_that_runs_and_defines_the_function_counts():
    programs = ("def add(:", "x = 1", "raise SystemExit", RIGHT, "def add(a, b): return 0")
    assert run(Task(programs=programs, tests=TESTS, entry_point="add"), PATIENT).passed


def test_tests_can_be_humanevals_check_or_call_what_they_know():
    check = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
    assert verdict(RIGHT, check).passed
    assert not verdict("def add(a, b): return 4", check).passed
    assert verdict(
        RIGHT + "def twice(a): return add(a, a)", "assert twice(2) == 4 == add(2, 2)", entry_point=None
    ).passed
    assert not verdict("def len(x): return 5", "assert len([1]) == 5", entry_point=None).passed, (
        "no built-in is replaced"
    )
    helper = "def helper(x):\n    return x\n"
    task = Task(programs=(helper + RIGHT,), tests="assert add(helper(7), 1) == 8", entry_point="add", prompt=helper)
    assert run(task, PATIENT).passed
    broken = Task(programs=("def helper(x): return 8\n" + RIGHT,), tests=task.tests, entry_point="add", prompt=helper)
    assert run(broken, PATIENT).passed, "the tests use the helper of the prompt, not that of the answer"


def test_every_plain_value_crosses_and_nothing_else():
    values = "[None, True, 0, -(10**5000), 1.5, float('inf'), 'ü\\ud800', b'x', (1, [2]), {1, (2,)}, frozenset(),"
    values += " {(1,): {}}, 2j, range(3)]"
    assert verdict("def add(x): return x", f"v = {values}\nassert repr(add(v)) == repr(v)").passed
    assert verdict("def add(): return float('nan')", "assert add() != add()").passed
    counter = "from collections import *\ndef add(): return Counter('aab'), OrderedDict(b=1), namedtuple('P', 'x')(1)"
    assert verdict(counter, "assert add() == ({'a': 2, 'b': 1}, {'b': 1}, (1,))").passed
    assert "not plain data" in verdict("def add(): return object()", "add()").why
    errors = "try: add(); assert 0\nexcept ZeroDivisionError as e: assert 'zero' in str(e)"
    assert verdict("def add(): return 1 / 0", errors).passed


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "def add(a, b):\n    while True: pass",
        "import time\ntime.sleep(10**6)",
        "x = bytearray(2**40)",
        "x = []\nwhile True: x.append('x' * 2**20)",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
        "def add(a, b): return add(a, b)",
        "def add(a, b): return 'x' * 10**8",
        "def add(a, b): return [[]] * 10**7",
        "x = []\nfor _ in range(10**5): x = [x]\ndef add(a, b): return x",
        "import os\nwhile True: os.write(1, b'x' * 65536)",
        "f = open('big', 'wb')\nwhile True: f.write(b'x' * 2**20)",
        "import faulthandler, ctypes\nctypes.string_at(0)",
        "input()",
    ],
    ids=lambda code: code[:40],
)
def test_code_that_takes_too_much_fails_in_time_and_leaves_nothing(code):
    assert not verdict(code, limits=QUICK).passed
    assert jails() == []


def test_printing_does_no_harm():
    assert verdict("def add(a, b):\n    print('x' * 10**6, flush=True)\n    return a + b").passed


@pytest.mark.parametrize(
    "start",
    [
        "while True: os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "subprocess.run(['/bin/true'])",
        "os.execv('/bin/true', ['true'])",
        "multiprocessing.Process(target=print).start()",
    ],
)
@needs("seccomp")
def test_no_process_is_started(start):
    found = verdict(f"import os, subprocess, multiprocessing\n{start}\n{RIGHT}", guards=("seccomp",))
    assert not found.passed
    assert "PermissionError" in found.why
    assert jails() == []


CHEATS = {
    "exit": "import sys; sys.exit(0)",
    "exit at once": "import os; os._exit(0)",
    "exit in the call": "def add(a, b):\n    import os; os._exit(0)",
    "exit softly in the call": "def add(a, b): raise SystemExit(0)",
    "exit later": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): raise SystemExit",
    "print success": """
        print('{"passed": true, "why": "", "guards": []}', flush=True)
        import os; os._exit(0)""",
    "write success everywhere": """
        import os
        for fd in range(256):
            try: os.write(fd, b'{"passed": true, "why": "", "guards": []}')
            except OSError: pass
        os._exit(0)""",
    "write success through /proc": """
        import os
        for pid in (os.getppid(), 'self'):
            for fd in range(16):
                try: open(f'/proc/{pid}/fd/{fd}', 'wb').write(b'{"passed": true, "why": "", "guards": []}')
                except OSError: pass
        def add(a, b): return 0""",
    "equal to everything": """
        class Yes:
            def __eq__(self, other): return True
        def add(a, b): return Yes()""",
    "a number that is equal to everything": """
        class Yes(int):
            __eq__ = lambda *_: True
            __hash__ = int.__hash__
        def add(a, b): return Yes(7)""",
    "no assertions": """
        import builtins, sys
        builtins.AssertionError = builtins.isinstance = None
        sys.settrace(lambda *_: None)
        def add(a, b): return 7""",
    "the parent dies": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "all die": "import os, signal\nos.kill(0, signal.SIGKILL)",
    "an exception of its own": """
        class AssertionError(Exception): __str__ = None
        def add(a, b): raise AssertionError""",
    "protocol noise": """
        import os
        for fd in range(3, 9):
            try: os.write(fd, b'{"passed": true}\\n{"value": 5}\\n[[[')
            except OSError: pass
        def add(a, b): return 0""",
    "the expected value, from the frames above": """
        import sys
        def add(a, b):
            frame, found = sys._getframe(), []
            while frame:
                seen = [*frame.f_locals.values(), *frame.f_globals.values()]
                found += [v for v in seen if isinstance(v, (str, list, dict))]
                frame = frame.f_back
            return 5 if 'assert' + ' add(2, 3)' in repr(found) else 0""",
}


@pytest.mark.parametrize("cheat", CHEATS.values(), ids=CHEATS)
def test_no_trick_passes(cheat):
    """Two of the tests' lines are about 5 and about 0: none of the tricks gives both."""
    assert not verdict(cheat, limits=QUICK).passed


@pytest.mark.parametrize("guards", [GUARDS, ("seccomp",), ("namespaces",)], ids="+".join)
def test_no_connection_is_made(guards):
    if not set(guards) & set(HERE):
        pytest.skip("not on this kernel")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(1.0)
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=5)\n"
        found = verdict(connect + RIGHT, guards=guards)
        assert not found.passed
        assert "Error" in found.why
        with pytest.raises(TimeoutError):
            server.accept()


def test_nothing_runs_where_the_network_cannot_be_cut(tmp_path):
    witness = tmp_path / "witness"
    with pytest.raises(SandboxError, match="network cannot be cut off"):
        verdict(RIGHT, f"open({str(witness)!r}, 'w')", guards=())
    assert not witness.exists()


def test_the_code_sees_none_of_our_environment_and_nothing_on_stdin(monkeypatch):
    monkeypatch.setenv("MEGATRON_OPD_API_KEY", "secret")
    code = "import os, sys\ndef add(): return sorted(os.environ), sys.stdin.read(), os.getcwd() == os.environ['HOME']"
    assert verdict(code, "names, said, home = add()\nassert (names, said, home) == (['HOME', 'LANG'], '', True)").passed


@needs("landlock")
def test_only_its_own_directory_can_be_written_and_only_libraries_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    own = "def add():\n    open('mine', 'w').write('5')\n    return open('mine').read()"
    assert verdict(own, "assert add() == '5'").passed
    for reach in (f"open({str(secret)!r}).read()", f"open({str(tmp_path / 'new')!r}, 'w')", "os.listdir('/')",
                  f"os.remove({str(secret)!r})", "open('/proc/self/environ').read()", "open('/etc/passwd').read()",
                  f"os.symlink({str(secret)!r}, 'link') or open('link').read()"):  # fmt: skip
        found = verdict(f"import os\ndef add(): return {reach}", "add()")
        assert "PermissionError" in found.why, reach
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret"]


@needs("seccomp")
def test_nothing_about_the_users_files_can_be_changed(tmp_path):
    """Landlock is silent about modes, owners, times and attributes."""
    mine = tmp_path / "mine"
    mine.write_text("key")
    mine.chmod(0o600)
    before, path = mine.stat(), str(mine)
    for change in (f"os.chmod({path!r}, 0o666)", f"os.chown({path!r}, {before.st_uid}, {before.st_gid})",
                   f"os.utime({path!r}, (1, 1))", f"os.setxattr({path!r}, 'user.a', b'b')",
                   f"os.truncate({path!r}, 0)"):  # fmt: skip
        found = verdict(f"import os\ndef add(): return {change}", "add()", guards=("namespaces", "seccomp"))
        assert "PermissionError" in found.why, change
    after = mine.stat()
    assert (after.st_mode, after.st_size, after.st_mtime) == (before.st_mode, 3, before.st_mtime)


@pytest.mark.parametrize("guards", [GUARDS, ("seccomp",), ("namespaces",)], ids="+".join)
def test_a_root_trainer_lends_its_code_none_of_its_privileges(guards):
    """Neither its own, with which the code could set the machine's clock, nor those of a namespace."""
    if not set(guards) & set(HERE):
        pytest.skip("not on this kernel")
    code = """
        import ctypes, struct
        def add():
            held = ctypes.create_string_buffer(24)
            assert ctypes.CDLL(None).capget(struct.pack("=Ii", 0x20080522, 0), held) == 0
            return held.raw
        """
    assert verdict(code, "assert add() == bytes(24), add()", guards=guards).passed


@pytest.mark.parametrize(("guards", "most"), [(("namespaces",), 64), (("seccomp",), None)])
def test_the_users_other_processes_do_not_count(guards, most):
    """The kernel counts them, threads of a trainer among them, but in a namespace: a limit would keep all code from
    running, and every answer would be wrong."""
    if not set(guards) <= set(HERE):
        pytest.skip("not on this kernel")
    most = resource.getrlimit(resource.RLIMIT_NPROC)[0] if most is None else most
    code = "def add(): return [x.split()[2] for x in open('/proc/self/limits') if x.startswith('Max processes')]"
    said = "unlimited" if most == resource.RLIM_INFINITY else str(most)
    assert verdict(code, f"assert add() == [{said!r}], add()", guards=guards).passed


def test_its_directory_is_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = "import os\nos.mkdir('d')\nopen('d/f', 'w').close()\n"
    assert verdict(made + RIGHT).passed
    if "namespaces" in HERE:  # seccomp refuses to change the mode
        assert verdict(f"{made}os.chmod('d', 0o500)\n{RIGHT}", guards=("namespaces",)).passed
    deep = f"import os\nfor _ in range(1100): os.mkdir('d'), os.chdir('d')\n{RIGHT}"
    assert verdict(deep).passed
    assert list(tmp_path.iterdir()) == []


def test_from_several_threads_at_once():
    found = {}

    def one(i):
        found[i] = verdict(f"def add(a, b): return {i}", f"assert add(0, 0) == {i}").passed

    threads = [threading.Thread(target=one, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == dict.fromkeys(range(6), True)


def test_sets_have_the_same_order_whenever_code_is_tested():
    words = "{'oak', 'elm', 'ash', 'yew', 'fir', 'lime'}"
    order = subprocess.run(
        [sys.executable, "-c", f"print(list({words}))"],
        env={"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout.strip()
    for _ in range(3):
        found = verdict(f"def add():\n    return list({words})", f"assert add() == {order}")
        assert found.passed, found.why
