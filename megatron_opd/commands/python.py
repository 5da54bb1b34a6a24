"""Functions for Python programs: `megatron_opd.load_config`, `train`, `evaluate` and `read_run` (docs/api.md).

Each does what the command does, so a run that a program began is continued by the command, and the other way round.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_opd.commands.eval import evaluate
from megatron_opd.config import Config, file
from megatron_opd.core.run_dir import COMPLETIONS
from megatron_opd.launch import worker
from megatron_opd.tracking import json_lines, report_run

if TYPE_CHECKING:
    import pandas

__all__ = ["RunTables", "evaluate", "load_config", "read_run", "train"]
_INTERRUPTED = range(128, 160)
"""Exit codes of a run that a signal ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTables:
    """The tables of a run, as far as it is written."""

    dir: Path
    config: dict[str, Any]
    """Every setting, by section; empty where the run directory has no config."""
    metrics: pandas.DataFrame
    """A row a step, its index; a column a metric, NaN where the step has none. docs/metrics.md has their names."""
    answers: pandas.DataFrame
    """The answers that `log.completions_every` wrote, a row each: step, source, prompt, response, reward, …"""


def load_config(path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Config:
    """A run's settings, all of them, checked. They cannot be changed; `dataclasses.replace` makes others.

    `overrides` are settings that replace some of the file's: `{"train.steps": 20}` or `["train.steps=20"]`. Raises
    ConfigError, a ValueError, with every problem.
    """
    if isinstance(overrides, Mapping):
        overrides = [f"{name}={_as_text(value)}" for name, value in overrides.items()]
    return file.load(path, [*overrides])


def _as_text(value: Any) -> str:
    """A value as an override has it: text as it is, the others as YAML, which JSON is."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def train(config: Config) -> RunTables:
    """Run to the last step and return what the run wrote: a new run, or one that is continued.

    Servers and ranks are processes of this machine, with restarts as by `megatron-opd launch`; what they do is said on
    stderr. Raises ValueError for what would be refused before a run, RuntimeError for a run that fails, and
    KeyboardInterrupt for one that is interrupted. Only a program's main thread can call it, as only that gets signals.
    """
    from megatron_opd.commands import first_look
    from megatron_opd.launch.interruption import until_interrupted

    if worker.is_worker():
        raise ValueError("this program is a rank itself (RANK is set); train starts ranks of its own")
    with tempfile.TemporaryDirectory(prefix="megatron-opd-") as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(file.dump(file.to_dict(config)), encoding="utf-8")

        def look_and_launch() -> int:
            found = first_look.look(path, [], name=f"the run {config.run.dir}")
            from megatron_opd.launch import local

            return local.launch(found, [str(path)], max_restarts=config.run.max_restarts)

        code = until_interrupted(config.run.dir, look_and_launch)
    if code in _INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise RuntimeError(f"the run {config.run.dir} did not come to its end; why is above, and in its train.log")
    return read_run(config.run.dir)


def read_run(run_dir: str | Path) -> RunTables:
    """The tables of a run, finished or not.

    Raises ValueError where there is no run, and ImportError where pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise ImportError("tables need pandas, which is not installed: pip install 'megatron-opd[pandas]'") from None
    run = report_run.read_run(Path(run_dir))
    names = dict.fromkeys(name for row in run.rows for name in row if name != "step")
    metrics = pandas.DataFrame({name: pandas.Series(run.series(name), dtype=float) for name in names})
    return RunTables(
        dir=run.dir,
        config=run.config,
        metrics=metrics.rename_axis("step").sort_index(),
        answers=pandas.DataFrame(_answers(run.dir / COMPLETIONS)),
    )


def _answers(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in json_lines.parse(path.read_bytes()).rows] if path.is_file() else []
