"""Prompts keep their messages where an environment adds others to them; so do those that teachers see."""

import copy
import datetime
import json
from dataclasses import replace

import pytest
from chat_templates import CALCULATOR, CHATML, LLAMA3, QWEN3, encoder, tokenizer
from test_conversation import USER, Talk, said, user

from megatron_opd.config import DataConfig, RewardsConfig, SourceConfig, TeacherConfig
from megatron_opd.prompts.chat import build_encoder
from megatron_opd.prompts.conversation import render_later
from megatron_opd.prompts.mix import Limit, read_prompts
from megatron_opd.prompts.views import RowReader, build_views
from megatron_opd.rewards import build_reward


def test_encoders_show_tools_and_take_the_tokenizers_template_for_them():
    ours = tokenizer(QWEN3)
    hf = copy.copy(ours.hf)
    hf.chat_template = {"default": CHATML, "tool_use": QWEN3}
    data = DataConfig(train=[], chat_template="tokenizer", system_prompt="Be brief.")
    for tools, template in (((CALCULATOR,), QWEN3), ((), CHATML)):
        built = build_encoder(data, replace(ours, hf=hf), tools=tools, is_continued=True)
        assert (built.template, built.tools, built.is_continued) == (template, tools, True)
        assert ("Computes." in built.render("?")) == bool(tools)
        assert built.messages("?") == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]


@pytest.mark.parametrize("is_continued", [False, True])
def test_rows_keep_their_messages_where_an_environment_adds_to_them(tmp_path, is_continued):
    path = tmp_path / "rows.jsonl"
    told = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1+1?"}]
    path.write_text("\n".join(map(json.dumps, [{"prompt": "1+1?", "answer": "2"}, {"messages": [*told, said("2")]}])))
    source = SourceConfig(name="a", path=str(path))
    ours = replace(encoder(CHATML), system_prompt="Be brief.", is_continued=is_continued)
    teacher = TeacherConfig(
        name="t", model="none", system_prompt="You know it.", prompt_template="{{ prompt }} {{ answer }}!"
    )
    limit = Limit(1000, "")
    rows = RowReader(encoder=ours, limit=limit, views=build_views([teacher], DataConfig(train=[source]), source, ours))
    reward = build_reward("none", RewardsConfig())
    prompts = read_prompts(source, ours, limit=limit, reward=reward, is_graded=False, complete=rows)
    seen = [prompt.messages for prompt in prompts], [prompt.teacher_messages for prompt in prompts]
    if not is_continued:
        assert seen == ([(), ()], [{}, {}])
        return
    brief = {"role": "system", "content": "Be brief."}
    assert seen[0] == [(brief, told[1]), tuple(told)]
    assert [one["t"][-1]["content"] for one in seen[1]] == ["1+1? 2!"] * 2
    assert {one["t"][0]["content"] for one in seen[1]} == {"You know it."}
    for prompt in prompts:
        assert prompt.token_ids == ids_of(ours, prompt.messages)
        assert prompt.teacher_ids["t"] == ids_of(ours, prompt.teacher_messages["t"])


def test_messages_that_cannot_be_kept_are_refused():
    dated = [{"role": "user", "content": "?", "sent": datetime.datetime(2026, 1, 1)}]
    assert encoder(CHATML).kept([USER]) == (USER,)
    with pytest.raises(ValueError, match="messages that an environment adds to must be JSON: Object of type datetime"):
        encoder(CHATML).kept(dated)
    assert replace(encoder(CHATML), is_continued=False).kept(dated) == ()


def ids_of(ours, messages):
    return tuple(ours.encode([ours.apply(messages, add_generation_prompt=True)])[0])


def test_a_teacher_with_messages_of_its_own_sees_the_later_ones_behind_them():
    talk = Talk(encoder(QWEN3), USER)
    more = talk.say("<think>\nSo.\n</think>\n\nIt is 408.", user("Sure?"))
    own = [{"role": "system", "content": "It is 408."}, USER]
    assert more.is_rewritten
    theirs = encoder(LLAMA3)
    for ours in (talk.ours, theirs):
        expected = [*own, said("<think>\nSo.\n</think>\n\nIt is 408."), user("Sure?")]
        assert render_later(ours, own, talk.talk) == ids_of(ours, expected)
