"""Ends and beginnings of texts: the model's own end among several, and special tokens that a tokenizer adds."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Words
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from megatron_opd.config import CrossTokenizerConfig
from megatron_opd.loss.crosstok.align import Translator
from megatron_opd.loss.crosstok.matched import match
from megatron_opd.loss.crosstok.pieces import read_pieces
from megatron_opd.loss.crosstok.uld import Spans, uld
from megatron_opd.models.tokenizer import Tokenizer, foreign_ends, load_tokenizer

MODELS = Path(__file__).resolve().parents[2] / "examples/quickstart/models"
SPECIAL = ["<pad>", "<text_end>", "<begin>", "<call_end>", "<turn_end>", "<extra>"]


def made(eos="<turn_end>", eos_ids=(4, 1, 3), framing="$A", words=("a", "b", "c")):
    words = Words(WordLevel({token: i for i, token in enumerate([*SPECIAL, *words])}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    ids = [(token, i) for i, token in enumerate(SPECIAL)]
    words.post_processor = TemplateProcessing(single=framing, special_tokens=ids)
    hf = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<begin>", eos_token=eos, additional_special_tokens=SPECIAL[3:]
    )
    return Tokenizer(hf, eos_ids)


@pytest.mark.parametrize(
    ("framing", "front"),
    [
        ("$A", []),
        ("$A <turn_end>", []),
        ("<begin> $A", [2]),
        ("<begin> $A <turn_end>", [2]),
        ("<extra> <begin> $A <text_end> <turn_end>", [5, 2]),
    ],
)
def test_prompts_have_the_front_of_the_tokenizer_and_never_its_end(framing, front):
    tokenizer = made(framing=framing)
    assert tokenizer.encode("b a") == [*front, 7, 6]
    assert tokenizer.encode_all(["c", "", "a b"]) == [[*front, 8], front, [*front, 6, 7]]
    assert tokenizer.encode_all(["c"], add_special_tokens=False) == [[8]]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("<begin> a", [5, 2, 6]),
        ("<begin>", [5, 2]),
        ("<extra> <begin> a", [5, 2, 6]),
        ("a <begin>", [5, 2, 6, 2]),
        ("<extra> a", [5, 2, 5, 6]),
    ],
)
def test_a_text_that_begins_as_the_tokenizer_begins_has_no_second_beginning(text, ids):
    assert made(framing="<extra> <begin> $A <turn_end>").encode(text) == ids


# Ends.


@pytest.mark.parametrize(
    ("own", "named", "eos_ids", "eos_id"),
    [
        ("</s>", [9, 3], (1, 3, 9), 1),
        (None, [9, 3, 5], (9, 3, 5), 9),
        (None, 6, (6,), 6),
    ],
)
def test_the_models_own_end_comes_first(tmp_path, own, named, eos_ids, eos_id):
    model = Path(shutil.copytree(MODELS / "student", tmp_path / "model"))
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": own}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    loaded = load_tokenizer(model)
    assert (loaded.eos_ids, loaded.eos_id) == (eos_ids, eos_id)


@pytest.mark.parametrize("named", [[3, None], [None], "3", [[3]], True, 3.0], ids=str)
def test_ends_that_are_no_ids(tmp_path, named):
    model = Path(shutil.copytree(MODELS / "student", tmp_path / "model"))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    with pytest.raises(ValueError, match="eos_token_id must be the id of a token, or a list of them, not"):
        load_tokenizer(model)


def test_a_config_that_transformers_refuses_is_told_with_the_reason(tmp_path):
    model = Path(shutil.copytree(MODELS / "student", tmp_path / "model"))
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "eos_token_id": "2"}))
    with pytest.raises(ValueError, match=r"its tokenizer cannot be loaded: .*'eos_token_id': .*\w"):
        load_tokenizer(model)


@pytest.mark.parametrize("named", [-1, [1, -7], 32, [99999]], ids=str)
def test_ends_that_are_no_tokens(tmp_path, named):
    model = Path(shutil.copytree(MODELS / "student", tmp_path / "model"))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    with pytest.raises(ValueError, match=r"eos_token_id must be the id of a token, from 0 to 31, not"):
        load_tokenizer(model)


@pytest.mark.parametrize("order", [(1, 3, 4), (4, 1, 3), (3, 4, 1)])
def test_another_tokenizers_end_is_the_models_own_and_not_the_lowest(order):
    """Qwen's and Llama's instruct models have several ends, and their own is not the lowest id."""
    ours, theirs = made("<turn_end>", order), made("<call_end>", order, words=("b", "a"))
    pieces = [(tokenizer, read_pieces(tokenizer)) for tokenizer in (ours, theirs)]
    matched = match(*pieces, (9, 8))
    pairs = list(zip(matched.student_M.tolist(), matched.teacher_M.tolist(), strict=True))
    assert [pair for pair in pairs if pair[0] == 4 or pair[1] == 3] == [(4, 3)]
    assert {(6, 7), (7, 6)} < set(pairs)
    for end in order:  # whichever the student has said
        translated = Translator(*pieces[0], *pieces[1]).translate([end], [True])
        assert (translated.ids, translated.spans) == ((3,), ((0, 1, 0, 1),))


def loss_by_hand(student_V, teacher_V, pairs):
    """KL(teacher || student) over pairs of ids and everything else, from logits, in plain float64."""

    def outcomes(logits_V, ids):
        most = max(logits_V)
        weights = [math.exp(x - most) for x in logits_V]
        p = [weight / sum(weights) for weight in weights]
        return [*(p[i] for i in ids), sum(x for i, x in enumerate(p) if i not in ids)]

    q, p = outcomes(student_V, [s for s, _ in pairs]), outcomes(teacher_V, [t for _, t in pairs])
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("said", [4, 1, 3, 6])
@pytest.mark.parametrize("order", [(1, 3, 4), (4, 1, 3)])
def test_the_loss_at_an_end_is_that_of_the_models_own_ends(order, said):
    """Of a student that ends with its own token (4), with others of its ends, the lowest among them, or not at all. The
    teacher ends with its own, 3."""
    ours, theirs = made("<turn_end>", order), made("<call_end>", order, words=("b", "a"))
    matched = match((ours, read_pieces(ours)), (theirs, read_pieces(theirs)), (9, 8))
    student_V, teacher_V = [0.1 * i for i in range(9)], [-0.2 * i for i in range(8)]
    student_V[said] += 15.0
    teacher_V[3] += 15.0
    spans = [
        Spans(torch.tensor([row], dtype=torch.float64).log_softmax(-1), torch.zeros(1), torch.zeros(1))
        for row in (student_V, teacher_V)
    ]
    how = CrossTokenizerConfig(adaptive=False, matched_weight=1.0)
    (loss,) = uld(*spans, matched, how, beta=0)[0].tolist()
    # Own ends, and what is no special token: words, <pad> and <text_end>.
    assert loss == pytest.approx(loss_by_hand(student_V, teacher_V, [(4, 3), (6, 7), (7, 6), (0, 0), (1, 1)]), rel=1e-9)
    assert loss < 1e-3 if said == 4 else loss > 14


@pytest.mark.parametrize(
    ("student", "teacher", "wrong"),
    [
        (("<turn_end>", (4, 1)), ("<turn_end>", (4, 1)), None),
        (("<turn_end>", (4, 1)), ("<text_end>", (1, 4)), None),
        # a base student and an instruct teacher
        (("<text_end>", (1,)), ("<turn_end>", (4, 1)), "its own end of a response, '<turn_end>' (4), does not end one"),
        # and the other way round
        (
            ("<call_end>", (3, 1)),
            ("<text_end>", (1,)),
            "the student's own end of a response, '<call_end>' (3), does not",
        ),
    ],
)
def test_an_end_that_the_other_goes_on_behind(student, teacher, wrong):
    found = foreign_ends(made(*student), made(*teacher))
    assert found is None if wrong is None else found.startswith(wrong)
