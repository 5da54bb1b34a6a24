"""Sources as prompts, and the stream of them: its mixture, its epochs, how it goes on from a saved state."""

import gzip
import json
import pickle
import re
import sys
import tracemalloc
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest

from megatron_opd.config import SourceConfig
from megatron_opd.core.types import Prompt
from megatron_opd.models.tokenizer import Tokenizer
from megatron_opd.prompts.chat import Encoder
from megatron_opd.prompts.mix import Limit, PromptMix, read_prompts
from megatron_opd.prompts.store import PackedPrompts
from megatron_opd.rewards.exact import REWARD


def source(name, size, weight=1.0):
    prompts = [Prompt(source=name, index=i, text=f"{name}{i}", token_ids=(i,), answer=None) for i in range(size)]
    return SourceConfig(name=name, path=f"{name}.jsonl", weight=weight), prompts


def texts(prompts):
    return [p.text for p in prompts]


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 2, 4), (0.1, 0.7, 0.2), (5, 1, 1, 1), (1,)])
def test_every_prefix_follows_the_weights(weights):
    mix = PromptMix([source(f"s{i}", 7 + i, weight) for i, weight in enumerate(weights)], seed=1)
    given = Counter()
    for count in range(1, 201):
        (prompt,) = mix.next(1)
        given[prompt.source] += 1
        for i, weight in enumerate(weights):
            assert abs(given[f"s{i}"] - count * weight / sum(weights)) < 1


def test_epochs_are_different_permutations():
    mix = PromptMix([source("a", 20), source("b", 3)], seed=1)
    of_a = [p.index for p in mix.next(160) if p.source == "a"]
    epochs = [of_a[i : i + 20] for i in range(0, 80, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert all(one != other for one, other in pairwise(epochs))


def test_the_stream_depends_on_the_seed_alone():
    def stream(seed, *sizes):
        mix = PromptMix([source("a", 20), source("b", 9, weight=2)], seed=seed)
        return [text for size in sizes for text in texts(mix.next(size))]

    assert stream(1, 90) == stream(1, 30, 30, 30) == stream(1, 1, 89)
    assert stream(1, 90) != stream(2, 90)


@pytest.mark.parametrize("before", [0, 1, 19, 20, 21, 57])
def test_state_continues_exactly(before):
    sources = [source("a", 20), source("b", 9, weight=2)]
    whole, first, second = (PromptMix(sources, seed=1) for _ in range(3))
    expected = texts(whole.next(before + 60))
    first.next(before)
    second.load_state(first.state())
    assert texts(second.next(60)) == expected[before:]


def test_state_with_sources_that_came_and_went():
    mix = PromptMix([source("a", 5), source("b", 5)], seed=1)
    mix.load_state({"a": 4, "gone": 9})
    assert mix.state() == {"a": 4, "b": 0}
    assert [p.source for p in mix.next(4)] == ["b"] * 4  # until it has caught up


def test_rows_that_come_again_in_a_step_say_so():
    """In that step alone, which begins anew with every call and after a resume."""
    mix, resumed = (PromptMix([source("a", 3), source("b", 100)], seed=1) for _ in range(2))
    for size in (14, 6, 2, 17):
        resumed.load_state(mix.state())
        step, before = mix.next(size), Counter()
        assert step == resumed.next(size)
        for prompt in step:
            assert prompt.repeat == before[prompt.text]
            before[prompt.text] += 1
    assert max(before.values()) > 2
    assert {p.repeat for p in step if p.source == "b"} == {0}


def test_order_within_a_source_does_not_depend_on_the_others():
    alone = texts(PromptMix([source("a", 20)], seed=1).next(20))
    together = PromptMix([source("z", 3), source("a", 20)], seed=1).next(40)
    assert [p.text for p in together if p.source == "a"] == alone


# Reading. What a row may look like is the same for all formats; ids are the bytes of the text here.

USER, ASSISTANT = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}


class Chatting(SimpleNamespace):
    """A stand-in for a tokenizer: messages are "u:1+1 a:2", ids are bytes."""

    def apply_chat_template(self, messages, **_):
        return " ".join(f"{message['role'][0]}:{message['content']}" for message in messages)

    def __call__(self, texts, **_):
        return {"input_ids": [list(text.encode()) for text in texts]}


CHAT = Encoder(Tokenizer(Chatting(), (2,)), template="the stand-in's")
BYTES = Encoder(CHAT.tokenizer)


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def read(path, encoder=BYTES, *, limit=99, drop=False, is_graded=False, **settings):
    settings = {"name": "n", "path": str(path), **settings}
    within = Limit(limit, "it", drop=drop)
    return read_prompts(SourceConfig(**settings), encoder, limit=within, reward=REWARD, is_graded=is_graded)


def test_reading_keeps_order_and_numbers_lines(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one", "answer": "1", "more": [1]}\n\n{"prompt": "zwei ü"}')
    prompts = read(path, limit=9)
    assert [(p.source, p.index, p.text, p.answer) for p in prompts] == [("n", 0, "one", "1"), ("n", 2, "zwei ü", None)]
    assert prompts[0].token_ids == tuple(b"one")


ROWS = [{"prompt": "one", "answer": "1"}, {"prompt": "zwei ü", "answer": None}, {"prompt": "三", "answer": "3"}]


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "array.json", "p.jsonl.gz", "p.parquet"])
def test_every_format_gives_the_same_prompts(tmp_path, name):
    path = tmp_path / name
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    if name == "array.json":
        path.write_text("\n " + json.dumps(ROWS, indent=1))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(ROWS), path, row_group_size=2)
    else:
        path.write_text(lines)
    expected = [
        Prompt(source="n", index=i, text=row["prompt"], token_ids=tuple(row["prompt"].encode()), answer=row["answer"])
        for i, row in enumerate(ROWS)
    ]
    assert list(read(path)) == expected


@pytest.mark.parametrize("name", ["p.jsonl", "array.json", "p.jsonl.gz"])
def test_the_first_rows_alone(tmp_path, name):
    lines, path = "".join(json.dumps(row) + "\n" for row in ROWS), tmp_path / name
    whole = json.dumps(ROWS) if name == "array.json" else lines
    path.write_bytes(gzip.compress(whole.encode()) if name.endswith(".gz") else whole.encode())
    assert texts(read(path, rows=2)) == ["one", "zwei ü"]
    assert len(read(path, rows=0)) == len(read(path, rows=9)) == 3


def test_fields_by_name_and_by_path(tmp_path):
    row = {"question": "q", "reward_model": {"ground_truth": "right"}, "a.b": "dotted", "prompt": "no", "answer": "no"}
    path = write(tmp_path / "p.jsonl", row)
    (nested,) = read(path, prompt_field="question", answer_field="reward_model.ground_truth", is_graded=True)
    assert (nested.text, nested.answer) == ("q", "right")
    (dotted,) = read(path, prompt_field="a.b", answer_field="reward_model.nothing.there")
    assert (dotted.text, dotted.answer) == ("dotted", None)


@pytest.mark.parametrize(
    ("row", "rendered", "answer"),
    [
        ({"messages": [USER]}, "u:1+1", None),
        ({"messages": [USER, ASSISTANT]}, "u:1+1", "2"),
        ({"messages": [USER, ASSISTANT], "answer": "two"}, "u:1+1", "two"),
        ({"messages": [USER, ASSISTANT, {**USER, "content": "2+2"}]}, "u:1+1 a:2 u:2+2", None),
        ({"prompt": [USER, ASSISTANT]}, "u:1+1", "2"),
        ({"prompt": None, "messages": [USER]}, "u:1+1", None),
        ({"prompt": "1+1", "messages": [{**USER, "content": "not this"}]}, "u:1+1", None),
    ],
)
def test_messages(tmp_path, row, rendered, answer):
    (prompt,) = read(write(tmp_path / "p.jsonl", row), CHAT)
    assert (bytes(prompt.token_ids).decode(), prompt.answer) == (rendered, answer)
    assert prompt.text == rendered[-3:]  # of the last message


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ({"messages": []}, "there are no messages"),
        ({"messages": [ASSISTANT]}, "there is no message before the assistant's"),
        ({"messages": ["1+1"]}, 'message 1: expected an object with text fields "role" and "content"'),
        ({"messages": [USER, {"from": "gpt", "value": "2"}]}, 'message 2: expected an object with text fields "role"'),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2: expected an object with"),
        ({"messages": [{"role": "human", "content": "?"}]}, "message 1: unknown role 'human'; known: system, "),
        ({"messages": [{"role": "user", "content": " "}]}, "the prompt is empty"),
        (
            {"messages": "1+1", "prompt": 3},
            'expected an object with a text field "prompt", or a list of messages in it',
        ),
        ({"prompt": "half a pair: \ud800"}, "'utf-8' codec can't encode character"),
    ],
)
def test_malformed_rows_are_named(tmp_path, row, wrong):
    path = write(tmp_path / "p.jsonl", {"prompt": "1"}, {"prompt": "2"}, row)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}, line 3: {wrong}")):
        read(path, CHAT)


def test_messages_without_a_template(tmp_path):
    with pytest.raises(ValueError, match=r"p.jsonl, line 1: messages need a chat template: set data.chat_template"):
        read(write(tmp_path / "p.jsonl", {"messages": [USER]}))


def test_evaluation_says_which_answer_it_misses(tmp_path):
    path = write(tmp_path / "p.jsonl", {"messages": [USER]})
    with pytest.raises(ValueError, match=r"line 1: evaluation needs a text .* or a last message of the ass"):
        read(path, CHAT, is_graded=True, answer_field="gold")


def damaged(path, whole):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(whole)[:-9])
    else:
        path.write_bytes(whole)
    return path


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        (
            "p.json",
            b'[{"prompt": "1"},\n {"prompt" "2"}]',
            "p.json: not valid JSON (Expecting ':' delimiter at line 2, ",
        ),
        ("p.json", b'[{"prompt": "1"}, 7]', "p.json, row 2: expected an object with a text field"),
        ("p.json", b" \n", "p.json has no prompts"),
        ("p.json", b"[]", "p.json has no prompts"),
        ("p.json", "[é]".encode("latin-1"), "p.json: not UTF-8 text (invalid continuation byte at byte 1)"),
        (
            "p.jsonl",
            b'{"prompt": "1", "n": ' + b"9" * 5000 + b"}",
            "p.jsonl, line 1: not valid JSON (Exceeds the limit (4300 digits)",
        ),
        ("p.jsonl.gz", b'{"prompt": "1"}', "p.jsonl.gz is not a gzip file, or is cut short: "),
        ("p.parquet", b"PAR1 and nothing", "p.parquet cannot be read as Parquet: "),
    ],
)
def test_damaged_files(tmp_path, name, content, wrong):
    if name == "p.parquet":
        pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=re.escape(wrong)):
        read(damaged(tmp_path / name, content))


def test_parquet_rows_are_named(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    path = tmp_path / "p.parquet"
    rows = [{"messages": [{**USER, "name": "me"}, ASSISTANT]}, {"messages": [{"role": "x", "content": "y"}]}]
    parquet.write_table(Table.from_pylist(rows), path)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}, row 2: message 1: unknown role 'x'")):
        read(path, CHAT)


def test_a_format_whose_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hf:some/set.* need.* datasets: pip install 'megatron-opd\[datasets\]'"):
        read("hf:some/set")


def test_data_set_of_the_hub(tmp_path, monkeypatch):
    """The same call that asks the hub takes a directory, so this needs no network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = tmp_path / "made"
    made.mkdir()
    write(made / "train.jsonl", {"question": "1+1", "answer": "2"}, {"question": "2+2", "answer": "4"})
    write(made / "test.jsonl", {"question": "3+3", "answer": "6"})
    asked = {"prompt_field": "question", "is_graded": True}
    assert [(p.index, p.text, p.answer) for p in read(f"hf:{made}", **asked)] == [(0, "1+1", "2"), (1, "2+2", "4")]
    assert [p.text for p in read(f"hf:{made}", split="test", **asked)] == ["3+3"]
    with pytest.raises(ValueError, match=r"made, train, row 1: expected an object with a text field \"prompt\""):
        read(f"hf:{made}")
    with pytest.raises(ValueError, match=r"made, validation cannot be loaded: .*validation.* see `subset` and `split`"):
        read(f"hf:{made}", split="validation")
    with pytest.raises(ValueError, match=r"made \(hard\), train cannot be loaded: .*hard"):
        read(f"hf:{made}", subset="hard")


# Prompts that are too long.


def test_too_long_is_dropped_and_counted_or_an_error(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"prompt": "x" * size} for size in (3, 9, 5, 6, 1)))
    kept = read(path, limit=5, drop=True)
    assert [p.index for p in kept] == [0, 2, 4]
    assert kept.dropped == 2
    assert read(path, limit=9).dropped == 0
    with pytest.raises(ValueError, match=r"p.jsonl, line 2: the prompt has 9 tokens, .*; the limit is 5 \(it\)$"):
        read(path, limit=5)
    with pytest.raises(ValueError, match=r"source 'n': all 5 prompts of .*p.jsonl are longer than 0 tokens \(it\)"):
        read(path, limit=0, drop=True)


def test_the_stream_continues_exactly_where_rows_were_dropped(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"prompt": "x" * (i % 7 + 1)} for i in range(50)))
    config = SourceConfig(name="n", path=str(path))
    whole, first, second = (PromptMix([(config, read(path, limit=5, drop=True))], seed=3) for _ in range(3))
    expected = [p.index for p in whole.next(90)]
    first.next(47)  # in the second epoch of the 36 that are left
    second.load_state(json.loads(json.dumps(first.state())))
    assert [p.index for p in second.next(43)] == expected[47:]


# Many prompts.


def test_packed_prompts_are_a_sequence_of_the_same_prompts():
    prompts = [
        Prompt(source="s", index=7 * i, text=text, token_ids=ids, answer=answer)
        for i, (text, ids, answer) in enumerate([("a", (1, 2), "x"), ("", (), None), ("\n三", (2**31 - 1,), "\ud800")])
    ]
    packed = PackedPrompts("s")
    for prompt in prompts:
        packed.append(prompt)
    assert list(packed) == prompts
    assert [packed[-1], *packed[::2]] == [prompts[2], prompts[0], prompts[2]]
    assert list(pickle.loads(pickle.dumps(packed))) == prompts  # rank 0 sends them to the others
    with pytest.raises(IndexError):
        packed[3]


def test_a_large_file_takes_little_more_memory_than_its_ids_and_texts(tmp_path):
    """What the prompts of 20,000 rows take, and what reading them takes on top, which does not grow with the file."""
    path, size = tmp_path / "p.jsonl", 20_000
    text = "x" * 200
    path.write_text(f'{{"prompt": "{text}"}}\n' * size)
    tracemalloc.start()
    try:
        prompts = read(path, limit=200)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(prompts) == size
    contents = size * (4 * 200 + 200)
    assert contents < kept < 1.3 * contents
    assert peak < 1.6 * contents + 10_000_000


def test_batches_do_not_change_prompts(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"prompt": f"{i}", "answer": f"{-i}"} for i in range(2500)))
    prompts = read(path)
    assert [(p.index, p.text, p.token_ids, p.answer) for p in prompts] == [
        (i, f"{i}", tuple(f"{i}".encode()), f"{-i}") for i in range(2500)
    ]
