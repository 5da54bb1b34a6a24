"""Which checkpoints of a run are its own and whole."""

import shutil

import pytest
import tiny

from megatron_opd.core import run_dir
from megatron_opd.models import convert


@pytest.fixture
def checkpoints(tmp_path):
    """Two whole checkpoints, one begun, and two copies of somebody's."""
    for name in ("step_00000009", "step_00000010", "step_00000010_best", "step_best"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / run_dir.MARKER).write_text("{}")
    (tmp_path / "checkpoints/step_00000011").mkdir()
    return tmp_path / "checkpoints"


def test_copies_are_nothing_to_continue_from(checkpoints):
    assert [path.name for path in run_dir.complete(checkpoints)] == ["step_00000009", "step_00000010"]
    assert run_dir.how_to_continue(checkpoints.parent).endswith("checkpoints/step_00000010")


def clean_up(parallel, directory):
    from megatron_opd.student.checkpoint import Checkpoints

    Checkpoints(directory, parallel, keep_last=1)._clean_up()


def test_copies_are_not_removed(ranks, checkpoints):
    ranks.run(1, clean_up, str(checkpoints.parent))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000010", "step_00000010_best", "step_best"]


def complaints(parallel, directories):
    from megatron_opd.student import checkpoint

    said = []
    for directory in directories:
        try:
            checkpoint._check_small_files(directory)
            said.append(None)
        except checkpoint.CheckpointError as error:
            said.append(str(error))
    return said


def test_small_files_that_are_missing_or_damaged_are_named(ranks, tmp_path):
    tiny.save(tiny.build("qwen3"), tmp_path / "hf")
    convert.to_megatron(convert.plan_to_megatron(tmp_path / "hf"), tmp_path / "hf", tmp_path / "whole")
    damaged = []
    for name in ("metadata.json", "common.pt"):
        for kind in ("missing", "short"):
            damaged.append(shutil.copytree(tmp_path / "whole", tmp_path / f"{kind} {name}"))
            content = (damaged[-1] / name).read_bytes()
            (damaged[-1] / name).unlink()
            if kind == "short":
                (damaged[-1] / name).write_bytes(content[: len(content) // 2])
    ((fine, *said),) = ranks.run(1, complaints, [tmp_path / "whole", *damaged])
    assert fine is None
    for directory, message in zip(damaged, said, strict=True):
        assert message.startswith(f"the checkpoint {directory} cannot be read: ")
        assert directory.name.split()[1] in message.removeprefix(f"the checkpoint {directory}")
        assert message.endswith("remove this directory to continue from the one before")
