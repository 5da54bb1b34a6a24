"""Scores of single tokens as Parquet: a file for each step that `log.completions_every` names.

    <run.dir>/tokens/step_00000010.parquet        pandas.read_parquet("<run.dir>/tokens") reads all steps

A row is an answer: what is known of it as a whole, and lists with an entry for each of its tokens. So a prompt is there
once, a file stands alone, and `explode` makes a row a token of it. docs/view.md has the columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_opd.core.whole_file import write_whole

DIRECTORY = "tokens"
_NAME = re.compile(r"step_([0-9]+)\.parquet")
TOP_ID, TOP_TOKEN, TOP_LOGP = "top_id", "top_token", "top_logp"
"""Columns of the likeliest tokens: the student's, and with a slash and its name behind them a teacher's."""
ROW = {
    **{"step": "int64", "answer": "int64", "source": "string", "index": "int64", "sample": "int64", "part": "int64"},
    **{"origin": "string", "finish": "string", "turns": "int64", "calls": "int64", "ended": "string"},
    **{"reward": "float64", "prompt": "string", "response": "string"},
}
"""Columns of an answer as a whole, and their types in every file, whatever a step has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredAnswer:
    """An answer with n tokens."""

    row: Mapping[str, Any]
    """The columns `ROW`, about the answer as a whole."""
    token_ids: Sequence[int]
    learnt: Sequence[bool]
    """Whether each is learnt."""
    columns: Mapping[str, np.ndarray]
    """By column, a number [m] or several [m, k] for each of the m learnt tokens; NaN: not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lists:
    """Candidates: how many each token has, and all of them, one behind the other."""

    counts: np.ndarray
    values: Sequence[Any] | np.ndarray
    """Texts, or numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """A file as it is read: the answers, and the tokens of all of them one behind the other, N in all."""

    rows: list[dict[str, Any]]
    """The columns `ROW`."""
    counts: np.ndarray
    """Tokens of each answer."""
    texts: list[str]
    learnt: np.ndarray
    """bool [N]."""
    numbers: dict[str, np.ndarray]
    """By column [N]; NaN: not known."""
    lists: dict[str, Lists]
    """By column."""


def path_of(run_dir: Path, step: int) -> Path:
    """The file of a step."""
    return run_dir / DIRECTORY / f"step_{step:08d}.parquet"


def files(run_dir: Path) -> dict[int, Path]:
    """The files of a run by step, in order."""
    found = {int(m[1]): path for path in (run_dir / DIRECTORY).glob("*") if (m := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def rewind(run_dir: Path, step: int) -> None:
    """Remove the files of steps after `step`. Raises OSError."""
    for its, path in files(run_dir).items():
        if its > step:
            path.unlink()


def write(path: Path, answers: Sequence[ScoredAnswer], text_of: Callable[[int], str]) -> None:
    """Write a step's answers, all with the same columns; `text_of` gives the text of a token id. Raises OSError."""
    import pyarrow as pa
    from pyarrow import parquet

    arrays = {name: pa.array([answer.row[name] for answer in answers], kind) for name, kind in ROW.items()}
    ends = np.cumsum([0, *(len(answer.token_ids) for answer in answers)])
    ids = np.concatenate([np.asarray(answer.token_ids, np.int64) for answer in answers])
    learnt = np.concatenate([np.asarray(answer.learnt, bool) for answer in answers])
    lists = {"token_id": _ids(ids), "token": _texts(ids, text_of), "learnt": pa.array(learnt)}
    for name in answers[0].columns:
        lists |= _lists(name, _at_all(learnt, [answer.columns[name] for answer in answers]), text_of)
    arrays |= {name: pa.ListArray.from_arrays(pa.array(ends, pa.int32()), x) for name, x in lists.items()}
    buffer = pa.BufferOutputStream()
    parquet.write_table(pa.table(arrays), buffer, compression="zstd")
    path.parent.mkdir(exist_ok=True)
    write_whole(path, buffer.getvalue().to_pybytes())


def read(path: Path) -> TokenScores:
    """Raises ValueError for a file that cannot be read."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        found = parquet.ParquetFile(path).read()
        table = found.combine_chunks()
        lists = {name: table.column(name).combine_chunks() for name in table.column_names if name not in ROW}
        return TokenScores(
            rows=_rows(table),
            counts=np.diff(_plain(lists["token"].offsets)),
            texts=lists["token"].values.to_pylist(),
            learnt=_plain(lists["learnt"].values).astype(bool),
            numbers={name: _plain(x.values).astype(float) for name, x in lists.items() if _is_number(x.values.type)},
            lists={name: _listed(x.values) for name, x in lists.items() if pa.types.is_list(x.values.type)},
        )
    except (pa.ArrowException, OSError, LookupError, AttributeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as scores of tokens: {why}; move it away") from None


def _rows(table: Any) -> list[dict[str, Any]]:
    """The columns `ROW`; files of runs that began with an older version do not tell of episodes."""
    older = {"turns": 1, "calls": 0, "ended": ""}
    there = [name for name in ROW if name not in older or name in table.column_names]
    return [{**older, **row} for row in table.select(there).to_pylist()]


def _plain(array: Any) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False)


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_floating(kind))


def _listed(array: Any) -> Lists:
    import pyarrow as pa

    values = array.values
    known = values.to_pylist() if pa.types.is_string(values.type) else _plain(values)
    return Lists(counts=np.diff(_plain(array.offsets)), values=known)


def _at_all(learnt: np.ndarray, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Values of all tokens from those of learnt ones; NaN elsewhere."""
    of_learnt = np.concatenate(parts)
    whole = np.full((len(learnt), *of_learnt.shape[1:]), np.nan)
    whole[learnt] = of_learnt
    return whole


def _lists(name: str, values: np.ndarray, text_of: Callable[[int], str]) -> dict[str, Any]:
    """A column of numbers by token as one of the file; of candidates' ids also their texts."""
    import pyarrow as pa

    if values.ndim == 1:
        return {name: pa.array(values.astype(np.float32), mask=np.isnan(values))}
    known = ~np.isnan(values)
    ends = pa.array(np.cumsum([0, *known.sum(-1)]), pa.int32())
    what, _, whose = name.partition("/")
    if what != TOP_ID:
        return {name: pa.ListArray.from_arrays(ends, pa.array(values[known].astype(np.float32)))}
    ids, of = values[known].astype(np.int64), f"/{whose}" if whose else ""
    return {
        name: pa.ListArray.from_arrays(ends, _ids(ids)),
        f"{TOP_TOKEN}{of}": pa.ListArray.from_arrays(ends, _texts(ids, text_of)),
    }


def _ids(ids: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.array(ids.astype(np.int32))


def _texts(ids: np.ndarray, text_of: Callable[[int], str]) -> Any:
    import pyarrow as pa

    some, at = np.unique(ids, return_inverse=True)
    return pa.array([text_of(int(i)) for i in some], pa.string()).take(pa.array(at.reshape(-1)))
