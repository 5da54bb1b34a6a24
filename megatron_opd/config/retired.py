"""Settings and choices of earlier versions, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterable

_PROBE = "servers that failed are looked at after 5 s, and after longer when they fail again; leave it out"
SETTINGS = {
    "rollout.servers.probe_s": _PROBE,
    "teachers.N.servers.probe_s": _PROBE,
    "rollout.sync_bucket_mb": "weights always travel 256 MiB at a time; leave it out",
}
"""By the setting's name, `N` for an index of a list."""
CHOICES = {
    ("loss.estimator", "k1"): "the gradient of log q(y) - log p(y) is that of log q(y), whatever the teachers say;"
    " policy_gradient has the same value and the gradient that is meant, k2 the same gradient",
}


def advice_for_setting(path: Iterable[str | int]) -> str | None:
    """What to write in place of the setting at `path`; None where there never was one."""
    return SETTINGS.get(_name(path))


def advice_for_choice(path: Iterable[str | int], value: object) -> str | None:
    """What to write in place of a choice; None where there never was one."""
    return CHOICES.get((_name(path), str(value)))


def _name(path: Iterable[str | int]) -> str:
    return ".".join("N" if isinstance(part, int) else part for part in path)
