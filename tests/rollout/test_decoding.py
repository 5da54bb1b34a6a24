"""Many answers in one batch: what one is depends on its own ids and random numbers, whatever comes, goes and waits."""

from types import SimpleNamespace

import pytest
import tiny
import torch

from megatron_opd.core.types import Prompt, Sampling
from megatron_opd.rollout import decoding, reading
from megatron_opd.rollout.decoding import Begun, decode
from megatron_opd.rollout.drawing import uniforms
from megatron_opd.rollout.reading import MixtureReader, ModelReader, has_rows

EOS, VOCAB_SIZE = tuple(range(2, 90, 9)), 90
FAMILIES = ["qwen3", "llama", "qwen3_moe"]
LENGTHS = [1, 9, 2, 30, 5, 5, 17, 3]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return loaded(request.param)


def loaded(family, **changes):
    """As transformers loads it."""
    model = tiny.build(family, **changes).eval()
    model.set_attn_implementation("sdpa")
    return model


def answers(number=24, longest=13):
    """Three of a prompt, of unequal lengths and with unequal room."""
    sampling = Sampling(max_new_tokens=longest, temperature=1.0, seed=3)
    made = []
    for i in range(number):
        group = i // 3
        ids = [(29 * group + 7 * at * at) % VOCAB_SIZE for at in range(LENGTHS[group % len(LENGTHS)])]
        prompt = Prompt(source="a", index=group, text="", token_ids=tuple(ids))
        made.append(Begun(prompt.token_ids, uniforms(sampling, prompt, i % 3)[: 1 + i % longest]))
    return made


def drawn(reader, begun, temperature=1.0):
    """[(ids, logps, whole)] in order; that each is told once."""
    told = {}

    def ended(number, answer):
        assert number not in told
        told[number] = answer

    decode(reader, begun, temperature=temperature, eos_ids=EOS, on_ended=ended)
    return [told[i] for i in range(len(begun))]


def assert_same(found, expected):
    assert [one.ids for one in found] == [one.ids for one in expected]
    assert [one.is_whole for one in found] == [one.is_whole for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-5)


@torch.no_grad()
def dense(model, begun, temperature=1.0):
    """One after the other, by whole forward passes without a cache."""
    made = []
    for one in begun:
        ids, logps = list(one.ids), []
        for uniform in one.uniforms:
            logp = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1, :VOCAB_SIZE].double() / temperature, -1)
            cumulative = logp.exp().cumsum(-1)
            ids.append(min(int((cumulative <= uniform * cumulative[-1]).sum()), VOCAB_SIZE - 1))
            logps.append(logp[ids[-1]].item())
            if ids[-1] in EOS:
                break
        made.append(SimpleNamespace(ids=ids[len(one.ids) :], logps=logps, is_whole=ids[-1] in EOS))
    return made


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_each_is_as_if_it_were_alone(model, temperature):
    begun = answers()
    found = drawn(ModelReader(model, vocab_size=VOCAB_SIZE), begun, temperature)
    assert_same(found, dense(model, begun, temperature))
    assert {one.is_whole for one in found} == {True, False}  # some end before others, and leave


@pytest.mark.parametrize("rows", [1, 3, 24])
def test_places_are_taken_again(model, monkeypatch, rows):
    begun = answers()
    expected = drawn(ModelReader(model, vocab_size=VOCAB_SIZE), begun)
    monkeypatch.setattr(decoding, "MAX_ROWS", rows)
    assert_same(drawn(ModelReader(model, vocab_size=VOCAB_SIZE), begun), expected)


@pytest.mark.parametrize("tokens", [1, 64])
def test_memory_is_bounded(model, monkeypatch, tokens):
    """By positions of the cache, of which the longest answer needs 43, and by tokens of prompts that are read."""
    begun = answers()
    expected = drawn(ModelReader(model, vocab_size=VOCAB_SIZE), begun)
    reader = ModelReader(model, vocab_size=VOCAB_SIZE)
    opened, read = [], []
    monkeypatch.setattr(
        reader, "open", lambda rows, length, do=reader.open: (opened.append((rows, length)), do(rows, length))
    )
    monkeypatch.setattr(decoding, "CACHE_BYTES", tokens * 3 * reader.token_bytes)
    monkeypatch.setattr(reading, "BEGIN_TOKENS", tokens)
    forward = model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward", lambda *a, **k: (read.append(k["input_ids"]), forward(*a, **k))[1])
    assert_same(drawn(reader, begun), expected)
    ((rows, length),) = opened
    assert rows == 1 or rows * length <= tokens * 3
    prompts = [ids for ids in read if ids.shape[1] > 1]
    assert prompts
    assert all(len(ids) == 1 or ids.numel() <= tokens for ids in prompts)


def test_a_prompt_is_read_once_for_all_its_answers(model, monkeypatch):
    read = []
    forward = model.base_model.forward
    monkeypatch.setattr(model.base_model, "forward", lambda *a, **k: (read.append(k["input_ids"]), forward(*a, **k))[1])
    drawn(ModelReader(model, vocab_size=VOCAB_SIZE), answers())
    first = read[0]  # longest first, in one pass; the prompt of one token has nothing to be read before
    assert len(first) == len(LENGTHS) - 1
    assert sum(ids.shape[1] > 1 for ids in read) == 1


@pytest.mark.parametrize("so_far", [1, 5])
def test_an_answer_goes_on_from_the_tokens_that_are_there(model, so_far):
    begun = [Begun(one.ids, list(one.uniforms)) for one in answers(longest=13) if len(one.uniforms) > so_far]
    whole = drawn(ModelReader(model, vocab_size=VOCAB_SIZE), begun)
    left = [i for i, one in enumerate(whole) if len(one.ids) > so_far]
    assert left
    rest = [Begun((*begun[i].ids, *whole[i].ids[:so_far]), begun[i].uniforms[so_far:]) for i in left]
    for i, more in zip(left, drawn(ModelReader(model, vocab_size=VOCAB_SIZE), rest), strict=True):
        assert whole[i].ids[so_far:] == more.ids
        assert more.logps == pytest.approx(whole[i].logps[so_far:], abs=1e-5)
        assert more.is_whole == whole[i].is_whole


def test_a_mixture_in_any_batch(monkeypatch):
    models = [loaded("qwen3"), loaded("llama", seed=1, hidden_size=48)]

    def mixture():
        readers = [ModelReader(one, vocab_size=VOCAB_SIZE) for one in models]
        return MixtureReader(*readers, alpha=0.3, temperature=0.8)

    begun = answers()
    expected = drawn(mixture(), begun, 0.8)
    monkeypatch.setattr(decoding, "MAX_ROWS", 2)
    assert_same(drawn(mixture(), begun, 0.8), expected)


def test_nothing_to_draw(model):
    assert drawn(ModelReader(model, vocab_size=VOCAB_SIZE), []) == []


def test_its_memory_is_given_back_also_after_a_failure(model, monkeypatch):
    reader = ModelReader(model, vocab_size=VOCAB_SIZE)
    monkeypatch.setattr(reader, "next", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        drawn(reader, answers())
    assert reader._layers == []


@pytest.mark.parametrize("family", sorted({*FAMILIES, "mistral", "qwen2"}))
def test_families_of_the_trainer_have_rows(family):
    assert has_rows(loaded(family).config)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}),
        ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ],
)
def test_a_model_of_those_with_another_kind_of_cache_has_not(family, changes):
    assert not has_rows(loaded(family, **changes).config)


@pytest.mark.slow
def test_a_thousand_answers_are_the_same_at_every_batch_size(model, monkeypatch):
    begun = answers(number=1000, longest=24)
    expected = drawn(ModelReader(model, vocab_size=VOCAB_SIZE), begun)
    for rows in (1, 5, 16, 64):
        monkeypatch.setattr(decoding, "MAX_ROWS", rows)
        assert_same(drawn(ModelReader(model, vocab_size=VOCAB_SIZE), begun), expected)
