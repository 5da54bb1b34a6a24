"""The embedded engine against transformers: greedy text, log-probabilities, frequencies, stops, weight loading."""

import hashlib
from dataclasses import replace
from statistics import mode

import pytest
import tiny
import torch
from safetensors.torch import load_file

from megatron_opd.core.types import Prompt, Sampling
from megatron_opd.rollout.embedded_engine import LocalEngine

EOS, VOCAB_SIZE = (2, 5), 90  # of the model's 96 entries


@pytest.fixture(scope="module")
def model():
    return tiny.build("qwen3")


@pytest.fixture(scope="module")
def model_dir(model, tmp_path_factory):
    return tiny.save(model, tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture
def engine(model_dir):
    return LocalEngine(model_dir, eos_ids=EOS, vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def prompts():
    return [r.prompt for r in tiny.rollouts(count=7, longest_prompt=5)]


@torch.no_grad()
def next_logp(model, ids, temperature):
    """Log-probabilities [len(ids), VOCAB_SIZE] of what follows each position, by one full forward pass."""
    logits = model(torch.tensor([ids])).logits[0, :, :VOCAB_SIZE].double()
    return torch.log_softmax(logits / temperature, -1)


def test_greedy_is_transformers_greedy(engine, model, prompts):
    answers = engine.generate(prompts, Sampling(max_new_tokens=12, temperature=0))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt.token_ids])
        suppressed = list(range(VOCAB_SIZE, model.config.vocab_size))
        out = model.generate(
            ids, max_new_tokens=12, do_sample=False, eos_token_id=list(EOS), pad_token_id=0, suppress_tokens=suppressed
        )
        assert answer.token_ids == tuple(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0, 1.8])
def test_behaviour_logps_are_those_of_a_full_forward(engine, model, prompts, temperature):
    sampling = Sampling(max_new_tokens=9, temperature=temperature, samples_per_prompt=2, seed=3)
    for answer in engine.generate(prompts, sampling):
        start = len(answer.prompt.token_ids)
        logp = next_logp(model, [*answer.prompt.token_ids, *answer.token_ids], temperature or 1.0)
        expected = [logp[start - 1 + r, token].item() for r, token in enumerate(answer.token_ids)]
        assert answer.logps == pytest.approx(expected, abs=2e-5)


def assert_drawn_from(tokens, logp):
    """Pearson's statistic has as mean the degrees of freedom, and as variance twice those."""
    seen = torch.bincount(torch.tensor(tokens), minlength=96).double()
    assert seen[VOCAB_SIZE:].sum() == 0
    expected = len(tokens) * logp.exp()
    rare = expected < 10
    assert rare.any()
    seen = torch.cat([seen[:VOCAB_SIZE][~rare], seen[:VOCAB_SIZE][rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic, freedom = ((seen - expected) ** 2 / expected).sum().item(), len(expected) - 1
    assert freedom >= 10
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_frequencies_follow_the_distribution(engine, model, temperature):
    """Of first tokens, and of second tokens after the most frequent first one: positions are independent draws."""
    prompt = Prompt(source="a", index=0, text="", token_ids=(7, 8, 9))
    sampling = Sampling(max_new_tokens=2, temperature=temperature, samples_per_prompt=20_000, seed=11)
    answers = [a.token_ids for a in engine.generate([prompt], sampling)]
    assert_drawn_from([ids[0] for ids in answers], next_logp(model, prompt.token_ids, temperature)[-1])
    first = mode(ids[0] for ids in answers if len(ids) == 2)
    after = next_logp(model, [*prompt.token_ids, first], temperature)[-1]
    assert_drawn_from([ids[1] for ids in answers if ids[0] == first], after)


def test_random_numbers_differ_by_seed_prompt_and_sample(engine):
    prompts = [Prompt(source=s, index=i, text="", token_ids=(7, 8)) for s in "ab" for i in (0, 1)]
    answers = []
    for seed in (0, 1):
        sampling = Sampling(max_new_tokens=6, temperature=3.0, samples_per_prompt=3, seed=seed)
        answers += engine.generate(prompts, sampling)
    assert len({a.token_ids for a in answers}) == 24


def test_a_prompt_that_is_drawn_again_gets_other_answers(engine):
    prompt = Prompt(source="a", index=0, text="", token_ids=(7, 8))
    sampling = Sampling(max_new_tokens=6, temperature=3.0, samples_per_prompt=3, seed=1)
    thrice = [replace(prompt, repeat=n) for n in range(3)]
    answers = engine.generate(thrice, sampling)
    assert len({a.token_ids for a in answers}) == 9
    assert [a.prompt for a in answers] == [p for p in thrice for _ in range(3)]
    alone = engine.generate([prompt], sampling)
    assert [a.token_ids for a in answers[:3]] == [a.token_ids for a in alone]


def test_seeds_are_those_of_runs_without_repeats():
    """Which began with this text."""
    prompt, sampling = Prompt(source="a", index=4, text="", token_ids=(7,)), Sampling(max_new_tokens=1, temperature=1)
    first = hashlib.blake2b(b"0/a/4/2", digest_size=8).digest()
    assert sampling.seed_of(prompt, 2) == int.from_bytes(first, "big") // 2
    assert sampling.seed_of(replace(prompt, repeat=1), 2) != sampling.seed_of(prompt, 2)


def test_a_rollout_does_not_depend_on_its_company(engine, prompts):
    sampling = Sampling(max_new_tokens=8, temperature=1.0, samples_per_prompt=2, seed=5)
    together = engine.generate(prompts, sampling)
    assert [(r.prompt, r.sample) for r in together] == [(p, s) for p in prompts for s in (0, 1)]
    backwards = engine.generate(prompts[::-1], sampling)
    alone = [r for p in prompts for r in engine.generate([p], sampling)]
    by_key = {(r.prompt, r.sample): r for r in backwards}
    for one, other in zip(together, alone, strict=True):
        for same in (other, by_key[one.prompt, one.sample]):
            assert one.token_ids == same.token_ids
            assert one.logps == pytest.approx(same.logps, abs=1e-5)


def test_first_eos_is_kept_and_ends_the_answer(engine, prompts):
    answers = engine.generate(prompts, Sampling(max_new_tokens=40, temperature=2.0, samples_per_prompt=20, seed=1))
    assert {a.finish for a in answers} == {"stop", "length"}
    for answer in answers:
        assert len(answer.logps) == len(answer.token_ids)
        assert not set(EOS) & set(answer.token_ids[:-1])
        assert (answer.token_ids[-1] in EOS) == (answer.finish == "stop")
        assert answer.finish == "stop" or len(answer.token_ids) == 40
    assert {a.token_ids[-1] for a in answers if a.finish == "stop"} == set(EOS)


def test_ids_beyond_the_vocabulary_are_never_sampled(engine, model):
    """Even when they are the most likely ones."""
    weights = dict(model.named_parameters())
    head = weights["lm_head.weight"].detach().clone()
    head[VOCAB_SIZE:] *= 20
    engine.load(iter([(n, head if n == "lm_head.weight" else w.detach()) for n, w in weights.items()]), version=1)
    prompts = [Prompt(source="a", index=i, text="", token_ids=(i + 10, 3)) for i in range(8)]
    for temperature in (0, 1.0, 4.0):
        for answer in engine.generate(prompts, Sampling(max_new_tokens=10, temperature=temperature)):
            assert max(answer.token_ids) < VOCAB_SIZE
            assert min(answer.logps) > -60


def test_load_replaces_weights_and_version(engine, prompts):
    other = tiny.build("qwen3", seed=9)
    greedy = Sampling(max_new_tokens=6, temperature=0)
    assert {v for r in engine.generate(prompts, greedy) for v in r.versions} == {0}
    engine.load(((n, p.detach()) for n, p in other.named_parameters()), version=7)
    answers = engine.generate(prompts, greedy)
    assert {v for r in answers for v in r.versions} == {7}
    for answer in answers:
        logp = next_logp(other, [*answer.prompt.token_ids, *answer.token_ids], 1.0)
        start = len(answer.prompt.token_ids) - 1
        assert logp[start : start + len(answer.token_ids)].argmax(-1).tolist() == list(answer.token_ids)


def test_load_of_half_precision_weights(engine, model):
    engine.load(((n, p.detach().bfloat16()) for n, p in model.named_parameters()), version=1)
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name].bfloat16().float())


def test_load_of_a_tied_model(tmp_path):
    model = tiny.build("qwen3_tied")
    engine = LocalEngine(tiny.save(model, tmp_path / "tied"), eos_ids=EOS, vocab_size=VOCAB_SIZE)
    other = tiny.build("qwen3_tied", seed=4)
    engine.load(((n, p.detach()) for n, p in other.named_parameters()), version=1)
    ids = torch.tensor([[4, 9, 11]])
    torch.testing.assert_close(engine.model(ids).logits, other(ids).logits)


def test_load_of_a_mixture_of_experts(tmp_path):
    """Experts come one by one, as files have them."""
    engine = LocalEngine(tiny.save(tiny.build("qwen3_moe"), tmp_path / "a"), eos_ids=EOS, vocab_size=VOCAB_SIZE)
    other = tiny.build("qwen3_moe", seed=4)
    weights = load_file(f"{tiny.save(other, tmp_path / 'b')}/model.safetensors")
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in weights
    engine.load(iter(weights.items()), version=1)
    ids = torch.tensor([[4, 9, 11]])
    torch.testing.assert_close(engine.model(ids).logits, other(ids).logits)
    del weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(ValueError, match=r"did not arrive.*experts\.3\.up_proj"):
        engine.load(iter(weights.items()), version=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {**w, "model.extra": torch.zeros(2)}, "no weight 'model.extra'"),
        (lambda w: {n: t for n, t in w.items() if n != "model.norm.weight"}, "did not arrive.*model.norm.weight"),
        (lambda w: {**w, "model.norm.weight": torch.ones(31)}, r"model.norm.weight.*\[31\], not \[32\]"),
        (lambda w: {**w, "model.norm.weight": torch.ones(1)}, r"model.norm.weight.*\[1\], not \[32\]"),
    ],
    ids=["unknown", "missing", "wrong shape", "shape that would be broadcast"],
)
def test_load_refuses(engine, model, change, message):
    weights = {n: p.detach() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        engine.load(iter(change(weights).items()), version=1)
    assert engine.version == 0


def test_in_bf16_it_says_what_the_rounded_model_says(model, model_dir, prompts):
    engine = LocalEngine(model_dir, eos_ids=EOS, vocab_size=VOCAB_SIZE, dtype="bf16")
    rounded = tiny.build("qwen3").to(torch.bfloat16)
    worst = 0.0
    for answer in engine.generate(prompts, Sampling(max_new_tokens=9, samples_per_prompt=2, temperature=1.0, seed=3)):
        ids, start = [*answer.prompt.token_ids, *answer.token_ids], len(answer.prompt.token_ids)
        at = torch.arange(start - 1, len(ids) - 1), torch.tensor(answer.token_ids)
        found = torch.tensor(answer.logps, dtype=torch.float64)
        torch.testing.assert_close(found, next_logp(rounded, ids, 1.0)[at], atol=0.3, rtol=0)  # sums in another order
        worst = max(worst, (found - next_logp(model, ids, 1.0)[at]).abs().max().item())
    assert worst > 1e-3  # not the model in fp32


def test_in_bf16_it_takes_new_weights_rounded(model_dir):
    engine = LocalEngine(model_dir, eos_ids=EOS, vocab_size=VOCAB_SIZE, dtype="bf16")
    new = {name: torch.randn_like(tensor) for name, tensor in load_file(f"{model_dir}/model.safetensors").items()}
    engine.load(iter(new.items()), version=3)
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, new[name].to(torch.bfloat16))
