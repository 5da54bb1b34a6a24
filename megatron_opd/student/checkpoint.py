"""Checkpoints of a run: Megatron's torch_dist for what is sharded, one JSON file for the loop, written last.

`<run.dir>/checkpoints/step_00000010/` holds the student, the optimizer, the schedule and every rank's random state.
`loop.json` (step, data cursor, weight version, steps skipped in a row, architecture, layout, hashes of the files)
appears only when all of that is on disk, with the files' names. So a directory without it is not a checkpoint, and a
run that ends in the middle of a save, with its machine or without, resumes from the one before. Teachers are never
saved. A checkpoint can be restored on another layout; random states are then left as they are.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint import CheckpointException

from megatron_opd.core import causes, durable, hashed_files, marker, process_memory
from megatron_opd.core.parallel import Parallel, lost_peer
from megatron_opd.core.run_dir import CHECKPOINTS, MARKER, complete, how_to_continue, remove_save, saves
from megatron_opd.core.whole_file import write_whole
from megatron_opd.models.lora_layout import facts
from megatron_opd.models.torch_dist_dir import TorchDistDir
from megatron_opd.student import checkpoint_files, listed_loading, optim, optimizer_state, streamed, whole_checkpoint
from megatron_opd.student.streamed import reason
from megatron_opd.student.student import Student
from megatron_opd.student.whole_checkpoint import CheckpointError

_FILES = 2
"""Files of a rank in a checkpoint. Megatron's versions have defaults of their own."""


class Checkpoints:
    """Saves to and restores from `<run_dir>/checkpoints`."""

    def __init__(
        self,
        run_dir: str | Path,
        parallel: Parallel,
        *,
        keep_last: int,
        skip_damaged: bool = False,
        verify: bool = True,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`skip_damaged`: restore the newest checkpoint that is whole, where the newest is not. `verify`: record
        hashes and compare them before loading. `say` takes lines for the log."""
        self.dir = Path(run_dir) / CHECKPOINTS
        self.parallel, self.keep_last, self.say = parallel, keep_last, say
        self.skip_damaged, self.verify = skip_damaged, verify

    def save(self, student: Student, loop: dict[str, Any]) -> Path:
        """Write a checkpoint of `loop["step"]` and then remove all but the newest `keep_last`. Collective.

        Raises CheckpointError on rank 0 (PeerError on the others) when it cannot be written; older checkpoints are
        untouched then.
        """
        target = self.dir / f"step_{loop['step']:08d}"
        try:
            self.parallel.share_world(lambda: _make_empty(target))
            optim.complete_state(student.optimizer)
            self._write(student, target)
            dist.barrier(group=self.parallel.world_group)
            files, failed = checkpoint_files.record(target, self.parallel, contents=self.verify)
            if failed:
                self.parallel.share_world(lambda: self._give_up(target, failed[0]))
            facts = {"student": _fingerprint(student), "layout": self._layout(), hashed_files.KEY: files}
            self.parallel.share_world(lambda: _complete(target, {**loop, **facts}))
        except CheckpointException as error:  # on all ranks alike; only rank 0 is told what failed where
            failure = error
            self.parallel.share_world(lambda: self._give_up(target, reason(failure)))
        except (OSError, RuntimeError) as error:
            if not self.parallel.is_main or (isinstance(error, RuntimeError) and lost_peer(error)):
                raise  # what a single rank does alone, rank 0 does: this one has only lost its peers
            self._give_up(target, reason(error))
        self.parallel.share_world(self._clean_up)
        return target

    def _write(self, student: Student, target: Path) -> None:
        """All files but the marker, a tensor at a time. Collective."""
        state = self._state(student, loading=False, with_rng=True)
        second_names = optimizer_state.second_names(student.optimizer, state["model"])
        second_names = dict(chain(*(names.items() for names in self.parallel.gather_world(second_names))))
        streamed.stand_alone(state)
        with streamed.writing(second_names):
            dist_checkpointing.save(state, str(target), _shared_by_all(self.parallel))

    def restore(
        self, student: Student, look: Callable[[Path, dict[str, Any]], None] | None = None
    ) -> dict[str, Any] | None:
        """Load the newest complete checkpoint into the student; returns its `loop`, or None when there is none.

        `look` is given the directory and its `loop` on rank 0, before anything is loaded; it raises ValueError where
        the loop cannot go on from there, DamagedMarker where its own keys are damaged. Raises CheckpointError on rank 0
        (PeerError on the others) when the checkpoint is of another model, saved with another kind of optimizer, or
        damaged.
        """
        mine = _fingerprint(student)
        reading = whole_checkpoint.Reading(
            marker=lambda path: _read_marker(path, mine, look),
            headers=_check_small_files,
            contents=self.verify,
        )
        found = whole_checkpoint.find(self.dir, reading, self.parallel, skip_damaged=self.skip_damaged)
        if found is None:
            return None
        for line in found.notes:
            self.say(line)
        with_rng = found.loop["layout"] == self._layout()
        try:
            state = listed_loading.load(self._state(student, loading=True, with_rng=with_rng), found.path)
        except CheckpointException as error:
            failure = error
            self.parallel.share_world(lambda: _damaged(found.path, reason(failure)))
        student.gpt.load_state_dict(state["model"])
        with optimizer_state.by_owners(student.optimizer):
            optim.load_state(student.optimizer, student.scheduler, state)
        if with_rng:
            _set_random_state(state["random"])
        del state
        process_memory.give_back()
        self.parallel.share_world(lambda: self._finish_removals(found.path))
        return found.loop

    def _state(self, student: Student, *, loading: bool, with_rng: bool) -> dict[str, Any]:
        metadata = {
            **optimizer_state.SHARDING,
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
            "dp_cp_group": self.parallel.reduction_group,
        }
        model = student.gpt.sharded_state_dict(metadata=metadata)
        with optimizer_state.by_owners(student.optimizer):
            optimizer = student.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        state = {"model": model, "optimizer": optimizer, "scheduler": student.scheduler.state_dict()}
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
            remove_save(old)

    def _finish_removals(self, used: Path) -> None:
        """Remove what is older than `used` and no checkpoint: a removal was cut short, and no save may follow. What is
        newer stays until the next save, for somebody to look at."""
        begun, whole = saves(self.dir), complete(self.dir)
        for old in set(begun[: begun.index(used)]) - set(whole):
            remove_save(old)

    def _give_up(self, target: Path, why: str) -> NoReturn:
        shutil.rmtree(target, ignore_errors=True)  # half a checkpoint is of no use, and the disk may be full
        said = causes.advised(why)
        if causes.is_full(why) or "unexpected pos" in why:  # torch's words where it could not write all
            said += f"; {shutil.disk_usage(self.dir.parent).free / 1e9:.1f} GB are free on the disk of run.dir"
        raise CheckpointError(
            f"the checkpoint {target} could not be written: {said}; {how_to_continue(self.dir.parent)}"
        )


def _shared_by_all(parallel: Parallel) -> FullyParallelSaveStrategyWrapper:
    """Megatron's writer of torch_dist, where what several ranks have is dealt out among them by size. By itself it has
    the first replica write all weights."""
    writer = get_default_save_sharded_strategy()
    writer.thread_count = _FILES
    return FullyParallelSaveStrategyWrapper(writer, parallel.world_group)


def _read_marker(
    checkpoint: Path, mine: dict[str, Any], look: Callable[[Path, dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """loop.json of a checkpoint, which must be of the student with the fingerprint `mine`, and pass `look`."""
    loop = marker.read(checkpoint)
    _check_student(checkpoint, loop["student"], mine)
    if look:
        look(checkpoint, {key: value for key, value in loop.items() if key != hashed_files.KEY})
    return loop


def _check_student(checkpoint: Path, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raises CheckpointError naming the setting by which the student is not that of the checkpoint."""
    theirs = {"lora.rank": 0, **theirs}
    for key, value in theirs.items():
        if mine.get(key) != value:
            setting = {"optimizer": "optim.distributed", "dtype": "student.dtype"}.get(key, "student.model")
            setting = key if key.startswith("lora.") else setting
            raise CheckpointError(
                f"{checkpoint} is of another student: its {key} is {value}, by {setting} it is {mine.get(key)} now;"
                f" set {setting} back, or give this run a run.dir of its own"
            )


def _check_small_files(checkpoint: Path) -> None:
    """That the files which every rank reads can be read: Megatron's errors about them neither name them nor agree."""
    for name in ("metadata.json", ".metadata"):
        if not (checkpoint / name).is_file():
            raise CheckpointError(f"there is no {name} in it")
    try:
        if not listed_loading.has_common(checkpoint):
            raise CheckpointError("there is no common.pt in it")
        listed_loading.check_small_files(checkpoint)
    except (OSError, ValueError, TypeError, CheckpointingException) as error:
        raise CheckpointError(f"metadata.json, common.pt or .metadata: {reason(error)}") from None
    if wrong := TorchDistDir(checkpoint).damage():
        raise CheckpointError(wrong[0])


def _damaged(checkpoint: Path, why: str) -> NoReturn:
    raise CheckpointError(
        f"the checkpoint {checkpoint} cannot be read: {why}; remove this directory to continue from the one before"
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
    if directory.is_dir():
        remove_save(directory)
    durable.make_directory(directory)


def _complete(checkpoint: Path, loop: dict[str, Any]) -> None:
    """Write the marker, when all other names are on disk: the files' in the checkpoint, and the checkpoint's own."""
    for directory in (checkpoint, checkpoint.parent):
        durable.sync(directory)
    write_whole(checkpoint / MARKER, marker.text(loop))
