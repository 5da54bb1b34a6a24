#!/usr/bin/env python3
"""One Markdown table of what tools/gpu_checks.sh left in its folder, for docs/gpu_results.md."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="OUT of tools/gpu_checks.sh")
    folder = parser.parse_args(argv).folder
    if absent := [name for name in ("machine.txt", "results.tsv") if not (folder / name).is_file()]:
        parser.error(f"{folder}: no {' and no '.join(absent)}: is it the OUT of tools/gpu_checks.sh?")
    page = render(folder)
    (folder / "table.md").write_text(page)
    print(page, end="")
    return 0


def render(folder: Path) -> str:
    """The table: a row a check; for runs also what they came to."""
    machine = (folder / "machine.txt").read_text().strip().splitlines()
    lines = [f"{datetime.date.today().isoformat()}, {'; '.join(machine)}", ""]
    lines += ["| check | result | seconds | accuracy | KL to the teachers | tokens/s | FP8 noise / KL to learn |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    for line in (folder / "results.tsv").read_text().splitlines():
        name, ended, seconds = line.split("\t")
        lines.append(f"| {name} | {ended} | {seconds} | {' | '.join(_of_run(folder / name))} |")
    return "\n".join(lines) + "\n"


def _of_run(run_dir: Path) -> list[str]:
    """Accuracy and KL of the last evaluation, the median throughput, the largest share of FP8's noise."""
    path = run_dir / "metrics.jsonl"
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    evaluations = [row for row in rows if "eval/accuracy/all" in row]
    speeds = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    noises = [value for row in rows for name, value in row.items() if name.startswith("fp8/ratio/")]
    return [
        f"{evaluations[-1]['eval/accuracy/all']:.1%}" if evaluations else "",
        f"{evaluations[-1]['eval/kl/ensemble']:.4f}" if evaluations else "",
        f"{statistics.median(speeds):.0f}" if speeds else "",
        f"{max(noises):.3%}" if noises else "",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
