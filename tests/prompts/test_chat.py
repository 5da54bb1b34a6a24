"""Chat templates: the ids that transformers itself would give, and what is refused.

The tokenizer is a real one, of a word or special token an id, with a template like Qwen3's.
"""

import json
import re
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer as Words
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from megatron_opd.__main__ import main
from megatron_opd.config import DataConfig
from megatron_opd.models.tokenizer import Tokenizer
from megatron_opd.prompts.chat import build_encoder

ROOT = Path(__file__).resolve().parents[2]
ASSISTANT_BEGINS = """\
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false -%}
<think>

</think>

{% endif -%}
{%- endif -%}
"""
QWEN3_LIKE = (
    "{%- for message in messages -%}\n<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor -%}\n"
    + ASSISTANT_BEGINS
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + QWEN3_LIKE
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
ASKED = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1=?"}]


def tokenizer(template=QWEN3_LIKE):
    """One id for every character and special token; a BOS in front of what is not a template's."""
    characters = sorted(set("\n" + "".join(map(chr, range(32, 127)))))
    model = WordLevel({token: i for i, token in enumerate([*SPECIAL, *characters])}, unk_token="?")
    words = Words(model)
    words.pre_tokenizer = Split(pattern="", behavior="isolated")
    words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    hf = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL[2:]
    )
    hf.chat_template = template
    return Tokenizer(hf, (1,))


def encoder(template=QWEN3_LIKE, **settings):
    return build_encoder(DataConfig(train=[], **{"chat_template": "tokenizer", **settings}), tokenizer(template))


def ids(encoder, asked):
    (found,) = encoder.encode([encoder.render(asked)])
    return found


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}, {"enable_thinking": True}], ids=str)
@pytest.mark.parametrize("asked", [ASKED, ASKED[1:], [*ASKED, {"role": "assistant", "content": "2"}, ASKED[1]]])
def test_ids_are_those_of_the_tokenizers_own_template(asked, options):
    ours = encoder(chat_template_options=options)
    theirs = ours.tokenizer.hf.apply_chat_template(asked, add_generation_prompt=True, return_dict=False, **options)
    assert ids(ours, asked) == theirs


def test_text_of_a_rendered_prompt():
    ours = encoder(chat_template_options={"enable_thinking": False})
    expected = "<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert ours.render(ASKED[1:]) == ours.render("1+1=?") == expected
    assert ids(ours, "1+1=?")[:2] == [2, ours.tokenizer.hf.convert_tokens_to_ids("u")]  # no <s>: the template has none


def test_plain_prompts_are_as_before():
    plain = encoder(None, chat_template="none")
    assert plain.render("1+1") == "1+1"
    assert ids(plain, "1+1") == plain.tokenizer.encode("1+1")
    assert ids(plain, "1+1")[0] == 0  # <s>


def test_system_prompt_is_for_prompts_without_one():
    ours = encoder(system_prompt="be kind")
    assert ours.render("?").startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n?<|im_end|>\n")
    assert "be kind" not in ours.render(ASKED)
    assert ASKED[0]["content"] == "be brief"


def test_template_of_a_file(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}{{ ending }}")
    ours = encoder(None, chat_template=str(path), chat_template_options={"ending": "="})
    assert ours.render(ASKED) == "[be brief][1+1=?]="


@pytest.mark.parametrize(
    ("template", "settings", "wrong"),
    [
        (
            None,
            {},
            "data.chat_template: the tokenizer of student.model has no (default) chat template; give a template",
        ),
        ({"rag": "{{ messages }}"}, {}, "has no (default) chat template"),
        (QWEN3_LIKE, {"chat_template": "no/such.jinja"}, "data.chat_template is neither none nor tokenizer nor a file"),
        (
            QWEN3_LIKE,
            {"chat_template_options": {"enable_thinkng": 1}},
            "the chat template has no variable enable_thinkng",
        ),
        (
            QWEN3_LIKE,
            {"chat_template_options": {"add_generation_prompt": 0}},
            "add_generation_prompt cannot be set here",
        ),
        (QWEN3_LIKE, {"chat_template_options": {"messages": 0}}, "messages cannot be set here"),
        ("{% if %}", {}, "data.chat_template (tokenizer), tried with one message: the chat template refuses it: "),
        ("{{ 1 // 0 }}", {}, "refuses it: integer division or modulo by zero"),
        (NO_SYSTEM, {"system_prompt": "x"}, "refuses it: no system role; it may not take a data.system_prompt"),
    ],
)
def test_what_cannot_work_is_refused(template, settings, wrong):
    with pytest.raises(ValueError, match=re.escape(wrong)):
        encoder(template, **settings)


def test_a_template_may_refuse_a_conversation():
    with pytest.raises(ValueError, match=r"^the chat template refuses it: no system role$"):
        encoder(NO_SYSTEM).render(ASKED)


# The command line.

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}="


@pytest.fixture
def check(monkeypatch, capsys, tmp_path):
    """Runs `megatron-opd check` on the quickstart with only the given rows; returns exit code, stdout and stderr."""
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)

    def run(rows, *overrides):
        path = tmp_path / "p.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        only = [f"data.train=[{{name: sums, path: {path}}}]", "data.eval=[]", f"run.dir={tmp_path / 'run'}"]
        return main(["check", "examples/quickstart.yaml", *only, *overrides]), *capsys.readouterr()

    return run


def test_check_with_messages_and_a_template(check, tmp_path):
    code, out, err = check([{"messages": ASKED[1:]}], f"data.chat_template={tmp_path}/chat.jinja")
    assert (code, err) == (0, "")
    assert yaml.safe_load(out)["data"]["chat_template"] == f"{tmp_path}/chat.jinja"
    assert "# data.train: sums: 1 prompts\n" in out


@pytest.mark.parametrize(("long", "start"), [(1, "# data"), (2, "# warning: data")])
def test_check_tells_what_was_left_out(check, long, start):
    rows = [{"prompt": "1+1="}] * (10 - long) + [{"prompt": "1" * 20}] * long
    code, out, _ = check(rows, "data.on_too_long=drop", "data.max_prompt_tokens=9")
    assert code == 0
    assert f"# data.train: sums: {10 - long} prompts\n" in out
    left_out = f".train: sums: left out {long} of 10 prompts, longer than 9 tokens (data.max_prompt_tokens)\n"
    assert f"\n{start}{left_out}" in out


@pytest.mark.parametrize(
    ("overrides", "wrong"),
    [
        (
            ["data.chat_template=tokenizer"],
            ["data: data.chat_template: the tokenizer of student.model has no (default)"],
        ),
        (["data.system_prompt=x"], ["data.system_prompt has no effect without a template; set data.chat_template"]),
        (["teachers.1.system_prompt=x"], ["teachers.1.system_prompt has no effect without a template"]),
        (["data.chat_template_options={a: 1}"], ["data.chat_template_options has no effect without a template"]),
        (["data.chat_template="], ["data.chat_template must be none, tokenizer, or a file"]),
        (["data.chat_template=''"], ["data.chat_template must be none, tokenizer, or a file"]),
        (["data.train.0.split=test"], ["data.train.0: subset and split are for data sets of the hub (path hf:…)"]),
        (["data.train.0.answer_field=''"], ["data.train.0: prompt_field and answer_field must not be empty"]),
        (["data.on_too_long=cut"], ["data.on_too_long: Input should be 'error' or 'drop'"]),
        (["data.on_too_long=drop", "data.max_prompt_tokens=1"], ["all 1 prompts of", "are longer than 1 tokens"]),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(check, overrides, wrong):
    code, _, err = check([{"prompt": "1+1="}], *overrides)
    assert code == 1
    assert "Traceback" not in err
    assert all(fragment in err for fragment in wrong), err
