"""A teacher with another tokenizer through the real step: the loss, its gradient and the next weights on every layout
are those of a dense float64 re-derivation with transformers' models."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import two_cuts

from megatron_opd import config as c
from megatron_opd.loss.crosstok.align import Translator
from megatron_opd.loss.crosstok.pieces import read_pieces
from megatron_opd.models.tokenizer import load_tokenizer

SIZES = {"student": 341, "teacher": 403}  # more entries than tokens, and than tensor parallelism divides
TEXTS = ["the lazy fox costs 12 €", "def add(a, b):", "12+34=46", "naïve café 🙂"]
LAYOUTS = {"tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "tp2_sequence": {"tensor": 2, "sequence": True}}
CASES = {
    "jsd_first": ({"beta": 0.4, "chunk_tokens": 5}, {}),
    "reverse_last": ({"beta": 1.0, "temperature": 1.5}, {"merge": "last", "adaptive": False, "matched_weight": 0.7}),
    "plain": ({"beta": 0.0}, {"hybrid": False}),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {
        "student": tiny.build("qwen3", vocab_size=SIZES["student"], eos_token_id=0),
        "teacher": tiny.build("llama", vocab_size=SIZES["teacher"], eos_token_id=0, seed=3),
    }
    paths = {name: tiny.save(model, root / name) for name, model in made.items()}
    two_cuts.byte_level(Path(paths["student"]))
    two_cuts.sentencepiece(Path(paths["teacher"]), vocab_size=390)
    return paths


def config(paths, loss, how, **parallel):
    teachers = [{"name": "other", "model": paths["teacher"], "tokenizer": "own"}]
    student = {"vocab_multiple": parallel.get("tensor", 1)}
    optim = {"lr": 1e-2, "eps": 1e-2, "clip_grad": 0.0}
    made = tiny.config(paths["student"], teachers, loss=loss, optim=optim, student=student, parallel=parallel)
    return dataclasses.replace(made, cross_tokenizer=c.CrossTokenizerConfig(**how))


def rollouts(paths):
    tokenizer = load_tokenizer(paths["student"])
    made = []
    for i, text in enumerate(TEXTS):
        prompt, answer = tokenizer.encode_all([f"prompt {i}: ", text], add_special_tokens=False)
        ids = [*answer, tokenizer.eos_ids[0]] if i % 2 else answer
        one = tiny.rollout(prompt, ids, index=i)
        theirs = load_tokenizer(paths["teacher"]).encode(f"prompt {i}: ")
        seen = {"text": f"prompt {i}: ", "teacher_ids": {"other": tuple(theirs)}}
        made.append(dataclasses.replace(one, prompt=dataclasses.replace(one.prompt, **seen)))
    return made


def built(parallel, config, rollouts):
    """(student, objective, scored micro-batches) of a rank."""
    from megatron_opd.student.student import Student
    from megatron_opd.teachers import build_teachers
    from megatron_opd.trainer.build_objective import build_objective
    from megatron_opd.trainer.experience import Experience

    student = Student(config, parallel)
    vocab = student.vocab_shard(SIZES["student"])
    teachers = build_teachers(config, parallel, vocab)
    objective = build_objective(config, vocab, teachers)
    return student, objective, Experience(config, parallel, teachers, None).score(rollouts)


def step(parallel, config, rollouts):
    student, objective, batches = built(parallel, config, rollouts)
    metrics = student.step(batches, objective)
    return metrics, {name: tensor.clone() for name, tensor in student.export()}


def told(parallel, config, rollouts):
    from megatron_opd.trainer.completions import answer_logps

    _, objective, batches = built(parallel, config, rollouts)
    return answer_logps(objective.distillation, batches, len(rollouts), parallel)


def told_by_token(parallel, config, rollouts):
    from megatron_opd.trainer import token_tables

    student, objective, batches = built(parallel, config, rollouts)
    how = {"rollouts": rollouts, "batches": batches, "parallel": parallel}
    return token_tables.measured(student, objective.distillation, **how)[1]


def spoilt_step(parallel, config, rollouts):
    """Why a step is skipped whose teacher said NaN at the second micro-batch's last token but one; and which of the
    student's tokens has the same end."""
    student, objective, batches = built(parallel, config, rollouts)
    score, at = batches[1].teachers[0], None
    if score is not None:
        score.hidden_QD[-2] = float("nan")
        (ends,) = [stop - 1 for _, stop, first, last in score.spans_G4.tolist() if first <= len(score.ids_Q) - 2 < last]
        at = divmod(batches[1].predicted_at_T[ends].item() + 1, batches[1].tokens_BS.shape[1])
    student.step(batches, objective)
    return student.skipped, at


class Dense:
    """The loss of `crosstok/uld.py`, span by span in float64 over whole vocabularies."""

    def __init__(self, paths, loss, how):
        from transformers import AutoModelForCausalLM

        self.models = [
            AutoModelForCausalLM.from_pretrained(paths[name], attn_implementation="eager").double()
            for name in ("student", "teacher")
        ]
        self.loss, self.how = c.LossConfig(**loss), c.CrossTokenizerConfig(**how)
        ours, theirs = (load_tokenizer(paths[name]) for name in ("student", "teacher"))
        self.tokenizers = ours, theirs
        self.pieces = read_pieces(ours), read_pieces(theirs)
        self.translator = Translator(ours, self.pieces[0], theirs, self.pieces[1])

    def pairs(self):
        """Ids of the same bytes, and the ends."""
        known = self.pieces[1].ids()
        same = [(i, known[piece]) for piece, i in self.pieces[0].ids().items() if piece in known]
        return [*same, (self.tokenizers[0].eos_ids[0], self.tokenizers[1].eos_ids[0])] if self.how.hybrid else []

    def rows(self, model, prompt, ids):
        whole = torch.tensor([[*prompt, *ids]])
        logits = model(whole).logits[0, len(prompt) - 1 : -1]
        return (logits / self.loss.temperature).softmax(-1)

    def __call__(self, rollout):
        ids = list(rollout.token_ids)
        said = self.translator.translate(ids, (True,) * len(ids))
        theirs, spans = said.ids, said.spans
        their_prompt = self.tokenizers[1].encode(rollout.prompt.text)
        q_RV = self.rows(self.models[0], rollout.prompt.token_ids, ids)
        with torch.no_grad():
            p_QV = self.rows(self.models[1], their_prompt, theirs)
        assert spans
        return sum(self.span(q_RV, ids, span[:2], p_QV, theirs, span[2:]) for span in spans)

    def merged(self, rows, ids, span):
        kept = span[0] if self.how.merge == "first" else span[1] - 1
        others = [rows[i, ids[i]] for i in range(*span) if i != kept]
        return rows[kept] * torch.stack(others).prod() if others else rows[kept]

    def span(self, q_RV, ids, span, p_QV, theirs, their_span):
        q, p = self.merged(q_RV, ids, span), self.merged(p_QV, theirs, their_span)
        pairs = self.pairs()
        ours, other = [i for i, _ in pairs], [j for _, j in pairs]
        q_all = torch.cat([q[ours], (1 - q[ours].sum())[None]])
        p_all = torch.cat([p[other], (1 - p[other].sum())[None]])
        given = len(pairs) / len(p) if self.how.adaptive else self.how.matched_weight
        weight = given if self.how.hybrid else 0.0
        beta = self.loss.beta
        m = beta * p_all + (1 - beta) * q_all
        if weight == 0:
            matched = q.sum() * 0
        elif beta == 1:
            matched = (q_all * (q_all / p_all).log()).sum()
        else:
            matched = beta * (p_all * (p_all / m).log()).sum() + (1 - beta) * (q_all * (q_all / m).log()).sum()
        keep = [x for i, x in enumerate(q.unbind()) if i not in set(ours)]
        their_keep = [x for j, x in enumerate(p.unbind()) if j not in set(other)]
        size = max(len(keep), len(their_keep))
        keep, their_keep = (
            torch.cat([torch.stack(x).sort(descending=True).values, torch.zeros(size - len(x))])
            if x
            else torch.zeros(size)
            for x in (keep, their_keep)
        )
        return weight * matched + (1 - weight) * (keep - their_keep).abs().sum()


TURNS = [
    [("so 12+34 is ", 0), ("46; 12", 1), ("that is right", 0)],
    [("the fox", 1), (" costs; a tool says 34", 0), ("and the lazy dog", 1)],
    [(" a b c", 0), ("x", 1)],
    [("return a", 1), (" + b", 0), ("def add", 1), (";", 0)],
]
"""(text, whether it is learnt) turn by turn, plain ASCII; odd ones end their learnt turns with the end of sequence."""


def trajectories(paths):
    tokenizer = load_tokenizer(paths["student"])
    made = []
    for i, (turns, one) in enumerate(zip(TURNS, rollouts(paths), strict=True)):
        cuts = tokenizer.encode_all([text for text, _ in turns], add_special_tokens=False)
        ends = [tokenizer.eos_ids[0]] * (i % 2)
        cuts = [[*ids, *ends] if is_learnt else ids for ids, (_, is_learnt) in zip(cuts, turns, strict=True)]
        learnt = [is_learnt for ids, (_, is_learnt) in zip(cuts, turns, strict=True) for _ in ids]
        masked = tiny.rollout((1,), [t for ids in cuts for t in ids], learnt=learnt)
        made.append(dataclasses.replace(masked, prompt=one.prompt))
    return made


class DenseTurns(Dense):
    """The same of trajectories: each turn is cut on its own, and positions count all tokens, learnt or not."""

    def ends(self, tokenizer, ids):
        """Where each token ends in the text of a turn, in characters."""
        return [len(tokenizer.hf.decode(ids[: i + 1])) for i in range(len(ids))]

    def __call__(self, rollout):
        turns = TURNS[rollout.prompt.index]
        ids, theirs, spans = list(rollout.token_ids), [], []
        at = 0
        for text, is_learnt in turns:
            (ours,), (other,) = (t.encode_all([text], add_special_tokens=False) for t in self.tokenizers)
            one, two = self.ends(self.tokenizers[0], ours), self.ends(self.tokenizers[1], other)
            before = 0, 0
            for end in sorted({*one} & {*two}) if is_learnt else []:
                here = one.index(end) + 1, two.index(end) + 1
                spans.append((at + before[0], at + here[0], len(theirs) + before[1], len(theirs) + here[1]))
                before = here
            at += len(ours)
            theirs += other
            if is_learnt and rollout.prompt.index % 2:
                spans.append((at, at + 1, len(theirs), len(theirs) + 1))
                theirs.append(self.tokenizers[1].eos_ids[0])
                at += 1
        assert at == len(ids)
        q_RV = self.rows(self.models[0], rollout.prompt.token_ids, ids)
        with torch.no_grad():
            p_QV = self.rows(self.models[1], self.tokenizers[1].encode(rollout.prompt.text), theirs)
        return sum(self.span(q_RV, ids, span[:2], p_QV, theirs, span[2:]) for span in spans)


@pytest.mark.parametrize(
    ("case", "layout", "packing"),
    [("jsd_first", {"tensor": 2}, False), ("reverse_last", {"pipeline": 2}, True)],
    ids=["tp2", "packed pp2"],
)
def test_context_is_read_and_not_learnt(ranks, paths, case, layout, packing):
    loss, how = CASES[case]
    made = trajectories(paths)
    value, norm, weights = expected(paths, loss, how, made, dense=DenseTurns)
    settings = config(paths, loss, how, **layout)
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, packing=packing))
    for metrics, exported in ranks.run(2, step, settings, made, **layout):
        assert metrics["loss"] == pytest.approx(value, rel=2e-5)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert metrics["num_tokens"] == sum(sum(r.learnt) for r in made)
        assert metrics["uld/other/aligned_frac"] == 1
        for name, tensor in exported.items():
            torch.testing.assert_close(tensor.double(), weights[name], atol=2e-6, rtol=2e-5)


def expected(paths, loss, how, made, dense=Dense):
    """(loss by token, gradient norm, weights after one step of Adam)."""
    dense = dense(paths, loss, how)
    student = dense.models[0]
    adam = torch.optim.AdamW(student.parameters(), lr=1e-2, eps=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    total = sum(dense(rollout) for rollout in made) / sum(sum(r.learnt) for r in made)
    total.backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
    adam.step()
    return total.item(), norm.item(), copy.deepcopy(student.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_that_of_the_dense_formula(ranks, paths, case):
    loss, how = CASES[case]
    made = rollouts(paths)
    value, norm, weights = expected(paths, loss, how, made)
    for layout in [{}, *(LAYOUTS.values() if case == "jsd_first" else [LAYOUTS["tp2"]])]:
        size = layout.get("tensor", 1) * layout.get("pipeline", 1)
        results = ranks.run(size, step, config(paths, loss, how, **layout), made, **(layout or {"tensor": 1}))
        metrics, exported = results[0]
        assert metrics["loss"] == pytest.approx(value, rel=2e-5), layout
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4), layout
        assert metrics["uld/other/aligned_frac"] == 1
        for name, tensor in exported.items():
            torch.testing.assert_close(tensor.double(), weights[name], atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("layout", [{"tensor": 1}, *LAYOUTS.values()], ids=["alone", *LAYOUTS])
def test_its_log_probabilities_of_whole_answers(ranks, paths, layout):
    loss, how = CASES["jsd_first"]
    dense, wanted = Dense(paths, loss, how), []
    for rollout in rollouts(paths):
        said = dense.translator.translate(rollout.token_ids, rollout.learnt)
        ids, spans = said.ids, said.spans
        with torch.no_grad():
            p_QV = dense.rows(dense.models[1], dense.tokenizers[1].encode(rollout.prompt.text), ids)
        assert spans[-1][3] == len(ids)  # nothing of the answer is outside of spans
        wanted.append(sum(p_QV[i, token].log().item() for i, token in enumerate(ids)))
    size = layout.get("tensor", 1) * layout.get("pipeline", 1)
    for found in ranks.run(size, told, config(paths, loss, how, **layout), rollouts(paths), **layout):
        assert [row["other"] for row in found] == pytest.approx(wanted, rel=2e-5)
    if layout == LAYOUTS["tp2"]:  # of single tokens it knows the ends of spans
        for found in ranks.run(2, told_by_token, config(paths, loss, how, **layout), rollouts(paths), **layout):
            assert [np.nansum(its["logp/other"]) for its in found] == pytest.approx(wanted, rel=2e-5)
            assert all(np.isnan(its["kl"]).all() and not np.isnan(its["logp"]).any() for its in found)


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_a_teacher_that_says_nan_is_named(ranks, paths, layout):
    answers = ranks.run(2, spoilt_step, config(paths, {}, {}, **layout), rollouts(paths), **layout)
    (why, _), (same, (row, position)) = answers
    assert why == same
    assert f"micro-batch 1, row {row}, position {position} (not finite: what teacher 'other' told)" in why
