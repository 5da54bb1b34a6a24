"""Environments in a config: what is refused, what a source takes from the run, and how long sequences may be."""

import copy

import pytest
from test_config import MINIMAL, problems_of

from megatron_opd import config as c
from megatron_opd.config import checks_environment
from megatron_opd.config import file as cfg
from megatron_opd.sglang import serve

TOOLS = {"name": "tools", "tools": ["calculator"]}


def tree_of(environment=TOOLS, *, source=None, **sections):
    """A valid tree with the run's environment, the first source's, and other settings of sections."""
    tree = copy.deepcopy(MINIMAL)
    tree["environment"] = environment
    tree["data"]["chat_template"] = "tokenizer"
    if source is not None:
        tree["data"]["train"][0]["environment"] = source
    for name, settings in sections.items():
        tree[name] = {**tree.get(name, {}), **settings}
    return tree


def graded(reward, **environment):
    tree = tree_of({"name": "none"})
    tree["data"]["train"][0] |= {"reward": reward, "environment": environment}
    return tree


REFUSED = {
    "no such name": (tree_of({"name": "tool"}), "environment.name: there is no environment 'tool'", "mean 'tools'?"),
    "a path that is none": (tree_of({"name": "my module:World"}), "environment.name: there is no", "as module:Class"),
    "the run's own": (tree_of({"name": "run"}), "environment.name: run is for a source", "none, tools"),
    "a source's without a name": (
        tree_of(source={"max_turns": 3}), "data.train.0.environment needs a name of its own", "name is none",
    ),
    "what a source does not take": (
        tree_of(source={"max_turns": 3}), "data.train.0.environment needs", "no setting from the run's environment",
    ),
    "code without the tool": (tree_of({**TOOLS, "calls": "python"}), "environment.calls: python is", "tool python"),
    "options within options": (
        tree_of({"name": "my:World", "options": {"top": {"a": 1}}}), "environment.options.top: Input should be", "",
    ),
    "a name alone": (tree_of("tools"), "environment: Input should be an object (got 'tools')", "each as name: value"),
    "one tool": (tree_of({**TOOLS, "tools": "python"}), "environment.tools: Input should", "write a list: [python]"),
    "no tools": (tree_of({"name": "tools"}), "environment.tools: at least one is needed", "calculator, python"),
    "no such tool": (
        tree_of({**TOOLS, "tools": ["python", "calculater"]}), "environment.tools.1: there is no tool", "'calculator'?",
    ),
    "twice the same": (tree_of({**TOOLS, "tools": ["python", "mine:python"]}), "two tools are called 'python'", ""),
    "tools of a class": (tree_of({"name": "my:World", "tools": ["python"]}), "environment.tools is for", "my:World"),
    "options of tools": (tree_of({**TOOLS, "options": {"a": 1}}), "environment.options are keyword arguments", ""),
    "an odd option": (tree_of({"name": "my:World", "options": {"a-b": 1}}), "environment.options: 'a-b'", ""),
    "a keyword": (tree_of({"name": "my:World", "options": {"class": 1}}), "environment.options: 'class'", ""),
    "no room": (tree_of({**TOOLS, "max_tokens": 128}), "environment.max_tokens (128) must be above", "(128)"),
    "no room at a source": (
        tree_of({"name": "none"}, source={**TOOLS, "max_tokens": 9}), "data.train.0.environment.max_tokens (9)", "128",
    ),
    "rewards of none": (graded("environment", name="none"), "data.train.0.reward: environment is", "one turn"),
    "rewards of tools": (graded("environment", **TOOLS), "data.train.0.reward: environment is", "gives no rewards"),
    "one name, two environments": (
        tree_of(data={"eval": [{"name": "math", "path": "p", "environment": {"name": "none"}}]}),
        "data.eval.0.environment: the source 'math' of data.train has another", "another name",
    ),
    "answers of the data": (tree_of(answers={"lmbda": 0.5}), "answers.lmbda (0.5) must be 1", "data.train"),
    "mixed answers": (tree_of(answers={"teacher_mixed_alpha": 0.2}), "answers.teacher_mixed_alpha must be 0", ""),
    "scales of all replicas": (
        tree_of(parallel={"data": 2}, student={"dtype": "bf16"},
                precision={"fp8": {"student": "full", "recipe": "delayed"}}),
        "precision.fp8.recipe: delayed compares", "tensorwise",
    ),
    "stages": (tree_of(parallel={"pipeline": 2}), "parallel.pipeline: an episode", "train.packing to true"),
    "stages and contexts": (
        tree_of(parallel={"pipeline": 2, "context": 2}), "parallel.pipeline: an episode", "micro_batch_size to 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tree", "begin", "within"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_work_is_refused(tree, begin, within):
    (problem,) = [problem for problem in problems_of(tree) if begin in problem]
    assert problem.startswith(begin) or ": two tools" in problem
    assert within in problem


ALLOWED = {
    "tools": tree_of({**TOOLS, "tools": ["calculator", "python", "my.tools:look_up"]}),
    "a class": tree_of({"name": "a.b:World", "options": {"size": 3, "name": "x"}}),
    "a source's own": tree_of({"name": "none"}, source=TOOLS),
    "none at a source": tree_of(source={"name": "none"}, parallel={"data": 2}),
    "rewards of a class": graded("environment", name="my:World"),
    "stages, packed": tree_of(parallel={"pipeline": 2}, train={"packing": True}),
    "stages, where nothing is written anew": tree_of(parallel={"pipeline": 2}, data={"chat_template": "none"}),
    "switched off, as the rest says nothing then": tree_of({**TOOLS, "name": "none"}),
}


@pytest.mark.parametrize("tree", ALLOWED.values(), ids=ALLOWED.keys())
def test_what_can_work_is_allowed(tree):
    cfg.from_dict(tree)


def test_a_source_has_its_own_environment_or_the_runs():
    made = cfg.from_dict(tree_of(source={"name": "my:World"}, data={"eval": [{"name": "a", "path": "p"}]}))
    assert made.environment_of(made.data.train[0]).name == "my:World"
    assert made.environment_of(made.data.eval[0]) == made.environment
    assert [e.name for e in made.environments] == ["my:World", "tools", "tools"]
    assert made.plays_episodes
    assert not cfg.from_dict(tree_of({"name": "none"})).environments


def test_settings_without_a_name_are_said():
    assert checks_environment.notes(c.EnvironmentConfig(tools=["python"]))
    assert not checks_environment.notes(c.EnvironmentConfig())
    assert not checks_environment.notes(c.EnvironmentConfig(name="tools", tools=["python"]))


def test_sequences_are_as_long_as_environments_allow():
    plain = cfg.from_dict(tree_of({"name": "none"}))
    assert (plain.longest, plain.longest_scored, plain.most_sampled) == (1024 + 128,) * 2 + (128,)
    made = cfg.from_dict(tree_of({**TOOLS, "max_tokens": 3000, "max_turns": 5}))
    assert (made.longest, made.longest_scored, made.most_sampled) == (3000, 3000, 640)
    short = cfg.from_dict(tree_of({**TOOLS, "max_tokens": 200, "max_turns": 5}))
    assert (short.longest, short.most_sampled) == (200, 199)
    mixed = cfg.from_dict(tree_of({**TOOLS, "max_tokens": 200, "max_turns": 1}, source={"name": "none"}))
    assert (mixed.longest, mixed.most_sampled) == (1152, 128)
    seen = tree_of({**TOOLS, "max_tokens": 3000})
    seen["teachers"][0]["system_prompt"] = "Be brief."
    assert cfg.from_dict(seen).longest_scored == 1024 + 2999


def test_servers_and_plans_have_room_for_them():
    tree = tree_of({**TOOLS, "max_tokens": 3000}, rollout={"engine": "sglang"})
    made = cfg.from_dict(tree)
    assert [its.longest for its in serve.needed(made)] == [3000 + serve.MARGIN]
    assert made.longest_response == 3000 - 1024


@pytest.mark.parametrize(
    "environment", [{**TOOLS, "name": "tool"}, {"name": "my:World", "options": {"a": [1]}}], ids=["name", "options"]
)
def test_a_fault_is_one_problem(environment):
    assert len(problems_of(tree_of(environment))) == 1


@pytest.mark.parametrize("own", [{}, {"name": "none"}, {**TOOLS, "max_turns": 3}])
def test_what_is_no_default_is_the_same_config_again(own):
    config = cfg.from_dict(tree_of(source=own) if own else tree_of())
    shown = cfg.not_defaults(config)
    assert shown["data"]["train"][0].get("environment", {}) == own
    assert cfg.from_dict(shown) == config
