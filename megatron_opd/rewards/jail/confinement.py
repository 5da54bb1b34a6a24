"""The guards that all processes of the sandbox have in common, put up in their order."""

from __future__ import annotations

import os
from typing import Any

import guards


def confine(settings: dict[str, Any]) -> list[str]:
    """All but the last guard; returns the names of those in force."""
    guards.die_with_parent()
    guards.hide_memory()
    in_force = []
    user, group = os.geteuid(), os.getegid()
    if guards.NAMESPACES in settings["guards"] and guards.enter_namespaces():
        in_force.append(guards.NAMESPACES)
        if guards.small_disk(os.getcwd(), settings["total_bytes"], user=user, group=group):
            os.chdir(os.getcwd())  # into what is mounted there now
    # Outside of a namespace the kernel counts all that the user runs, the trainer's threads too: a limit on that would
    # end this process where it splits. Nothing is run there without seccomp, which allows no processes at all.
    counts_alone = {} if guards.NAMESPACES in in_force else {"processes": None}
    guards.limit(**settings["limits"] | counts_alone)
    if guards.LANDLOCK in settings["guards"] and guards.only_files(
        readable=settings["readable"], writable=[os.getcwd(), os.devnull]
    ):
        in_force.append(guards.LANDLOCK)
    guards.drop_privileges()
    return in_force


def cut_off(in_force: list[str], settings: dict[str, Any]) -> bool:
    """The last guard, for when no process has to be started any more. False where the network is still there."""
    if guards.SECCOMP in settings["guards"] and guards.deny_calls():
        in_force.append(guards.SECCOMP)
    return any(guard in in_force for guard in guards.CUT_THE_NETWORK)


def silence() -> None:
    """Standard streams lead nowhere; there is nothing to read."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)
