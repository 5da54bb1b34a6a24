"""Tries the rewards of rows before a run: a row that every answer passes would spoil every result, and nobody would
see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.progress import track

from megatron_opd.config import SourceConfig
from megatron_opd.core.types import Prompt

_NAMED = 3
"""Rows of a source that are named; the others are counted."""


def problems_of_rows(
    source: SourceConfig,
    prompts: Sequence[Prompt],
    trial: Callable[[Prompt], str | None],
    *,
    most: int,
    workers: int,
) -> tuple[list[str], str | None]:
    """(problems, a note where only some rows were tried) of a source's rows; at most `most` are tried, evenly spread.

    trial: why a row cannot be graded, or None; it is called from several threads.
    """
    step = max(1, -(-len(prompts) // most))
    tried = [prompts[i] for i in range(0, len(prompts), step)]
    console = Console(stderr=True)
    with ThreadPoolExecutor(workers, thread_name_prefix="reward-trial") as pool:
        reasons = track(
            pool.map(trial, tried),
            description=f"trying the tests of {source.name}",
            total=len(tried),
            console=console,
            transient=True,
            disable=not console.is_interactive,
        )
        wrong = [(prompt, why) for prompt, why in zip(tried, reasons, strict=True) if why]
    problems = [f"{source.path}, row {prompt.index + 1}: {why}" for prompt, why in wrong[:_NAMED]]
    if len(wrong) > _NAMED:
        problems.append(f"{source.path}: {len(wrong) - _NAMED} more rows of {len(tried)} that were tried are like that")
    note = f"{source.name}: the tests of {len(tried)} of {len(prompts)} rows were tried" if step > 1 else None
    return problems, note
