"""The planner's bytes against those of real ranks: the tensors that there are, those that autograd keeps, and the peak.

Bytes of tensors repeat, whatever the machine does besides; resident memory would not. What collectives allocate for
themselves is left out: gloo frees its copies when its threads come to it, and a GPU's collectives have none.
"""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import steps
import tiny
import torch

VOCAB = 2048
SIZES = {"vocab_size": VOCAB, "num_hidden_layers": 4, "intermediate_size": 128, "hidden_size": 64}
SAMPLED = {"loss": {"kind": "sampled"}}
POLICY = {"policy": {"kl_coef": 0.5}}
FEW = {"loss": {"chunk_tokens": 4}}
CASES = [
    ({"tensor": 1}, "fp32", "none", {}),
    ({"tensor": 2, "pipeline": 2}, "fp32", "none", {}),
    ({"tensor": 1, "pipeline": 2, "data": 2}, "fp32", "full", {}),
    ({"tensor": 2, "sequence": True, "data": 2}, "bf16", "selective", {}),
    ({"tensor": 2, "sequence": True}, "bf16", "full", {}),
    ({"tensor": 2, "sequence": True}, "bf16", "full", FEW),  # the peak is a layer's, not the loss's
    ({"tensor": 1}, "bf16", "none", POLICY),
    ({"tensor": 1}, "fp32", "none", POLICY | FEW),  # the peak is in the gradients' way back
    ({"tensor": 2, "sequence": True}, "bf16", "full", SAMPLED),
    ({"tensor": 1}, "fp32", "none", SAMPLED | POLICY),
    ({"tensor": 2}, "fp32", "none", {"lora": {"rank": 4}}),
    ({"tensor": 1}, "fp32", "none", {"lora": {"rank": 4, "targets": ["qkv"]}, **FEW}),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    student = tiny.save(tiny.build("llama", **SIZES), folder / "student")
    teacher = tiny.save(tiny.build("qwen3", seed=1, **{**SIZES, "hidden_size": 48}), folder / "teacher")
    mixture = tiny.save(tiny.build("qwen3_moe", seed=2, **SIZES, moe_intermediate_size=32), folder / "mixture")
    return {"student": student, "teacher": teacher, "mixture": mixture}


def planned(student, teacher, layout, dtype="fp32", recompute="none", method=None):
    """(config, what the planner says of each stage)."""
    from megatron_opd.planner import memory
    from megatron_opd.planner.job import build

    method = method or {}
    config = tiny.config(
        student,
        [{"name": "t", "model": teacher}],
        parallel=layout,
        student={"dtype": dtype, "recompute": recompute},
        train={"steps": 10, "micro_batch_size": 4},
        rollout={"prompts_per_step": 16, "max_new_tokens": 32},
        **{**method, "loss": {"chunk_tokens": 64, **method.get("loss", {})}},
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_prompt_tokens=32))
    return config, memory.trainer(dataclasses.replace(build(config, gpu="H100"), on_gpu=False))


def longest():
    """Rollouts that are as long as the config allows, as the planner assumes."""
    return [tiny.rollout([1 + i] * 32, [3 + i] * 32, index=i) for i in range(16)]


def together(tensors):
    """Bytes of the memory behind the tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measured(parallel, config, rollouts, trace):
    """Bytes on this rank: what is there between steps, what one micro-batch keeps, and the peak of a step over that."""
    from megatron_opd.trainer.build_objective import build_objective
    from megatron_opd.trainer.shaping import Shaping

    student, exact, pack = steps.build(parallel, config, VOCAB)
    term = exact.distillation
    objective = build_objective(config, term.vocab, [SimpleNamespace(head_LD=head) for head in term.heads])
    mine = rollouts[parallel.data_rank :: parallel.data_size]
    [batches], _ = Shaping(config, parallel, objective.distillation)(mine, [pack(mine)], 0)
    student.step(batches, objective)
    found = {
        "weights": together(student.gpt.parameters()),
        "gradients": together(p.main_grad for p in student.gpt.parameters() if p.requires_grad),
        "optimizer": together(_optimizer_state(student)),
        "kept": _kept(parallel, student, batches[0]) if parallel.pipeline_size == 1 else None,
    }
    # What threads of collectives free is unseen, and a peak then looks higher than it is.
    return found | {"peak": min(_peak(student, batches, objective, f"{trace}.{parallel.rank}") for _ in range(3))}


def _peak(student, batches, objective, path):
    """Bytes over what is there between steps, the most at one time of a forward and backward pass."""
    from megatron_opd.student import pipeline

    student.model.zero_grad_buffer()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        pipeline.train(student.model, batches, student._at_rows(objective))
    profile.export_chrome_trace(path)
    with open(path) as file:
        return _highest(json.load(file)["traceEvents"])


def _highest(events):
    """Most bytes at one time of what was allocated in a trace, without what collectives allocate for themselves.

    Their threads free things unseen, so an address that is given again counts as freed.
    """
    collectives = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name", "").startswith("c10d::")]
    live, now, most = {}, 0, 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        now -= live.pop(address, 0)
        if size > 0 and not any(start <= event["ts"] <= stop for start, stop in collectives):
            live[address] = size
            now += size
            most = max(most, now)
    return most


def _optimizer_state(student):
    """Moments, and master weights where they are not the weights themselves."""
    weights = {p.untyped_storage().data_ptr() for p in student.gpt.parameters()}
    for optimizer in getattr(student.optimizer, "chained_optimizers", [student.optimizer]):
        adam = optimizer.optimizer
        for group in adam.param_groups:
            yield from (p for p in group["params"] if p.untyped_storage().data_ptr() not in weights)
        for state in adam.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value) and value.dim())


def _kept(parallel, student, batch):
    """Bytes that autograd saves in the forward pass, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in student.gpt.parameters()}
    saved = []
    size, length = batch.tokens_BS.shape
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = student.model(batch.tokens_BS, torch.arange(length).expand(size, length), None)
    output.sum().backward()
    return together(t for t in saved if t.untyped_storage().data_ptr() not in parameters)


@pytest.mark.parametrize(("layout", "dtype", "recompute", "method"), CASES)
def test_a_rank_has_the_memory_that_was_planned(ranks, models, tmp_path, layout, dtype, recompute, method):
    config, plans = planned(models["student"], models["teacher"], layout, dtype, recompute, method)
    count = config.parallel.world_size
    found = ranks.run(count, measured, config, longest(), str(tmp_path / "trace"), **layout)
    for plan in plans:
        real = found[plan.stage * count // config.parallel.pipeline]
        for part in ("weights", "gradients", "optimizer"):
            assert plan.always[part] == pytest.approx(real[part], rel=0.01), part
        training = [plan.moments[name] for name in ("the loss", "the backward pass")]
        if real["kept"] is not None:
            assert training[0]["activations"] == pytest.approx(real["kept"], rel=0.01)
        own = sum(plan.always[part] for part in ("weights", "gradients", "optimizer"))
        at_most = max(sum(size for name, size in moment.items() if name != "hidden states") for moment in training)
        at_rest = sum(real[part] for part in ("weights", "gradients", "optimizer"))
        assert own + at_most == pytest.approx(at_rest + real["peak"], rel=0.1)


def numels(parallel, config):
    """(parameters of the student, of a teacher with its head) on this rank."""
    from megatron_opd.teachers import build_teachers

    made = steps.build(parallel, config, VOCAB)[0]
    scorer = build_teachers(config, parallel, made.vocab_shard(VOCAB))[0]
    head = 0 if scorer.head_LD is None else scorer.head_LD.numel()
    return sum(p.numel() for p in made.gpt.parameters()), sum(p.numel() for p in scorer.model.parameters()) + head


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("student", {"tensor": 2, "pipeline": 2}),
        ("mixture", {"tensor": 2, "pipeline": 2, "sequence": True, "expert": 2}),
    ],
)
def test_every_rank_has_the_parameters_that_were_planned(ranks, models, model, layout):
    config, plans = planned(models[model], models["teacher"], layout)
    from megatron_opd.models.architecture import read_architecture
    from megatron_opd.planner import sizes

    arch = read_architecture(models[model])
    found = ranks.run(4, numels, config, **layout)
    for rank, (student, teacher) in enumerate(found):
        stage = rank // 2
        assert student == sizes.numel(sizes.stage_parameters(arch, config.parallel, stage))
        assert teacher * 4 == plans[stage].always["teacher weights"] + plans[stage].always["teacher heads"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_head_in_fp8_rounds_hidden_states_in_the_memory_that_was_planned(tmp_path, dtype):
    from megatron_opd.planner import loss_buffers
    from megatron_opd.precision.fp8_plan import Products
    from megatron_opd.precision.recipes import RECIPES
    from megatron_opd.precision.scaled import ScaledHead

    head = ScaledHead(torch.ones(16, 4096, dtype=dtype), Products(RECIPES["tensorwise"], backward=False))
    hidden, into = torch.ones(64, 4096, dtype=dtype), torch.empty(64, 16, dtype=dtype)
    head.logits(hidden, into)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        head.logits(hidden, into)
    profile.export_chrome_trace(str(tmp_path / "trace"))
    with open(tmp_path / "trace") as file:
        peak = _highest(json.load(file)["traceEvents"])
    assert peak == pytest.approx(loss_buffers._ROUNDING * hidden.numel(), rel=0.02)
