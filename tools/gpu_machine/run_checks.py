"""The command line of tools/gpu_checks.sh: every check in turn, under a limit, with a line of the table at once."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gpu_machine import checks, figures, runner
from gpu_machine.checks import Check
from gpu_machine.table import Table

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "runs/gpu_site"
"""Packages that were carried here (`install.py`)."""
_LEAST_S = 10.0
"""The time under which no check is started."""
_TAIL_LINES, _KEPT_BYTES = 15, 300_000
_PROBES = {
    "te": ["-c", "import torch, transformer_engine.pytorch"],  # which finds NCCL only where torch has loaded it
    "servers": ["-c", "import os, sys; sys.exit(not os.path.exists('.venv-sglang/bin/python') and 'no SGLang here')"],
}
"""A command by stage that ends well where the stage has what it needs."""


@dataclass(frozen=True)
class Plan:
    """Settings that all checks share."""

    python: str
    out: Path
    """Folder of the table and the logs of all checks."""
    work: Path
    """Folder of each check's log and run."""
    limit_s: float
    until: float
    """When the time is up, by the monotonic clock."""
    env: dict[str, str]


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 when every check that could run went well, else 1."""
    arguments = _parsed(argv)
    try:
        listed = checks.chosen(checks.read(arguments.checks), stages=arguments.stage, patterns=arguments.only)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.list:
        _print(listed, arguments)
        return 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # `runner` ends what runs
    return _run_all(listed, arguments)


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/gpu_checks.sh",
        description="Run every check that a machine with one GPU allows, each under a limit, and print a table line by"
        " line. Nothing is downloaded. A check that fails or takes too long stops none of the others.",
        epilog="In the environment: OUT, LIMIT and WHEELS for --out, --limit and --wheels; PYTHON, the interpreter.",
    )
    env = os.environ
    parser.add_argument("--list", "--dry-run", action="store_true", help="print what would run, and start nothing")
    parser.add_argument("--stage", nargs="+", choices=checks.STAGES, default=[*checks.STAGES], metavar="STAGE",
                        help="plain, te (Transformer Engine), servers (SGLang); default: all")  # fmt: skip
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these checks; * stands for any text")
    parser.add_argument("--limit", type=float, default=float(env.get("LIMIT", 120)), metavar="S",
                        help="most seconds of a check (120)")  # fmt: skip
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="S",
                        help="seconds for all; what cannot begin in time is listed as not run")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path(env.get("OUT") or ROOT / "runs/gpu_checks"), metavar="DIR",
                        help="where table.md and logs.txt are added to (runs/gpu_checks)")  # fmt: skip
    parser.add_argument("--wheels", type=Path, default=env.get("WHEELS") or None, metavar="DIR",
                        help="install the wheels of this folder first (tools/gpu_carry.sh fills one)")  # fmt: skip
    parser.add_argument("--checks", type=Path, default=checks.PAGE, metavar="FILE", help="another list of checks")
    return parser.parse_args(argv)


def _print(listed: list[Check], arguments: argparse.Namespace) -> None:
    print("| check | stage | most seconds | command |\n|---|---|---:|---|")
    for check in listed:
        command = " ".join(check.arguments(Path("RUN")))
        print(f"| {check.name} | {check.stage} | {min(check.limit_s, arguments.limit):.0f} | {figures.cell(command)} |")


def _run_all(listed: list[Check], arguments: argparse.Namespace) -> int:
    paths = [str(ROOT), str(ROOT / "tools"), str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    plan = Plan(
        python=sys.executable,
        out=arguments.out.resolve(),
        work=ROOT / "runs/gpu_checks" if arguments.checks == checks.PAGE else arguments.out.resolve() / "work",
        limit_s=arguments.limit,
        until=time.monotonic() + arguments.budget,
        env={"OMP_NUM_THREADS": "4", **os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
    )
    table, all_well = Table(plan.out / "table.md"), True
    if arguments.wheels:
        command = ("tools/gpu_machine/install.py", str(arguments.wheels.resolve()), str(SITE))
        installing = Check("install", "wheels that were carried here", "plain", command, "last-line", required=True)
        listed = [installing, *listed]
    missing: dict[str, str] = {}
    for number, check in enumerate(listed):
        if check.stage not in missing:
            missing[check.stage] = _missing(check.stage, plan)
        if missing[check.stage]:
            table.add(check.name, check.what, result=f"skipped: {missing[check.stage]}")
            continue
        is_well = _run(check, plan, table)
        all_well = all_well and is_well
        if check.required and not is_well:
            for left in listed[number + 1 :]:
                table.add(left.name, left.what, result=f"not run: {check.name} failed")
            break
    return 0 if all_well else 1


def _missing(stage: str, plan: Plan) -> str:
    """Why a stage cannot run here; empty when it can."""
    if stage not in _PROBES:
        return ""
    command = [plan.python, *_PROBES[stage]]
    try:
        done = subprocess.run(command, cwd=ROOT, env=plan.env, capture_output=True, timeout=plan.limit_s)
    except subprocess.TimeoutExpired:
        return f"looking for it took more than {plan.limit_s:.0f} s"
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return (said[-1] if said else f"exit code {done.returncode}") if done.returncode else ""


def _run(check: Check, plan: Plan, table: Table) -> bool:
    """Run one check and add its line; whether it went well."""
    left_s = plan.until - time.monotonic()
    limit_s = min(check.limit_s, plan.limit_s, left_s)
    if left_s < _LEAST_S:
        table.add(check.name, check.what, result="not run: the time was up")
        return False
    log, run_dir = plan.work / f"{check.name}.log", plan.work / check.name
    log.parent.mkdir(parents=True, exist_ok=True)
    _forget(run_dir)
    code, seconds = runner.run([plan.python, *check.arguments(run_dir)], log=log, limit_s=limit_s, env=plan.env)
    text = figures.text_of(log)
    result = "ok" if code == 0 else f"TOO LONG (over {limit_s:.0f} s)" if code is None else f"FAILED ({code})"
    if code == 0 and check.figure == "pytest" and not figures.tests_passed(text):
        result = "FAILED (no test ran)"
    figure = figures.figure(check.figure, text, run_dir)
    table.add(check.name, check.what, result=result, figure=figure, seconds=seconds)
    _keep(check.name, text, plan.out)
    if result != "ok":
        tail = "\n".join(f"    {line[:200]}" for line in text.splitlines()[-_TAIL_LINES:])
        print(f"  the end of what {check.name} said:\n{tail}", file=sys.stderr, flush=True)
    return result == "ok"


def _forget(run_dir: Path) -> None:
    """A run goes on where an earlier one stopped, so that one is put aside."""
    if run_dir.exists():
        run_dir.rename(run_dir.with_name(f"{run_dir.name}.{time.time_ns()}"))


def _keep(name: str, text: str, out: Path) -> None:
    """All logs in one file: a machine that is lent may give few files back."""
    with (out / "logs.txt").open("a") as file:
        file.write(f"\n===== {name}\n{text[-_KEPT_BYTES:]}\n")


if __name__ == "__main__":
    raise SystemExit(main())
