"""Checkpoints of a run: Megatron's torch_dist for what is sharded, one JSON file for the loop, written last.

`<run.dir>/checkpoints/step_00000010/` holds the student, the optimizer, the schedule and every rank's random state.
`loop.json` (step, data cursor, weight version, architecture, layout) appears only when all of that is on disk, so a
directory without it is not a checkpoint, and a run killed in the middle of a save resumes from the one before.
Teachers are never saved. A checkpoint can be restored on another layout; random states are then left as they are.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_opd.parallel import Parallel
from megatron_opd.student.student import Student

MARKER = "loop.json"


class CheckpointError(ValueError):
    """A checkpoint cannot be written or does not belong to this run."""


class Checkpoints:
    """Saves to and restores from `<run_dir>/checkpoints`."""

    def __init__(self, run_dir: str | Path, parallel: Parallel, *, keep_last: int) -> None:
        self.dir = Path(run_dir) / "checkpoints"
        self.parallel = parallel
        self.keep_last = keep_last

    def save(self, student: Student, loop: dict[str, Any]) -> Path:
        """Write a checkpoint of `loop["step"]` and then remove all but the newest `keep_last`. Collective.

        Raises CheckpointError (on every rank) when it cannot be written; older checkpoints are untouched then.
        """
        target = self.dir / f"step_{loop['step']:08d}"
        self.parallel.share_world(lambda: _make_empty(target))
        try:
            with _synchronous_writer():
                dist_checkpointing.save(self._state(student, loading=False, with_rng=True), str(target))
            marker = {**loop, "student": _fingerprint(student), "layout": self._layout()}
            dist.barrier(group=self.parallel.world_group)
            self.parallel.share_world(lambda: _write_json(target / MARKER, marker))
        except Exception as error:
            raise CheckpointError(self._failure(target, error)) from error
        self.parallel.share_world(self._remove_old)
        return target

    def restore(self, student: Student) -> dict[str, Any] | None:
        """Load the newest complete checkpoint into the student; returns its `loop`, or None when there is none.

        Raises CheckpointError when it is of another model, or saved with another kind of optimizer.
        """
        newest = self.parallel.share_world(lambda: max(complete(self.dir), default=None))
        if newest is None:
            return None
        loop: dict[str, Any] = json.loads((newest / MARKER).read_text())
        mine = _fingerprint(student)
        for key, value in loop["student"].items():
            if mine.get(key) != value:
                raise CheckpointError(
                    f"{newest} is of another student: its {key} is {value}, that of student.model is {mine.get(key)};"
                    " give the run another run.dir"
                )
        with_rng = loop["layout"] == self._layout()
        state = dist_checkpointing.load(self._state(student, loading=True, with_rng=with_rng), str(newest))
        student.gpt.load_state_dict(state["model"])
        student.optimizer.load_state_dict(state["optimizer"])
        student.scheduler.load_state_dict(state["scheduler"])
        if with_rng:
            _set_random_state(state["random"])
        return loop

    def _state(self, student: Student, *, loading: bool, with_rng: bool) -> dict[str, Any]:
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
            "dp_cp_group": self.parallel.data_group,
        }
        model = student.gpt.sharded_state_dict(metadata=metadata)
        state = {
            "model": model,
            "optimizer": student.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata),
            "scheduler": student.scheduler.state_dict(),
        }
        if with_rng:
            p = self.parallel
            grid, mine = (p.pipeline_size, p.tensor_size, p.data_size), (p.pipeline_rank, p.tensor_rank, p.data_rank)
            state["random"] = ShardedObject("random", _random_state(), grid, mine)
        return state

    def _layout(self) -> list[int]:
        return [self.parallel.tensor_size, self.parallel.pipeline_size, self.parallel.data_size]

    def _remove_old(self) -> None:
        for old in sorted(complete(self.dir))[: -self.keep_last]:
            (old / MARKER).unlink()  # from here on it is no checkpoint, however far the removal gets
            shutil.rmtree(old, ignore_errors=True)

    def _failure(self, target: Path, error: Exception) -> str:
        newest = max(complete(self.dir), default=None)
        kept = f"the last complete checkpoint is {newest}" if newest else "there is no complete checkpoint yet"
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        return f"the checkpoint {target} could not be written: {reason} ({kept}); is the disk of run.dir full?"


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints in a directory."""
    return [marker.parent for marker in directory.glob(f"step_*/{MARKER}")]


@contextmanager
def _synchronous_writer() -> Iterator[None]:
    """Megatron's writer returns its results through a manager process, which it spawns for saves that run in the
    background. Ours do not, so a queue of this process does, without the seconds that the spawning takes."""
    saved = filesystem_async._results_queue
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = saved


def _fingerprint(student: Student) -> dict[str, Any]:
    """What must agree for a checkpoint to be of this student; padding is a matter of layout."""
    arch = dataclasses.asdict(student.arch)
    del arch["padded_vocab_size"]
    return {**arch, "optimizer": type(student.optimizer).__name__, "dtype": str(next(student.gpt.parameters()).dtype)}


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state(), "megatron": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["megatron"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Atomically: the file is whole or not there."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
