"""Checkpoints of a run: Megatron's torch_dist for what is sharded, one JSON file for the loop, written last.

`<run.dir>/checkpoints/step_00000010/` holds the student, the optimizer, the schedule and every rank's random state.
`loop.json` (step, data cursor, weight version, steps skipped in a row, architecture, layout) appears only when all of
that is on disk, so a directory without it is not a checkpoint, and a run killed in the middle of a save resumes from
the one before. Teachers are never saved. A checkpoint can be restored on another layout; random states are then left as
they are.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint import CheckpointException

from megatron_opd.core.parallel import Parallel, lost_peer
from megatron_opd.core.run_dir import CHECKPOINTS, MARKER, complete, how_to_continue, saves
from megatron_opd.core.whole_file import write_whole
from megatron_opd.models.lora_layout import facts
from megatron_opd.student import optim
from megatron_opd.student.student import Student


class CheckpointError(ValueError):
    """A checkpoint cannot be written or does not belong to this run."""


class Checkpoints:
    """Saves to and restores from `<run_dir>/checkpoints`."""

    def __init__(self, run_dir: str | Path, parallel: Parallel, *, keep_last: int) -> None:
        self.dir = Path(run_dir) / CHECKPOINTS
        self.parallel = parallel
        self.keep_last = keep_last

    def save(self, student: Student, loop: dict[str, Any]) -> Path:
        """Write a checkpoint of `loop["step"]` and then remove all but the newest `keep_last`. Collective.

        Raises CheckpointError on rank 0 (PeerError on the others) when it cannot be written; older checkpoints are
        untouched then.
        """
        target = self.dir / f"step_{loop['step']:08d}"
        try:
            self.parallel.share_world(lambda: _make_empty(target))
            optim.complete_state(student.optimizer)
            with _writing_in_this_process():
                dist_checkpointing.save(self._state(student, loading=False, with_rng=True), str(target))
            marker = {**loop, "student": _fingerprint(student), "layout": self._layout()}
            dist.barrier(group=self.parallel.world_group)
            self.parallel.share_world(lambda: write_whole(target / MARKER, json.dumps(marker, indent=1)))
        except CheckpointException as error:  # on all ranks alike; only rank 0 is told what failed where
            failure = error
            self.parallel.share_world(lambda: self._give_up(target, _reason(failure)))
        except (OSError, RuntimeError) as error:
            if not self.parallel.is_main or (isinstance(error, RuntimeError) and lost_peer(error)):
                raise  # what a single rank does alone, rank 0 does: this one has only lost its peers
            self._give_up(target, _reason(error))
        self.parallel.share_world(self._clean_up)
        return target

    def restore(self, student: Student) -> dict[str, Any] | None:
        """Load the newest complete checkpoint into the student; returns its `loop`, or None when there is none.

        Raises CheckpointError on rank 0 (PeerError on the others) when it is of another model, saved with another kind
        of optimizer, or damaged.
        """
        newest = self.parallel.share_world(lambda: (complete(self.dir) or [None])[-1])
        if newest is None:
            return None
        mine = _fingerprint(student)
        loop = self.parallel.share_world(lambda: _read_marker(newest, mine))
        self.parallel.share_world(lambda: _check_small_files(newest))
        with_rng = loop["layout"] == self._layout()
        try:
            state = dist_checkpointing.load(self._state(student, loading=True, with_rng=with_rng), str(newest))
        except CheckpointException as error:
            failure = error
            self.parallel.share_world(lambda: _damaged(newest, _reason(failure)))
        student.gpt.load_state_dict(state["model"])
        optim.load_state(student.optimizer, student.scheduler, state)
        if with_rng:
            _set_random_state(state["random"])
        return loop

    def _state(self, student: Student, *, loading: bool, with_rng: bool) -> dict[str, Any]:
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
            "dp_cp_group": self.parallel.reduction_group,
        }
        model = student.gpt.sharded_state_dict(metadata=metadata)
        state = {
            "model": model,
            "optimizer": student.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata),
            "scheduler": student.scheduler.state_dict(),
        }
        if with_rng:
            p = self.parallel
            copies, copy = p.data_size * p.context_size, p.data_rank * p.context_size + p.context_rank
            grid, mine = (p.pipeline_size, p.tensor_size, copies), (p.pipeline_rank, p.tensor_rank, copy)
            state["random"] = ShardedObject("random", _random_state(), grid, mine)
        return state

    def _layout(self) -> list[int]:
        """Tensor, pipeline, data, and context where there is more than one: checkpoints did not always have it."""
        p = self.parallel
        sizes = [p.tensor_size, p.pipeline_size, p.data_size]
        return sizes if p.context_size == 1 else [*sizes, p.context_size]

    def _clean_up(self) -> None:
        """Remove all but the newest checkpoints, and what saves that were cut short have left."""
        keep = complete(self.dir)[-self.keep_last :]
        for old in set(saves(self.dir)) - set(keep):
            (old / MARKER).unlink(missing_ok=True)  # from here on it is no checkpoint, however far the removal gets
            shutil.rmtree(old, ignore_errors=True)

    def _give_up(self, target: Path, reason: str) -> NoReturn:
        shutil.rmtree(target, ignore_errors=True)  # half a checkpoint is of no use, and the disk may be full
        free = shutil.disk_usage(self.dir.parent).free
        raise CheckpointError(
            f"the checkpoint {target} could not be written: {reason}; {free / 1e9:.1f} GB are free on the disk of"
            f" run.dir; {how_to_continue(self.dir.parent)}"
        )


@contextmanager
def _writing_in_this_process() -> Iterator[None]:
    """Megatron writes in processes that it forks, made for saves in the background. Ours are not, and a fork may hang
    where other threads hold locks, or for good when the forked process is killed; so this process writes itself."""
    writer = filesystem_async.FileSystemWriterAsync
    saved = writer.write_preloaded_data_multiproc, filesystem_async._results_queue
    writer.write_preloaded_data_multiproc = staticmethod(_write_here)
    filesystem_async._results_queue = queue.Queue()  # otherwise one of a manager process
    try:
        yield
    finally:
        writer.write_preloaded_data_multiproc, filesystem_async._results_queue = staticmethod(saved[0]), saved[1]


def _write_here(transforms: list[Any], _: bool, rank: int, files: list[Any], results: queue.Queue[Any]) -> None:
    """Write this rank's files; results gets what Megatron expects: {number of the file: its entries} or an error."""
    done: queue.Queue[Any] = queue.Queue()
    written = {}
    for i, file in enumerate(files):
        pending: queue.Queue[int] = queue.Queue()
        pending.put(i)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, i, file, done, pending, use_fsync=True)
        _, outcome = done.get()
        if isinstance(outcome, Exception):
            results.put(OSError(f"{_reason(outcome)} (rank {rank})"))
            return
        written[i] = outcome
    results.put(written)


def _reason(error: BaseException) -> str:
    """One line: what the operating system said, where torch's own complaint about it hides that."""
    if isinstance(error, CheckpointException):
        causes = [cause for _, (cause, _) in sorted(error.failures.items())]
        return _reason(causes[0]).removeprefix("Worker failure: ") if causes else "another rank failed"
    cause: BaseException | None = error
    while cause and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return (str(cause or error).strip() or type(error).__name__).splitlines()[0]


def _read_marker(checkpoint: Path, mine: dict[str, Any]) -> dict[str, Any]:
    """loop.json of a checkpoint, which must be of the student with the fingerprint `mine`."""
    try:
        loop: dict[str, Any] = json.loads((checkpoint / MARKER).read_text())
        theirs = {"lora.rank": 0, **loop["student"]}
    except (ValueError, KeyError, TypeError):
        _damaged(checkpoint, f"{MARKER} is not what was written")
    for key, value in theirs.items():
        if mine.get(key) != value:
            setting = {"optimizer": "optim.distributed", "dtype": "student.dtype"}.get(key, "student.model")
            setting = key if key.startswith("lora.") else setting
            raise CheckpointError(
                f"{checkpoint} is of another student: its {key} is {value}, by {setting} it is {mine.get(key)} now;"
                f" set {setting} back, or give this run a run.dir of its own"
            )
    return loop


def _check_small_files(checkpoint: Path) -> None:
    """That the files which every rank reads can be read: Megatron's errors about them neither name them nor agree."""
    for name in ("metadata.json", "common.pt"):
        if not (checkpoint / name).is_file():
            _damaged(checkpoint, f"there is no {name} in it")
    known = (OSError, ValueError, TypeError, EOFError, RuntimeError, UnpicklingError, CheckpointingException)
    try:
        dist_checkpointing.load_common_state_dict(str(checkpoint))
    except known as error:
        _damaged(checkpoint, f"metadata.json or common.pt: {_reason(error)}")


def _damaged(checkpoint: Path, reason: str) -> NoReturn:
    raise CheckpointError(
        f"the checkpoint {checkpoint} cannot be read: {reason}; remove this directory to continue from the one before"
    )


def _fingerprint(student: Student) -> dict[str, Any]:
    """What must agree for a checkpoint to be of this student; padding is a matter of layout."""
    arch = dataclasses.asdict(student.arch)
    del arch["padded_vocab_size"]
    optimizers = getattr(student.optimizer, "chained_optimizers", [student.optimizer])
    kind = ", ".join(sorted({type(optimizer).__name__ for optimizer in optimizers}))
    dtype = str(next(student.gpt.parameters()).dtype)
    return {**arch, "optimizer": kind, "dtype": dtype, **facts(student.lora)}


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
