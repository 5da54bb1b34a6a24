"""Sources that changed between two starts of a run: which, how, and where is told from two fingerprints."""

import dataclasses
import json
import random

import pytest

from megatron_opd.config import SourceConfig
from megatron_opd.core.types import Prompt
from megatron_opd.prompts.changes import other_mixture, other_prompts
from megatron_opd.prompts.fingerprint import DataRecord, Fingerprinting


def print_of(rows, name="add", weight=1.0, batch=7, **prompts):
    """The fingerprint of rows that are prompts of two tokens each."""
    made = Fingerprinting(SourceConfig(name=name, path="x.jsonl", weight=weight))
    for start in range(0, len(rows), batch):
        made.rows(rows[start : start + batch])
        made.prompts([prompt(start + i, row, **prompts) for i, row in enumerate(rows[start : start + batch])])
    return made.done()


def prompt(index, row, **changes):
    asked = {"text": row["prompt"], "answer": row["answer"], "token_ids": (len(row["prompt"]), index % 5)}
    extra = {"tests": row["tests"]} if "tests" in row else {}
    return Prompt(source="add", index=index, **{**asked, "extra": extra, **changes})


def rows_of(count):
    return [{"prompt": "p" * (i % 11 + 1), "answer": str(i)} for i in range(count)]


def told(before, now):
    return other_prompts(DataRecord(train=[before], eval=[]), DataRecord(train=[now], eval=[]))


def changed(before, now):
    (line,) = told(print_of(before), print_of(now))
    return line.removeprefix("data.train: source 'add' has changed: ")


@pytest.mark.parametrize("count", [1, 2, 100, 255, 256, 257, 5000])
def test_the_same_rows_are_the_same_however_they_are_read(count):
    assert print_of(rows_of(count)) == print_of(rows_of(count), batch=1024)
    assert told(print_of(rows_of(count)), print_of(rows_of(count), batch=3)) == []


def test_rows_that_were_cut_or_added():
    assert changed(rows_of(100), rows_of(98)) == "rows 100 -> 98, the first 98 are the same"
    assert changed(rows_of(98), rows_of(100)) == "rows 98 -> 100, the first 98 are the same"
    assert changed(rows_of(2), rows_of(1)) == "rows 2 -> 1, the first 1 are the same"
    assert changed(rows_of(100), rows_of(100)[1:]) == "rows 100 -> 99, row 1 is the first that differs"
    assert changed(rows_of(100), [*rows_of(100)[:60], *rows_of(100)[61:]]) == (
        "rows 100 -> 99, row 61 is the first that differs"
    )


def test_rows_in_another_order():
    rows = rows_of(100)
    swapped = [*rows[:40], rows[41], rows[40], *rows[42:]]
    assert changed(rows, swapped) == "the same 100 rows in another order, row 41 is the first that differs"
    shuffled, said = random.Random(3).sample(rows_of(1000), 1000), "the same 1000 rows in another order, the first"
    assert changed(rows_of(1000), shuffled).startswith(said)


@pytest.mark.parametrize("place", [0, 1, 99, 254])
def test_one_edited_row_is_named(place):
    rows = rows_of(255)
    edited = [*rows[:place], {**rows[place], "prompt": "other"}, *rows[place + 1 :]]
    assert changed(rows, edited) == f"other rows among its 255, row {place + 1} is the first that differs"


@pytest.mark.parametrize(("count", "place"), [(1000, 0), (1000, 999), (5000, 2345), (20_000, 19_999)])
def test_one_edited_row_of_many_is_found_within_a_range(count, place):
    rows = rows_of(count)
    edited = [*rows[:place], {**rows[place], "prompt": "other"}, *rows[place + 1 :]]
    line = changed(rows, edited)
    first, last = (int(number) for number in line.partition("differs is in ")[2].split(" to "))
    assert first <= place + 1 <= last
    assert last - first < count / 50


def test_where_another_number_of_rows_makes_other_marks():
    before, now = rows_of(300), rows_of(5000)
    now[200] = {"prompt": "x", "answer": "y"}
    first, last = (int(n) for n in changed(before, now).partition("differs is in ")[2].split(" to "))
    assert first <= 201 <= last


def test_other_rewards_and_answers_of_the_rows_are_a_change():
    rows = [{**row, "tests": f"assert f() == {i}"} for i, row in enumerate(rows_of(20))]
    for key, value in [("answer", "7"), ("tests", "")]:
        edited = [*rows[:5], {**rows[5], key: value}, *rows[6:]]
        assert changed(rows, edited) == "other rows among its 20, row 6 is the first that differs"


def test_what_no_part_of_the_run_reads_may_change():
    rows = rows_of(20)
    with_column = [{**row, "difficulty": 3} for row in rows]
    in_another_order = [dict(reversed(row.items())) for row in rows]
    assert told(print_of(rows), print_of(with_column)) == []
    assert print_of(rows) == print_of(in_another_order)


def test_other_prompts_of_the_same_rows_are_a_change_and_other_answers_to_learn_are_a_setting():
    rows = rows_of(20)
    (line,) = told(print_of(rows), print_of(rows, token_ids=(1, 2, 3)))
    assert "its rows are the same, but other prompts are made of them (a chat template, a tokenizer" in line
    assert told(print_of(rows), print_of(rows, answer_ids=(4, 5), teacher_ids={"t": (1,)}, extra={"a": 1})) == []
    fewer = Fingerprinting(SourceConfig(name="add", path="x.jsonl"))
    fewer.rows(rows)
    fewer.prompts([prompt(i, row) for i, row in enumerate(rows[:15])])
    (line,) = told(print_of(rows), fewer.done())
    assert "its rows are the same, but 20 -> 15 of them are prompts" in line


def test_where_tokens_end_is_part_of_a_prompt():
    """The same tokens in a row, cut otherwise."""

    def made(*prompts):
        found = Fingerprinting(SourceConfig(name="add", path="x.jsonl"))
        found.prompts([Prompt(source="add", index=1, text="", token_ids=ids) for ids in prompts])
        return found.done()

    assert made((1, 2), (1, 1, 3)).asked != made((1, 2, 1, 1), (3,)).asked


def test_sources_that_the_settings_changed_are_said():
    a, b, c = (print_of(rows_of(5), name=name) for name in "abc")
    before = DataRecord(train=[a, b], eval=[c])
    assert other_mixture(before, before) == []

    def said(*train, eval=(c,)):
        return other_mixture(before, DataRecord(train=list(train), eval=list(eval)))

    assert said(b, a) == ["data.train: the order of sources: a, b -> b, a"]
    assert said(a) == ["data.train: source 'b' is gone; it would start at its beginning if it came back"]
    (new,) = said(a, b, c)
    assert new.startswith("data.train: source 'c' is new: it starts at its beginning")
    assert said(a, dataclasses.replace(b, weight=2.5)) == ["data.train: the weight of source 'b': 1 -> 2.5"]
    (of_eval,) = said(a, b, eval=[print_of(rows_of(4), name="c")])
    assert of_eval.startswith("data.eval: source 'c' has changed: rows 5 -> 4, the first 4 are the same; evaluations")
    assert other_prompts(before, DataRecord(train=[b, a], eval=[])) == []


def test_a_fingerprint_is_small_and_is_json():
    made = print_of(rows_of(20_000))
    assert len(json.dumps(dataclasses.asdict(made))) < 2500


@pytest.mark.parametrize("row", [None, 3, "text", [1], {"a": b"\xff"}, {"a": "\ud800"}, {"a": float("nan")}])
def test_rows_of_any_kind_have_a_digest(row):
    made = Fingerprinting(SourceConfig(name="add", path="x.jsonl"))
    made.rows([row])
    assert made.done().rows == 1
