"""Who answers: the choice, the order, what every kind of answer carries, and the mixture of student and teacher."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch

from megatron_opd import config as c
from megatron_opd.core.batching import pack, renormalised
from megatron_opd.core.types import Prompt, Rollout, Sampling
from megatron_opd.rollout.answers import Answers, Choice
from megatron_opd.rollout.embedded_engine import LocalEngine
from megatron_opd.rollout.engines import build_answers
from megatron_opd.rollout.mixed import MixedEngine
from megatron_opd.trainer.experience import teacher_weights
from megatron_opd.trainer.origin_weights import weighted

EOS = (2,)
SAMPLING = Sampling(max_new_tokens=4, temperature=1.0, samples_per_prompt=2, seed=3)
TEACHERS = (
    {"name": "x", "model": "x", "weight": 1.0, "sources": {"b": 0.2}},
    {"name": "y", "model": "y", "weight": 0.5, "sources": {"b": 0.8}},
)


def config(teachers=TEACHERS, seed=7, **answers):
    made = tiny.config("s", teachers)
    return replace(made, run=c.RunConfig(dir="unused", seed=seed), answers=c.AnswersConfig(**answers))


def choice(settings):
    return Choice(answers=settings.answers, teachers=settings.teachers, seed=settings.run.seed)


def prompts(count, source="a"):
    return [
        Prompt(source=source, index=i, text="", token_ids=(10 + i % 50, 11), answer_ids=(20 + i % 50, EOS[0]))
        for i in range(count)
    ]


class Engine:
    """Says who it is, and the first token that it saw."""

    def __init__(self, who):
        self.who, self.closed = who, False

    def generate(self, prompts, sampling, on_finished=None):
        made = [
            Rollout(
                prompt=p, sample=s, token_ids=(self.who, p.token_ids[0]), learnt=(True, True), logps=(-1.0, -1.0),
                finish="stop", versions=(5, 5),
            )
            for p in prompts for s in range(sampling.samples_per_prompt)
        ]  # fmt: skip
        for rollout in made if on_finished else ():
            on_finished(rollout)
        return made

    def metrics(self):
        return {"rollout/requests": 1.0}

    def close(self):
        self.closed = True


def answers(settings, mixed=()):
    teachers = {"x": Engine(101), "y": Engine(102)}
    return Answers(choice(settings), Engine(100), teachers, {name: Engine(200) for name in mixed}, eos_ids=EOS)


@pytest.mark.parametrize("lmbda", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_fraction_of_the_students_answers(lmbda):
    """Of all, and of one prompt over the steps; four standard deviations."""
    settings, count = config(lmbda=lmbda), 4000
    of_step = sum(choice(settings).is_for_student(prompt, 3) for prompt in prompts(count))
    of_prompt = sum(choice(settings).is_for_student(prompts(1)[0], step) for step in range(count))
    width = 4 * (lmbda * (1 - lmbda) * count) ** 0.5
    assert abs(of_step - lmbda * count) <= width
    assert abs(of_prompt - lmbda * count) <= width


def test_the_choice_follows_from_seed_step_and_prompt():
    def drawn(seed, step, source="a"):
        return [choice(config(lmbda=0.5, seed=seed)).is_for_student(p, step) for p in prompts(64, source)]

    assert drawn(7, 3) == drawn(7, 3)
    others = [drawn(7, 4), drawn(8, 3), drawn(7, 3, source="b")]
    assert all(drawn(7, 3) != other for other in others)


def test_the_teacher_that_samples():
    assert choice(config(seq_kd=True)).teacher("a").name == "x"
    assert choice(config(seq_kd=True)).teacher("b").name == "y"
    assert choice(config(seq_kd=True, teacher="y")).teacher("a").name == "y"


@pytest.mark.parametrize("seq_kd", [False, True])
def test_answers_come_in_the_order_of_prompts_whoever_gives_them(seq_kd):
    settings = config(lmbda=0.5, seq_kd=seq_kd)
    asked = [p for pair in zip(prompts(20), prompts(20, "b"), strict=True) for p in pair]
    told = []
    given = answers(settings).to(asked, SAMPLING, 3, told.append)
    assert [(r.prompt, r.sample) for r in given] == [(p, s) for p in asked for s in (0, 1)]
    assert sorted(map(repr, told)) == sorted(map(repr, given))
    for rollout in given:
        if choice(settings).is_for_student(rollout.prompt, 3):
            assert (rollout.origin, rollout.token_ids[0]) == ("student", 100)
        elif seq_kd:
            teacher = {"a": 101, "b": 102}[rollout.prompt.source]
            assert (rollout.origin, rollout.token_ids[0]) == ("teacher", teacher)
        else:
            assert (rollout.origin, rollout.token_ids) == ("dataset", rollout.prompt.answer_ids)
            assert len(rollout.logps) == len(rollout.versions) == len(rollout.token_ids)
    assert {r.origin for r in given} == {"student", "teacher" if seq_kd else "dataset"}


@pytest.mark.parametrize("seq_kd", [False, True])
def test_replicas_together_answer_as_one_does(seq_kd):
    settings, asked = config(lmbda=0.5, seq_kd=seq_kd), prompts(24)
    whole = answers(settings).to(asked, SAMPLING, 3, lambda _: None)
    for size in (2, 4):
        for rank in range(size):
            part = answers(settings).to(asked[rank::size], SAMPLING, 3, lambda _: None)
            assert part == [r for i in range(rank, 24, size) for r in whole[2 * i : 2 * i + 2]]


def test_a_sampling_teacher_sees_its_own_prompt_and_the_rollout_has_the_students():
    settings = config(lmbda=0.0, seq_kd=True)
    asked = [replace(p, teacher_ids={"x": (77, 78, 79)}) for p in prompts(3)]
    asked.append(replace(asked[1], repeat=1))
    told = []
    given = answers(settings).to(asked, SAMPLING, 0, told.append)
    assert {r.token_ids for r in given} == {(101, 77)}
    assert [r.prompt for r in given] == [r.prompt for r in told] == [p for p in asked for _ in (0, 1)]


def test_mixed_sampling_is_by_the_teacher_of_the_source():
    settings = config(teacher_mixed_alpha=0.2)
    given = answers(settings, mixed=("x",)).to(prompts(2), SAMPLING, 0, lambda _: None)
    assert {(r.origin, r.token_ids[0]) for r in given} == {("student", 200)}


def test_metrics_and_the_end_of_teachers():
    ours = answers(config(seq_kd=True))
    assert ours.metrics() == {"answers/requests": 2.0}
    ours.close()
    assert all(teacher.closed for teacher in ours.teachers.values())
    assert not ours.engine.closed  # the loop's


def test_an_answer_that_was_cut():
    cut = replace(prompts(1)[0], answer_ids=(20, 21))
    (given,) = answers(config(lmbda=0.0)).to([cut], replace(SAMPLING, samples_per_prompt=1), 0, lambda _: None)
    assert given.finish == "length"


# What is learnt on them.


def three(origins=("student", "teacher", "dataset")):
    return [replace(tiny.rollout((5,), (6,) * n, index=n), origin=o) for n, o in enumerate(origins, start=1)]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_weights_by_token(micro_batch_size):
    settings = config(lmbda=0.5, sft_alpha=0.3, distill_alpha=0.6)
    rollouts = three()
    plain = pack(rollouts, micro_batch_size=micro_batch_size, length_multiple=1, device=torch.device("cpu"))
    made = weighted(settings.answers, plain, rollouts, [[1.0]] * 3)
    torch.testing.assert_close(torch.cat([b.weight("distill") for b in made]), torch.tensor([1.0, *[0.6] * 5]))
    torch.testing.assert_close(torch.cat([b.weight("sft") for b in made]), torch.tensor([0.0, *[0.3] * 5]))
    assert torch.cat([b.on_policy_T for b in made]).tolist() == [True, *[False] * 5]


@pytest.mark.parametrize(
    ("settings", "has_others"), [({}, False), ({"lmbda": 0.5}, True), ({"teacher_mixed_alpha": 0.5}, True)]
)
def test_nobody_else_is_asked_where_the_student_alone_answers(settings, has_others):
    assert config(**settings).answers.has_others == has_others


@pytest.mark.parametrize("teachers", [TEACHERS, ()])
def test_no_teacher_is_asked_about_answers_that_are_not_distilled(teachers):
    settings = config(teachers, lmbda=0.5, sft_alpha=1.0, distill_alpha=0.0)
    student, *others = three()
    by_source = {student.prompt.source: settings.teacher_weights(student.prompt.source)}
    weights = [teacher_weights(by_source, settings.answers, r) for r in (student, *others)]
    assert [any(w) for w in weights] == [bool(teachers), False, False]
    weights = weights[1:]
    assert renormalised(others, weights, [[None, None]] * len(teachers)) == weights
    plain = pack(others, micro_batch_size=2, length_multiple=1, device=torch.device("cpu"))
    (made,) = weighted(settings.answers, plain, others, weights)
    assert made.weight("distill").tolist() == [0.0] * 5
    assert made.weight("sft").tolist() == [1.0] * 5


# The mixture.

ALPHA, VOCAB_SIZE = 0.3, 90


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {"s": tiny.build("qwen3"), "x": tiny.build("llama", seed=1, hidden_size=48)}
    return {name: (model, tiny.save(model, root / name)) for name, model in made.items()}


@torch.no_grad()
def mixture(models, ids, temperature):
    """Log-probabilities [len(ids), VOCAB_SIZE] of the mixture after each position, dense and in float64."""
    logits = [m(torch.tensor([ids])).logits[0, :, :VOCAB_SIZE].double() for m, _ in models.values()]
    student, teacher = [torch.softmax(z / temperature, -1) for z in logits]
    return torch.log((1 - ALPHA) * student + ALPHA * teacher)


def mixed_engine(models):
    student, teacher = (LocalEngine(path, eos_ids=EOS, vocab_size=VOCAB_SIZE) for _, path in models.values())
    return MixedEngine(student, teacher, alpha=ALPHA)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_mixed_answers_have_the_mixtures_log_probabilities(models, temperature):
    asked = [r.prompt for r in tiny.rollouts(count=6, longest_prompt=4)]
    sampling = Sampling(max_new_tokens=7, temperature=temperature, samples_per_prompt=3, seed=1)
    for answer in mixed_engine(models).generate(asked, sampling):
        start = len(answer.prompt.token_ids)
        logp = mixture(models, [*answer.prompt.token_ids, *answer.token_ids], temperature)
        expected = [logp[start - 1 + r, token].item() for r, token in enumerate(answer.token_ids)]
        assert answer.logps == pytest.approx(expected, abs=2e-4)


def test_mixed_answers_are_drawn_from_the_mixture(models):
    """First tokens of 20,000 answers: the likeliest ones as often as the mixture says, within four deviations."""
    prompt = Prompt(source="a", index=0, text="", token_ids=(7, 8, 9))
    count = 20_000
    sampling = Sampling(max_new_tokens=1, temperature=1.0, samples_per_prompt=count, seed=11)
    drawn = torch.tensor([a.token_ids[0] for a in mixed_engine(models).generate([prompt], sampling)])
    p = mixture(models, prompt.token_ids, 1.0)[-1].exp()
    seen = torch.bincount(drawn, minlength=VOCAB_SIZE) / count
    top = p.topk(10).indices
    assert ((seen[top] - p[top]).abs() <= 4 * (p[top] * (1 - p[top]) / count).sqrt()).all()


def test_the_student_in_the_mixture_is_the_one_that_learns(models):
    engine = mixed_engine(models)
    other = tiny.build("qwen3", seed=5)
    engine.student.load(iter([(n, p.detach()) for n, p in other.named_parameters()]), version=4)
    prompt = Prompt(source="a", index=0, text="", token_ids=(7, 8, 9))
    (answer,) = engine.generate([prompt], Sampling(max_new_tokens=1, temperature=1.0))
    logp = mixture({"s": (other, ""), "x": models["x"]}, prompt.token_ids, 1.0)[-1]
    assert answer.logps[0] == pytest.approx(logp[answer.token_ids[0]].item(), abs=1e-4)
    assert answer.versions == (4,)


def test_models_that_sample_are_loaded_once_and_only_where_needed(models, monkeypatch):
    loaded = []

    def load(self, model_dir, **_):
        loaded.append(model_dir)
        self.model, self.eos_ids, self.vocab_size, self.has_weights = SimpleNamespace(), EOS, VOCAB_SIZE, True

    monkeypatch.setattr(LocalEngine, "__init__", load)
    student = LocalEngine("s")
    for expected, settings in [
        ([], {}),
        ([], {"lmbda": 0.5}),
        (["x"], {"lmbda": 0.5, "seq_kd": True}),
        (["y"], {"teacher_mixed_alpha": 0.5, "teacher": "y"}),
    ]:
        loaded.clear()
        made = replace(config(**settings), data=c.DataConfig(train=[c.SourceConfig(name="a", path="")]))
        built = build_answers(made, student, eos_ids=EOS, vocab_size=VOCAB_SIZE)
        assert loaded == expected
        assert sorted(built.mixed) == (expected if "teacher_mixed_alpha" in settings else [])


def test_a_teacher_without_weights_for_the_engine(tmp_path):
    tiny.hf_config("qwen3").save_pretrained(tmp_path)
    made = config([{"name": "x", "model": str(tmp_path)}], seq_kd=True, lmbda=0.0)
    made = replace(made, data=c.DataConfig(train=[c.SourceConfig(name="a", path="")]))
    with pytest.raises(ValueError, match=r"teacher 'x' is to sample, but .* is a Megatron checkpoint"):
        build_answers(made, Engine(0), eos_ids=EOS, vocab_size=VOCAB_SIZE)
