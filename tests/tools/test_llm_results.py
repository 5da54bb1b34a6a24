"""Methods on a real model: the order of cells, what is kept, what they set, and that the page shows the lines."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import llm_results  # noqa: E402
from llm_cells import cells, runs, setting, show  # noqa: E402
from llm_cells.methods import FIRST, METHODS, THEN  # noqa: E402

from megatron_opd.config.file import load  # noqa: E402

SFT = METHODS["sft"]
BEST_LR = {method.name: method.lrs[1] for method in METHODS.values()}


def line(cell, *, after=0.7, **settings):
    measures = {"kl": 1.0, "agreement": 0.5, "nll": 3.0}
    points = [{"step": 0, "tokens": 0, "forced_agreement": 0.4, **measures}]
    points.append({"step": 8, "tokens": 4096, "forced_agreement": after, **measures})
    spent = {"cell": 600.0, "training": 300.0, "samples": 50.0}
    of = {"cell": cell.name, "method": cell.method.name, "lr": cell.lr, "seed": cell.seed}
    return {
        **of,
        "overrides": list(cell.method.settings),
        "settings": settings,
        "points": points,
        "core_seconds": spent,
    }


def tuned(*methods):
    """Lines of the learning rates, of which the middle one is best."""
    tried = [cell for method in methods for cell in cells.tuning(method)]
    return {cell.name: line(cell, after=0.8 if cell.lr == BEST_LR[cell.method.name] else 0.6) for cell in tried}


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the tool on models that are there only by name; returns (exit code, names of the cells that ran)."""
    ran = []
    for name in ("model", "student"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)

    def finished(cell, of):
        ran.append(cell.name)
        return line(cell, after=0.8 if cell.lr == BEST_LR[cell.method.name] else 0.6, **of.told())

    monkeypatch.setattr(llm_results, "finished", finished)

    def run(*arguments):
        ran.clear()
        places = {"--model": "model", "--student": "student", "--dir": "runs", "--json": "lines.jsonl"}
        where = [text for option, name in places.items() for text in (option, str(tmp_path / name))]
        return llm_results.main([*where, *map(str, arguments)]), list(ran)

    return run


def test_learning_rates_come_first_then_seed_by_seed_the_first_methods_before_the_others():
    names = [cell.name for cell in cells.in_order(list(METHODS.values()), [1, 2], tuned(*METHODS.values()))]
    of_first = [f"{method.name}/lr{lr:g}/seed0" for method in FIRST for lr in method.lrs]
    of_first += [f"{method.name}/lr0.0004/seed{seed}" for seed in (1, 2) for method in FIRST]
    assert names[: len(of_first)] == of_first
    assert {name.split("/")[0] for name in names[len(of_first) :]} == {method.name for method in THEN}


def test_a_method_without_all_its_learning_rates_waits():
    lines = tuned(SFT)
    assert cells.best(SFT, lines) == 4e-4
    lines.popitem()
    assert cells.best(SFT, lines) == cells.UNKNOWN_LR
    assert cells.in_order([SFT], [1], lines)[-1].name == "sft/lr?/seed1"


def test_recovered_is_the_part_of_what_was_lost():
    assert cells.recovered(line(cells.Cell(SFT, 1.0, 1), after=0.7)) == [0.0, pytest.approx(0.5)]


def test_a_finished_cell_is_not_run_again_unless_settings_differ(command):
    tuning = [f"sft/lr{lr:g}/seed0" for lr in SFT.lrs]
    assert command("--only", "sft", "--seeds", "2") == (0, [*tuning, "sft/lr0.0004/seed2"])
    assert command("--only", "sft", "--seeds", "1,2") == (0, ["sft/lr0.0004/seed1"])
    assert command("--only", "sft", "--seeds", "1,2") == (0, [])
    assert len(command("--only", "sft", "--seeds", "1", "--steps", 10)[1]) == 4
    assert command("--only", "sft", "--seeds", "1", "--threads", 2) == (0, [])


def test_a_dry_run_says_what_is_finished_interrupted_and_waiting(command, tmp_path, capsys):
    command("--only", "sft", "--seeds", "1")
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))  # the first learning rate
    of = llm_results._setting(
        llm_results._parser().parse_args(
            [
                "--model",
                str(tmp_path / "model"),
                "--student",
                str(tmp_path / "student"),
                "--dir",
                str(tmp_path / "runs"),
            ]
        )
    )
    place = of.place(cells.tuning(SFT)[0])
    place.mkdir(parents=True)
    (place / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 6, "loss": 1.0}\n')
    capsys.readouterr()
    assert command("--dry-run", "--only", "sft", "--seeds", "1") == (0, [])
    said = capsys.readouterr().out
    assert "interrupted after step 6 of 8" in said
    assert said.count("finished: ") == 2
    assert "waits for the learning rate" in said
    assert "about 12 core minutes are left" in said  # a quarter of ten minutes, and ten


def test_models_that_are_not_there_are_said_and_a_method_that_is_unknown(tmp_path, capsys):
    assert llm_results.main(["--model", str(tmp_path / "none"), "--dir", str(tmp_path)]) == 1
    assert "holds no model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        llm_results.main(["--only", "sftt"])
    assert "there is no method sftt; there are reverse_kl" in capsys.readouterr().err


def test_places_follow_from_settings_and_from_what_models_are(tmp_path):
    def place(*arguments, method=SFT):
        parsed = llm_results._parser().parse_args(["--dir", str(tmp_path), *map(str, arguments)])
        return llm_results._setting(parsed).place(cells.Cell(method, 1e-4, 1)).name

    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    names = [
        place(),
        place("--steps", 6),
        place("--tokens", 16),
        place("--held-out", 9),
        place("--model", tmp_path / "model"),
        place(method=METHODS["jsd"]),
    ]
    assert len(set(names)) == len(names)
    assert place("--threads", 2, "--timeout", 5) == names[0]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_config_with_equally_many_answers(name, tmp_path):
    of = llm_results._setting(llm_results._parser().parse_args(["--dir", str(tmp_path)]))
    config = load(setting.CONFIG, [*of.overrides(), *setting.of_lr(1e-3), *METHODS[name].settings])
    assert config.rollout.prompts_per_step * config.rollout.samples_per_prompt == 16
    assert (config.train.steps, config.train.eval_every, config.rollout.max_new_tokens) == (8, 4, 32)
    assert (config.data.eval[0].rows, config.data.eval[1].rows) == (32, 16)
    assert (config.answers.lmbda == 0) == METHODS[name].learns_samples
    assert (config.optim.lr, config.optim.min_lr) == (1e-3, 1e-4)


def test_points_count_the_tokens_of_students_and_of_samples(tmp_path):
    measured = dict.fromkeys(runs._MEASURES.values(), 0.5)
    rows = [
        {"step": 0, **measured},
        {"step": 1, "rollout/length": 31.5},
        {"step": 2, "answers/length_others": 32.0},
        {"step": 3, "rollout/length": 30.0, "step/skipped": 1.0},
        {"step": 3, **measured},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of = llm_results._setting(llm_results._parser().parse_args([]))
    assert [(point["step"], point["tokens"]) for point in runs.points(tmp_path, of)] == [(0, 0), (3, 1016)]


@pytest.mark.parametrize(("name", "samples"), [("sft", 64.0), ("jsd", 0.0)])
def test_the_cost_counts_interrupted_attempts_and_the_samples_that_were_used(name, samples, tmp_path):
    rows = [{"step": step, "time/generate": 2.0, "time/step": 3.0} for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(KeyboardInterrupt), runs._Attempt(tmp_path / runs._ATTEMPTS):
        raise KeyboardInterrupt
    assert json.loads((tmp_path / runs._ATTEMPTS).read_text())["seconds"] > 0
    attempts = [{"core_seconds": 50.0, "seconds": 30.0}, {"core_seconds": 100.0, "seconds": 70.0}]
    (tmp_path / runs._ATTEMPTS).write_text("".join(json.dumps(one) + "\n" for one in attempts))
    of = llm_results._setting(llm_results._parser().parse_args([]))
    made = {"kept": {"gsm8k": 120, "instructions": 80}, "core_seconds": 100.0}  # of which a cell uses 128
    cost = runs._cost(cells.Cell(METHODS[name], 1.0, 1), tmp_path, made, of)
    assert cost == {"cell": 150.0, "training": 60.0, "samples": samples}


def test_what_is_not_run_is_shown(tmp_path):
    lines = tuned(SFT)
    lines |= {cell.name: line(cell) for cell in [cells.Cell(SFT, 4e-4, 1)]}
    text = show.tables(lines)
    (sft,) = [row for row in text.splitlines() if row.startswith(f"| {SFT.label} | 4e-4")]
    assert "| 1 of 3 | 4,096 | 50.0 |" in sft
    assert "| 350 |" in sft  # training, and the samples that it used
    jsd = [row for row in text.splitlines() if row.startswith(f"| {METHODS['jsd'].label}")]
    assert [row.count("not run") for row in jsd] == [len(show._HEAD) - 3, 3]
    show.plot(lines, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_tables_go_between_the_marks_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{show._BEGIN}\nold\n{show._END}\nbelow\n")
    show.into_page(page, "| new |")
    show.into_page(page, "| new |")
    assert page.read_text() == f"above\n{show._BEGIN}\n\n| new |\n\n{show._END}\nbelow\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the lines"):
        show.into_page(page, "")


def test_the_page_shows_the_lines_that_are_committed():
    """Where this fails: python tools/llm_results.py --show."""
    arguments = llm_results._parser().parse_args(["--model", "none", "--student", "none"])
    lines = llm_results._lines(arguments, llm_results._setting(arguments))
    assert f"{show._BEGIN}\n\n{show.tables(lines)}\n\n{show._END}" in arguments.page.read_text()
