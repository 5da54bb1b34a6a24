"""Rows as tokens: the answers of a data set as the student would say them, and the prompts that teachers see."""

import json
from dataclasses import replace

import pytest
import test_chat
from tokenizers import Tokenizer as Words
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from megatron_opd import config as c
from megatron_opd.core.types import Prompt
from megatron_opd.models.tokenizer import Tokenizer
from megatron_opd.prompts.chat import Encoder
from megatron_opd.prompts.mix import Limit, read_prompts
from megatron_opd.prompts.store import PackedPrompts
from megatron_opd.prompts.views import build_row_reader, build_views
from megatron_opd.rewards.exact import REWARD

IM_END = 3
"""<|im_end|> of the tokenizer of test_chat, which knows </s> (1) too."""


def chat(template=test_chat.QWEN3_LIKE, eos_ids=(1, IM_END), **settings):
    made = test_chat.encoder(template, **settings)
    return replace(made, tokenizer=Tokenizer(made.tokenizer.hf, eos_ids))


def plain():
    return Encoder(test_chat.tokenizer())


def config(teachers=(), *, max_new_tokens=50, **answers):
    return c.Config(
        run=c.RunConfig(dir="unused"),
        student=c.StudentConfig(model="s"),
        teachers=[c.TeacherConfig(**{"model": "t", **teacher}) for teacher in teachers],
        rollout=c.RolloutConfig(max_new_tokens=max_new_tokens),
        answers=c.AnswersConfig(**answers),
        data=c.DataConfig(train=[]),
        train=c.TrainConfig(steps=1),
    )


def read(tmp_path, rows, encoder, settings, *, limit=None, is_trained_on=True):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = c.SourceConfig(name="a", path=str(path))
    limit = limit or Limit(1000, "data.max_prompt_tokens")
    complete = build_row_reader(
        build_views(settings.teachers, settings.data, source, encoder), encoder, limit=limit, answers=settings.answers,
        max_answer_tokens=settings.rollout.max_new_tokens, is_trained_on=is_trained_on,
        is_measured=settings.train.eval_nll and not is_trained_on,
    )  # fmt: skip
    return read_prompts(source, encoder, limit=limit, reward=REWARD, is_graded=False, complete=complete)


def text(encoder, ids):
    return encoder.tokenizer.hf.decode(list(ids), skip_special_tokens=False).replace(" ", "")


OFF_POLICY = {"lmbda": 0.5, "sft_alpha": 1.0}
ROW = {"prompt": "1+1=", "answer": "42"}


@pytest.mark.parametrize("settings", [{}, {"lmbda": 0.5, "seq_kd": True}])
def test_answers_are_not_tokenized_where_nobody_trains_on_them(tmp_path, settings):
    (prompt,) = read(tmp_path, [ROW], plain(), config(**settings))
    assert prompt.answer_ids == ()
    (prompt,) = read(tmp_path, [ROW], plain(), config(**OFF_POLICY), is_trained_on=False)
    assert prompt.answer_ids == ()


def test_a_plain_answer_ends_with_the_end_of_sequence_and_has_no_second_bos(tmp_path):
    ours = plain()
    (prompt,) = read(tmp_path, [ROW], ours, config(**OFF_POLICY))
    assert prompt.token_ids[0] == 0  # <s>
    assert prompt.answer_ids == (*ours.tokenizer.hf.convert_tokens_to_ids(["4", "2"]), 1)


def test_an_answer_through_a_chat_template_is_the_turn_up_to_its_end(tmp_path):
    ours = chat()
    messages = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "42"}]
    for row in (ROW | {"prompt": "1+1=?"}, {"messages": messages}):
        (prompt,) = read(tmp_path, [row], ours, config(**OFF_POLICY))
        assert text(ours, prompt.answer_ids) == "42<|im_end|>"
        whole = ours.tokenizer.hf.apply_chat_template(messages, return_dict=False)
        both = [*prompt.token_ids, *prompt.answer_ids]
        assert both == whole[: len(both)]


def test_a_template_whose_turn_never_ends_for_the_student(tmp_path):
    """The turn's own end is no end of sequence: the answer still has one, behind it."""
    ours = chat(eos_ids=(1,))
    (prompt,) = read(tmp_path, [ROW], ours, config(**OFF_POLICY))
    assert text(ours, prompt.answer_ids) == "42<|im_end|>\n</s>"


def test_a_template_that_opens_past_turns_differently(tmp_path):
    """Without thinking the model finds an empty thought opened, which turns of the past do not have."""
    ours = chat(chat_template_options={"enable_thinking": False})
    (prompt,) = read(tmp_path, [ROW], ours, config(**OFF_POLICY))
    assert text(ours, prompt.token_ids).endswith("</think>\n\n")
    assert text(ours, prompt.answer_ids) == "42<|im_end|>"


def test_a_template_that_hides_the_answer(tmp_path):
    asked = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    hides = asked + "{{ '>' if add_generation_prompt else '' }}"
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: the chat template changes the answer"):
        read(tmp_path, [ROW], chat(hides), config(**OFF_POLICY))


def test_tokens_that_would_join_prompt_and_answer_do_not(tmp_path):
    """A merge over the border never happens to a student that is given the prompt's tokens."""
    model = BPE(vocab={"</s>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")])
    hf = PreTrainedTokenizerFast(tokenizer_object=Words(model), eos_token="</s>")
    ours = Encoder(Tokenizer(hf, (0,)))
    joined, alone = read(
        tmp_path, [{"prompt": "a", "answer": "b"}, {"prompt": "b", "answer": "ab"}], ours, config(**OFF_POLICY)
    )
    assert (joined.token_ids, joined.answer_ids) == ((1,), (2, 0))
    assert (alone.token_ids, alone.answer_ids) == ((2,), (3, 0))


def test_an_answer_that_names_its_end_stops_there(tmp_path):
    ours = plain()
    (prompt,) = read(tmp_path, [{"prompt": "?", "answer": "4</s>2"}], ours, config(**OFF_POLICY))
    assert text(ours, prompt.answer_ids) == "4</s>"


def test_an_answer_that_is_too_long(tmp_path):
    rows = [ROW, {"prompt": "?", "answer": "123"}]
    with pytest.raises(ValueError, match=r"line 2: the answer has 4 tokens .* more than rollout.max_new_tokens \(3\)"):
        read(tmp_path, rows, plain(), config(max_new_tokens=3, **OFF_POLICY))
    ours = plain()
    short, long = read(tmp_path, rows, ours, config(max_new_tokens=3, on_too_long="cut", **OFF_POLICY))
    assert [text(ours, p.answer_ids) for p in (short, long)] == ["42</s>", "123"]


def test_answers_that_are_only_measured_are_cut_and_may_be_missing(tmp_path):
    settings = config(max_new_tokens=3)
    settings = replace(settings, train=replace(settings.train, eval_nll=True))
    rows, ours = [ROW, {"prompt": "?", "answer": "123"}, {"prompt": "?"}], plain()
    found = read(tmp_path, rows, ours, settings, is_trained_on=False)
    assert [text(ours, p.answer_ids) for p in found] == ["42</s>", "123", ""]
    (nothing,) = read(tmp_path, rows[2:], ours, settings, is_trained_on=False)
    assert nothing.answer_ids == ()
    assert [p.answer_ids for p in read(tmp_path, rows, ours, settings)] == [(), (), ()]  # those are of training prompts


@pytest.mark.parametrize("answer", [None, 42])
def test_a_row_without_an_answer(tmp_path, answer):
    with pytest.raises(ValueError, match=r"line 2: answers of the data set are trained on \(answers\.lmbda\)"):
        read(tmp_path, [ROW, {"prompt": "?", "answer": answer}], plain(), config(**OFF_POLICY))


# What teachers see.


def test_a_teachers_prompt_from_a_field_of_the_row(tmp_path):
    ours = plain()
    teachers = [{"name": "t", "prompt_field": "hints.long"}, {"name": "u"}]
    (prompt,) = read(tmp_path, [ROW | {"hints": {"long": "1+1=2,"}}], ours, config(teachers), is_trained_on=False)
    assert list(prompt.teacher_ids) == ["t"]
    assert prompt.teacher_ids["t"] == tuple(ours.tokenizer.encode("1+1=2,"))
    assert prompt.token_ids == tuple(ours.tokenizer.encode("1+1="))


def test_a_teachers_prompt_goes_through_the_chat_template(tmp_path):
    ours = chat(system_prompt="be kind")
    messages = [{"role": "user", "content": "so?"}, {"role": "assistant", "content": "no"}]
    (prompt,) = read(tmp_path, [ROW | {"hint": messages}], ours, config([{"name": "t", "prompt_field": "hint"}]))
    expected = ours.encode([ours.render(messages[:1])])[0]
    assert prompt.teacher_ids["t"] == tuple(expected)
    assert "bekind" in text(ours, expected)


def test_a_teachers_prompt_from_a_template(tmp_path):
    ours = plain()
    template = "{{ hint }} {{ prompt }}{{ answer }};{{ prompt }}"
    (prompt,) = read(tmp_path, [ROW | {"hint": "hm"}], ours, config([{"name": "t", "prompt_template": template}]))
    assert prompt.teacher_ids["t"] == tuple(ours.tokenizer.encode("hm 1+1=42;1+1="))


def test_a_template_stands_in_place_of_the_last_message(tmp_path):
    ours = chat()
    system, user = {"role": "system", "content": "brief"}, {"role": "user", "content": "1+1=?"}
    settings = config([{"name": "t", "prompt_template": "{{ prompt }} ({{ answer }})"}])
    (prompt,) = read(tmp_path, [{"messages": [system, user], "answer": "2"}], ours, settings)
    expected = ours.render([system, {"role": "user", "content": "1+1=? (2)"}])
    assert prompt.teacher_ids["t"] == tuple(ours.encode([expected])[0])


@pytest.mark.parametrize("own", [[], [{"role": "system", "content": "brief"}], [{"role": "developer", "content": "b"}]])
@pytest.mark.parametrize("template", ["", "{{ prompt }} ({{ answer }})"])
def test_a_teachers_system_prompt_stands_in_place_of_any_other(tmp_path, own, template):
    ours, user = chat(system_prompt="be kind"), {"role": "user", "content": "1+1=?"}
    settings = config([{"name": "t", "system_prompt": "you know: 2", "prompt_template": template}, {"name": "u"}])
    (prompt,) = read(tmp_path, [{"messages": [*own, user], "answer": "2"}], ours, settings)
    asked = "1+1=? (2)" if template else "1+1=?"
    expected = ours.render([{"role": "system", "content": "you know: 2"}, {"role": "user", "content": asked}])
    assert prompt.teacher_ids == {"t": tuple(ours.encode([expected])[0])}
    assert prompt.token_ids == tuple(ours.encode([ours.render([*own, user])])[0])


def test_a_teachers_system_prompt_of_a_prompt_that_is_a_text(tmp_path):
    ours = chat()
    (prompt,) = read(tmp_path, [ROW], ours, config([{"name": "t", "system_prompt": "hm"}]))
    expected = ours.render([{"role": "system", "content": "hm"}, {"role": "user", "content": "1+1="}])
    assert prompt.teacher_ids["t"] == tuple(ours.encode([expected])[0])


def test_a_template_that_takes_no_system_prompt_is_said_before_any_row(tmp_path):
    wrong = "the system_prompt of teacher 't', tried with one message: the chat template refuses it: no system role"
    with pytest.raises(ValueError, match=wrong):
        read(tmp_path, [], chat(test_chat.NO_SYSTEM), config([{"name": "t", "system_prompt": "x"}]))


@pytest.mark.parametrize(
    ("settings", "row", "wrong"),
    [
        ({"prompt_field": "hint"}, {}, "line 1: the prompt that teacher 't' sees is empty"),
        ({"prompt_field": "hint"}, {"hint": 7}, "line 1: teacher 't' needs a text or messages in the field \"hint\""),
        ({"prompt_field": "hint"}, {"hint": " "}, "line 1: the prompt that teacher 't' sees is empty"),
        ({"prompt_template": "{{ hint }}"}, {}, "line 1: the prompt_template of teacher 't': 'hint' is undefined"),
        ({"prompt_template": "{{ answer }}"}, {"answer": None}, "line 1: .* 'answer' is undefined"),
        ({"prompt_template": "{{ ''.__class__ }}"}, {}, "line 1: the prompt_template of teacher 't'"),
    ],
)
def test_a_row_that_lacks_what_a_teacher_sees(tmp_path, settings, row, wrong):
    with pytest.raises(ValueError, match=wrong):
        read(tmp_path, [ROW | row], plain(), config([{"name": "t", **settings}]))


def test_a_teacher_that_is_never_asked_about_a_source_needs_nothing_of_it(tmp_path):
    teachers = [{"name": "t", "prompt_field": "hint", "sources": {"a": 0}}, {"name": "u"}]
    (prompt,) = read(tmp_path, [ROW], plain(), config(teachers))
    assert prompt.teacher_ids == {}


def test_the_limit_holds_for_teachers_too(tmp_path):
    rows = [ROW | {"hint": "123456789"}, ROW | {"hint": "1"}]
    settings = config([{"name": "t", "prompt_field": "hint"}])
    with pytest.raises(ValueError, match=r"line 1: teacher 't' sees a prompt of 10 tokens.* the limit is 6 \(why\)"):
        read(tmp_path, rows, plain(), settings, limit=Limit(6, "why"))
    kept = read(tmp_path, rows, plain(), settings, limit=Limit(6, "why", drop=True))
    assert [p.index for p in kept] == [1]
    assert kept.dropped == 1


def test_packed_prompts_give_back_what_they_got():
    packed = PackedPrompts("a")
    made = [
        Prompt(source="a", index=0, text="x", token_ids=(1, 2), answer="y", answer_ids=(3, 4), teacher_ids={"t": (5,)}),
        Prompt(source="a", index=1, text="x", token_ids=(1,)),
    ]
    for prompt in made:
        packed.append(prompt)
    assert packed[:] == made
    assert len({*packed}) == 2  # hashable, as servers' scorers need them


@pytest.mark.parametrize(
    ("teacher", "row", "wrong"),
    [
        ({"prompt_field": "hint"}, {"hint": "\ud800"}, "surrogates not allowed"),
        ({"prompt_template": "{{ hint }}"}, {"hint": "\ud800"}, "surrogates not allowed"),
        ({"prompt_template": "{{ hint + prompt }}"}, {"hint": 3}, "teacher 't': unsupported operand"),
        ({"prompt_template": "{{ 1 // hint }}"}, {"hint": 0}, "teacher 't': integer division"),
        ({}, {"answer": "\ud800"}, "surrogates not allowed"),
    ],
)
def test_what_is_no_text_names_its_line(tmp_path, teacher, row, wrong):
    settings = config([{"name": "t", **teacher}], **OFF_POLICY)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 1: .*{wrong}"):
        read(tmp_path, [{**ROW, **row}], plain(), settings)


def test_thought_and_calls_of_the_last_message_are_learnt(tmp_path):
    import test_turns

    ours, settings = chat(test_turns.QWEN3), config(max_new_tokens=99, **OFF_POLICY)
    asked, called = {"role": "user", "content": "ox?"}, {"name": "look_up", "arguments": {}}
    answer = {"role": "assistant", "content": "Soon.", "reasoning_content": "hm", "tool_calls": [called]}
    (prompt,) = read(tmp_path, [{"messages": [asked, answer]}], ours, settings)
    assert text(ours, prompt.answer_ids).startswith("<think>\nhm\n</think>\n\nSoon.<tool_call>")
    assert text(ours, prompt.answer_ids).endswith("<|im_end|>")
    assert prompt.answer == "Soon."
    (other,) = read(tmp_path, [{"messages": [asked, answer], "answer": "No."}], ours, settings)
    assert text(ours, other.answer_ids) == "<think>\n\n</think>\n\nNo.<|im_end|>"  # the row's own answer stands alone
