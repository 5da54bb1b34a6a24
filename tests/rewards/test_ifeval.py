"""The reward ifeval: what counts as followed, which rows it takes, and what it says when its checker is not there."""

import json
import random
import sys
from types import SimpleNamespace

import pytest

from megatron_opd.config import RewardsConfig, SourceConfig
from megatron_opd.core.types import Prompt
from megatron_opd.prompts.mix import Limit, read_prompts
from megatron_opd.rewards import build_reward

ENGLISH = "The cat sat on the mat and looked out of the window at the birds in the garden."
FRENCH = "Le chat est assis sur le tapis et regarde les oiseaux du jardin par la fenêtre."


def row(*instructions):
    """A prompt with instructions, (name, arguments) each."""
    names, kwargs = [name for name, _ in instructions], [given for _, given in instructions]
    extra = {"instruction_id_list": names, "kwargs": kwargs}
    return Prompt(source="s", index=0, text="?", token_ids=(1,), extra=extra)


@pytest.fixture(scope="module")
def checker(tmp_path_factory):
    """The extra, with nltk's rules for sentences as they are before any training: no abbreviations, no exceptions."""
    pytest.importorskip("lm_eval", reason="needs the extra `ifeval`")
    nltk = pytest.importorskip("nltk", reason="needs the extra `ifeval`")
    rules = tmp_path_factory.mktemp("nltk") / "tokenizers" / "punkt_tab" / "english"
    rules.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (rules / name).touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [str(rules.parents[2])])
        yield


@pytest.fixture
def reward(checker):
    return build_reward("ifeval")


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(ValueError, match=r"pip install 'megatron-opd\[ifeval\]'"):
        build_reward("ifeval")


def test_without_the_data_of_nltk_nothing_is_downloaded(checker, monkeypatch, tmp_path):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk, "download", lambda name: pytest.fail("downloads"))
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.ifeval.instructions_registry", raising=False)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.ifeval.instructions_util", raising=False)
    with pytest.raises(ValueError, match=r"python -m nltk\.downloader punkt_tab"):
        build_reward("ifeval")


@pytest.mark.parametrize(
    ("name", "given", "right", "wrong"),
    [
        ("keywords:existence", {"keywords": ["cat", "mat"]}, ENGLISH, "A cat."),
        ("keywords:forbidden_words", {"forbidden_words": ["dog"]}, ENGLISH, "The Dog is here."),
        ("keywords:frequency", {"relation": "at least", "keyword": "the", "frequency": 3}, ENGLISH, "the the"),
        ("keywords:letter_frequency", {"let_relation": "less than", "letter": "e", "let_frequency": 2}, "one", ENGLISH),
        ("length_constraints:number_words", {"relation": "less than", "num_words": 4}, "one, two three", "a b c d"),
        (
            "length_constraints:number_sentences",
            {"relation": "at least", "num_sentences": 3},
            "It is. We are! Are they?",
            "It is, we are, are they? No.",
        ),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
            "one\n\nSo, two",
            "so one\n\ntwo",
        ),
        ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a\n* b\n* c"),
        ("detectable_format:title", {}, "<<Cats>>\nThey sit.", "Cats\nThey sit."),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [place]", "[name], place"),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say so."}, "Say so. So.", "So. Say so."),
        ("startend:end_checker", {"end_phrase": "Is that all?"}, "Yes. Is that all?", "Is that all? Yes."),
        ("startend:quotation", {}, '"quoted"', 'not "quoted"'),
        ("punctuation:no_comma", {}, "no comma", "a, comma"),
        ("change_case:english_lowercase", {}, ENGLISH.lower(), ENGLISH),
        ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH),
        ("language:response_language", {"language": "fr"}, FRENCH, ENGLISH),
        ("language:response_language", {"language": "fr"}, "123", ENGLISH),  # the authors' doubt is for the answer
    ],
)  # fmt: skip
def test_an_instruction(reward, name, given, right, wrong):
    padded = {**dict.fromkeys(["num_words", "keywords", "language", "letter"]), **given}  # as the hub's table has it
    for prompt in (row((name, given)), row((name, padded))):
        reward.check(prompt)
        assert reward.grade([(prompt, right), (prompt, wrong), (prompt, " \n")]) == [1, 0, 0]


def test_every_instruction_counts_or_its_share(reward):
    prompt = row(("punctuation:no_comma", {}), ("keywords:existence", {"keywords": ["so"]}), ("startend:quotation", {}))
    answers = [(prompt, text) for text in ('"so"', "so", "so, no", "well, no", "")]
    assert reward.grade(answers) == [1, 0, 0, 0, 0]
    shares = build_reward("ifeval", RewardsConfig(ifeval="instruction"))
    assert shares.grade(answers) == [1, 2 / 3, 1 / 3, 0, 0]


def test_signs_are_counted_where_the_checker_would_draw_a_letter(reward):
    prompt = row(("keywords:letter_frequency", {"let_relation": "at least", "letter": "#", "let_frequency": 2}))
    reward.check(prompt)
    letters = "abcdefghijklmnopqrstuvwxyz" * 9
    assert reward.grade([(prompt, "#a #b"), (prompt, f"#a {letters}"), (prompt, letters)]) == [1, 0, 0]
    few = row(("keywords:letter_frequency", {"let_relation": "less than", "letter": "É", "let_frequency": 2}))
    assert reward.grade([(few, "none"), (few, "été"), (few, "éa")]) == [1, 0, 1]


def test_grades_do_not_depend_on_chance_nor_change_it(reward):
    """Without a seed, one in four or so is French."""
    prompt = row(("language:response_language", {"language": "fr"}))
    before = random.getstate()
    assert len(set(reward.grade([(prompt, "Oui, of course")] * 40))) == 1
    assert random.getstate() == before


def test_json_too_deep_to_read_is_not_followed(reward):
    prompt = row(("detectable_format:json_format", {}))
    assert reward.grade([(prompt, "[" * 100_000), (prompt, "[1]")]) == [0, 1]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({}, '"instruction_id_list"'),
        ({"instruction_id_list": [], "kwargs": []}, '"instruction_id_list"'),
        ({"instruction_id_list": ["startend:quotation"]}, '"kwargs"'),
        ({"instruction_id_list": ["startend:quotation"], "kwargs": [{}, {}]}, '"kwargs"'),
        ({"instruction_id_list": ["startend:quotation"], "kwargs": ["{}"]}, '"kwargs"'),
        ({"instruction_id_list": ["startend:quote"], "kwargs": [{}]}, "no instruction 'startend:quote'"),
        ({"instruction_id_list": [{}], "kwargs": [{}]}, "no instruction {}"),
    ],
)  # fmt: skip
def test_rows_that_lack_something(reward, extra, said):
    with pytest.raises(ValueError, match=said):
        reward.check(Prompt(source="s", index=0, text="?", token_ids=(1,), extra=extra))


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("length_constraints:number_words", {"num_words": 3}, "it takes num_words, relation"),
        ("length_constraints:number_words", {"num_words": "3", "relation": "at least"}, "TypeError"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "exactly"}, "exactly"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "at least", "unit": 1}, "unit"),
        ("length_constraints:number_words", {"num_words": -1, "relation": "at least"}, "out of range"),
        ("keywords:letter_frequency", {"let_relation": "at least", "letter": "ab", "let_frequency": 2}, "out of range"),
        ("keywords:frequency", {"relation": "at least", "keyword": "c++(", "frequency": 1}, "subpattern"),
        ("language:response_language", {"language": "klingon"}, "klingon"),
        ("combination:repeat_prompt", {"prompt_to_repeat": None}, "prompt_to_repeat"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(reward, name, given, said):
    before = random.getstate()
    with pytest.raises(ValueError, match=f'^"{name}" with the "kwargs".*{said}'):
        reward.check(row((name, given)))
    assert random.getstate() == before


def test_preflight_names_the_line(reward, tmp_path):
    good = {"prompt": "?", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]}
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(good)}\n{json.dumps({'prompt': '?'})}\n")
    encoder = SimpleNamespace(
        render=lambda asked: asked, encode=lambda texts: [[1] for _ in texts], kept=lambda asked: ()
    )
    source = SourceConfig(name="s", path=str(path), reward="ifeval")
    with pytest.raises(ValueError, match=r'rows\.jsonl.*2.*"instruction_id_list"'):
        read_prompts(source, encoder, limit=Limit(9, ""), reward=reward, is_graded=True)
    path.write_text(json.dumps(good) + "\n")
    (prompt,) = read_prompts(source, encoder, limit=Limit(9, ""), reward=reward, is_graded=True)
    assert reward.grade([(prompt, "no comma"), (prompt, "a, b")]) == [1, 0]
