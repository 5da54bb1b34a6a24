"""Refuses to continue in prompts that a checkpoint does not count in; without Megatron, so that `check` can do it."""

from __future__ import annotations

from pathlib import Path

from megatron_opd.core import marker
from megatron_opd.core.run_dir import CHECKPOINTS, complete
from megatron_opd.prompts import changes
from megatron_opd.prompts.fingerprint import DataRecord


class OtherData(ValueError):
    """The prompts are not those that the checkpoint was made with."""


def check_newest(run_dir: str | Path, data: DataRecord) -> None:
    """Raises OtherData where the newest checkpoint of a run was made with other prompts: before models are loaded. What
    else is wrong with it is said where it is restored."""
    for checkpoint in complete(Path(run_dir) / CHECKPOINTS)[-1:]:
        try:
            before = marker.validated(DataRecord, marker.read(checkpoint)["data"])
        except (marker.DamagedMarker, KeyError):
            return
        refuse_others(checkpoint, before, data)


def refuse_others(checkpoint: Path, before: DataRecord, now: DataRecord) -> None:
    """Raises OtherData where a checkpoint, made with the prompts `before`, is to go on with other ones."""
    if refused := changes.other_prompts(before, now):
        raise OtherData(
            f"{checkpoint} was made with other prompts: {'; '.join(refused)}. Put them back as they were, or set"
            " data.on_change: accept to go on at the same place in the new ones"
        )
