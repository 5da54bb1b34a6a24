"""The first lines of a run: there before anything slow is imported, and gone if there is no run."""

import subprocess
import sys
from contextlib import ExitStack

import pytest
from program import CONFIG, PATIENCE_S, ROOT, environment

from megatron_opd.core import run_dir as directory
from megatron_opd.tracking import train_log


def log(run_dir):
    return [line.split("  ", 1)[1] for line in (run_dir / "train.log").read_text().splitlines()]


def test_the_line_is_on_the_console_and_in_the_log_of_a_new_run(tmp_path, capsys):
    with train_log.checking(tmp_path / "runs/new", "checking"):
        assert log(tmp_path / "runs/new") == ["checking"]
        assert capsys.readouterr().err.endswith("  checking\n")
    train_log.say(tmp_path / "runs/new", "starting")
    assert log(tmp_path / "runs/new") == ["checking", "starting"]


def test_nothing_is_left_of_a_run_that_is_refused(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="refused"), train_log.checking(tmp_path / "runs/a/b", "checking"):
        raise ValueError("refused")
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_directory_that_was_there_stays(tmp_path):
    with pytest.raises(ValueError, match="refused"), train_log.checking(tmp_path, "checking"):
        raise ValueError("refused")
    assert log(tmp_path) == ["checking"]


def test_what_somebody_puts_there_meanwhile_stays(tmp_path):
    def put_and_refuse():
        (tmp_path / "new/notes.txt").touch()
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"), train_log.checking(tmp_path / "new", "checking"):
        put_and_refuse()
    assert (tmp_path / "new/notes.txt").is_file()


def test_another_run_that_has_had_the_directory_meanwhile_keeps_it(tmp_path):
    def run_and_refuse():
        with directory.claimed(tmp_path / "new"):
            train_log.say(tmp_path / "new", "the other one")
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"), train_log.checking(tmp_path / "new", "checking"):
        run_and_refuse()
    assert log(tmp_path / "new") == ["checking", "the other one"]


def test_another_run_that_has_the_directory_keeps_its_lock(tmp_path):
    other = ExitStack()

    def claim_and_refuse():
        other.enter_context(directory.claimed(tmp_path / "new"))
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"), train_log.checking(tmp_path / "new", "checking"):
        claim_and_refuse()
    with pytest.raises(ValueError, match="another run is writing"), directory.claimed(tmp_path / "new"):
        pass
    other.close()


def test_the_log_of_another_run_is_left_alone(tmp_path, capsys):
    with directory.claimed(tmp_path), train_log.checking(tmp_path, "checking"):
        train_log.say_early(tmp_path, "importing")
        assert not (tmp_path / "train.log").exists()
    assert "checking" in capsys.readouterr().err


def test_a_directory_that_cannot_be_is_for_the_run_to_refuse(tmp_path):
    (tmp_path / "file").touch()
    with train_log.checking(tmp_path / "file/run", "checking"):
        pass
    train_log.say(tmp_path / "none", "line")
    train_log.say_early(tmp_path / "none", "line")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("rank", "lines"),
    [({}, ["checking the settings of"]), ({"RANK": "0", "WORLD_SIZE": "1"}, ["importing torch"]),
     ({"RANK": "1", "WORLD_SIZE": "2"}, [])],
    ids=["launcher", "rank 0", "rank 1"],
)  # fmt: skip
def test_it_is_said_before_torch_is_imported(tmp_path, rank, lines):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from megatron_opd.__main__ import main\n"
        f"main(['train', {CONFIG!r}, 'run.dir={tmp_path}'])"
    )
    how = {"cwd": ROOT, "env": environment(**rank), "timeout": PATIENCE_S, "text": True, "capture_output": True}
    done = subprocess.run([sys.executable, "-c", code], check=False, **how)
    assert "import of torch halted" in done.stderr
    said = [line for line in done.stderr.partition("Traceback")[0].splitlines() if line]
    assert len(said) == len(lines)
    for line, expected in zip(said, lines, strict=True):
        assert expected in line
        assert any(expected in logged for logged in log(tmp_path))
