"""Which tokens end a response, and what makes two tokenizers different."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_opd.models.tokenizer import Tokenizer, difference, load_tokenizer

MODELS = Path(__file__).resolve().parents[2] / "examples/quickstart/models"


def made(vocab, eos_ids=(2,)):
    return Tokenizer(SimpleNamespace(get_vocab=lambda: vocab), tuple(eos_ids))


VOCAB = {"a": 0, "b": 1, "</s>": 2}


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        (made(VOCAB), None),
        (made({**VOCAB, "more": 3}), None),  # the teacher may know tokens that the student cannot say
        (made(VOCAB, eos_ids=(1, 2)), None),  # one end in common is enough
        (made({"a": 0, "b": 1}), "1 of 3 tokens have another id, first '</s>' (2, there None)"),
        (made({"b": 0, "a": 1, "</s>": 2}), "2 of 3 tokens have another id, first 'a' (0, there 1)"),
        (made(VOCAB, eos_ids=(1,)), "they end a response with different tokens ((2,) and (1,))"),
    ],
)
def test_difference(teacher, reason):
    assert difference(made(VOCAB), teacher) == reason


def test_quickstart_models_agree():
    student, *teachers = (load_tokenizer(MODELS / m) for m in ("student", "teacher_carry", "teacher_compare"))
    assert [difference(student, teacher) for teacher in teachers] == [None, None]
    assert len(student) == 32
    assert student.decode([*student.encode("12+3="), student.eos_ids[0]]) == "12+3="


@pytest.mark.parametrize(("named", "eos_ids"), [(None, (1,)), (1, (1,)), (7, (1, 7)), ([7, 3, 1], (1, 3, 7))])
def test_generation_config_adds_ends_of_a_response(tmp_path, named, eos_ids):
    model = Path(shutil.copytree(MODELS / "student", tmp_path / "model"))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert load_tokenizer(model).eos_ids == eos_ids


@pytest.mark.parametrize("named", [["</s>"], {"id": 1}, True, 1.0], ids=str)
def test_ends_of_a_response_that_are_no_ids(tmp_path, named):
    model = Path(shutil.copytree(MODELS / "student", tmp_path / "model"))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be the id of a token"):
        load_tokenizer(model)


def test_without_generation_config(tmp_path):
    model = Path(shutil.copytree(MODELS / "student", tmp_path / "model"))
    (model / "generation_config.json").unlink()
    assert load_tokenizer(model).eos_ids == (1,)


def test_without_any_end_of_a_response(tmp_path):
    model = Path(shutil.copytree(MODELS / "student", tmp_path / "model"))
    (model / "generation_config.json").unlink()
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))
    with pytest.raises(ValueError, match="names an end-of-sequence token"):
        load_tokenizer(model)


def test_missing_directory_is_not_looked_for_elsewhere(tmp_path):
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path / "no" / "model")


@pytest.mark.parametrize("config", [None, {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}])
def test_code_beside_a_tokenizer_is_not_run(tmp_path, monkeypatch, config):
    """transformers would ask at a terminal whether to run it, and people say yes."""
    directory = tmp_path / "model"
    shutil.copytree(MODELS / "student", directory)
    (directory / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    (directory / "config.json").unlink()
    if config:
        (directory / "config.json").write_text(json.dumps(config))
    file = directory / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded"):
        load_tokenizer(directory)
    assert not (tmp_path / "ran").exists()
