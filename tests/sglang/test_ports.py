"""Ports for servers: each is given out once on a machine, before anybody listens there."""

import subprocess
import sys

import pytest

from megatron_opd.sglang.ports import free_port

HOLD = """
import sys
from megatron_opd.sglang.ports import free_port
print(free_port("127.0.0.1", int(sys.argv[1])), free_port("127.0.0.1", int(sys.argv[1])), flush=True)
sys.stdin.read()
"""


def test_a_port_is_given_out_once():
    assert free_port("127.0.0.1", 26000) != free_port("127.0.0.1", 26000)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names for sockets without files")
def test_two_programs_are_not_given_the_same_port_and_one_that_ends_gives_its_ports_back():
    own = free_port("127.0.0.1", 26100)
    command = [sys.executable, "-c", HOLD, str(own)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        theirs = [int(port) for port in other.stdout.readline().split()]
        assert len({own, *theirs}) == 3
        assert free_port("127.0.0.1", own) not in theirs
        other.kill()
        other.wait(timeout=120)
    assert free_port("127.0.0.1", theirs[0]) == theirs[0]


@pytest.mark.parametrize("host", ["203.0.113.7", "no such host"])
def test_an_address_of_another_machine(host):
    with pytest.raises(ValueError, match=rf"servers\.host: {host} is not an address of this machine"):
        free_port(host, 26000)
