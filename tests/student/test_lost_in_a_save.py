"""A rank that dies while a checkpoint is written is no fault of the disk."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch.distributed as dist

LOST = [
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4182"),
    RuntimeError("[enforce fail at x/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 7000ms for recv"),
    dist.DistStoreError("wait timeout after 7000ms"),
    dist.DistBackendError("NCCL communicator was aborted on rank 0"),
]
FULL, OTHERS = "GB are free on the disk of run.dir", "not how much is free"
OF_THE_DISK = {
    "full": (OSError(28, "No space left on device"), FULL),
    "quota": (OSError(122, "Disk quota exceeded"), FULL),
    "torch": (RuntimeError("unexpected pos 64"), FULL),
    "broken": (OSError(5, "Input/output error"), "the network's file system fails"),
    "files": (OSError(24, "Too many open files"), "raise the limit (`ulimit -n`)"),
    "files of the machine": (OSError(23, "Too many open files in system"), "fs.file-max"),
    "large": (OSError(27, "File too large"), "raise the limit (`ulimit -f`)"),
    "read-only": (OSError(30, "Read-only file system", "/here"), "take another directory"),
    "another": (OSError(13, "Permission denied", "/here"), OTHERS),
}


def save(parallel, run_dir, error):
    """What a save raises, as (type, message), whose collectives raise `error`."""
    from megatron_opd.student import checkpoint

    student = SimpleNamespace(optimizer=None)
    checkpoints = checkpoint.Checkpoints(run_dir, parallel, keep_last=1)
    failing = mock.patch.object(checkpoint.optim, "complete_state", side_effect=error)
    try:
        with failing:
            checkpoints.save(student, {"step": 3})
    except Exception as raised:
        return type(raised).__name__, str(raised)


@pytest.mark.parametrize("error", LOST, ids=["closed", "late", "store", "nccl"])
def test_a_peer_that_dies_in_a_save(ranks, tmp_path, error):
    assert ranks.run(1, save, str(tmp_path), error) == [(type(error).__name__, str(error))]


@pytest.mark.parametrize(("error", "advice"), OF_THE_DISK.values(), ids=OF_THE_DISK)
def test_a_disk_that_fails_in_a_save(ranks, tmp_path, error, advice):
    """The message has the free room where room was lacking, and nowhere else."""
    ((kind, said),) = ranks.run(1, save, str(tmp_path), error)
    assert kind == "CheckpointError"
    assert f"step_00000003 could not be written: {error}" in said
    assert (FULL in said) == (advice == FULL)
    assert advice in said or advice == OTHERS
