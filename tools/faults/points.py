"""Points of the code at which a fault can happen, and how often a run of four steps comes past each (about)."""

from __future__ import annotations

import random
from typing import Any

POINTS = {
    "megatron_opd.trainer.loop:train": 1,
    "megatron_opd.trainer.loop:read_inputs": 1,
    "megatron_opd.trainer.loop:Student": 1,
    "megatron_opd.trainer.loop:build_teachers": 1,
    "megatron_opd.trainer.loop:Run.sync": 5,
    "megatron_opd.trainer.loop:Run.step": 4,
    "megatron_opd.trainer.saving:Saving.restore": 1,
    "megatron_opd.trainer.saving:Saving.save": 4,
    "megatron_opd.trainer.saving:Saving.export": 1,
    "megatron_opd.trainer.experience:Experience.sample": 4,
    "megatron_opd.trainer.experience:Experience.score": 4,
    "megatron_opd.trainer.held_out:HeldOut.evaluate": 3,
    "megatron_opd.trainer.completions:Completions.log": 4,
    "megatron_opd.student.student:Student.step": 4,
    "megatron_opd.student.optim:step": 4,
    "megatron_opd.student.optim:complete_state": 4,
    "megatron_opd.student.checkpoint:Checkpoints.save": 4,
    "megatron_opd.student.checkpoint:Checkpoints._clean_up": 4,
    "megatron_opd.student.checkpoint:write_whole": 4,
    "megatron_opd.rollout.embedded_engine:LocalEngine.load": 5,
    "megatron_opd.rollout.embedded_engine:LocalEngine.generate": 6,
    "megatron_opd.tracking.tracker:Tracker.log": 7,
    "megatron_opd.tracking.tracker:Tracker.message": 8,
    "megatron_opd.models.hf_dir:write": 1,
    "torch:save": 4,
    "torch.autograd:backward": 8,
    "os:fsync": 20,
    "os:replace": 6,
    "json:dumps": 20,
    "shutil:rmtree": 8,
}
FILE_POINTS = {"os:fsync": 20, "os:replace": 6, "os:mkdir": 8, "os:rename": 4, "builtins:open": 60, "io:open": 10}
"""Where the operating system may refuse a file."""


def draw_point(rng: random.Random, points: dict[str, int]) -> dict[str, Any]:
    """A point, and which call of it."""
    point = rng.choice(list(points))
    return {"point": point, "call": rng.randint(1, points[point])}
