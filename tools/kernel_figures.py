#!/usr/bin/env python3
"""The least times of the loss's Triton kernels on a GPU that is not here: floors read from compiled code, not measured.

    python tools/kernel_figures.py                               # the table of docs/performance.md
    python tools/kernel_figures.py --every --json kernels.json   # every kernel that the trainer can ask for, in minutes
    python tools/kernel_figures.py --few --arch 100 --json FILE  # registers and loads on another architecture

The kernels are compiled for T = 8,192, V = 151,936 in bf16 as Triton would for that call, and disassembled.

passes         matrices [T, V] that the kernel reads or writes
memory         their bytes at 3.35 TB/s
instructions   of the main loop, for 16 columns of a thread
issue          their time on 132 multiprocessors at 1.755 GHz: the slowest of issue slots, special functions, and those
               that run at half the rate
time           the slower of the two at nine tenths of the peak, which is an assumption

Needs Triton (`pip install -e '.[triton]'`), and no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

H100 = 90
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", action="store_true", help="every kernel that the trainer can ask for, not a table")
    parser.add_argument("--few", action="store_true", help="one of everything, not a table")
    parser.add_argument("--arch", type=int, default=H100, metavar="N", help="90 (default): sm_90; 100: sm_100")
    parser.add_argument("--json", metavar="FILE", help="write all numbers to this file")
    arguments = parser.parse_args(argv)
    try:
        from kernel_code import cases, launches
    except ImportError as error:
        print(f"error: Triton is needed: pip install -e '.[triton]' ({error})", file=sys.stderr)
        return 1
    is_table = not (arguments.every or arguments.few)
    if is_table and arguments.arch != H100:
        parser.error("the table is about an H100 (sm_90): give --few or --every too")
    asked = list(cases.TABLE.values()) if is_table else cases.every() if arguments.every else cases.few()
    found = list(_figures(asked, arguments.arch))
    if arguments.json:
        rows = {"triton": launches.version(), "arch": arguments.arch, "kernels": found}
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    if is_table:
        _print_table(found, {name: asdict(case) for name, case in cases.TABLE.items()})
    else:
        print(f"{len(found)} kernels compiled for sm_{arguments.arch}")
    return 0


def _figures(asked: list[Any], arch: int) -> Iterator[dict[str, Any]]:
    """A kernel's case, name, code and floors, an H100's; a gradient times a factor has no main loop, and none."""
    from kernel_code import floors, launches, machine_code

    for count, launch in enumerate(launches.compiled(asked, arch), 1):
        print(f"{count:4} {launch.kernel}", end="\r", file=sys.stderr, flush=True)
        code = machine_code.read(launch.code, launches.DTYPES[launch.case.dtype].itemsize)
        floor = None
        if code.has_loop and arch == H100:
            found = floors.of(launch, code)
            floor = asdict(found) | {"time_s": found.time_s}
        yield {
            "kernel": launch.kernel, "case": asdict(launch.case), "code": asdict(code), "floor": floor,
            "contracts": launch.code.metadata.enable_fp_fusion,
        }  # fmt: skip


def _print_table(found: list[dict[str, Any]], names: dict[str, dict[str, Any]]) -> None:
    """A line a kernel and a sum a loss, in Markdown where nobody watches; losses share kernels."""
    table = Table("loss", "kernel", "passes", "memory", "registers", "instructions", "issue", "time")
    for name, case in names.items():
        its = [x for x in found if x["floor"] is not None and _serves(x, case)]
        for x in its:
            code, floor = x["code"], x["floor"]
            table.add_row(
                name, x["kernel"], str(floor["passes"]), _ms(floor["memory_s"]), str(code["registers"]),
                f"{floor['instructions']:.0f}", _ms(floor["issue_s"]), _ms(floor["time_s"]),
            )  # fmt: skip
        sums = [_ms(sum(x["floor"][key] for x in its)) for key in ("memory_s", "issue_s", "time_s")]
        passes = sum(x["floor"]["passes"] for x in its)
        table.add_row(name, "together", str(passes), sums[0], "", "", sums[1], sums[2])
    if sys.stdout.isatty():
        Console().print(table)
        return
    rows = [[column.header for column in table.columns], ["---"] * 2 + ["---:"] * 6]
    rows += zip(*[list(column.cells) for column in table.columns], strict=True)
    print("\n".join(f"| {' | '.join(map(str, row))} |" for row in rows))


def _serves(x: dict[str, Any], case: dict[str, Any]) -> bool:
    """Whether a kernel is one of the case's: its statistics do not depend on the kind of divergence."""
    its = x["case"]
    alike = all(its[key] == case[key] for key in its if key != "kind")
    return alike and (its["kind"] == case["kind"] or x["kernel"] == "stats")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


if __name__ == "__main__":
    sys.exit(main())
