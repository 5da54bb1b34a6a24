"""Facts of a run that a checkpoint keeps besides the weights: the place in the prompts, and what decides results.

Everything here goes to `loop.json`, and is compared when the run goes on: other prompts are refused or accepted by
`data.on_change`, and every other difference is said.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_opd.config.section import AtLeastOne, Count, section
from megatron_opd.core import marker
from megatron_opd.prompts import changes
from megatron_opd.prompts.fingerprint import DataRecord
from megatron_opd.trainer import conditions
from megatron_opd.trainer.conditions import Conditions
from megatron_opd.trainer.other_data import refuse_others

_SAID = "changed since the checkpoint:"


@section
class LoopState:
    """The keys of `loop.json` that are the loop's."""

    version: AtLeastOne
    """Version of the weights: the step."""
    prompts: dict[str, Count]
    """How many prompts each source has given, by name."""
    skips: Count = 0
    """Steps skipped in a row; checkpoints did not always have it."""
    data: DataRecord | None = None
    conditions: Conditions | None = None
    """None in checkpoints of versions that kept none."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Facts that decide the results of this start of a run."""

    data: DataRecord
    conditions: Conditions
    on_change: Literal["error", "accept"]
    """As data.on_change."""

    def loop(self, step: int, cursor: dict[str, int], skips: int) -> dict[str, Any]:
        """For `loop.json`: the step, the prompts given, the steps skipped, and this record."""
        state = LoopState(version=step, prompts=cursor, skips=skips, data=self.data, conditions=self.conditions)
        return {"step": step, **dataclasses.asdict(state)}

    def check(self, checkpoint: Path, loop: dict[str, Any]) -> None:
        """Raises OtherData for a checkpoint of other prompts, unless that is accepted, and DamagedMarker."""
        before = state_of(loop).data
        if before and self.on_change == "error":
            refuse_others(checkpoint, before, self.data)

    def differences(self, loop: dict[str, Any]) -> list[str]:
        """The changes since a checkpoint, a line each."""
        before = state_of(loop)
        if before.data is None or before.conditions is None:
            return [
                "the checkpoint does not say with which prompts, loss backend and versions it was made, so changes of"
                " those are not noticed this time"
            ]
        of_prompts = [f"{_SAID} {line}" for line in changes.other_prompts(before.data, self.data)]
        of_mixture = [f"{_SAID} {line}" for line in changes.other_mixture(before.data, self.data)]
        of_conditions = conditions.differences(before.conditions, self.conditions)
        return [*of_prompts, *of_mixture, *(f"{_SAID} {line}" for line in of_conditions)]


def state_of(loop: dict[str, Any]) -> LoopState:
    """The loop's keys of `loop.json`. Raises DamagedMarker naming the ones that are not what a save writes."""
    state = marker.validated(LoopState, marker.others(loop))
    if state.version != loop["step"]:
        raise marker.DamagedMarker(f"{marker.MARKER}: version is {state.version}, but step is {loop['step']}")
    return state
