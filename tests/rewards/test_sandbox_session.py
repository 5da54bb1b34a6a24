"""Sessions in the sandbox, against code that wants out, and against code that speaks where it should not."""

import os
import signal
import socket
import threading
import time

import psutil
import pytest

from megatron_opd.rewards import sandbox
from megatron_opd.rewards.sandbox import GUARDS, SandboxError, SandboxLimits
from megatron_opd.rewards.sandbox_session import SandboxSession, SessionEnded

LIMITS = SandboxLimits(timeout_s=120.0, memory_mb=256, total_mb=4, file_mb=2)
PATIENT_S, SHORT_S = 120.0, 0.1
ME = os.getpid()


def session(*, guards=GUARDS, characters=400, limits=LIMITS):
    return SandboxSession(limits, characters=characters, guards=guards)


def here():
    one = session()
    one.run("", PATIENT_S)
    one.close()
    return one.guards


HERE = here()


@pytest.fixture
def cells():
    one = session()
    yield lambda code, seconds=PATIENT_S: one.run(code, seconds)
    one.close()


def outcome(run):
    try:
        return run()
    except SessionEnded as error:
        return error.reason


def nothing_is_left():
    """Processes that were killed get a while to be gone."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        arguments = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline", "ppid"]) if p.info["ppid"] == ME]
        if not any(str(sandbox.JAIL) in a for a in arguments):
            return True
        time.sleep(0.05)
    return False


def test_names_live_on_and_the_last_value_is_shown(cells):
    assert cells("import math\nx = 3\nprint('hi')\nx * 2").text == "hi\n6"
    assert cells("x + math.floor(1.5)").text == "4"
    assert cells("x = None\nx").text == ""
    assert cells("").text == ""
    assert cells("print('a', end='')\n'b'").text == "a\n'b'"
    assert cells("def f():\n    return x\nclass C: pass").text == ""
    assert cells("import sys\nprint('to stderr', file=sys.stderr)").text == "to stderr\n"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("a = 1\n1 / 0", "ZeroDivisionError in line 2: division by zero"),
        ("def f(:", "SyntaxError: invalid syntax (<cell>, line 1)"),
        ("print(1)\nnot_there", "1\nNameError in line 2: name 'not_there' is not defined"),
        ("import sys; sys.exit(0)", "SystemExit in line 1: 0"),
        ("input()", "EOFError in line 1: EOF when reading a line"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt in line 1"),
        ("class E(Exception): __str__ = None\nraise E", "E in line 2: an exception that cannot be printed"),
        ("x = bytearray(2**40)", "MemoryError in line 1"),
        ("def f(): return f()\nf()", "RecursionError in line 1: maximum recursion depth exceeded"),
        ("import numpy", "ModuleNotFoundError in line 1: No module named 'numpy'"),
        ("open('big', 'wb').write(bytes(2**23))", "OSError in line 1: [Errno 27] File too large"),
    ],
)
def test_code_that_fails_says_how_and_the_session_goes_on(cells, code, words):
    cells("kept = 7")
    said = cells(code)
    assert (said.has_failed, said.text) == (True, words)
    assert cells("kept").text == "7"


@pytest.mark.parametrize("code", ["for i in range(10**5): print(i)", "print('x' * 10**6)", "'x' * 10**6"])
def test_the_middle_of_a_long_output_is_left_out(cells, code):
    text = cells(code).text
    assert 400 < len(text) < 450
    assert "characters are left out]" in text


REACHES = {
    "network": "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=5)",
    "file": "open(SECRET).read()",
    "new file": "open(SECRET + '2', 'w')",
    "folder": "import os\nos.listdir('/')",
    "environment of the trainer": "open('/proc/PARENT/environ').read()",
    "memory of the trainer": "open('/proc/PARENT/mem', 'r+b')",
    "pipes of the trainer": "import os\nos.listdir('/proc/PARENT/fd')",
    "fork": "import os\nos.fork()",
    "program": "import subprocess\nsubprocess.run(['/bin/true'])",
    "killing the trainer": "import os\nos.kill(PARENT, 9)",
    "killing its group": "import os\nos.killpg(PARENT, 9)",
    "another session's files": "open('HOME/mine').read()",
    "another session's process": "import os\nos.kill(OTHER, 9)",
    "a trace of another session": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, OTHER, 0, 0) == 0",
    "priority": "import os\nos.setpriority(os.PRIO_USER, os.getuid(), 19)",
    "leaving the group": "import os\nos.setsid()",
}


@pytest.mark.skipif(set(HERE) != set(GUARDS), reason="this kernel lacks a guard")
def test_nothing_outside_is_reached(cells, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    other = session()
    home = other.run("import os\nopen('mine', 'w').write('5')\nprint(os.getcwd(), end='')", PATIENT_S).text
    victim = other.run("print(os.getpid(), end='')", PATIENT_S).text
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        names = {"PORT": str(server.getsockname()[1]), "SECRET": repr(str(secret)), "PARENT": str(ME)}
        names |= {"HOME": home, "OTHER": victim}
        for what, code in REACHES.items():
            for name, value in names.items():
                code = code.replace(name, value)
            said = cells(code)
            assert said.has_failed, f"{what}: {said.text}"
            assert any(word in said.text for word in ("Error in line", "AssertionError")), what
        with pytest.raises(TimeoutError):
            server.accept()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret"]
    assert other.run("open('mine').read()", PATIENT_S).text == "'5'"
    other.close()


def test_it_sees_none_of_our_environment(cells, monkeypatch):
    monkeypatch.setenv("MEGATRON_OPD_API_KEY", "secret")
    assert cells("import os, sys\nsorted(os.environ), sys.stdin.read()").text == "(['HOME', 'LANG'], '')"


def spoken(message, *, for_ever=False):
    """Code that writes the message to its pipe, whichever number that has."""
    loop = "while True" if for_ever else "for _ in range(1)"
    return f"""import os
{loop}:
    for fd in range(64):
        try: os.write(fd, {message})
        except OSError: pass
"""


ENDS = {
    "loop": ("while True: pass", "timeout"),
    "endless output": ("while True: print('x' * 10**5)", "timeout"),
    "sleep": ("import time\ntime.sleep(10**6)", "timeout"),
    "its own requests": (
        spoken("1").replace("write", "read"),
        "timeout",
    ),
    "a loop in the end": ("try:\n    while True: pass\nfinally:\n    while True: pass", "timeout"),
    "exit": ("import os\nos._exit(0)", "died"),
    "no pipes": ("import os\nos.closerange(0, 64)", "died"),
    "crash": ("import ctypes\nctypes.string_at(0)", "died"),
    "abort": ("import os\nos.abort()", "died"),
    "broken output": ("import sys\nsys.stdout._begin = 5", "died"),
    "no JSON": ("import json\njson.dumps = lambda *_: 'no message'", "died"),
    "nested": (spoken("b'[' * 10**5 + b'\\n'"), "died"),
    "a list": (spoken("b'[]\\n'"), "died"),
    "other types": (spoken(repr(b'{"number": true, "text": [], "failed": 0}\n')), "died"),
    "a long number": (spoken("b'9' * 5000 + b'\\n'"), "died"),
    "no end": (spoken("b'x' * 65536", for_ever=True), "died"),
}


@pytest.mark.parametrize(("code", "reason"), ENDS.values(), ids=ENDS)
def test_code_that_hangs_or_dies_or_speaks_out_of_turn_ends_the_session(cells, code, reason):
    cells("kept = 7")
    with pytest.raises(SessionEnded) as ended:
        cells(code, SHORT_S if reason == "timeout" else PATIENT_S)
    assert ended.value.reason == reason
    assert nothing_is_left()
    with pytest.raises(SessionEnded):
        cells("1")


def test_a_forged_reply_is_the_codes_own_word_and_ends_the_session_at_the_next_cell(cells):
    cells("import os")
    forged = b'{"number": 2, "text": "forged", "failed": false}\n'
    said = outcome(lambda: cells(spoken(repr(forged))).text)
    assert said in ("forged", "died"), "the latter where both replies came with one read"
    assert outcome(lambda: cells("print('real')").text) == "died"


def test_a_reply_that_comes_late_is_no_reply_to_the_next_cell(cells):
    """The process is stopped before the real one, which comes when it goes on."""
    cells("import os, time")
    forged = b'{"number": 2, "text": "forged", "failed": false}\n'
    assert cells(f"{spoken(repr(forged))}\ntime.sleep(0.3)\nprint('of cell 2')").text == "forged"
    assert outcome(lambda: cells("time.sleep(1)\nprint('of cell 3')").text) == "died"


def test_nothing_goes_on_between_cells(cells):
    cells("import threading\nn = 0\ndef count():\n    global n\n    while True: n += 1")
    cells("threading.Thread(target=count, daemon=True).start()")
    process = next(p for p in psutil.Process().children() if str(sandbox.JAIL) in p.cmdline())
    deadline = time.monotonic() + 60
    while process.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
        time.sleep(0.01)
    before = process.cpu_times().user
    time.sleep(0.3)
    assert process.cpu_times().user == before
    assert cells("n > 0").text == "True"


def test_the_cpu_time_of_all_cells_together_is_bounded():
    one = session(limits=SandboxLimits(timeout_s=1.0))
    half = "import time\nt = time.process_time()\nwhile time.process_time() < t + 0.5: pass"
    assert "died" in [outcome(lambda: one.run(half, PATIENT_S).text) for _ in range(4)]
    one.close()


@pytest.mark.parametrize("guards", [GUARDS, ("seccomp",)], ids="+".join)
def test_files_together_are_bounded(guards):
    if not set(guards) <= set(HERE):
        pytest.skip("not on this kernel")
    one = session(guards=guards)
    fill = "import time\nfor i in range(10**4):\n    open(f'{i}', 'wb').write(bytes(2**19))\n    time.sleep(0.02)"
    assert "No space left" in (said := outcome(lambda: one.run(fill, PATIENT_S).text)) or said == "died"
    one.close()


def test_nothing_runs_where_the_network_cannot_be_cut():
    one = session(guards=())
    with pytest.raises(SandboxError, match="network cannot be cut off"):
        one.run("1", PATIENT_S)
    one.close()
    assert nothing_is_left()


def test_a_session_can_be_closed_from_another_thread_while_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    one, ended = session(), []

    def hang():
        try:
            one.run("while True: pass", PATIENT_S)
        except SessionEnded as error:
            ended.append(error.reason)

    thread = threading.Thread(target=hang)
    thread.start()
    time.sleep(0.2)
    one.close()
    thread.join(120)
    assert ended == ["died"]
    assert nothing_is_left()
    assert list(tmp_path.iterdir()) == []
    one.close()
    with pytest.raises(SessionEnded):
        one.run("1", PATIENT_S)


def test_it_outlives_the_thread_that_began_it():
    """The kernel ends the jail with the thread that started it."""
    one = session()
    thread = threading.Thread(target=one.run, args=("x = 5", PATIENT_S))
    thread.start()
    thread.join(120)
    assert one.run("x", PATIENT_S).text == "5"
    one.close()


def test_it_ends_with_its_program_however_that_ends():
    to_read, to_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(to_write, session().run("import os\nos.getpid()", PATIENT_S).text.encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(to_write)
    process = int(os.read(to_read, 100))
    os.close(to_read)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 120
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_long_code_arrives_and_odd_code_is_an_error(cells):
    assert cells(f"x = '{'a' * 10**6}'\nlen(x)").text == "1000000"
    for code in ("\ud800", "x\0", "(" * 10**4, "\\", "é = 1\né²"):
        assert cells(code).has_failed
    assert cells("len(x)").text == "1000000"


def test_the_same_cells_say_the_same_in_every_session():
    said = []
    for _ in range(2):
        one = session()
        said.append(one.run("import random\nset('abcdefgh'), random.random(), hash('a')", PATIENT_S).text)
        one.close()
    assert said[0] == said[1]
