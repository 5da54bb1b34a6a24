"""A launcher of one's own: two files, tests and docs apart.

launch/queue/launcher.py         the launcher: `QueueLauncher` below
launch/launchers.py              a line of LAUNCHERS
"""

from pathlib import Path

import pytest

from megatron_opd.__main__ import main
from megatron_opd.launch import launchers

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = "examples/quickstart.yaml"


class QueueLauncher:
    """Writes what is to be started into a file that something else reads."""

    summary = "put the run into a queue"

    def add_options(self, parser):
        parser.add_argument("--queue-file", metavar="FILE", help="the queue")

    def launch(self, config, given, options):
        from megatron_opd.launch import local

        if options.queue_file is None:
            raise ValueError("--queue needs --queue-file")
        lines = [str(process) for process in local.plan(config, given)]
        if options.dry_run:
            print(*lines, sep="\n")
        else:
            Path(options.queue_file).write_text("\n".join(lines))
        return 0


@pytest.fixture(autouse=True)
def queue(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(launchers.LAUNCHERS, "queue", QueueLauncher())
    return tmp_path / "queue"


def test_it_launches(queue, capsys):
    given = [QUICKSTART, "run.seed=3"]
    assert main(["launch", "--queue", f"--queue-file={queue}", "--dry-run", *given]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed == "trainer: 4 ranks of `python -m megatron_opd train examples/quickstart.yaml run.seed=3`"
    assert not queue.exists()
    assert main(["launch", "--queue", f"--queue-file={queue}", *given]) == 0
    assert queue.read_text() == printed


def test_its_help_and_its_errors_are_the_command_lines(queue, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["launch", "--help"])
    assert "put the run into a queue" in capsys.readouterr().out
    assert main(["launch", "--queue", QUICKSTART]) == 1
    assert capsys.readouterr().err == "error: --queue needs --queue-file\n"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--queue-file=x"], "--queue-file requires --queue"),
        (["--slurm", "--queue-file=x"], "--queue-file requires --queue"),
        (["--queue", "--nodes=2"], "--nodes requires --slurm"),
    ],
)
def test_options_of_another_launcher_are_refused(options, problem, capsys):
    assert main(["launch", *options, QUICKSTART]) == 1
    assert capsys.readouterr().err == f"error: {problem}\n"


def test_there_is_one_launcher_at_a_time(capsys):
    with pytest.raises(SystemExit):
        main(["launch", "--slurm", "--queue", QUICKSTART])
    assert "not allowed with argument --slurm" in capsys.readouterr().err
