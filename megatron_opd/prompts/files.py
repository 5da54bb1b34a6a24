"""The rows that prompt sources hold: JSON Lines, JSON, Parquet, or a data set of the Hugging Face hub.

Rows come one after the other, so that a large file is never in memory as a whole (a JSON array is). What cannot be read
is a ValueError that names the place.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.config import HUB, SourceConfig

_BATCH = 1024
"""Rows of a Parquet file that are Python objects at a time."""
_INSTALL = "pip install 'megatron-opd[datasets]'"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source."""

    index: int
    """Line or row of the source, from 0."""
    where: str
    """For messages: "prompts.jsonl, line 3"."""
    fields: Any
    """A mapping, unless the source is not what it should be."""
    share: float
    """Share of the source that has been read with this row."""


def read_rows(source: SourceConfig) -> Iterator[Row]:
    """All rows of a source, in its order; blank lines are skipped. Raises ValueError for what cannot be read."""
    if source.path.startswith(HUB):
        return _hub(source)
    path = Path(source.path)
    if not path.is_file():
        raise ValueError(f"prompt source '{source.name}': there is no file {path}")
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".json" and _starts_an_array(path):
        return _array(path)
    return _lines(path)


def _lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        lines = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield Row(number - 1, where, _parse(line, where), raw.tell() / size)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a gzip file, or is cut short: {error}") from None


def _starts_an_array(path: Path) -> bool:
    with path.open("rb") as file:
        while chunk := file.read(4096):
            if text := chunk.removeprefix(codecs.BOM_UTF8).strip():
                return text.startswith(b"[")
    return False


def _array(path: Path) -> Iterator[Row]:
    rows = _parse(path.read_bytes(), str(path))
    for number, fields in enumerate(rows, start=1):
        yield Row(number - 1, f"{path}, row {number}", fields, number / len(rows))


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{where}: not valid JSON ({error.msg} at {line}column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{where}: not valid JSON (nested too deeply)") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except ValueError as error:  # a number with thousands of digits
        raise ValueError(f"{where}: not valid JSON ({error})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are all different; JSON would keep the last value of each."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice in an object")
    return found


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    index = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{path}: the column {twice[0]!r} is there twice")
            for batch in file.iter_batches(batch_size=_BATCH):
                for fields in batch.to_pylist():
                    index += 1
                    yield Row(index - 1, f"{path}, row {index}", fields, index / file.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        at = f" after row {index}" if index else ""
        raise ValueError(f"{path} cannot be read as Parquet{at}: {_first_line(error)}") from None


def _hub(source: SourceConfig) -> Iterator[Row]:
    where = f"{source.path}{f' ({source.subset})' if source.subset else ''}, {source.split}"
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{where}: data sets of the hub need the package datasets: {_INSTALL}") from None
    try:
        found = datasets.load_dataset(source.path.removeprefix(HUB), source.subset or None, split=source.split)
    except Exception as error:  # hub, network, cache, and the readers of every format raise their own
        raise ValueError(
            f"{where} cannot be loaded: {_first_line(error)}; see `subset` and `split` of the source, or give it a file"
        ) from None
    for number, fields in enumerate(found, start=1):
        yield Row(number - 1, f"{where}, row {number}", fields, number / len(found))


def at_path(fields: Any, name: str) -> Any:
    """What a row has under a name, or under a path of names with dots; None if nothing."""
    if not isinstance(fields, Mapping):
        return None
    if name in fields or "." not in name:
        return fields.get(name)
    first, _, rest = name.partition(".")
    return at_path(fields.get(first), rest)


def as_messages(asked: Any) -> Any:
    """A text that is a JSON list of messages as that list, as some files store them; all else as it is."""
    if not isinstance(asked, str) or not asked.lstrip().startswith("["):
        return asked
    try:
        found = json.loads(asked)
    except (ValueError, RecursionError):
        return asked
    is_told = isinstance(found, list) and found and all(isinstance(one, dict) and "role" in one for one in found)
    return found if is_told else asked


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
