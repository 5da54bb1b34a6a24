#!/usr/bin/env python3
"""How fast whole steps are, and how that scales: tokens a second, time by stage, bytes sent, peak memory, MFU.

It is the run's own loop, with its models and its sampling, on every layout in turn. Alone it starts the ranks of each
layout on this machine, and the servers that the config leaves to it; under torchrun or srun it is one rank of one
layout, that of the config. Every case is timed --repeats times after a warm-up; what is shown is the median and how far
the repeats lie apart. Collectives are counted in a step of their own, which is not timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import tool
from step_bench import cases, show
from step_bench.cases import Case

from megatron_opd.core import lifeline, rendezvous
from megatron_opd.core.arguments import Parser, add_config
from megatron_opd.launch import local, worker
from megatron_opd.launch.rank_processes import Handle, Output, Ranks, Start, spawn
from megatron_opd.sglang import serve

ROOT = Path(__file__).resolve().parents[1]
_EXAMPLES = """\
examples:
  python tools/bench_step.py --dry-run                                        what would run
  python tools/bench_step.py --layouts 1x1x1 2x1x1 1x2x1 1x1x2 --json a.json --plot a.png
  python tools/bench_step.py --layouts 1x1x1 1x1x2 --scaling weak             as many prompts a replica
  python tools/bench_step.py --teachers 1 2 4                                 those of the config, again and again
  python tools/bench_step.py my.yaml parallel.tensor=8 rollout.max_staleness=1 teachers.0.carrier=topk
  python tools/bench_step.py --compare before.json after.json                 is it faster, or is it noise?
  srun -N 4 --ntasks-per-node 8 python tools/bench_step.py my.yaml parallel.data=4 --json 4.json

A layout is TENSORxPIPELINExDATA, or with xCONTEXT behind it. Results are added to those in the --json file, so several
calls make one table.
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    lifeline.tie_to_launcher()
    return tool.run(_run, _parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config(parser, default=str(ROOT / "examples/quickstart.yaml"))
    what = parser.add_argument_group("cases: every combination")
    what.add_argument("--layouts", nargs="+", default=[], metavar="TxPxD[xC]", help="(the config's)")
    what.add_argument("--teachers", nargs="+", type=tool.positive, default=[], metavar="N", help="(the config's)")
    what.add_argument(
        "--scaling",
        choices=["strong", "weak"],
        default="strong",
        help="rollout.prompts_per_step is of a step (strong, the default), or of each replica (weak)",
    )
    how = parser.add_argument_group("measuring")
    how.add_argument("--warmup", type=tool.positive, default=2, metavar="N", help="steps before (%(default)s)")
    how.add_argument("--steps", type=tool.positive, default=3, metavar="N", help="steps of a repeat (%(default)s)")
    how.add_argument("--repeats", type=tool.positive, default=5, metavar="N", help="(%(default)s)")
    how.add_argument("--gpu", default="", metavar="NAME", help="for the MFU, as in `check --plan`; nothing without")
    how.add_argument("--timeout", type=tool.positive, default=3600, metavar="S", help="of a case (%(default)s)")
    parser.add_argument("--json", "--out", metavar="FILE", help="add the results to this file")
    parser.add_argument("--plot", metavar="FILE", help="draw tokens a second and time by stage")
    parser.add_argument("--dry-run", action="store_true", help="print the cases, start nothing")
    parser.add_argument("--compare", nargs=2, metavar=("BEFORE", "AFTER"), help="compare two --json files, run nothing")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # how this tool tells its own ranks what to do
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.compare:
        show.compare(*map(show.read, arguments.compare))
        return 0
    if "=" in arguments.config:  # no config, only overrides
        arguments.overrides.insert(0, arguments.config)
        arguments.config = str(ROOT / "examples/quickstart.yaml")
    if arguments.case:
        return _as_rank(Case(**json.loads(arguments.case)), arguments.json)
    planned = cases.of(arguments)
    if worker.is_worker():
        if len(planned) > 1:
            raise ValueError("under torchrun or srun there is one case: one layout, one number of teachers")
        return _as_rank(planned[0], arguments.json, show_it=True)
    show.planned(planned)
    if arguments.dry_run:
        return 0
    found = [_start(case, arguments.timeout) for case in planned]
    show.results(found)
    told = show.add(arguments.json, found) if arguments.json else found
    if arguments.plot:
        show.plot(told, arguments.plot)
    return 0


def _as_rank(case: Case, out: str | None, *, show_it: bool = False) -> int:
    """One rank of one case; rank 0 writes what came out."""
    from step_bench.measure import measure

    found = measure(case)
    if tool.is_main():
        if out:
            show.add(out, [found])
        if show_it:
            show.results([found])
    return 0


def _start(case: Case, timeout_s: int) -> dict[str, object]:
    """The case on ranks of its own, with the servers that it needs."""
    with tempfile.TemporaryDirectory() as folder:
        case = case.at(folder)
        out = Path(folder) / "found.json"
        arguments = [__file__, "--case", json.dumps(case.as_dict()), "--json", str(out)]
        with serve.running(case.config(), say=local.say, beside_ranks=True), rendezvous.private_store() as store:
            how = {"logs": Path(folder), "environment": store, "start": _into(Path(folder) / "rank-0.log")}
            try:
                failures = Ranks(arguments, case.ranks, **how).run(timeout_s)
            except TimeoutError:
                raise ValueError(f"{case.name} took more than {timeout_s} s (--timeout)") from None
        if failures or not out.exists():
            rank = min(failures, key=lambda rank: (failures[rank].is_ours, failures[rank].when), default=0)
            log = Path(folder) / f"rank-{rank}.log"
            raise ValueError(f"{case.name} failed:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-30:]))
        found: dict[str, object] = json.loads(out.read_text())["cases"][0]
        return found


def _into(log: Path) -> Start:
    """Starts ranks that write nothing to the terminal."""

    def start(environment: Mapping[str, str], arguments: Sequence[str], stdout: Output, stderr: Output) -> Handle:
        with log.open("ab") as instead:
            return spawn(environment, arguments, stdout or instead, stderr or instead)

    return start


if __name__ == "__main__":
    sys.exit(main())
