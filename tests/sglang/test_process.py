"""Starting and ending servers, with a small program in SGLang's place."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from standin import wait_for

from megatron_opd.__main__ import main
from megatron_opd.config import ServersConfig
from megatron_opd.sglang import process
from megatron_opd.sglang.keeper import Keeper, kept
from megatron_opd.sglang.serve import _machine
from megatron_opd.sglang.weights.group import own_address

# Answers /health like the server; what it does before and after depends on the name of the model.
PROGRAM = """#!{python}
import http.server, json, os, pathlib, socket, subprocess, sys, time, yaml
arguments = sys.argv[3:]
value = lambda name: arguments[arguments.index(name) + 1]
model = pathlib.Path(value("--model-path")).name
print("arguments", json.dumps(arguments), flush=True)
print("environment", json.dumps(dict(os.environ)), flush=True)
if "--config" in arguments:
    keys = yaml.safe_load(open(value("--config")))
    print("keys of length", json.dumps({{name: len(key) for name, key in keys.items()}}), flush=True)
if model == "dies":
    sys.exit("cannot load this")
if model == "never-ready":
    time.sleep(600)
if model == "stubborn":
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
print("pid", os.getpid(), flush=True)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer.address_family = socket.AF_INET6 if ":" in value("--host") else socket.AF_INET
http.server.HTTPServer((value("--host"), int(value("--port"))), Health).serve_forever()
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "python"
    path.write_text(PROGRAM.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def begin(program, tmp_path):
    """begin(model, **settings) -> (servers, settings), ended after the test."""
    begun = []

    def begin(model, **changes):
        settings = ServersConfig(python=program, **{"port": 25000, "start_timeout_s": 20.0, **changes})
        begun.extend(process.start(settings, tmp_path / model, name="student", log_dir=tmp_path / "logs", context=99))
        return begun, settings

    yield begin
    process.stop(begun, grace_s=0.2)


def said(server, word):
    """The rest of the log's line that starts with `word`."""
    return next(line for line in server.log.read_text().splitlines() if line.startswith(word))[len(word) + 1 :]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, timeout=120).stdout
    return not state.startswith("Z") and bool(state.strip())


def gone(pid):
    deadline = time.monotonic() + 120
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_alive(pid)


def test_servers_become_ready_and_are_stopped_with_their_children(begin, tmp_path):
    servers, settings = begin("fine", count=2, args=["--mem-fraction-static", "0.5"])
    lines = []
    process.wait(servers, settings, say=lines.append)
    assert len(lines) == 2
    assert "ready" in lines[0]
    assert len({s.url for s in servers}) == 2
    assert [s.log for s in servers] == [tmp_path / "logs" / f"student-{i}.log" for i in range(2)]
    children = [int(said(server, "child")) for server in servers]
    assert all(is_alive(pid) for pid in children)
    process.stop(servers)
    assert all(gone(pid) for pid in [*children, *(s.pid for s in servers)])
    process.stop(servers)  # harmless


def test_the_command_line_names_loopback_context_and_type_and_ends_with_the_users_arguments(begin, tmp_path):
    (tmp_path / "fine").mkdir()
    (tmp_path / "fine" / "config.json").write_text('{"dtype": "float32"}')
    (server,), settings = begin("fine", args=["--mem-fraction-static", "0.5"])
    process.wait([server], settings, say=print)
    arguments = said(server, "arguments")
    for option in ('"--host", "127.0.0.1"', '"--context-length", "99"', '"--dtype", "float32"'):
        assert option in arguments
    assert arguments.endswith('"--mem-fraction-static", "0.5"]')


@pytest.mark.parametrize(("visible", "names"), [(None, "0,1,2,3,4,5"), ("9,8,7,6", "9,8,7,6")])
def test_a_server_on_the_trainers_gpus_sees_all_of_them(begin, monkeypatch, visible, names):
    """As the ranks do, so that a GPU has one number for both."""
    monkeypatch.setattr(process.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(process.torch.cuda, "device_count", lambda: 6)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    servers, settings = begin("fine", count=2, tensor=2, colocated=True)
    process.wait(servers, settings, say=print)
    for server, first in zip(servers, ("0", "2"), strict=True):
        arguments = json.loads(said(server, "arguments"))
        assert "--enable-memory-saver" in arguments
        assert arguments[arguments.index("--base-gpu-id") + 1] == first
        assert json.loads(said(server, "environment"))["CUDA_VISIBLE_DEVICES"] == names


def test_a_server_with_gpus_of_its_own_sees_those(begin, monkeypatch):
    monkeypatch.setattr(process.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(process.torch.cuda, "device_count", lambda: 6)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (server,), settings = begin("fine", tensor=2, gpus=[3, 4])
    process.wait([server], settings, say=print)
    assert json.loads(said(server, "environment"))["CUDA_VISIBLE_DEVICES"] == "3,4"
    assert not {"--enable-memory-saver", "--base-gpu-id"} & set(json.loads(said(server, "arguments")))


def test_a_server_that_gets_handles_sees_the_trainers_gpu_under_its_number(program, tmp_path, monkeypatch):
    """With rollout.sync: tensor a server has GPUs of its own, and opens memory of the trainer's."""
    monkeypatch.setattr(process.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(process.torch.cuda, "device_count", lambda: 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9,8,7,6,5,4")
    settings = ServersConfig(python=program, port=25000, start_timeout_s=60.0, count=2, tensor=2, gpus=[2, 3, 4, 5])
    servers = process.start(settings, tmp_path / "fine", name="s", log_dir=tmp_path, context=9, sees_all=True)
    try:
        process.wait(servers, settings, say=print)
        for server, first in zip(servers, ("2", "4"), strict=True):
            arguments = json.loads(said(server, "arguments"))
            assert arguments[arguments.index("--base-gpu-id") + 1] == first
            assert "--enable-memory-saver" not in arguments
            assert json.loads(said(server, "environment"))["CUDA_VISIBLE_DEVICES"] == "9,8,7,6,5,4"
    finally:
        process.stop(servers, grace_s=0.2)


def test_a_server_is_not_told_about_the_rank_that_starts_it(begin, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "7")
    (server,), settings = begin("fine")
    process.wait([server], settings, say=print)
    environment = said(server, "environment")
    assert "cpu_stand_ins" in environment
    for name in ("RANK", "MASTER_PORT", "TORCHELASTIC"):
        assert f'"{name}' not in environment


def test_keys_reach_the_server_and_nothing_else(begin, monkeypatch, tmp_path):
    monkeypatch.setenv("MEGATRON_OPD_API_KEY", "secret-for-all")
    monkeypatch.setenv("MEGATRON_OPD_ADMIN_KEY", "secret-for-control")
    (server,), settings = begin("fine")
    process.wait([server], settings, say=print)
    assert said(server, "keys") == 'of length {"admin-api-key": 18, "api-key": 14}'
    ps = subprocess.run(
        ["ps", "-ww", "-o", "args=", "-p", str(server.pid)], capture_output=True, text=True, timeout=120
    )
    assert "launch_server" in ps.stdout
    files = "".join(p.read_text(errors="replace") for p in (tmp_path / "logs").iterdir() if p.is_file())
    assert "secret" not in ps.stdout + files


def test_a_server_that_dies_is_reported_with_the_end_of_its_log(begin):
    servers, settings = begin("dies")
    with pytest.raises(ValueError, match=r"(?s)exit code 1 before it was ready.*student-0\.log.*cannot load this"):
        process.wait(servers, settings, say=print)


def test_a_server_that_never_becomes_ready_names_the_setting(begin):
    servers, settings = begin("never-ready", start_timeout_s=1.0)
    with pytest.raises(ValueError, match=r"(?s)not ready after 1 s \(servers\.start_timeout_s\).*the end of"):
        process.wait(servers, settings, say=print)


def test_a_server_that_ignores_sigterm_is_killed(begin):
    servers, settings = begin("stubborn")
    process.wait(servers, settings, say=print)
    started = time.monotonic()
    process.stop(servers, grace_s=0.5)
    assert time.monotonic() - started > 0.4
    assert servers[0].process.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_server_ends_when_the_trainer_is_killed(program, tmp_path):
    code = f"""
import time
from megatron_opd.__main__ import main
from megatron_opd.config import ServersConfig
from megatron_opd.sglang import process
from megatron_opd.sglang.keeper import Keeper, kept
from megatron_opd.sglang.weights.group import own_address
servers = ServersConfig(python={program!r}, port=25100)
(server,) = process.start(servers, {str(tmp_path / "fine")!r}, name="a", log_dir={str(tmp_path)!r}, context=9)
print(server.pid, flush=True)
time.sleep(600)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(trainer.stdout.readline())
    assert is_alive(pid)
    trainer.kill()
    trainer.wait(120)
    trainer.stdout.close()
    try:
        assert gone(pid)
    finally:
        if is_alive(pid):
            os.killpg(pid, signal.SIGKILL)


def test_without_sglang_the_message_says_how_to_get_it(tmp_path):
    settings = ServersConfig(python=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"servers\.python: .* `megatron-opd install-sglang`"):
        process.start(settings, tmp_path, name="a", log_dir=tmp_path, context=9)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
def test_an_address_of_ipv6(begin):
    (server,), settings = begin("fine", host="::1", port=25400)
    process.wait([server], settings, say=print)
    assert server.url.startswith("http://[::1]:254")
    assert own_address([server.url]) == "127.0.0.1"


def killed(server):
    os.kill(server.pid, signal.SIGKILL)
    server.process.wait(120)


def test_a_server_that_ends_starts_again_at_its_address_and_the_others_stay(begin, monkeypatch):
    monkeypatch.setattr("megatron_opd.sglang.keeper._LOOK_S", 0.05)
    servers, settings = begin("fine", count=2)
    process.wait(servers, settings, say=print)
    first, other = servers
    child, lines = int(said(first, "child")), []
    keeper = Keeper(servers, restarts=1, say=lines.append)
    with kept(keeper):
        killed(first)
        deadline = time.monotonic() + 120
        while not lines and time.monotonic() < deadline:
            time.sleep(0.02)
        assert servers[0].pid != first.pid
        assert servers[1] is other
        process.wait(servers, settings, say=print)
    assert servers[0].url == first.url
    assert first.log.read_text().count("$ ") == 2, "what it said before it ended is lost"
    assert gone(child), "a worker of the one that ended has its memory still"
    assert keeper.lost() == []
    servers[0].process.wait(120)  # it ended with the thread that had started it
    keeper.look()
    keeper.look()
    how = [line.partition(",")[0].removeprefix(f"the server {first.url} was ended by ") for line in lines]
    assert how == ["SIGKILL", "SIGTERM"]
    assert "not started again (run.max_restarts)" in lines[-1]
    assert keeper.lost() == []
    killed(other)
    keeper.look()
    assert keeper.lost() == ["student"]


@pytest.mark.slow
def test_serve_goes_on_with_the_servers_that_are_left(program, tmp_path, capsys):
    config = Path(__file__).resolve().parents[2] / "examples/quickstart.yaml"
    run = ["serve", str(config), f"run.dir={tmp_path}/run", "rollout.engine=sglang", "rollout.servers.count=2",
           f"rollout.servers.python={program}", "rollout.servers.port=25200"]  # fmt: skip
    logs = tmp_path / "run/logs"

    def ended(i):
        wait_for(lambda: (tmp_path / f"run/servers/rollout@{_machine()}-001").exists(), 60)
        pid = int((logs / f"rollout-{i}.log").read_text().partition("pid ")[2].split()[0])
        os.kill(pid, signal.SIGKILL)

    def end_both():
        ended(0)
        time.sleep(2.5)
        outlived.append((tmp_path / f"run/servers/rollout@{_machine()}-001").exists())
        ended(1)

    before, outlived = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=end_both)
    thread.start()
    try:
        assert main(run) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
        thread.join()
    assert outlived == [True]
    assert "no server is left for rollout" in capsys.readouterr().err
