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


MASKED = [("it costs ", True), ("12 € said the tool", False), ("; so it is 12", True), (" and more", False)]


def masked(kinds, turns, *, ends=False):
    """(student's tokens, mask, tokens by turn), cut turn by turn; with `ends`, learnt turns end in its end."""
    ours, _ = kinds["byte"]
    cuts = [ours.encode_all([text], add_special_tokens=False)[0] for text, _ in turns]
    if ends:
        cuts = [[*ids, ours.eos_ids[0]] if is_learnt else ids for ids, (_, is_learnt) in zip(cuts, turns, strict=True)]
    mask = [is_learnt for ids, (_, is_learnt) in zip(cuts, turns, strict=True) for _ in ids]
    return [i for ids in cuts for i in ids], mask, cuts


@pytest.mark.parametrize("teacher", ["byte_large", "piece", "piece_plain", "byte"])
@pytest.mark.parametrize("ends", [False, True])
def test_context_is_translated_and_spans_are_of_learnt_tokens_alone(kinds, teacher, ends):
    their_tokenizer, their_pieces = kinds[teacher]
    ids, mask, cuts = masked(kinds, MASKED, ends=ends)
    made = translator(kinds, "byte", teacher).translate(ids, mask)
    theirs = [i for i, is_learnt in zip(made.ids, made.learnt, strict=True) if is_learnt]
    ours = [i for i, is_learnt in zip(ids, mask, strict=True) if is_learnt]
    assert made.learnt[-1]  # the teacher reads nothing behind the last learnt token
    said = written(their_pieces, made.ids).decode()
    spaced = " " if teacher == "piece" else ""  # in front of every turn
    assert said == "".join(spaced + text for text, _ in MASKED[:3])
    assert [end for _, end, _, _ in made.spans][-1] == len(ours)
    firsts = [first for first, *_ in made.spans], [first for _, _, first, _ in made.spans]
    assert len(cuts[0]) in firsts[0]  # no span goes from one turn to the next
    for first, stop, their_first, their_stop in made.spans:
        ours_bytes = written(kinds["byte"][1], ours[first:stop])
        their_bytes = written(their_pieces, theirs[their_first:their_stop])
        assert ours_bytes == their_bytes or b" " + ours_bytes == their_bytes
    if ends:
        assert theirs.count(their_tokenizer.eos_ids[0]) == 2
        assert (len(cuts[0]) - 1, len(cuts[0])) in [span[:2] for span in made.spans]


def test_a_single_learnt_token_and_none(kinds):
    turns = [("the tool says ", False), ("x", True)]
    ids, mask, _ = masked(kinds, turns)
    made = translator(kinds, "byte", "piece").translate(ids, mask)
    assert [first for first, *_ in made.spans] == [0]
    assert made.learnt[-1]
    nothing = translator(kinds, "byte", "piece").translate(ids[:-1], mask[:-1])
    assert (nothing.ids, nothing.learnt, nothing.spans) == ((), (), ())


@pytest.mark.parametrize("is_learnt", [True, False])
def test_nothing_behind_what_the_teacher_cannot_say_is_learnt(kinds, is_learnt):
    """It would be said behind another text."""
    ours, _ = kinds["byte"]
    first, cut, tool, last = (
        ours.encode_all([text], add_special_tokens=False)[0] for text in ("ok ", "漢", " tool ", "then")
    )
    cut = cut[:-1]
    ids = [*first, *cut, *tool, *last]
    mask = [*[True] * len(first), *[is_learnt] * len(cut), *[False] * len(tool), *[True] * len(last)]
    made = translator(kinds, "byte", "piece_plain").translate(ids, mask)
    assert made.spans[-1][1] == len(first)


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
