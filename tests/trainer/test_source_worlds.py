"""Environments of sources before a run: what is refused, what prompts keep, and how long they may be."""

import json
from pathlib import Path

import pytest

from megatron_opd.config.file import ConfigError, load
from megatron_opd.core.environment import Reply
from megatron_opd.trainer import preflight

CONFIG = Path(__file__).resolve().parents[2] / "examples/quickstart.yaml"
HERE = "test_source_worlds"


class Guess:
    """Says whether a guess is too low; its rows have the number."""

    fields = ("number",)
    note = "guesses are told apart by their first digit"

    async def start(self, prompt):
        self.number = prompt.extra["number"]

    async def answer(self, turn):
        return Reply(messages=[{"role": "user", "content": "no"}])

    async def close(self):
        pass

    @staticmethod
    def check(prompt):
        if "number" not in prompt.extra:
            raise ValueError("the number is missing")


class NotOne:
    pass


@pytest.fixture
def read(tmp_path, monkeypatch):
    """The inputs of the quickstart with other rows of its training source, and other settings."""
    monkeypatch.chdir(CONFIG.parents[1])

    def inputs(rows, *overrides):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"prompt": "1+1=", "answer": "2", **row}) + "\n" for row in rows))
        train = f"data.train=[{{name: add, path: {path}, reward: none}}]"
        return preflight.read_inputs(load(CONFIG, [train, "data.eval=[]", "rewards.watch=false", *overrides]))

    return inputs


def problems_of(read, rows, *overrides):
    with pytest.raises(ConfigError) as caught:
        read(rows, *overrides)
    return caught.value.problems


GUESS = (f"environment.name={HERE}:Guess", "environment.max_tokens=40")


def test_prompts_keep_messages_and_the_fields_of_the_environment(read):
    found = read([{"number": 7, "other": 1}], *GUESS)
    (_, (prompt,)) = found.train[0]
    assert prompt.extra == {"number": 7}
    assert [dict(message) for message in prompt.messages] == [{"role": "user", "content": "1+1="}]
    shown = f"environment {GUESS[0].partition('=')[2]}: no tools in the prompts; calls are not looked for; at most"
    assert found.notes[-2:] == (f"{shown} 8 turns and 40 tokens", Guess.note)
    (_, (plain,)) = read([{"number": 7}]).train[0]
    assert (plain.extra, plain.messages) == ({}, ())
    assert plain.token_ids == prompt.token_ids


def test_the_tools_and_the_form_of_calls_are_told(monkeypatch):
    monkeypatch.chdir(CONFIG.parents[1])
    notes = preflight.read_inputs(load("examples/tools.yaml")).notes
    assert "environment tools: tools calculator; calls in the form hermes; at most 3 turns and 256 tokens" in notes
    assert "warning" not in "".join(notes)
    unlike = ["environment.calls=llama3", "environment.max_turns=1"]
    notes = "\n".join(preflight.read_inputs(load("examples/tools.yaml", unlike)).notes)
    assert "tools calculator; calls in the form llama3; at most 1 turn and 256 tokens" in notes
    assert "warning: environment.calls is llama3, and the chat template shows calls in the form hermes" in notes
    assert "warning: environment.max_turns is 1" in notes


def test_rows_without_what_the_environment_needs_are_named(read):
    (problem,) = problems_of(read, [{"number": 7}, {}], *GUESS)
    assert problem.endswith("line 2: the number is missing")


def test_an_environment_that_cannot_be_had_is_said_once(read):
    name = f"environment.name={HERE}:NotOne"
    two = "data.eval=[{name: more, path: examples/quickstart/data/add.eval.jsonl}]"
    (problem,) = problems_of(read, [{}], name, two)
    assert problem.startswith(f"environment: environment '{HERE}:NotOne' has no method start")
    own = "data.train.0.environment={name: no_such_module_here:X}"
    (problem,) = problems_of(read, [{}], own)
    assert problem.startswith("data.train.0.environment: environment 'no_such_module_here:X': no_such_module_here")


def test_a_prompt_leaves_room_for_a_turn(read):
    (problem,) = problems_of(read, [{"number": 1, "prompt": "1" * 33}], *GUESS)
    assert problem.endswith("the limit is 32 (environment.max_tokens of 40 less rollout.max_new_tokens)")
    read([{"number": 1, "prompt": "1" * 32}], *GUESS)


def test_a_teachers_own_prompt_leaves_room_for_a_trajectory(read):
    own = 'teachers.0.prompt_template="{{ prompt }}"'
    (problem,) = problems_of(read, [{"number": 1, "prompt": "1" * 26}], *GUESS, own)
    assert "the limit is 25 (the models' context of 64 tokens less environment.max_tokens" in problem
    read([{"number": 1, "prompt": "1" * 25}], *GUESS, own)


def test_an_environment_that_the_context_ends_is_said(read):
    found = read([{"number": 1}], GUESS[0])
    assert "environment.max_tokens (4096) is more than the 64 tokens that the models" in "".join(found.notes)
    off = read([{}], "environment.tools=[calculator]")
    assert "environment.name is none" in "".join(off.notes)


def test_tools_without_a_template_need_a_form_and_are_not_shown(read):
    tools = ("environment.name=tools", "environment.tools=[calculator]")
    (problem,) = problems_of(read, [{}], *tools)
    assert problem.startswith("environment: environment.calls: auto cannot tell")
    found = read([{}], *tools, "environment.calls=hermes", "environment.max_tokens=40")
    assert found.notes[-1].startswith("warning: data.chat_template is none, so prompts do not show the tools")
