"""Which checkpoints of a run are its own and whole."""

import pytest

from megatron_opd.core import run_dir


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


def save_begins(parallel, target):
    from megatron_opd.student import checkpoint

    checkpoint._make_empty(target)


def test_what_no_save_has_made_is_left_alone(ranks, tmp_path):
    """Files with the name of a checkpoint, and directories elsewhere that links of such a name lead to."""
    checkpoints, elsewhere = tmp_path / "run/checkpoints", tmp_path / "elsewhere"
    for path in (checkpoints / "step_00000008", elsewhere):
        path.mkdir(parents=True)
        (path / run_dir.MARKER).write_text("{}")
    (checkpoints / "step_00000009").write_text("notes")
    (checkpoints / "step_00000011").symlink_to("nowhere")
    (checkpoints / "step_00000003").symlink_to(elsewhere)
    assert [path.name for path in run_dir.saves(checkpoints)] == ["step_00000003", "step_00000008"]
    ranks.run(1, clean_up, str(tmp_path / "run"))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000008", "step_00000009", "step_00000011"]
    (checkpoints / "step_00000012").symlink_to(elsewhere)
    ranks.run(1, save_begins, checkpoints / "step_00000012")
    assert not (checkpoints / "step_00000012").is_symlink()
    assert (elsewhere / run_dir.MARKER).is_file()
