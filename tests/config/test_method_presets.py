"""Methods are files: what each has, who wins where a config says something else, and that examples are methods."""

import re

import pytest
import yaml
from program import ROOT
from test_config import MINIMAL, problems_of

from megatron_opd.__main__ import main
from megatron_opd.config import methods
from megatron_opd.config.file import ConfigError, changes, from_dict, load, read, to_dict
from megatron_opd.config.schema import adapter

NAMES = methods.names()
MORE_SAMPLES = {**MINIMAL, "rollout": {"samples_per_prompt": 8, "prompts_per_step": 16}}
EXAMPLES = [*sorted(ROOT.glob("examples/*.yaml")), *sorted(ROOT.glob("examples/cluster/*.yaml"))]
DIFFER = {
    # Short runs of tiny models: the weight falls within a dozen steps.
    "examples/kdrl.yaml": ["loss.weight: 0.005 -> 0.5", "loss.anneal: 2e-05 -> 0.02", "loss.weight_min: 0.001 -> 0.1"],
    "examples/cluster/minillm.yaml": ["answers.teacher_mixed_alpha: 0.2 -> 0.0"],  # which servers cannot do
    "examples/cluster/tinker.yaml": ["loss.kind: distribution -> sampled"],  # of a teacher that tells no more
    "examples/cluster/gold.yaml": ["loss.chunk_tokens: 1024 -> 128"],  # memory alone
    # Served teachers list their likeliest tokens, of which logits cannot be averaged.
    "examples/cluster/routed_teachers.yaml": ["loss.ensemble: logits -> probs"],
    "examples/cluster/opd_multi_teacher.yaml": ["loss.ensemble: logits -> probs"],
    "examples/plan.yaml": ["loss.ensemble: logits -> probs"],
}


def learnt(config):
    """What is minimised, and on whose answers."""
    return {name: to_dict(config)[name] for name in ("loss", "policy", "rl", "answers", "cross_tokenizer")}


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_what_it_is_and_explains_its_settings(name):
    what, source = methods.about(name)
    assert len(what) > 40
    assert what.endswith(".")
    assert "Source: " + source in methods.text(name)
    head, settings = re.fullmatch(r"((?:#.*\n)+)\n(.+)", methods.text(name), re.DOTALL).groups()
    assert len(head.splitlines()) >= 2
    lines = [line for line in settings.splitlines() if ": " in line]
    assert sum("#" in line for line in lines) > len(lines) / 2


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_one_line_of_a_config(name):
    config = from_dict({**MINIMAL, "method": name})
    assert config.method == name
    values = dict(leaves(to_dict(config)))
    own = {key: value for key, value in leaves(methods.preset(name)) if key != "teachers"}
    assert {key: values[key] for key in own} == own
    assert own
    assert from_dict(to_dict(config)) == config


def test_the_default_is_a_method_that_has_the_defaults():
    bare = adapter().validate_python(MINIMAL)
    assert bare.method == methods.DEFAULT
    assert from_dict(MINIMAL) == bare


def test_the_config_wins_over_the_method_and_the_command_line_over_both(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "method": "gkd", "loss": {"beta": 0.1}, "answers": {"lmbda": 0.9}}))
    config = load(path, ["answers.lmbda=0.7"])
    assert (config.loss.beta, config.answers.lmbda, config.rollout.temperature) == (0.1, 0.7, 0.9)
    other = load(path, ["method=forward_kl_offline", "answers.lmbda=0.7"])
    assert (other.loss.beta, other.answers.lmbda, other.rollout.temperature) == (0.1, 0.7, 1.0)


def test_lists_of_a_config_replace_those_of_the_method():
    config = from_dict({**MORE_SAMPLES, "method": "grpo"})
    assert [t.name for t in config.teachers] == ["a", "b"]
    without = {key: value for key, value in MORE_SAMPLES.items() if key != "teachers"}
    assert from_dict({**without, "method": "grpo"}).teachers == []


def test_an_unknown_method_is_answered_with_the_nearest(capsys):
    assert problems_of({**MINIMAL, "method": "gdk"}) == ["method: there is no method 'gdk'; did you mean gkd?"]
    (problem,) = problems_of({**MINIMAL, "method": 3})
    assert problem == f"method: there is no method '3'; known: {', '.join(NAMES)}"
    assert main(["methods", "min-llm"]) == 1
    assert "did you mean minillm?" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="did you mean grpo"):
        load(ROOT / "examples/quickstart.yaml", ["method=grppo"])


def test_the_command_lists_methods_and_prints_one(capsys):
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    lines = [line.strip() for line in listed.splitlines()]
    for name in NAMES:
        what, source = methods.about(name)
        assert lines[lines.index(f"{name:20} {what}") + 1] == source
    assert main(["methods", "gkd"]) == 0
    assert capsys.readouterr().out == (ROOT / "megatron_opd/methods/gkd.yaml").read_text()


def test_check_says_which_settings_are_the_methods(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = ["--settings-only", "loss.beta=0.4", "answers.lmbda=0.5"]
    assert main(["check", "examples/gkd.yaml", *settings]) == 0
    printed = capsys.readouterr().out
    assert "# method gkd\n" in printed
    own = "answers.lmbda: 0.5, answers.seq_kd: false, answers.sft_alpha: 0.0, rollout.temperature: 0.9"
    assert f"# from the method: {own}\n" in printed
    assert "# of the method, replaced here: loss.beta: 0.5\n" in printed


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_examples_are_their_method(path):
    """Models, data and lengths aside, an example is what its line `method` says, but for what is listed above."""
    name = path.relative_to(ROOT).as_posix()
    config = load(path)
    assert read(path)["method"] == (path.stem if path.stem in NAMES else "opd")
    tree = {**MORE_SAMPLES, "method": config.method, "teachers": to_dict(config)["teachers"]}
    tree["data"] = to_dict(config)["data"]
    tree["rollout"] = {"engine": config.rollout.engine, "samples_per_prompt": config.rollout.samples_per_prompt}
    bare = _without_checks(tree)
    assert changes(learnt(bare), learnt(config)) == DIFFER.get(name, [])


def _without_checks(tree):
    """A method's settings may not go with served teachers until the config has replaced some of them."""
    return adapter().validate_python(methods.overlaid(methods.preset(tree["method"]), tree))
