"""The tables of episodes: why they ended, at first and at last, where not every step has every metric."""

import io
from pathlib import Path

from rich.console import Console

from megatron_opd.tracking import report, report_run
from megatron_opd.tracking.report_episodes import episodes_table, evaluated


def run_of(rows):
    return report_run.RecordedRun(dir=Path(), config={}, rows=rows, sources=[], teachers=[])


def row(step, turns, **ended):
    return {
        "step": step,
        "loss": 1.0,
        "episode/turns": turns,
        **{f"episode/ended/{name}": x for name, x in ended.items()},
    }


def test_first_and_last_step():
    first = {
        **row(1, 1.0, answered=0.75, length=0.25),
        "episode/calls_failed_frac": 0.5,
        "episode/failed/not_json": 0.5,
    }
    table = episodes_table(run_of([first, {"step": 1, "eval/kl/a": 1.0}, row(2, 9.0), row(3, 2.0, answered=1.0)]))
    assert (table.title, table.header) == ("Episodes, first and last step", ["mean of", "first", "last"])
    assert table.lines == [
        ["turns", "1.00", "2.00"],
        ["calls failed: not_json, %", "50.0", "-"],
        ["ended: answered, %", "75.0", "100.0"],
        ["ended: length, %", "25.0", "0.0"],
    ]


def test_a_tenth_of_the_steps_at_either_end():
    table = episodes_table(run_of([row(step, step, answered=1.0) for step in range(1, 21)]))
    assert table.lines[0] == ["turns", "1.50", "19.50"]
    assert "first and last 2 steps" in table.title


def test_runs_without_episodes_have_no_table():
    assert not episodes_table(run_of([{"step": step, "loss": 1.0} for step in (1, 2)])).lines
    assert not episodes_table(run_of([row(1, 1.0)])).lines
    assert not evaluated({"eval/accuracy/all": 1.0}).lines


def test_an_evaluation_prints_its_episodes():
    shares = {"eval/episode/turns": 2.0, "eval/episode/ended/answered": 0.9, "eval/episode/ended/max_turns": 0.1}
    metrics = {f"{name}/{source}": value for name, value in shares.items() for source in ("math", "all")}
    out = io.StringIO()
    report.print_grades("m", metrics, console=Console(file=out, width=120))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["│", "turns", "│", "2.00", "│"] in lines
    assert ["│", "ended:", "max_turns,", "%", "│", "10.0", "│"] in lines
