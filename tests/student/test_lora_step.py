"""LoRA through the real step: gradients and steps are those of plain torch with adapters on transformers' modules, on
every layout; the base stays as it was; what is exported is what was trained."""

import copy
from functools import cache

import pairwise
import pytest
import steps
import tiny
import torch

from megatron_opd.config import LoraConfig
from megatron_opd.models.lora_layout import facts

VOCAB_SIZE = 90
NUM_STEPS = 3
RANK, ALPHA = 3, 7.0
STUDENTS = {
    "qwen3": {"vocab_size": 93},
    "qwen2": {},  # tied, biases
    "qwen3_moe": {"norm_topk_prob": True},
}
TEACHER = ("llama", {"hidden_size": 48, "vocab_size": 101, "num_hidden_layers": 4})
OPTIM = {"lr": 3e-2, "weight_decay": 0.1, "clip_grad": 0.05, "eps": 1e-2}  # see test_step_invariance.py
ATTENTION = ["qkv", "o_proj"]


class Adapted(torch.nn.Module):
    """A linear layer and what LoRA's paper adds to it."""

    def __init__(self, base, a, b):
        super().__init__()
        self.base, self.lora_A, self.lora_B = base, torch.nn.Parameter(a.double()), torch.nn.Parameter(b.double())

    def forward(self, x):
        return self.base(x) + ALPHA / RANK * (x @ self.lora_A.T @ self.lora_B.T)


def dense(model, adapters):
    """A copy of a transformers model whose only parameters are adapters, by the tensors of a peft file."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            del module._parameters[name]
            module.register_buffer(name, parameter.detach())
    names = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in adapters if "_A." in name
    }
    for name in names:
        parent, _, child = name.rpartition(".")
        a, b = (adapters[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        setattr(model.get_submodule(parent), child, Adapted(model.get_submodule(name), a, b))
    return model


def adapters_of(model):
    """The adapters of `dense`, named as in a peft file."""
    return {f"base_model.model.{name}.weight": p for name, p in model.named_parameters()}


@cache
def model(family):
    return tiny.build(family, **STUDENTS[family])


@cache
def teacher():
    return tiny.build(TEACHER[0], **TEACHER[1])


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {**{f: tiny.save(model(f), root / f) for f in STUDENTS}, "teacher": tiny.save(teacher(), root / "teacher")}


def config(paths, family, targets=(), *, dtype="fp32", recompute="none", micro_batch_size=2, packing=False, **optim):
    return tiny.config(
        paths[family],
        [{"name": "t", "model": paths["teacher"]}],
        student={"dtype": dtype, "recompute": recompute, "vocab_multiple": 4},
        lora={"rank": RANK, "alpha": ALPHA, "targets": list(targets)},
        optim={**OPTIM, **optim},
        train={"steps": NUM_STEPS, "micro_batch_size": micro_batch_size, "packing": packing},
    )


def rollouts():
    made = tiny.rollouts(count=8, vocab_size=VOCAB_SIZE)
    made.sort(key=lambda r: len(r.token_ids))  # replicas get unequal numbers of tokens
    return made


def logits(student, batches):
    """This rank's columns at every position, on the last stage."""
    from megatron_opd.student import head, pipeline

    student.model.eval()
    return pipeline.forward(student.model, batches, lambda _, hidden_BSD: hidden_BSD @ head.weight(student.gpt).T)


def train(parallel, config, num_steps=NUM_STEPS):
    """What every rank does and has; gradients are (name, this rank's shard, dimension of the split)."""
    from megatron_opd.student import lora

    student, objective, pack = steps.build(parallel, config, VOCAB_SIZE)
    mine = pack(rollouts()[parallel.data_rank :: parallel.data_size])
    start = {name: tensor.clone() for name, tensor in student.export_adapters()}
    first_logits = logits(student, mine)
    frozen = {name: p.clone() for name, p in student.gpt.named_parameters() if not p.requires_grad}
    metrics = [student.step(mine, objective) for _ in range(num_steps)]
    after = {name: p for name, p in student.gpt.named_parameters() if not p.requires_grad}
    parameters = {name: (p, dim) for name, p, dim in lora.peft_parameters(student.gpt)}
    grads = {p.data_ptr(): p.main_grad.clone() for p in student.gpt.parameters() if p.requires_grad}
    return {
        "metrics": metrics,
        "start": start,
        "frozen": len(frozen) > 0 and all(torch.equal(frozen[name], after[name]) for name in after),
        "merged": {name: tensor.clone() for name, tensor in student.export()},
        "adapters": {name: tensor.clone() for name, tensor in student.export_adapters()},
        "grads": {name: (grads[p.data_ptr()], dim) for name, (p, dim) in parameters.items()},
        "first logits": first_logits,
        "logits": logits(student, mine),
        "tokens": [batch.tokens_BS for batch in mine],
    }


@pytest.fixture(scope="module")
def reference(paths):
    """(family, targets, start, optimizer settings) -> metrics and the dense model after NUM_STEPS."""

    def compute(family, targets, start, num_steps=NUM_STEPS, **optim):
        mine = steps.Reference(
            config(paths, family, targets, **optim), dense(model(family), start), [copy.deepcopy(teacher())], VOCAB_SIZE
        )
        return [mine.step(rollouts(), number) for number in range(1, num_steps + 1)], mine.student

    return compute


def size(layout):
    return layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("data", 1)


CASES = {
    "tp1": ("qwen3", (), {"tensor": 1}, {}),
    "tp2": ("qwen3", (), {"tensor": 2}, {}),
    "tp4": ("qwen3", (), {"tensor": 4}, {}),
    "tp2sp": ("qwen3", (), {"tensor": 2, "sequence": True}, {}),
    "pp2": ("qwen3", (), {"pipeline": 2}, {}),
    "dp2": ("qwen3", (), {"data": 2}, {}),
    "dp2tp2sp": ("qwen3", (), {"tensor": 2, "data": 2, "sequence": True}, {}),
    "tp2pp2sp recomputed": ("qwen3", (), {"tensor": 2, "pipeline": 2, "sequence": True}, {"recompute": "full"}),
    "tp1 recomputed": ("qwen3", ("down_proj",), {"tensor": 1}, {"recompute": "full", "micro_batch_size": 1}),
    "one of q, k, v, one of gate, up": ("qwen3", ("k_proj", "up_proj"), {"tensor": 2}, {}),
    "q and v": ("qwen2", ("q_proj", "v_proj"), {"tensor": 2, "pipeline": 2}, {}),
    "tied pp2": ("qwen2", ("all-linear",), {"pipeline": 2}, {"recompute": "selective"}),
    "packed pp2": ("qwen3", (), {"pipeline": 2}, {"packing": True}),
    "mixture": ("qwen3_moe", ATTENTION, {"tensor": 1}, {}),
    "mixture tp2ep2sp": ("qwen3_moe", ATTENTION, {"tensor": 2, "expert": 2, "sequence": True}, {}),
}


@pytest.mark.parametrize(("family", "targets", "layout", "settings"), pairwise.thin(pairwise.named(CASES)))
def test_steps_are_those_of_adapters_on_transformers_modules(
    ranks, paths, reference, family, targets, layout, settings
):
    answers = ranks.run(size(layout), train, config(paths, family, targets, **settings), **layout)
    leader = answers[0]
    expected, student = reference(family, targets, leader["start"])
    for found, theirs in zip(leader["metrics"], expected, strict=True):
        assert {name: found[name] for name in theirs} == pytest.approx(theirs, rel=2e-5)
    assert expected[-1]["grad_norm"] > OPTIM["clip_grad"]  # clipping is at work
    wanted = adapters_of(student)
    assert leader["adapters"].keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(leader["adapters"][name].double(), tensor.data, atol=2e-5, rtol=0, msg=name)
        assert (tensor - leader["start"][name]).abs().max() > 1e-3  # and it did move
    for answer in answers:
        assert answer["frozen"]
        assert answer["metrics"] == leader["metrics"]


GRADIENTS = ["tp1", "tp2", "tp2sp", "pp2", "dp2", "tp2pp2sp recomputed", "mixture tp2ep2sp"]


@pytest.mark.parametrize(("family", "targets", "layout", "settings"), [CASES[n] for n in GRADIENTS], ids=GRADIENTS)
def test_gradients_of_a_and_b(ranks, paths, reference, family, targets, layout, settings):
    """Of the second step, where B is not 0 and A has a gradient too; without clipping, which scales them in place."""
    plain = {"clip_grad": 0.0, "distributed": False}
    answers = ranks.run(size(layout), train, config(paths, family, targets, **settings, **plain), 2, **layout)
    _, student = reference(family, targets, answers[0]["start"], 2, **plain)
    tensor = layout.get("tensor", 1)
    seen = set()
    for first in range(0, len(answers), tensor):
        shards = [answer["grads"] for answer in answers[first : first + tensor]]
        for name, (grad, dim) in shards[0].items():
            pieces = [shard[name][0] for shard in shards]
            assert dim is not None or all(torch.equal(piece, grad) for piece in pieces)
            whole = grad if dim is None else torch.cat(pieces, dim)
            expected = adapters_of(student)[name].grad
            largest = expected.abs().max().item()
            assert largest > 1e-4
            torch.testing.assert_close(whole.double(), expected, atol=2e-5 * largest, rtol=0, msg=name)
            seen.add(name)
    assert seen == set(adapters_of(student))


@pytest.mark.parametrize("layout", [{"tensor": 2, "sequence": True}, {"pipeline": 2}, {"tensor": 4}], ids=str)
def test_start_is_the_base_and_the_same_on_every_layout(ranks, paths, layout):
    made = config(paths, "qwen3")
    found = ranks.run(size(layout), train, made, 0, **layout)
    alone = ranks.run(1, train, made, 0)[0]
    assert found[0]["start"].keys() == alone["start"].keys()
    for name, tensor in alone["start"].items():
        assert torch.equal(found[0]["start"][name], tensor)
        bound = tensor.shape[1] ** -0.5
        assert (tensor == 0).all() if "_B." in name else 0.8 * bound < tensor.abs().max() <= bound
    drawn = [tensor.flatten()[:6].tolist() for name, tensor in alone["start"].items() if "_A." in name]
    assert len({tuple(numbers) for numbers in drawn}) == len(drawn) == 14  # every A is another
    for name, tensor in model("qwen3").state_dict().items():
        assert torch.equal(found[0]["merged"][name], tensor)


def test_logits_at_the_start_are_bitwise_the_base_models(ranks, paths):
    made = config(paths, "qwen3")
    without = tiny.config(
        paths["qwen3"], [{"name": "t", "model": paths["teacher"]}], student={"vocab_multiple": 4},
        train={"steps": NUM_STEPS, "micro_batch_size": 2},
    )  # fmt: skip
    layout = {"tensor": 2, "sequence": True}
    for mine, base in zip(*(ranks.run(2, logits_alone, c, **layout) for c in (made, without)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, base, strict=True))


def logits_alone(parallel, config):
    student, _, pack = steps.build(parallel, config, VOCAB_SIZE)
    return logits(student, pack(rollouts()))


@pytest.mark.parametrize(
    "layout", [{"tensor": 1}, {"tensor": 2, "sequence": True}, {"tensor": 2, "pipeline": 2}], ids=str
)
def test_merged_weights_are_the_adapted_model(ranks, paths, layout):
    answers = ranks.run(size(layout), train, config(paths, "qwen3"), **layout)
    last = answers[-layout["tensor"] :]
    merged = copy.deepcopy(model("qwen3"))
    merged.load_state_dict(answers[0]["merged"])
    for tokens, *shards in zip(last[0]["tokens"], *(a["logits"] for a in last), strict=True):
        with torch.no_grad():
            expected = merged(tokens).logits
            base = model("qwen3")(tokens).logits
        found = torch.cat(shards, dim=-1)[..., : expected.shape[-1]]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        assert (found - base).abs().max() > 0.01


def test_half_precision_merges_in_fp32(ranks, paths):
    answer = ranks.run(2, train, config(paths, "qwen3", dtype="bf16"))[0]
    base = model("qwen3").state_dict()
    assert {tensor.dtype for tensor in [*answer["merged"].values(), *answer["adapters"].values()]} == {torch.bfloat16}
    for name in ("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"):
        a, b = (answer["adapters"][f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
        expected = base[f"{name}.weight"].bfloat16().float() + ALPHA / RANK * (b @ a)
        # Sums in another order may round to the other neighbour here and there; a sum in bf16 does so everywhere.
        assert (answer["merged"][f"{name}.weight"] != expected.bfloat16()).float().mean() < 0.01


def test_without_adapters_nothing_is_exported(ranks, paths):
    made = tiny.config(paths["qwen3"], [{"name": "t", "model": paths["teacher"]}], student={"vocab_multiple": 4})
    assert ranks.run(2, names_of_adapters, made, pipeline=2) == [[], []]


def names_of_adapters(parallel, config):
    from megatron_opd.student.student import Student

    return [name for name, _ in Student(config, parallel).export_adapters()]


def message(_, directory, theirs, mine):
    """What restoring a checkpoint with the adapters `theirs` into a student with `mine` is answered with, or None."""
    import json

    from megatron_opd.student.checkpoint import CheckpointError, _read_marker

    (directory / "loop.json").write_text(json.dumps({"step": 1, "layout": [1, 1, 1], "student": theirs}))
    try:
        _read_marker(directory, mine)
    except CheckpointError as error:
        return str(error)
    return None


def test_a_run_continues_only_with_its_own_adapters(ranks, tmp_path):
    def said(theirs, mine):
        return ranks.run(1, message, tmp_path, theirs, mine)[0]

    def adapters(**changes):
        return facts(LoraConfig(**{"rank": 4, "alpha": 32.0, "targets": ["qkv"], **changes}))

    assert said(adapters(), adapters(targets=["v_proj", "q_proj", "k_proj"])) is None
    assert said(adapters(rank=0), adapters(rank=0, alpha=1.0)) is None
    before_there_was_lora = {}
    assert said(before_there_was_lora, adapters(rank=0)) is None
    assert "its lora.rank is 0, by lora.rank it is 4 now; set lora.rank back" in said(before_there_was_lora, adapters())
    assert "its lora.rank is 0, by lora.rank it is 4 now" in said(adapters(rank=0), adapters())
    assert "its lora.rank is 4, by lora.rank it is 0 now" in said(adapters(), adapters(rank=0))
    assert "its lora.alpha is 32.0, by lora.alpha it is 16.0 now" in said(adapters(), adapters(alpha=16.0))
    assert "by lora.targets it is ['o_proj'] now; set lora.targets back" in said(
        adapters(), adapters(targets=["o_proj"])
    )
