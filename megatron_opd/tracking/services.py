"""Metrics as other programs show them: TensorBoard and Weights & Biases, each a `tracker.Sink`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_opd.config import LogConfig
from megatron_opd.core.whole_file import write_whole
from megatron_opd.tracking.wandb_files import Scratch

STEP = "step"
"""Field of a row that is not a metric."""


class TensorBoard:
    """Scalars for TensorBoard. Raises ValueError when it is not installed."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError(_missing("log.tensorboard", "tensorboard")) from None
        self._open: Any = lambda purge_step: SummaryWriter(str(directory), purge_step=purge_step, flush_secs=10)
        self._writer = self._open(None)

    def log(self, row: Mapping[str, float], step: int) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """TensorBoard has no tables."""

    def rewind(self, step: int) -> list[str]:
        self._writer.close()
        self._writer = self._open(step + 1)  # TensorBoard then hides what was written from that step on
        return []

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases. Raises ValueError when it is not installed, or refuses."""

    def __init__(self, log: LogConfig, run_dir: Path, settings: dict[str, Any]) -> None:
        self._scratch = Scratch(run_dir / "wandb" / "tmp")
        try:
            with self._scratch.in_use():
                self._wandb = _wandb()
                self._run = self._begin(log, run_dir, settings)
        except BaseException:
            self._scratch.close()
            raise
        # Its own step only grows; ours goes back on resume and repeats, so it is logged as a metric and used as x axis.
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def _begin(self, log: LogConfig, run_dir: Path, settings: dict[str, Any]) -> Any:
        # The id lives in the run directory, so that a resumed run goes on with the same curves.
        id_file = run_dir / "wandb_id"
        if not (id_file.is_file() and id_file.read_text().strip()):
            write_whole(id_file, secrets.token_hex(4))
        online = log.wandb == "online"
        try:
            return self._wandb.init(
                project=log.wandb_project,
                name=run_dir.name,
                id=id_file.read_text().strip(),
                resume="allow" if online else None,
                dir=str(run_dir),
                mode="online" if online else "offline",
                config=settings,
                settings=self._wandb.Settings(quiet=True),  # without its own tables at the end; `report` has ours
            )
        except self._wandb.Error as error:
            raise ValueError(f"log.wandb: {error} (or set log.wandb=offline)") from None

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._run.log({STEP: step, **row})

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        columns = list(rows[0]) if rows else []
        made = self._wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])
        self._run.log({STEP: step, name: made})

    def rewind(self, step: int) -> list[str]:
        """Nothing can be taken back there: steps done twice show as two points of the same value."""
        return []

    def close(self) -> None:
        self._run.finish()
        self._scratch.close()


def _wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError(_missing("log.wandb", "wandb")) from None
    return wandb


def _missing(setting: str, extra: str) -> str:
    return f"{setting} is on, but {extra} is not installed: pip install 'megatron-opd[{extra}]', or turn it off"
