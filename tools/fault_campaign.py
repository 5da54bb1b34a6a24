#!/usr/bin/env python3
"""Inject faults into small runs, many and by seed, and judge each by the same rules.

A run that a fault meets ends within a bound, with one message, and leaves nothing behind: no process, temporary file or
shared memory. The same command then continues it, and it ends bitwise where a run ends that nothing happened to. Files
that were damaged or changed are refused by name. Inputs that somebody made up are accepted, or refused in one line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import tool
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

_ROOT = Path(__file__).resolve().parents[1]
_OUT = _ROOT / "runs/faults"
_EXAMPLES = """\
examples:
  python tools/fault_campaign.py --seed 7 --count 500     into runs/faults/seed_7.jsonl; the same command continues
  python tools/fault_campaign.py --kinds power_cut --count 20
  python tools/fault_campaign.py --again 7 123            injection 123 of seed 7 once more, with all that it found
  python tools/fault_campaign.py --table runs/faults/*.jsonl
  python tools/fault_campaign.py --list
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 when anything went wrong."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the campaign (default 0)")
    parser.add_argument("--count", type=tool.positive, default=40, metavar="N", help="injections (default 40)")
    parser.add_argument("--kinds", default="", metavar="A,B", help="these kinds only")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"results (default {_OUT.name}/seed_N.jsonl in runs/)")
    parser.add_argument(
        "--again", type=int, nargs=2, metavar=("SEED", "NUMBER"), help="one injection, by a file's line"
    )
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="only show what files of results hold")
    parser.add_argument("--list", action="store_true", help="list the kinds")
    return tool.run(_command, parser.parse_args(argv))


def _command(arguments: argparse.Namespace) -> int:
    sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT / "tests/sglang"), str(_ROOT)]
    from faults import campaign
    from faults.kind import KINDS, line

    kinds = arguments.kinds.split(",") if arguments.kinds else list(KINDS)
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"--kinds: there is no {', '.join(unknown)}; --list shows what there is")
    if arguments.list:
        for name in KINDS:
            print(f"{name:32s}{line(name)}")
        return 0
    if arguments.table:
        return _show([one for file in arguments.table for one in campaign.results(file)])
    out = arguments.out or _OUT / f"seed_{arguments.seed}.jsonl"
    if arguments.again:
        seed, number = arguments.again
        file = arguments.out or _OUT / f"seed_{seed}.jsonl"
        kind = next(one["kind"] for one in campaign.results(file) if one["number"] == number)
        print(json.dumps(campaign.play(seed, number, kind), indent=1))
        return 0
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        task = progress.add_task("injections", total=arguments.count)
        progress.update(task, completed=len(campaign.results(out)))
        for result in campaign.run(arguments.seed, arguments.count, kinds, out):
            progress.advance(task)
            for wrong in result["wrong"]:
                console.print(f"{result['number']} {result['kind']} {result['facts']}: {wrong}", markup=False)
    return _show(campaign.results(out))


def _show(found: list[dict[str, object]]) -> int:
    from faults import campaign

    table = Table("kind", "reached", "wrong", "seconds each")
    counted = campaign.by_kind(found)
    for name, (reached, wrong, seconds) in counted.items():
        table.add_row(name, str(reached), str(wrong), f"{seconds:.1f}")
    reached, wrong = (sum(row[i] for row in counted.values()) for i in (0, 1))
    table.add_row(f"{len(counted)} kinds", str(reached), str(wrong), "")
    Console().print(table)
    missed = [one["number"] for one in found if not one["reached"]]
    if missed:
        print(f"{len(missed)} injections were not reached and do not count")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
