"""Which ports a run opens: whoever reaches one of its ports can make it run code, so none is open to other machines."""

import ipaddress
import shutil
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import tiny
from program import ALONE, MODELS, PATIENCE_S, ROOT, checkpoints, started
from standin_model import VOCAB_SIZE

STEPS = ["train.steps=4", "train.save_every=2", "train.eval_every=2"]


def listeners(processes):
    """(address, port, name and command) of every TCP socket, v4 or v6, on which one of the processes listens."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            command = " ".join([process.name(), *process.cmdline()[:4]])
            for socket in process.net_connections("tcp"):
                if socket.status == psutil.CONN_LISTEN:
                    found.add((socket.laddr.ip, socket.laddr.port, command))
    return found


def watch(run, timeout=PATIENCE_S):
    """All listeners that the run has at one time or another until its end."""
    found, until = set(), time.monotonic() + timeout
    while run.process.poll() is None:
        assert time.monotonic() < until, "the run does not end"
        with suppress(psutil.NoSuchProcess):
            found |= listeners(run.everyone())
        time.sleep(0.02)
    return found


def assert_loopback_only(found):
    exposed = sorted(one for one in found if not ipaddress.ip_address(one[0]).is_loopback)
    assert not exposed, exposed


def watched(run, timeout=PATIENCE_S):
    """The listeners of a run that ends well."""
    found = watch(run, timeout)
    returned, printed = run.end(timeout=10)
    assert returned == 0, printed
    return found


def test_a_run_of_two_ranks_listens_on_loopback_only(tmp_path):
    with started(tmp_path, "parallel.tensor=2", *STEPS) as run:
        found = watched(run)
    assert checkpoints(tmp_path) == ["step_00000002", "step_00000004"]
    assert len([one for one in found if "megatron_opd" in one[2]]) >= 4, "the ranks' own listeners were not seen"
    assert_loopback_only(found)


def test_one_rank_alone_listens_on_loopback_only(tmp_path):
    with started(tmp_path, *STEPS, env=ALONE) as run:
        found = watched(run)
    assert found, "its groups' listeners were not seen"
    assert_loopback_only(found)


@pytest.mark.slow
def test_a_run_with_servers_listens_on_loopback_only(tmp_path):
    """Stand-ins for SGLang: the launcher starts them, and ranks of two replicas talk to them."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/slurm/standin_server.py "$@"\n')
    python.chmod(0o755)
    model = tmp_path / "model"
    tiny.save(tiny.build("qwen3", vocab_size=VOCAB_SIZE, max_position_embeddings=64), model)
    for file in MODELS.joinpath("student").glob("*token*"):
        shutil.copy(file, model)
    served = [
        *(f"student.model={model}", f"teachers.0.model={model}", f"teachers.1.model={model}"),
        *("rollout.engine=sglang", "rollout.sync=disk", f"rollout.servers.python={python}"),
        *("rollout.servers.port=25500", "rollout.servers.count=2", "parallel.data=2", "train.steps=2"),
    ]
    with started(tmp_path / "run", *served) as run:
        found = watched(run)
    assert len({port for _, port, command in found if "standin_server" in command}) == 2
    assert_loopback_only(found)


@pytest.mark.sglang
@pytest.mark.timeout(700)
def test_a_run_with_sglang_opens_one_port_that_is_not_ours(tmp_path):
    """SGLang's ranks meet in a TCPStore, also when there is one: docs/security.md. All else is on loopback."""
    served = ["rollout.engine=sglang", "rollout.servers.port=31500", "train.steps=2"]
    with started(tmp_path / "run", *served) as run:
        found = watched(run, 600)
    assert 31500 in {port for _, port, _ in found}
    stores = {one for one in found if one[0] == "::" and "sglang" in one[2] and "megatron_opd" not in one[2]}
    assert len({port for _, port, _ in stores}) <= 1, stores  # one process may have had several titles
    assert_loopback_only(found - stores)


def test_an_exposed_port_would_be_seen(tmp_path):
    """The test of the tests above: the same eyes on a program that listens everywhere."""
    listen = (
        "import socket, time; s = socket.create_server(('', 0)); print(s.getsockname()[1], flush=True); time.sleep(60)"
    )
    program = subprocess.Popen([sys.executable, "-c", listen], stdout=subprocess.PIPE, text=True)
    try:
        port = int(program.stdout.readline())
        ((address, seen, _),) = listeners([psutil.Process(program.pid)])
        assert (address, seen) == ("0.0.0.0", port)
        with pytest.raises(AssertionError, match=str(port)):
            assert_loopback_only({(address, seen, "")})
    finally:
        program.kill()
        program.communicate(timeout=10)
