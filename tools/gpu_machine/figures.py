"""The figures that the table shows of a check's output. Output that cannot be read gives an empty text."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

_LONGEST = 400
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_BENCH = re.compile(r"\s*\d+ s  (\S.*): (\S+)")
_PYTEST = re.compile(r"\d+ (?:passed|failed|skipped|error)")


def text_of(log: Path, *, most: int = 1 << 20) -> str:
    """The last `most` bytes of a log as printable text."""
    with log.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - most))
        decoded = file.read().decode("utf-8", "replace").replace("\r", "\n")
    return "".join(c for c in _ESCAPES.sub("", decoded) if c.isprintable() or c == "\n")


def figure(kind: str, text: str, run_dir: Path) -> str:
    """One line for a cell of a Markdown table; `kind` is one of `checks.FIGURES`."""
    if kind == "run":
        found = _of_run(run_dir / "metrics.jsonl")
    else:
        found = {"last-line": _last_line, "pytest": _of_pytest, "bench": _of_bench}[kind](text)
    return cell(found)


def cell(text: str) -> str:
    """Text without what would end a cell, cut to a length."""
    flat = " ".join(text.replace("|", "/").split())
    return flat if len(flat) <= _LONGEST else flat[: _LONGEST - 1] + "…"


def tests_passed(text: str) -> int:
    """Tests that pytest says have passed; 0 where it says nothing."""
    found = re.search(r"(\d+) passed", _of_pytest(text))
    return int(found[1]) if found else 0


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _of_pytest(text: str) -> str:
    lines = [line for line in text.splitlines() if _PYTEST.search(line) and " in " in line]
    return lines[-1].strip("= ") if lines else ""


def _of_bench(text: str) -> str:
    """Figures in the order in which they were measured; also those of a run that was cut off."""
    found = [match for match in map(_BENCH.match, text.splitlines()) if match]
    return "; ".join(f"{match[1]}: {match[2]}" for match in found)


def _of_run(path: Path) -> str:
    """Accuracy and KL of the last evaluation, the median throughput, the largest share of FP8's noise."""
    rows = [row for row in map(_row, path.read_text(errors="replace").splitlines()) if row] if path.is_file() else []
    evaluations = [row for row in rows if "eval/accuracy/all" in row]
    speeds = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    noises = [value for row in rows for name, value in row.items() if name.startswith("fp8/ratio/")]
    parts = []
    if evaluations:
        parts += [f"accuracy {evaluations[-1]['eval/accuracy/all']:.1%}"]
        parts += [f"KL {evaluations[-1]['eval/kl/ensemble']:.4f}"] if "eval/kl/ensemble" in evaluations[-1] else []
    parts += [f"{statistics.median(speeds):.0f} tokens/s"] if speeds else []
    parts += [f"FP8 noise {max(noises):.3%} of the KL"] if noises else []
    return ", ".join(parts)


def _row(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError:  # a line that was being written when the run was stopped
        return {}
    return found if isinstance(found, dict) else {}
