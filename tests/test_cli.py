"""The command line and the launcher: who is a worker, what is said when a rank fails, who may write to run.dir."""

import signal
from pathlib import Path

import pytest

from megatron_opd import __version__
from megatron_opd.__main__ import main
from megatron_opd.config.file import changes, load, record, to_dict
from megatron_opd.core import run_dir
from megatron_opd.core.whole_file import write_whole
from megatron_opd.launch import culprit, local, worker
from megatron_opd.launch.one_rank import PEER_FAILED
from megatron_opd.launch.rank_processes import Failure

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")


@pytest.fixture
def environ(monkeypatch):
    """Sets exactly these of the variables that launchers set."""

    def only(**values):
        for name in LAUNCHERS:
            monkeypatch.setenv(name, "")  # so that what is_worker sets is undone, too
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return local.os.environ

    return only


@pytest.mark.parametrize("command", [[], ["train"], ["check"], ["eval"], ["report"]], ids=" ".join)
def test_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    out = capsys.readouterr().out
    assert "usage: megatron-opd" in out
    assert "train" in out if not command else command[0] in out


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_without_a_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "COMMAND" in capsys.readouterr().err


def test_started_by_hand_is_no_worker(environ):
    environ()
    assert not worker.is_worker()


def test_torchrun_starts_workers(environ):
    environ(RANK="3", LOCAL_RANK="1", WORLD_SIZE="4")
    assert worker.is_worker()


def test_srun_starts_workers_under_its_own_names(environ):
    env = environ(SLURM_PROCID="5", SLURM_LOCALID="1", SLURM_STEP_NUM_TASKS="8")
    assert worker.is_worker()
    assert [env[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["5", "1", "8"]


def test_torchrun_inside_srun_keeps_its_own_ranks(environ):
    of_srun = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    env = environ(**of_srun, RANK="6", LOCAL_RANK="2", WORLD_SIZE="8")
    assert worker.is_worker()
    assert [env[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["6", "2", "8"]


def test_one_task_of_a_batch_job_is_no_worker(environ):
    environ(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_STEP_NUM_TASKS="1")
    assert not worker.is_worker()


def test_plan_repeats_what_the_user_gave(monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["examples/quickstart.yaml", "run.dir=a b"]
    (process,) = local.plan(load(arguments[0], arguments[1:]), arguments)
    assert process.ranks == 4
    assert str(process) == "trainer: 4 ranks of `python -m megatron_opd train examples/quickstart.yaml 'run.dir=a b'`"


def failed(**ends):
    """Failures as the launcher sees them, {rank: (exit code, when)}; a third part: it has ended the rank itself."""
    return {
        int(rank[1:]): Failure(code=code, when=when, is_ours=bool(ours)) for rank, (code, when, *ours) in ends.items()
    }


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        (failed(r0=(1, 5)), "rank 0 failed with exit code 1; the run has stopped"),
        (failed(r0=(PEER_FAILED, 1), r2=(1, 5)), "rank 2 failed with exit code 1; the run has stopped"),
        (failed(r0=(-signal.SIGTERM, 1, True), r1=(1, 5)), "rank 1 failed with exit code 1; the run has stopped"),
        (failed(r0=(1, 1), r1=(-signal.SIGSEGV, 5)), "rank 1 was ended by SIGSEGV; the run has stopped"),
        (failed(r1=(1, 5), r3=(2, 4)), "rank 3 failed with exit code 2; the run has stopped"),
        (failed(r1=(PEER_FAILED, 5)), f"rank 1 failed with exit code {PEER_FAILED}; the run has stopped"),
        (
            failed(r1=(-signal.SIGKILL, 5)),
            "rank 1 was ended by SIGKILL (did this machine run out of memory?); the run has stopped",
        ),
        (
            failed(r0=(-signal.SIGTERM, 6, True), r3=(-signal.SIGTERM, 5)),
            "rank 3 was ended by SIGTERM; the run has stopped",
        ),
        (
            failed(r0=(-signal.SIGKILL, 1, True), r2=(PEER_FAILED, 5)),
            f"rank 2 failed with exit code {PEER_FAILED}; the run has stopped",
        ),
        (failed(r0=(-signal.SIGKILL, 1, True)), "rank 0 was ended by SIGKILL; the run has stopped"),
    ],
)
def test_the_rank_that_failed_by_itself_is_named(tmp_path, failures, said):
    assert culprit.explain(failures, tmp_path) == said


def test_the_end_of_a_failed_ranks_log_is_shown(tmp_path):
    for run, text in (("20260101-000000", "old"), ("20260102-000000", "\n".join(map(str, range(100))))):
        log = tmp_path / run / "rank-1.log"
        log.parent.mkdir(parents=True)
        log.write_text(text)
    head, where, *lines = culprit.explain({1: Failure(code=1, when=5, log=log)}, tmp_path).splitlines()
    assert head.startswith("rank 1 failed")
    assert where == f"the end of {log}:"
    assert lines == [str(i) for i in range(80, 100)]


def test_a_run_directory_has_one_run_at_a_time(tmp_path):
    with run_dir.claimed(tmp_path / "run") as path:
        assert path.is_dir()
        refused = pytest.raises(ValueError, match=r"run\.dir: another run is writing to .* \(process \d+ on ")
        with refused, run_dir.claimed(path):
            pass
    with run_dir.claimed(path):
        pass


def test_run_directory_that_cannot_be(tmp_path, capsys, monkeypatch, environ):
    environ()
    monkeypatch.chdir(ROOT)
    (tmp_path / "file").write_text("")
    assert main(["train", "examples/quickstart.yaml", f"run.dir={tmp_path}/file/run"]) == 1
    assert f"error: run.dir: {tmp_path}/file/run cannot be created: Not a directory" in capsys.readouterr().err


def test_how_to_continue(tmp_path):
    (tmp_path / "checkpoints/step_00000009").mkdir(parents=True)  # half of one
    assert run_dir.how_to_continue(tmp_path) == "the same command starts it again"
    for step in (2, 4):
        complete = tmp_path / f"checkpoints/step_{step:08}"
        complete.mkdir()
        (complete / "loop.json").touch()
    assert run_dir.how_to_continue(tmp_path) == f"the same command continues from {complete}"


@pytest.mark.parametrize("content", [b"run: [", b"\xff", b""])
def test_a_record_that_cannot_be_read_is_written_anew(tmp_path, content):
    config = load(ROOT / "examples/quickstart.yaml")
    (tmp_path / "config.yaml").write_bytes(content)
    assert record(to_dict(config), tmp_path / "config.yaml", write_whole) is None
    assert record(to_dict(config), tmp_path / "config.yaml", write_whole) == []


def test_changes_between_two_configs():
    old = {"train": {"steps": 4, "export": True}, "teachers": [{"name": "a", "weight": 1.0}]}
    new = {"train": {"steps": 8, "export": True}, "teachers": [{"name": "a", "weight": 2.0}, {"name": "b"}]}
    assert changes(old, old) == []
    assert changes(old, new) == [
        "train.steps: 4 -> 8",
        "teachers.0.weight: 1.0 -> 2.0",
        "teachers.1: (not set) -> {'name': 'b'}",
    ]


@pytest.mark.parametrize(
    "given",
    [
        ["run.seed=3", "optim.lr=1e-4", "--settings-only"],
        ["--settings-only", "run.seed=3", "optim.lr=1e-4"],
        ["run.seed=3", "--settings-only", "optim.lr=1e-4"],
    ],
)
def test_overrides_stand_before_and_behind_options(given, capsys):
    assert main(["check", "examples/quickstart.yaml", *given]) == 0
    assert "examples/quickstart.yaml run.seed=3 optim.lr=1e-4`" in capsys.readouterr().out


def test_an_unknown_option_is_still_refused(capsys):
    with pytest.raises(SystemExit):
        main(["check", "examples/quickstart.yaml", "--no-such-option", "run.seed=3"])
    assert "unrecognized arguments: --no-such-option\n" in capsys.readouterr().err


def test_a_directory_that_is_gone_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["methods"]) == 1
    assert capsys.readouterr().err == "error: the current directory is not there any more; go to another one (`cd`)\n"
