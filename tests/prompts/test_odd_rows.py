"""Rows as other tools write them: messages as JSON text, names twice, a byte order mark."""

import gzip
import json

import pytest
import test_data
from test_data import CHAT

ASKED = [{"role": "user", "content": "ox?"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize("field", ["messages", "prompt"])
@pytest.mark.parametrize("indent", [None, 2])
def test_messages_stored_as_json_text(tmp_path, field, indent):
    path = test_data.write(tmp_path / "p.jsonl", {field: json.dumps(ASKED, indent=indent)})
    (prompt,) = test_data.read(path, CHAT)
    assert (bytes(prompt.token_ids).decode(), prompt.answer) == ("u:ox?", "yes")


@pytest.mark.parametrize("text", ["[1, 2]", "[]", "[not json", '[{"a": 1}]'])
def test_a_prompt_that_looks_like_a_list_is_a_text(tmp_path, text):
    (prompt,) = test_data.read(test_data.write(tmp_path / "p.jsonl", {"prompt": text}), CHAT)
    assert prompt.text == text


@pytest.mark.parametrize(
    "line",
    ['{"prompt": "a", "n": 1, "prompt": "b"}', '{"prompt": "a", "of": {"x": 1, "x": 1}}', '{"prompt": 1, "prompt": 1}'],
)
def test_a_name_twice_is_refused(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "c"}\n' + line)
    with pytest.raises(ValueError, match=r"line 2: not valid JSON \('(prompt|x)' is there twice in an object\)"):
        test_data.read(path)


def test_a_column_twice_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = pyarrow.array(["a"])
    parquet.write_table(pyarrow.Table.from_arrays([column, column], names=["prompt", "prompt"]), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="the column 'prompt' is there twice"):
        test_data.read(tmp_path / "p.parquet")


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.jsonl.gz"])
def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path, name):
    rows = [{"prompt": "é"}, {"prompt": "b"}]
    text = json.dumps(rows) if name == "p.json" else "\n".join(map(json.dumps, rows))
    whole = text.encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(whole) if name.endswith("gz") else whole)
    assert [prompt.text for prompt in test_data.read(tmp_path / name)] == ["é", "b"]


@pytest.mark.parametrize("answer", ["", "  ", "\n"])
def test_an_empty_reference_is_refused_where_it_grades(tmp_path, answer):
    path = test_data.write(tmp_path / "p.jsonl", {"prompt": "a", "answer": answer})
    with pytest.raises(ValueError, match="line 1: the reference answer is empty"):
        test_data.read(path, is_graded=True)
    assert len(test_data.read(path)) == 1
