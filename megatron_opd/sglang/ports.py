"""Ports for servers that a run starts: no two servers of this machine are given the same one, whoever starts them."""

from __future__ import annotations

import errno
import socket
import sys

_TAKEN: dict[int, socket.socket] = {}
"""By port, what holds this process's claim to it. It stays: a server that is started again has the same port."""


def free_port(host: str, first: int) -> int:
    """The next port from `first` that nobody listens on, and that no run on this machine has taken for a server that
    does not listen yet."""
    for port in range(first, min(first + 1000, 1 << 16)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
            try:
                probe.bind((host, port))
            except OSError as error:
                if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                    raise ValueError(f"servers.host: {host} is not an address of this machine ({error})") from None
                continue
        if _take(port):
            return port
    raise ValueError(f"servers.port: no free port on {host} from {first} on; choose another first one")


def _take(port: int) -> bool:
    """Whether this process has it now, until it ends: a server needs a while until it listens, and a second run that
    looks meanwhile must not choose the same. Where there are no names for sockets but in files, only this one knows."""
    if port in _TAKEN:
        return False
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        if sys.platform == "linux":
            claim.bind(f"\0megatron_opd/port/{port}")  # a name that is gone with the process, whatever ends it
    except OSError:
        claim.close()
        return False
    _TAKEN[port] = claim
    return True
