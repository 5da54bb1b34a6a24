"""The examples are what `check` accepts, here and in their cluster form, and begin with how to run them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opd.__main__ import main
from megatron_opd.config.file import load, to_dict
from megatron_opd.launch.local import plan
from megatron_opd.launch.slurm.layout import idle_gpus, num_nodes, place

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.name for path in ROOT.glob("examples/*.yaml"))
CLUSTER = sorted(path.name for path in ROOT.glob("examples/cluster/*.yaml"))
METHODS = sorted({*EXAMPLES} - {"quickstart.yaml", "plan.yaml"})
"""Named after a method, or after what it adds to one."""
IN_A_CLUSTER = {"tools.yaml": "tools_math.yaml"}
"""Cluster forms that have other names, because they are about other tasks."""
SIZES = {
    "Llama-3.1-8B-Instruct": "llama-8b",
    "Llama-3.1-70B-Instruct": "llama-70b",
    "Qwen3-0.6B": "qwen3-0.6b",
    "Qwen3-8B": "qwen3-8b",
    "Qwen3-30B-A3B": "qwen3-30b-a3b",
    # Whose weights are the user's: a model of that size.
    "student": "qwen3-8b",
    "teacher-general": "llama-70b",
    "teacher-math": "qwen3-30b-a3b",
    "teacher-code": "qwen3-30b-a3b",
}
"""By the name of a model's directory, the config.json of tests/model_configs that says how large it is."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_check_accepts_it(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    settings = [f"run.dir={tmp_path / 'run'}"]
    if name == "gold.yaml":  # its first line makes its teachers
        subprocess.run(
            [sys.executable, "examples/cross_tokenizer/relabel.py", "--out", tmp_path], check=True, timeout=120
        )
        settings += [f"teachers.0.model={tmp_path}/teacher_carry", f"teachers.1.model={tmp_path}/teacher_compare"]
    if name == "plan.yaml":  # whose models are not here
        settings.append("--settings-only")
    assert main(["check", f"examples/{name}", *settings]) == 0
    assert "trainer: " in capsys.readouterr().out


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_first_lines_say_how_to_run_it_and_what_to_expect(name):
    head = re.match(r"(?:#.*\n)+", (ROOT / "examples" / name).read_text())[0]
    assert f"examples/{name}" in head or "make quickstart" in head
    assert "Expected" in head
    assert re.search(r"rank|GPU|CPU", head)


def test_every_method_has_a_cluster_form():
    assert {IN_A_CLUSTER.get(name, name) for name in METHODS} <= {*CLUSTER}


@pytest.mark.parametrize("name", CLUSTER)
def test_check_accepts_the_cluster_form(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["check", f"examples/cluster/{name}", "--settings-only"]) == 0
    assert "trainer: " in capsys.readouterr().out


@pytest.mark.parametrize("name", CLUSTER)
def test_the_cluster_form_fits_on_gpus_of_80_gb(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    path = f"examples/cluster/{name}"
    config = load(path)
    models = {f"teachers.{i}.model": teacher.model for i, teacher in enumerate(config.teachers)}
    models["student.model"] = config.student.model
    sizes = [f"{setting}=tests/model_configs/{SIZES[Path(model).name]}" for setting, model in models.items()]
    planned = ["check", path, "--plan", "--gpu", "H100", *sizes]
    assert main(planned) == 0, capsys.readouterr().out
    assert main([*planned, "rollout.max_new_tokens=30000"]) == 1  # it can say no


@pytest.mark.parametrize("name", METHODS)
def test_the_job_of_the_cluster_form_fills_the_nodes_that_it_names(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = f"examples/cluster/{IN_A_CLUSTER.get(name, name)}"
    head = re.match(r"(?:#.*\n)+", Path(path).read_text())[0]
    assert head.startswith(f"# megatron-opd launch {path} --slurm\n")
    steps = place(plan(load(path), [path]), [path], gpus_per_node=8)
    assert idle_gpus(steps, 8) == {}
    said = re.search(r"(\d+) nodes? of 8\s+(?:# )?GPUs", head)
    assert int(said[1]) == num_nodes(steps)


@pytest.mark.parametrize("name", METHODS)
def test_the_cluster_form_is_the_same_method(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    here, there = (_method(load(f"examples/{path}")) for path in (name, f"cluster/{IN_A_CLUSTER.get(name, name)}"))
    assert here == there


def _method(config):
    """What is learnt, and on whose answers; weights and lengths are a run's own."""
    tree = to_dict(config)
    tree["answers"].pop("teacher_mixed_alpha")  # which servers cannot do
    found = {section: tree[section] for section in ("answers", "policy", "rl", "cross_tokenizer")}
    sees_more = any(t.has_own_prompt for t in config.teachers)
    answered_by = config.environment.name
    return found, config.loss.beta, config.loss.weight > 0, config.train.minibatches, sees_more, answered_by
