"""The report: right numbers from a full run, something useful from half of one, clear words about none."""

import io
import json
import re

import pytest
import yaml
from rich.console import Console

from megatron_opd.tracking import report as rp
from megatron_opd.tracking import report_plot, report_run

CONFIG = {
    "train": {"steps": 4},
    "teachers": [{"name": "zeta"}, {"name": "alpha"}],
    "data": {"eval": [{"name": "sub"}, {"name": "add"}]},
}
BEFORE = {
    "eval/accuracy/add": 0.1,
    "eval/accuracy/sub": 0.0,
    "eval/accuracy/all": 0.05,
    "eval/teacher/alpha/accuracy/add": 1.0,
    "eval/teacher/alpha/accuracy/sub": 0.25,
    "eval/teacher/alpha/accuracy/all": 0.625,
    "eval/teacher/zeta/accuracy/add": 0.0,
    "eval/teacher/zeta/accuracy/all": 0.5,
    "eval/kl/alpha": 2.0,
    "eval/kl/zeta": 1.0,
    "eval/kl/ensemble": 0.8,
}
AFTER = {
    "eval/accuracy/add": 0.9,
    "eval/accuracy/sub": 0.8,
    "eval/accuracy/all": 0.85,
    "eval/kl/alpha": 0.5,
    "eval/kl/zeta": 1.5,
    "eval/kl/ensemble": -1e-9,
}
TRAIN = {"loss": 0.5, "grad_norm": 1.0, "kl/alpha": 1.0, "kl/zeta": 1.0, "kl/ensemble": 0.5, "time/score": 0.1}


def training_rows(num_steps):
    """Steps of 1 s, of which the first needs 100 s to generate."""
    return [
        {"step": s, "time_s": 2.0 * s, **TRAIN, "tokens_per_s": 10.0 * s, "time/generate": 100.0 if s == 1 else 0.3}
        for s in range(1, num_steps + 1)
    ]


def full_rows():
    return [{"step": 0, "time_s": 0.0, **BEFORE}, *training_rows(4), {"step": 4, "time_s": 9.0, **AFTER}]


def make_run(tmp_path, rows, config=None):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config is not None:
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    return run_dir


def report_of(run_dir):
    """(what was printed, what was written)."""
    out = io.StringIO()
    rp.report(run_dir, console=Console(file=out, width=120))
    assert (run_dir / "report.png").read_bytes().startswith(b"\x89PNG")
    return out.getvalue(), (run_dir / "report.md").read_text()


def test_accuracy_before_teachers_after_and_gain(tmp_path):
    table = rp.accuracy_table(report_run.read_run(make_run(tmp_path, full_rows(), CONFIG)))
    assert table.header == ["task", "student\nbefore", "zeta", "alpha", "student\nafter", "gain"], "order of the config"
    assert table.lines == [
        ["sub", "0.0", "-", "25.0", "80.0", "+80.0"],
        ["add", "10.0", "0.0", "100.0", "90.0", "+80.0"],
        ["all", "5.0", "50.0", "62.5", "85.0", "+80.0"],
    ]
    assert "step 4" in table.title


def test_kl_before_and_after(tmp_path):
    table = rp.kl_table(report_run.read_run(make_run(tmp_path, full_rows(), CONFIG)))
    assert "held-out" in table.title
    assert table.lines == [
        ["zeta", "1", "1.5", "1.5x further"],
        ["alpha", "2", "0.5", "4x closer"],
        ["ensemble", "0.8", "-1e-09", "-"],
    ]


@pytest.mark.parametrize(("listed", "marked"), [("alpha", ["alpha", "ensemble"]), ("zeta", ["zeta", "ensemble"])])
def test_kl_of_lists_is_called_a_lower_bound(tmp_path, listed, marked):
    rows = [{**row, f"topk/{listed}/mass_outside": 0.1} for row in full_rows()]
    table = rp.kl_table(report_run.read_run(make_run(tmp_path, rows)))
    names = [line[0] for line in table.lines]
    assert [name.split()[0] for name in names if name.endswith(" (top-k, a lower bound)")] == marked
    assert len(names) == 3
    assert table.total
    plain = rp.kl_table(
        report_run.RecordedRun(dir=tmp_path, config={}, rows=full_rows(), sources=[], teachers=["alpha"])
    )
    assert [line[0] for line in plain.lines] == ["alpha", "ensemble"]


def test_kl_on_rollouts_stands_in_where_nothing_was_evaluated(tmp_path):
    rows = training_rows(3)
    rows[-1]["kl/alpha"] = 0.25
    table = rp.kl_table(report_run.read_run(make_run(tmp_path, rows, CONFIG)))
    assert "training rollouts" in table.title
    assert ["alpha", "1", "0.25", "4x closer"] in table.lines


def test_speed_is_a_median_so_that_warm_up_does_not_count(tmp_path):
    run = report_run.read_run(make_run(tmp_path, full_rows(), CONFIG))
    assert rp.speed_table(run).lines == [
        ["generate", "0.300", "75 %"],
        ["score", "0.100", "25 %"],
        ["whole step", "0.400", "100 %"],
    ]
    assert report_run.headline(run) == "4 of 4 steps, 25 tokens/s (median), 9 s in all"


def test_printed_and_written_tables_hold_the_same_numbers(tmp_path):
    printed, written = report_of(make_run(tmp_path, full_rows(), CONFIG))
    cells = [c.strip() for line in written.splitlines() if line.startswith("| ") for c in line.strip("| ").split("|")]
    numbers = {c for c in cells if re.search(r"\d", c)}
    assert len(numbers) > 15
    assert [c for c in numbers if c not in printed] == []
    assert "![four panels](report.png)" in written


def test_paths_name_the_newest_complete_checkpoint(tmp_path):
    run_dir = make_run(tmp_path, full_rows(), CONFIG)
    for name in ("step_00000009", "step_00000100", "step_00000101", "latest"):
        (run_dir / "checkpoints" / name).mkdir(parents=True)
    for name in ("step_00000009", "step_00000100"):
        (run_dir / "checkpoints" / name / "loop.json").touch()
    printed, _ = report_of(run_dir)
    assert f"newest checkpoint: {run_dir / 'checkpoints' / 'step_00000100'}\n" in printed
    assert "Hugging Face export" not in printed, "there is none"
    (run_dir / "hf").mkdir()
    assert f"Hugging Face export: {run_dir / 'hf'}\n" in report_of(run_dir)[0]


@pytest.mark.parametrize(
    ("rows", "config", "present", "absent"),
    [
        (training_rows(2), CONFIG, "2 of 4 steps (unfinished)", "Greedy accuracy"),
        (training_rows(2), None, "2 steps", "of 4"),
        ([{"step": 0, **BEFORE}], CONFIG, "0 of 4 steps (unfinished)", "Time per step"),
        ([{"step": 1, "loss": "nan", "grad_norm": "inf", "kl/a": "nan", "time/step": "nan"}], {}, "1 step\n", "whole"),
        ([{"step": 1, "kl/ensemble": -1e-9}], None, "-1e-09", "closer"),
        ([{"step": 3, "time_s": 1.0}], {}, "3 steps", "Distance"),
        ([{"step": 0, "eval/accuracy/a|b": 0.5}], None, "50.0", "all"),
    ],
)
def test_missing_pieces_are_left_out(tmp_path, rows, config, present, absent):
    printed, written = report_of(make_run(tmp_path, rows, config))
    tables = printed.split(" in all")[0]
    assert present in printed
    assert present in written
    assert absent not in tables


def test_before_is_shown_without_an_after(tmp_path):
    table = rp.accuracy_table(report_run.read_run(make_run(tmp_path, [{"step": 0, **BEFORE}], CONFIG)))
    assert table.lines[-1] == ["all", "5.0", "50.0", "62.5", "-", "-"]


def test_a_teacher_named_like_a_path_stays_one_teacher(tmp_path):
    rows = [{"step": 0, "eval/teacher/org/big/accuracy/add": 1.0, "eval/kl/org/big": 1.0, "eval/accuracy/add": 0.5}]
    run = report_run.read_run(make_run(tmp_path, rows))
    assert run.teachers == ["org/big"]
    assert rp.accuracy_table(run).lines == [["add", "50.0", "100.0", "-", "-"]]


def test_a_killed_run_is_reported_up_to_its_last_whole_row(tmp_path):
    run_dir = make_run(tmp_path, full_rows()[:-1], CONFIG)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert "4 of 4 steps" in report_of(run_dir)[0]


def test_what_is_wrong_with_a_directory_is_said(tmp_path):
    console = Console(file=io.StringIO())
    with pytest.raises(ValueError, match=r"no run directory .*nowhere"):
        rp.report(tmp_path / "nowhere", console=console)
    with pytest.raises(ValueError, match=r"not a run directory: it has no metrics\.jsonl"):
        rp.report(tmp_path, console=console)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is empty"):
        rp.report(make_run(tmp_path, []), console=console)


def test_the_panels_show_every_task_and_teacher(tmp_path, monkeypatch):
    from matplotlib import figure

    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    report_plot.plot(report_run.read_run(make_run(tmp_path, full_rows(), CONFIG)), tmp_path / "p.png")
    accuracy, kl, loss, seconds = drawn[0].axes[:4]
    labels = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert labels == ["sub", "add", "all", "zeta (all)", "alpha (all)"]
    (overall,) = [line for line in accuracy.lines if line.get_label() == "all"]
    assert list(overall.get_ydata()) == [5.0, 85.0]
    assert [line.get_ydata()[0] for line in accuracy.lines[-2:]] == [50.0, 62.5]
    assert kl.get_yscale() == "log"
    assert list(loss.lines[0].get_xdata()) == [1, 2, 3, 4]
    assert {text.get_text() for text in seconds.get_legend().get_texts()} == {"generate", "score"}
    assert seconds.get_ylim()[1] < 1, "the warm-up step does not flatten the others"


def test_the_last_evaluation_with_its_intervals(tmp_path):
    def row(step, **values):
        measures = {"accuracy": 0.5, "reward": 0.5, "pass@2": 0.75, **values}
        named = {f"eval/{m}{end}/{t}": v + d for m, v in measures.items() for t in ("add", "sub", "all")
                 for end, d in (("", 0), ("_low", -0.25), ("_high", 0.125))}  # fmt: skip
        return {"step": step, "time_s": 1.0, **named}

    run_dir = make_run(tmp_path, [row(0), row(4, accuracy=0.625, reward=0.625)], CONFIG)
    table = rp.last_grades(report_run.read_run(run_dir))
    assert table.header == ["task", "accuracy", "pass@2"], "reward says no more"
    cells = ["62.5 [38–75]", "75.0 [50–88]"]
    assert table.lines == [["sub", *cells], ["add", *cells], ["all", *cells]], "order of the config"
    printed, written = report_of(run_dir)
    assert "after step 4" in printed
    assert "| sub | 62.5 [38–75] | 75.0 [50–88] |" in written


def test_the_mean_reward_has_a_column_where_it_is_not_the_accuracy(tmp_path):
    row = {"step": 0, "eval/accuracy/all": 0.5, "eval/accuracy_low/all": 0.4, "eval/accuracy_high/all": 0.6,
           "eval/reward/all": 0.7, "eval/reward_low/all": 0.6, "eval/reward_high/all": 0.8}  # fmt: skip
    table = rp.last_grades(report_run.read_run(make_run(tmp_path, [row], CONFIG)))
    assert table.lines == [["all", "50.0 [40–60]", "70.0 [60–80]"]]


AGREEMENT = {
    "eval/forced_agreement/zeta/sub": (0.4, 0.7),
    "eval/forced_agreement/zeta/all": (0.5, 0.8),
    "eval/forced_agreement/alpha/all": (1.0, 1.0),
    "eval/agreement/zeta": (0.6, 0.5),
    "eval/agreement/ensemble": (0.25, 0.5),
    "eval/nll/sub": (3.0, 2.5),
    "eval/nll/all": (2.0, 2.125),
}


def test_agreement_says_how_much_of_what_lacked_is_recovered(tmp_path):
    rows = full_rows()
    rows[0] |= {name: first for name, (first, _) in AGREEMENT.items()}
    run = make_run(tmp_path, rows, CONFIG)
    unfinished = rp.agreement_table(report_run.read_run(run)).lines
    assert ["zeta's answers: sub", "40.0", "-", "-"] in unfinished
    rows[-1] |= {name: last for name, (_, last) in AGREEMENT.items()}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = rp.agreement_table(report_run.read_run(run))
    assert table.lines == [
        ["zeta's answers: sub", "40.0", "70.0", "50.0"],
        ["zeta's answers: all", "50.0", "80.0", "60.0"],
        ["alpha's answers: all", "100.0", "100.0", "-"],
        ["the student's own answers, with zeta", "60.0", "50.0", "-25.0"],
        ["the student's own answers, with ensemble", "25.0", "50.0", "33.3"],
    ]
    assert rp.nll_table(report_run.read_run(run)).lines == [
        ["sub", "3.000", "2.500", "-0.500"],
        ["all", "2.000", "2.125", "+0.125"],
    ]
    printed, _ = report_of(run)
    assert "recovered" in printed
    assert "Cross-entropy" in printed


def test_of_one_teacher_its_name_is_not_needed(tmp_path):
    row = {"kl/only": 1.0, "eval/accuracy/sub": 0.0, "eval/forced_agreement/only/sub": 0.5, "eval/agreement/only": 0.25}
    table = rp.agreement_table(report_run.read_run(make_run(tmp_path, [{"step": 0, **row}])))
    assert [line[0] for line in table.lines] == ["the teacher's answers: sub", "the student's own answers"]


def drawn(run_dir, monkeypatch):
    from matplotlib import figure

    found = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: found.append(self))
    report_plot.plot(report_run.read_run(run_dir), run_dir / "p.png")
    found[0].canvas.draw()
    return found[0].axes


def test_a_run_that_was_evaluated_once_has_a_report_without_dashes(tmp_path):
    """Its steps tell how the divergence went; the evaluation alone cannot."""
    rows = [{"step": 0, "time_s": 0.0, **BEFORE, **{name: first for name, (first, _) in AGREEMENT.items()}}]
    rows += [{**row, "kl/alpha": 1.0 / row["step"], "reward/mean": row["step"] / 40} for row in training_rows(20)]
    rows[-1]["loss"] = 0.25
    printed, written = report_of(make_run(tmp_path, rows, CONFIG))
    cells = [c.strip() for line in written.splitlines() if line.startswith("| ") for c in line.strip("| ").split("|")]
    assert cells.count("-") == 1  # nobody asked zeta about sub
    assert "student after" not in written
    assert "student\nbefore" not in printed
    assert "| alpha | 1 | 0.05 | 20x closer |" in written
    assert "## Training, first and last 2 steps" in written
    assert "| reward | 0.0375 | 0.4875 |" in written
    assert "| loss | 0.5 | 0.375 |" in written


def test_one_evaluation_and_one_step(tmp_path):
    run = make_run(tmp_path, [{"step": 0, **BEFORE}, *training_rows(1)], CONFIG)
    assert "held-out" in rp.kl_table(report_run.read_run(run)).title
    assert "Training" not in report_of(run)[1]


def test_a_constant_series_has_an_axis_around_it(tmp_path, monkeypatch):
    axes = drawn(
        make_run(tmp_path, [{**row, "loss": 1.35 + 1e-9 * row["step"]} for row in training_rows(4)]), monkeypatch
    )
    low, high = axes[2].get_ylim()
    assert 1.0 < low < 1.3 < 1.4 < high < 1.6
    assert [t for axis in axes for t in axis.get_yticklabels() if "10^" in t.get_text() or "e-" in t.get_text()] == []


@pytest.mark.parametrize("last", [1e-4, 0.06, 0.4, 0.9])
def test_ticks_are_plain_numbers(tmp_path, monkeypatch, last):
    rows = training_rows(4)
    rows[-1] |= {"kl/ensemble": last, "kl/alpha": last}
    kl = drawn(make_run(tmp_path, rows, CONFIG), monkeypatch)[1]
    low, high = kl.get_ylim()
    shown = [t.get_text() for t in kl.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert len(shown) >= 2
    assert [float(text) for text in shown] == pytest.approx([p for p in kl.get_yticks() if low <= p <= high])
    assert kl.yaxis.get_offset_text().get_text() == ""


def test_a_bar_that_leaves_the_panel_says_how_long_it_is(tmp_path, monkeypatch):
    seconds = drawn(make_run(tmp_path, full_rows(), CONFIG), monkeypatch)[3]
    (label,) = seconds.texts
    assert (label.get_text(), label.xy[0]) == ("100 s", 1)
    assert 0 < label.xy[1] < seconds.get_ylim()[1]
