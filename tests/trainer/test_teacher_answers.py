"""The teachers' answers: made once, again where they would be others; the agreement with them on every layout."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import oracle
import pytest
import steps
import test_step_invariance as invariance
import tiny
import torch
from test_answer_logps import LAYOUTS

from megatron_opd import config as c
from megatron_opd.core.types import Prompt
from megatron_opd.rollout import embedded_engine
from megatron_opd.tracking.tracker import Tracker
from megatron_opd.trainer.evaluate import Evaluator, teacher_accuracies
from megatron_opd.trainer.preflight import Inputs
from megatron_opd.trainer.reference_nll import as_answer
from megatron_opd.trainer.teacher_answers import ANSWERS_FILE, teacher_answers

WORDS = SimpleNamespace(
    decode=lambda ids: "".join(map(chr, ids)), hf=SimpleNamespace(get_vocab=dict, all_special_ids=[])
)


def answer_of(prompt, ids):
    return replace(as_answer(prompt, ids), origin="teacher")


@pytest.fixture
def asked(monkeypatch):
    """Every question that a teacher's engine got: (model, prompt ids). It says the first letter of its model's name."""
    questions = []

    def engine(model, *, eos_ids, vocab_size):
        def generate(prompts, sampling, on_finished=None):
            questions.extend((model.rsplit("/")[-1], prompt.token_ids) for prompt in prompts)
            return [answer_of(prompt, (ord(model.rsplit("/")[-1][0]), 2)) for prompt in prompts]

        return SimpleNamespace(generate=generate, close=lambda: None)

    monkeypatch.setattr(embedded_engine, "LocalEngine", engine)
    return questions


def place(tmp_path, answers=("m\2", "n\2"), *, max_new_tokens=3):
    """(teachers, evaluator, inputs) of two teachers and a source with a prompt for each of the right answers."""
    for name in ("math", "naming"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(name)
    source = c.SourceConfig(name="a", path="")
    prompts = [
        Prompt(source="a", index=number, text="?", token_ids=(1, number), answer=answer)
        for number, answer in enumerate(answers)
    ]
    config = tiny.config("unused", [], rollout={"max_new_tokens": max_new_tokens})
    data = c.DataConfig(train=[], eval=[source])
    teachers = [c.TeacherConfig(name=name, model=str(tmp_path / name)) for name in ("math", "naming")]
    inputs = Inputs(train=[], eval=[(source, prompts)], eos_ids=(2,), vocab_size=90)
    return teachers, Evaluator(data, config.rewards, config.rollout, config.run, WORDS), inputs


def answers_to(tmp_path, **how):
    return teacher_answers(*place(tmp_path, **how), tmp_path, tracker=Tracker())


def test_teachers_answer_once(tmp_path, asked):
    first = answers_to(tmp_path)
    assert asked == [(name, (1, n)) for name in ("math", "naming") for n in (0, 1)]
    assert [answer.token_ids for answer in first["naming"]] == [(ord("n"), 2)] * 2
    assert answers_to(tmp_path) == first
    assert len(asked) == 4, "the file has them"


def test_other_prompts_lengths_and_models_are_asked_again(tmp_path, asked):
    answers_to(tmp_path)
    answers_to(tmp_path, answers=["m", "n", "o"])
    assert len(asked) == 4 + 6
    answers_to(tmp_path, answers=["m", "n", "o"], max_new_tokens=4)
    assert len(asked) == 10 + 6
    place(tmp_path)
    (tmp_path / "math" / "tokenizer.json").write_text("{}")
    answers_to(tmp_path, answers=["m", "n", "o"], max_new_tokens=4)
    assert [name for name, _ in asked[16:]] == ["math"] * 3


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"math": 3}', '{"math": {"of": "else"}}'])
def test_a_damaged_file_is_made_again(tmp_path, asked, damage):
    first = answers_to(tmp_path)
    (tmp_path / ANSWERS_FILE).write_text(damage)
    assert answers_to(tmp_path) == first
    assert set(json.loads((tmp_path / ANSWERS_FILE).read_text())) == {"math", "naming"}


def test_accuracies_are_those_of_the_answers(tmp_path, asked):
    teachers, evaluator, inputs = place(tmp_path)
    found = teacher_accuracies(evaluator, teacher_answers(teachers, evaluator, inputs, tmp_path, tracker=Tracker()))
    assert found["eval/teacher/math/accuracy/a"] == found["eval/teacher/naming/accuracy/all"] == 0.5


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    made = invariance.model("qwen3", (("vocab_size", 93),))
    return made, tiny.save(made, tmp_path_factory.mktemp("models") / "student")


def wanted(model, answers):
    """Whether each token is the student's likeliest one, by source."""
    model, found = copy.deepcopy(model).double(), {}
    for answer in answers:
        start, ids = len(answer.prompt.token_ids), torch.tensor([[*answer.prompt.token_ids, *answer.token_ids]])
        with torch.no_grad():
            logp = oracle.log_softmax(model(ids).logits[0, start - 1 : -1], invariance.VOCAB_SIZE, 1.0)
        found.setdefault(answer.prompt.source, []).extend((logp.argmax(-1) == ids[0, start:]).tolist())
    return found


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_agreement_is_the_mean_over_all_tokens_of_all_replicas(ranks, student, layout):
    model, directory = student
    made = tiny.rollouts(count=9, vocab_size=invariance.VOCAB_SIZE, sources=("a", "b", "a"), seed=3)
    greedy = [answered(model, rollout) for rollout in made]
    by_source = wanted(model, greedy)
    by_source["all"] = [same for its in by_source.values() for same in its]
    assert all(0 < sum(its) < len(its) for its in by_source.values())
    expected = {f"eval/forced_agreement/t/{name}": sum(its) / len(its) for name, its in by_source.items()}
    size = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("data", 1)
    config = tiny.config(directory, [], student={"vocab_multiple": 4}, train={"steps": 1, "micro_batch_size": 2})
    for found in ranks.run(size, steps.agreement_with_answers, config, {"t": greedy}, invariance.VOCAB_SIZE, **layout):
        assert found == pytest.approx(expected)


def answered(model, rollout):
    """The rollout with the student's likeliest token in every second place, so that some agree."""
    ids = list(rollout.token_ids)
    for at in range(0, len(ids), 2):
        with torch.no_grad():
            logits = model(torch.tensor([[*rollout.prompt.token_ids, *ids[:at]]])).logits[0, -1]
        ids[at] = int(logits[: invariance.VOCAB_SIZE].argmax())
    return answer_of(rollout.prompt, tuple(ids))
