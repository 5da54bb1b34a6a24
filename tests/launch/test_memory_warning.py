"""A run that may need more memory than there is says so before it starts, with a setting to change."""

import dataclasses
from pathlib import Path

import pytest
import tiny

from megatron_opd.__main__ import main
from megatron_opd.launch import local, memory_warning
from megatron_opd.planner.job import build


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tiny.build("llama"), tmp_path_factory.mktemp("models") / "student")


def job(model, max_prompt_tokens=64, **settings):
    settings = {"train": {"steps": 10, "micro_batch_size": 4}, "rollout": {"prompts_per_step": 16}, **settings}
    made = tiny.config(model, [{"name": "t", "model": model}], **settings)
    return build(dataclasses.replace(made, data=dataclasses.replace(made.data, max_prompt_tokens=max_prompt_tokens)))


def test_nothing_is_said_where_there_is_room(model):
    assert memory_warning.lines(job(model), 8, lambda: 1e12) == []


def test_the_plan_is_a_line_of_check(model, capsys):
    line = memory_warning.plan(job(model), 8, lambda: 2.5e9)
    assert line.startswith("plan: 1 rank on a machine, about ")
    assert "GB of host memory together, 2.5 GB are left here" in line
    assert float(line.split()[7]) == pytest.approx(memory_warning._need(job(model), 8).total / 1e9, abs=0.05)


def test_one_line_with_what_to_change(model):
    made = job(
        model, rollout={"prompts_per_step": 512, "max_new_tokens": 2048}, train={"steps": 1, "micro_batch_size": 64}
    )
    (line,) = memory_warning.lines(made, 8, lambda: 1e9)
    assert "\n" not in line
    assert line.startswith("warning: this run may need ")
    assert "1.0 GB are left here; most is activations (" in line
    assert "lower train.micro_batch_size (it is 64)" in line


def test_prompts_count_as_long_as_they_are(model):
    made = job(model, max_prompt_tokens=4096, train={"steps": 1, "micro_batch_size": 64})
    needs = []
    for longest in (4000, 8):
        (line,) = memory_warning.lines(made, longest, lambda: 1e6)
        needs.append(float(line.split()[5]))
    assert needs[0] > 2 * needs[1]


@pytest.mark.parametrize(
    ("part", "settings", "setting"),
    [
        ("loss", {"train": {"steps": 1, "micro_batch_size": 1}}, "student.recompute=full"),
        (
            "activations",
            {"train": {"steps": 1, "micro_batch_size": 1}, "student": {"recompute": "full"}},
            "max_new_tokens",
        ),
        ("engine cache", {}, "rollout.prompts_per_step"),
        ("teacher weights", {}, "teachers.0.dtype=bf16"),
        ("optimizer", {}, "lora.rank"),
        ("programs", {}, "parallel.data"),
        ("servers", {}, "rollout.servers.count"),
        ("prompts", {}, "data.train"),
    ],
)
def test_each_part_has_its_setting(model, part, settings, setting):
    assert setting in memory_warning.remedy(part, job(model, **settings))


@pytest.mark.parametrize("command", ["train", "launch", "check"])
def test_it_is_said_before_a_run_and_by_check(monkeypatch, capsys, tmp_path, command):
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(memory_warning, "lines", lambda *_: ["warning: too much"])
    monkeypatch.setattr(local, "launch", lambda *_, **__: 0)
    assert main([command, "examples/quickstart.yaml", f"run.dir={tmp_path}/run"]) == 0
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("warning: too much") == 1
