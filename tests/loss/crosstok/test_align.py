"""Two cuts of one text, laid side by side."""

import random

import pytest
import two_cuts as made

from megatron_opd.loss.crosstok.align import Translator, spans_of
from megatron_opd.loss.crosstok.matched import match
from megatron_opd.loss.crosstok.pieces import read_pieces
from megatron_opd.models.tokenizer import load_tokenizer

TEXTS = [*made.TEXT[:4], " starts with a space", "", "x", "\n\n  indented\ttab", "🙂🙂", "the  two  spaces"]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    paths = {
        "byte": made.byte_level(root / "byte"),
        "byte_large": made.byte_level(root / "byte_large", vocab_size=420, eos="<eot>"),
        "piece": made.sentencepiece(root / "piece"),
        "piece_plain": made.sentencepiece(root / "piece_plain", prepend=False),
    }
    loaded = {name: load_tokenizer(path) for name, path in paths.items()}
    return {name: (tokenizer, read_pieces(tokenizer)) for name, tokenizer in loaded.items()}


def translator(kinds, student, teacher):
    return Translator(*kinds[student], *kinds[teacher])


def response(translator, ids):
    """(the teacher's tokens, the spans) of tokens that are all learnt."""
    made = translator.translate(ids, (True,) * len(ids))
    assert all(made.learnt)
    return list(made.ids), list(made.spans)


def written(pieces, ids):
    return b"".join(pieces.of_id[i] or b"" for i in ids)


@pytest.mark.parametrize("kind", ["byte", "byte_large", "piece", "piece_plain"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_spell_the_text(kinds, kind, text):
    tokenizer, pieces = kinds[kind]
    [ids] = tokenizer.encode_all([text], add_special_tokens=False)
    assert written(pieces, ids).decode().removeprefix(" " if kind == "piece" else "") in (text, text[1:])
    assert written(pieces, ids).decode().endswith(text)


@pytest.mark.parametrize("student", ["byte", "piece"])
@pytest.mark.parametrize("teacher", ["byte_large", "piece", "piece_plain", "byte"])
@pytest.mark.parametrize("text", TEXTS)
def test_spans_cover_the_same_bytes(kinds, student, teacher, text):
    ours, our_pieces = kinds[student]
    _, their_pieces = kinds[teacher]
    [ids] = ours.encode_all([text], add_special_tokens=False)
    theirs, spans = response(translator(kinds, student, teacher), [*ids, ours.eos_ids[0]])
    covered = b""
    for first, stop, their_first, their_stop in spans[:-1]:
        ours_bytes = written(our_pieces, ids[first:stop])
        their_bytes = written(their_pieces, theirs[their_first:their_stop])
        assert ours_bytes == their_bytes or (not covered and b" " + ours_bytes == their_bytes)
        covered += ours_bytes
    assert covered == written(our_pieces, ids)
    assert spans[-1] == (len(ids), len(ids) + 1, len(theirs) - 1, len(theirs))
    assert theirs[-1] == kinds[teacher][0].eos_ids[0]


def test_spans_are_the_shortest(kinds):
    ours, our_pieces = kinds["byte"]
    _, their_pieces = kinds["byte_large"]
    [ids] = ours.encode_all([made.TEXT[0]], add_special_tokens=False)
    theirs, spans = response(translator(kinds, "byte", "byte_large"), ids)
    assert max(stop - first for first, stop, *_ in spans) > 1, "the tokenizers cut alike: nothing is tested"
    for first, stop, their_first, their_stop in spans:
        inside = {len(written(our_pieces, ids[first:i])) for i in range(first + 1, stop)}
        theirs_inside = {len(written(their_pieces, theirs[their_first:i])) for i in range(their_first + 1, their_stop)}
        assert not inside & theirs_inside


def test_a_response_cut_inside_a_character_is_aligned_up_to_it(kinds):
    ours, our_pieces = kinds["byte"]
    [ids] = ours.encode_all(["ok 漢"], add_special_tokens=False)
    cut = ids[:-1]
    assert written(our_pieces, cut).decode(errors="replace").endswith("�")
    theirs, spans = response(translator(kinds, "byte", "piece"), cut)
    last = spans[-1][1]
    assert written(our_pieces, cut[:last]).decode() == "ok "
    assert last < len(cut)
    assert written(kinds["piece"][1], theirs).decode() == " ok "


def test_no_end_after_bytes_that_are_no_text(kinds):
    ours, _ = kinds["byte"]
    [ids] = ours.encode_all(["漢 ok"], add_special_tokens=False)
    _, spans = response(translator(kinds, "byte", "piece"), [*ids[1:], ours.eos_ids[0]])
    assert spans == []


def test_ends_without_common_points_and_tokens_without_bytes():
    assert spans_of([2, 4], [3]) == []
    assert spans_of([], [1]) == []
    assert spans_of([3, 3, 5], [3, 5]) == [(0, 1, 0, 1), (1, 3, 1, 2)]


def test_random_cuts_against_a_search():
    draw = random.Random(0)
    for _ in range(200):
        length = draw.randint(1, 12)
        ours, theirs = (sorted({*draw.sample(range(1, length + 1), draw.randint(0, length)), length}) for _ in "ab")
        common = sorted(set(ours) & set(theirs))
        expected, at = [], (0, 0)
        for end in common:
            here = (ours.index(end) + 1, theirs.index(end) + 1)
            expected.append((at[0], here[0], at[1], here[1]))
            at = here
        assert spans_of(ours, theirs) == expected


def test_matched_by_bytes_and_not_by_spelling(kinds):
    byte, piece = kinds["byte"], kinds["piece"]
    sizes = len(byte[0]), len(piece[0])
    matched = match(byte, piece, sizes)
    ends = (byte[0].eos_ids[0], piece[0].eos_ids[0])
    pairs = list(zip(matched.student_M.tolist(), matched.teacher_M.tolist(), strict=True))
    assert ends in pairs
    assert all(byte[1].of_id[i] == piece[1].of_id[j] for i, j in pairs if (i, j) != ends)
    spelled = byte[0].hf.get_vocab()
    assert any(" " in byte[1].of_id[i].decode(errors="ignore") for i, j in pairs if (i, j) != ends)
    assert "Ġthe" in spelled
    assert sorted([*matched.student_M.tolist(), *matched.student_only_A.tolist()]) == list(range(sizes[0]))
    assert sorted([*matched.teacher_M.tolist(), *matched.teacher_only_B.tolist()]) == list(range(sizes[1]))


def test_an_unknown_decoder_is_refused_by_name(tmp_path, kinds):
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    path = made.written(tokenizer, tmp_path / "wordpiece", "</s>")
    with pytest.raises(ValueError, match="WordPiece"):
        read_pieces(load_tokenizer(path))
