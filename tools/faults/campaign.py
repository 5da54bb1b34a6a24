"""A campaign: injections by number and seed, each played in a directory of its own, its result a line of JSON."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from faults import changes, environments, files, fuzz, limits, servers, signals  # noqa: F401  (each registers its kinds)
from faults.kind import KINDS, Played
from megatron_opd.core.whole_file import write_whole

_DRAWS = 8
"""Draws of an injection until one is reached."""
Result = dict[str, Any]


def plan(seed: int, count: int, kinds: Sequence[str]) -> list[str]:
    """The kind of each injection: every kind equally often, in an order by seed."""
    order = random.Random(seed)
    rounds = [order.sample(list(kinds), len(kinds)) for _ in range(-(-count // len(kinds)))]
    return [kind for one in rounds for kind in one][:count]


def play(seed: int, number: int, kind: str) -> Result:
    """Play one injection; a draw that is not reached is replaced by the next one."""
    began = time.monotonic()
    for draw in range(_DRAWS):
        rng = random.Random(f"{seed}/{number}/{kind}/{draw}")
        directory = Path(tempfile.mkdtemp(prefix=f"fault_{kind}_"))
        try:
            played = KINDS[kind](rng, directory)
        except Exception as error:  # a fault of the campaign itself must not pass for a run that is right
            played = Played({}, wrong=[f"the campaign failed: {type(error).__name__}: {error}"])
        if not played.wrong:
            shutil.rmtree(directory, ignore_errors=True)
        if played.reached:
            break
    kept = {"directory": str(directory)} if played.wrong else {}
    result = {"seed": seed, "number": number, "kind": kind, "draw": draw, "reached": played.reached}
    return {
        **result,
        "facts": played.facts,
        "wrong": played.wrong,
        **kept,
        "seconds": round(time.monotonic() - began, 1),
    }


def results(file: Path) -> list[Result]:
    """The results in a file; a last line that was cut off does not count."""
    if not file.is_file():
        return []
    *whole, _ = file.read_text().split("\n")
    return [json.loads(line) for line in whole]


def run(seed: int, count: int, kinds: Sequence[str], out: Path) -> Iterator[Result]:
    """Play what `out` does not hold yet, and append it there."""
    done = {(one["number"], one["kind"]) for one in results(out)}
    out.parent.mkdir(parents=True, exist_ok=True)
    for number, kind in enumerate(plan(seed, count, kinds)):
        if (number, kind) in done:
            continue
        result = play(seed, number, kind)
        _append(out, json.dumps(result, default=str))
        yield result


def _append(out: Path, line: str) -> None:
    """Add a line, in place of one that was cut off."""
    whole = out.read_text().rpartition("\n")[0] if out.is_file() else ""
    write_whole(out, f"{whole}\n{line}\n" if whole else f"{line}\n", durable=False)


def by_kind(found: Sequence[Result]) -> dict[str, tuple[int, int, float]]:
    """For each kind: injections that were reached, those of them that went wrong, and the mean of their seconds."""
    of_kind: dict[str, list[Result]] = defaultdict(list)
    for one in found:
        if one["reached"]:
            of_kind[one["kind"]].append(one)
    return {
        name: (len(ones), sum(bool(one["wrong"]) for one in ones), sum(one["seconds"] for one in ones) / len(ones))
        for name, ones in sorted(of_kind.items())
    }
