"""The tracker: nothing lost, nothing twice, nothing that is not JSON."""

import io
import json
import math
import struct
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_opd.config import file as cfg
from megatron_opd.tracking.tracker import Tracker, build_tracker, read_metrics


def config_for(run_dir, steps=60, **log):
    tree = {
        "run": {"dir": str(run_dir)},
        "student": {"model": "s"},
        "teachers": [{"name": "t", "model": "t"}],
        "data": {"train": [{"name": "math", "path": "m.jsonl"}]},
        "train": {"steps": steps},
        "log": log,
    }
    return cfg.from_dict(tree)


def tracker_for(config, console=None):
    settings = {"num_steps": config.train.steps, "settings": cfg.to_dict(config)}
    return build_tracker(config.log, Path(config.run.dir), **settings, console=console)


def quiet():
    return Console(file=io.StringIO(), width=200)


def lines_of(run_dir):
    """The rows as strict JSON: NaN and Infinity are not."""

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steps_of(run_dir):
    return [row["step"] for row in lines_of(run_dir)]


def log_steps(run_dir, *steps):
    with tracker_for(config_for(run_dir), console=quiet()) as tracker:
        for step in steps:
            tracker.log({"loss": float(step)}, step)


def test_floats_come_back_bit_by_bit(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, struct.unpack("<f", b"\x01\x02\x03\x3e")[0]]
    with tracker_for(config_for(tmp_path), console=quiet()) as tracker:
        tracker.log({f"m{i}": value for i, value in enumerate(values)}, 3)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert [struct.pack("<d", row[f"m{i}"]) for i in range(len(values))] == [struct.pack("<d", v) for v in values]


def test_nan_and_infinities_are_valid_json_and_come_back(tmp_path):
    with tracker_for(config_for(tmp_path), console=quiet()) as tracker:
        tracker.log({"loss": math.nan, "up": math.inf, "down": -math.inf}, 1)
    assert lines_of(tmp_path)[0]["loss"] == "nan"
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["loss"])
    assert (row["up"], row["down"]) == (math.inf, -math.inf)


def test_a_row_is_in_the_file_when_log_returns(tmp_path):
    tracker = tracker_for(config_for(tmp_path), console=quiet())
    tracker.log({"loss": 1.0}, 1)
    assert steps_of(tmp_path) == [1]
    assert lines_of(tmp_path)[0]["time_s"] >= 0
    tracker.close()


def test_a_step_may_have_several_rows(tmp_path):
    with tracker_for(config_for(tmp_path), console=quiet()) as tracker:
        tracker.log({"loss": 1.0}, 5)
        tracker.log({"eval/accuracy/all": 0.5}, 5)
    assert [set(row) - {"step", "time_s"} for row in lines_of(tmp_path)] == [{"loss"}, {"eval/accuracy/all"}]


def test_rewind_leaves_each_step_once(tmp_path):
    log_steps(tmp_path, 0, 1, 2, 3, 4)
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    with tracker_for(config_for(tmp_path), console=quiet()) as tracker:
        tracker.rewind(2)
        tracker.log({"loss": 9.0}, 3)
    assert steps_of(tmp_path) == [0, 1, 2, 3]
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:3] == before[:3], "kept rows are not rewritten"
    assert lines_of(tmp_path)[3]["loss"] == 9.0
    assert not list(tmp_path.glob("*.tmp"))


def test_rewind_to_before_the_start_empties_the_file(tmp_path):
    log_steps(tmp_path, 0, 1)
    with tracker_for(config_for(tmp_path), console=quiet()) as tracker:
        tracker.rewind(-1)
    assert steps_of(tmp_path) == []


@pytest.mark.parametrize("half", [b'{"step": 3, "lo', b"{", b'{"step": 3, "time_s": 1.0, "loss": 1.0}', b"\x00\x00"])
def test_a_half_written_last_line_does_no_harm(tmp_path, half):
    log_steps(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + half)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    log_steps(tmp_path, 3)
    assert steps_of(tmp_path) == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 .*nonsense"):
        read_metrics(path)


def test_a_crash_while_rewinding_keeps_the_old_rows(tmp_path, monkeypatch):
    log_steps(tmp_path, 1, 2, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full_disk(_):
        raise OSError("no space left")

    monkeypatch.setattr("megatron_opd.tracking.tracker.os.fsync", full_disk)
    tracker = tracker_for(config_for(tmp_path), console=quiet())
    with tracker, pytest.raises(OSError, match="no space"):
        tracker.rewind(1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_time_goes_on_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time_s": 100.0}\n{"step": 2, "time_s": 200.0}\n')
    with tracker_for(config_for(tmp_path), console=quiet()) as tracker:
        tracker.rewind(1)
        tracker.log({"loss": 1.0}, 2)
    assert 100.0 <= lines_of(tmp_path)[1]["time_s"] < 150.0


def test_other_ranks_write_nothing_and_print_nothing(tmp_path, capsys):
    with Tracker() as tracker:
        tracker.log({"loss": 1.0}, 1)
        tracker.message("hello")
        tracker.rewind(0)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    out = io.StringIO()
    with tracker_for(config_for(tmp_path), console=Console(file=out, width=20)) as tracker:
        tracker.message("loading [bold]two[/bold] teachers, a long line that must not wrap")
        tracker.log({"loss": 0.1234567, "grad_norm": 0.9, "tokens_per_s": 1234.4, "lr": 1e-5}, 11)
        tracker.log({"loss": 0.1, "grad_norm": 0.9, "tokens_per_s": 1234.4}, 12)
        tracker.log({"eval/accuracy/math": 0.5, "eval/accuracy/all": 0.25, "eval/kl/ensemble": 0.0123}, 12)
    message, first, second, evaluation = [line.split("  ", 1)[1] for line in out.getvalue().splitlines()]
    assert message == "loading [bold]two[/bold] teachers, a long line that must not wrap"
    assert first == "step 11/60  loss 0.1235  grad 0.9  tok/s 1234  eta -"
    assert second == "step 12/60  loss 0.1  grad 0.9  tok/s 1234  eta 0:00"
    assert evaluation == "step 12/60  eval  math 0.500  all 0.250  kl 0.0123"
    logged = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in logged] == [message, first, second, evaluation]


def test_the_time_to_go_follows_the_pace(tmp_path, monkeypatch):
    clock = iter([0.0, 100.0, 100.0, 145.0, 145.0])  # start; then two readings a row: its time_s and its pace
    monkeypatch.setattr("megatron_opd.tracking.tracker.time.monotonic", lambda: next(clock, 145.0))
    with tracker_for(config_for(tmp_path, steps=200), console=quiet()) as tracker:
        tracker.log({"loss": 1.0}, 20)
        tracker.log({"loss": 1.0}, 21)
    # 45 s a step, 179 steps to go: 8,055 s
    assert (tmp_path / "train.log").read_text().rstrip().endswith("eta 2:14:15")


def test_a_progress_bar_where_there_is_a_terminal(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=150, color_system=None)
    with tracker_for(config_for(tmp_path), console=console) as tracker:
        tracker.log({"eval/accuracy/all": 0.25}, 0)
        tracker.log({"loss": 0.5, "tokens_per_s": 99.0}, 12)
        tracker.message("saved")
    shown = out.getvalue()
    assert "12/60" in shown
    assert "loss 0.5  tok/s 99  accuracy 0.250" in shown
    assert "saved" in shown
    assert "step 12/60  loss 0.5" in (tmp_path / "train.log").read_text()


def test_tensorboard_hides_what_was_rewound(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tracker_for(config_for(tmp_path, tensorboard=True), console=quiet()) as tracker:
        for step in (1, 2, 3):
            tracker.log({"loss": float(step)}, step)
        tracker.rewind(1)
        tracker.log({"loss": 20.0}, 2)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


@pytest.mark.parametrize(
    ("log", "module", "setting", "extra"),
    [
        ({"tensorboard": True}, "torch.utils.tensorboard", "log.tensorboard", "megatron-opd[tensorboard]"),
        ({"wandb": "offline"}, "wandb", "log.wandb", "megatron-opd[wandb]"),
    ],
)
def test_a_missing_package_names_the_setting_and_the_extra(tmp_path, monkeypatch, log, module, setting, extra):
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    with pytest.raises(ValueError, match=setting) as caught:
        tracker_for(config_for(tmp_path, **log), console=quiet())
    assert f"pip install '{extra}'" in str(caught.value)


def test_wandb_gets_the_run_and_keeps_its_id_over_a_resume(tmp_path, monkeypatch):
    started, logged = [], []

    class FakeRun:
        def define_metric(self, *_, **__):
            pass

        def log(self, row):
            logged.append(row)

        def finish(self):
            logged.append("finished")

    class FakeWandb:
        Settings, Error = dict, RuntimeError

        @staticmethod
        def init(**arguments):
            started.append(arguments)
            return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", FakeWandb)
    config = config_for(tmp_path / "mine", wandb="online", wandb_project="p")
    for _ in range(2):
        with tracker_for(config, console=quiet()) as tracker:
            tracker.log({"loss": 1.0}, 7)
    assert logged == [{"step": 7, "loss": 1.0}, "finished"] * 2
    assert started[0] == started[1]
    assert {k: started[0][k] for k in ("project", "name", "mode")} == {"project": "p", "name": "mine", "mode": "online"}
    assert started[0]["config"] == cfg.to_dict(config)
