"""The answers of a run token by token, as one HTML page that needs no network: `megatron-opd view RUN_DIR`.

The page is three files in `page/`, put together with the data. Numbers travel as whole numbers of 16 bits with a scale
a column, texts of tokens as places in one list. Whatever a run's texts hold, they stay texts: they cannot end the block
of data, the script makes text of them before they become HTML, and the page runs no other script than its own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opd.core.run_dir import COMPLETIONS
from megatron_opd.core.whole_file import write_whole
from megatron_opd.tracking import token_file
from megatron_opd.tracking.report_run import RecordedRun, read_run
from megatron_opd.tracking.token_file import TOP_LOGP, TOP_TOKEN, Lists, TokenScores

PAGE = "view.html"
_POINTS = 600
"""The most points of a curve."""
_MOST_SHORT = 65535
"""The most texts whose places 16 bits hold."""
_UNKNOWN, _LARGEST = -32768, 32767
_KEPT = (
    *("source", "index", "sample", "part", "origin", "finish"),
    *("turns", "calls", "ended", "reward", "prompt", "response"),
)


def view(run_dir: Path, out: Path, *, most_steps: int) -> list[int]:
    """Write the page of a run; the steps that are in it. Raises ValueError that says what is missing."""
    run = read_run(run_dir)
    found = token_file.files(run_dir)
    if not found:
        raise ValueError(_nothing(run_dir))
    steps = _spread(list(found), most_steps)
    write_whole(out, page(data_of(run, [token_file.read(found[step]) for step in steps])), durable=False)
    return steps


def page(data: dict[str, Any]) -> str:
    """The whole HTML."""
    folder = Path(__file__).parent / "page"
    frame, style, script = ((folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "title": html.escape(data["name"]),
        "style": style,
        "script": script,
        "hash": f"sha256-{digest}",
        "data": _harmless(json.dumps(data, ensure_ascii=False, separators=(",", ":"))),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], frame)


def data_of(run: RecordedRun, tables: Sequence[TokenScores]) -> dict[str, Any]:
    """The data of the page. Raises ValueError for a run without answers."""
    places: dict[str, int] = {"": 0}
    teachers = [name.removeprefix("logp/") for name in tables[0].numbers if name.startswith("logp/")]
    lists = [x for table in tables for x in table.lists.values()]
    candidates = max((int(x.counts.max(initial=0)) for x in lists), default=0)
    for text in (text for table in tables for text in _texts(table)):
        places.setdefault(text, len(places))
    kind = np.uint32 if len(places) > _MOST_SHORT else np.uint16
    return {
        "name": run.dir.resolve().name,
        "about": _about(run, teachers),
        "teachers": teachers,
        "candidates": candidates,
        "curves": _curves(run),
        "texts": list(places),
        "wide": kind is np.uint32,
        "steps": [_step(table, places, kind, teachers=teachers, candidates=candidates) for table in tables],
    }


def _nothing(run_dir: Path) -> str:
    how = "set log.completions_every (for example log.completions_every=10) and train, or continue, the run"
    if (run_dir / COMPLETIONS).is_file():
        return f"{run_dir} has answers, but no scores of single tokens: they come with newer versions; {how}"
    return f"{run_dir} has no scores of tokens: {how}"


def _harmless(text: str) -> str:
    """JSON that an HTML parser sees nothing in."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _spread(steps: list[int], most: int) -> list[int]:
    """`most` of the steps at most, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / max(most - 1, 1))] for i in range(most - 1)] + steps[-1:]


def _about(run: RecordedRun, teachers: Sequence[str]) -> str:
    done = max(int(row["step"]) for row in run.rows)
    student = Path(str((run.config.get("student") or {}).get("model") or "student")).name
    taught = f" learns from {', '.join(teachers)}" if teachers else ""
    return f"{student}{taught}; {done} step{'' if done == 1 else 's'} done"


def _curves(run: RecordedRun) -> dict[str, list[list[float]]]:
    """Every metric with two values or more, of so many points that a curve looks the same."""
    found = {}
    for name in dict.fromkeys(name for row in run.rows for name in row if name != "step"):
        points = [[step, x] for step, x in run.series(name).items() if isinstance(x, int | float) and math.isfinite(x)]
        if len(points) > 1:
            found[name] = points[:: math.ceil(len(points) / _POINTS)] + points[-1:]
    return found


def _texts(table: TokenScores) -> Iterable[str]:
    yield from table.texts
    for name, its in table.lists.items():
        if name.partition("/")[0] == TOP_TOKEN:
            yield from its.values


def _step(
    table: TokenScores, places: dict[str, int], kind: type, *, teachers: Sequence[str], candidates: int
) -> dict[str, Any]:
    counts = zip(table.rows, table.counts.tolist(), strict=True)
    tops = {}
    for model in ("", *teachers):
        of = f"/{model}" if model else ""
        tokens, logps = table.lists.get(f"{TOP_TOKEN}{of}"), table.lists.get(f"{TOP_LOGP}{of}")
        if tokens is not None and logps is not None and len(tokens.values):
            ids = Lists(counts=tokens.counts, values=[places[text] for text in tokens.values])
            whole = _rectangle(ids, candidates, 0).astype(kind)
            tops[model] = {"ids": _base64(whole), "logps": _packed(_rectangle(logps, candidates, np.nan))}
    return {
        "step": table.rows[0]["step"] if table.rows else 0,
        "answers": [{**{name: row[name] for name in _KEPT}, "tokens": count} for row, count in counts],
        "token": _base64(np.array([places[text] for text in table.texts], kind)),
        "learnt": _base64(table.learnt.astype(np.uint8)),
        "columns": {name: _packed(x) for name, x in table.numbers.items() if not np.isnan(x).all()},
        "top": tops,
    }


def _rectangle(lists: Lists, width: int, filler: float) -> np.ndarray:
    """[N, width] from lists of up to `width` numbers."""
    found = np.full((len(lists.counts), width), filler, dtype=float)
    found[np.arange(width)[None] < lists.counts[:, None]] = np.asarray(lists.values, dtype=float)
    return found


def _packed(values: np.ndarray) -> dict[str, Any]:
    """Numbers as 16 bits; what is not finite is not known."""
    known = np.isfinite(values)
    scale = float(np.abs(values[known]).max(initial=0.0)) / _LARGEST or 1.0
    whole = np.full(values.shape, _UNKNOWN, np.int16)
    whole[known] = np.round(values[known] / scale).astype(np.int16)
    return {"scale": scale, "data": _base64(whole)}


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()).decode()
