"""The planner against sums done by hand, public parameter counts, and the table that loads real weights."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from rich.console import Console

from megatron_opd import __main__ as cli
from megatron_opd import config as c
from megatron_opd.models.architecture import read_architecture
from megatron_opd.models.lora_layout import places
from megatron_opd.models.weight_map import is_expert, rules
from megatron_opd.planner import adapters, flops, loss_buffers, memory, search, servers, sizes, timing, traffic
from megatron_opd.planner.gpus import GPUS
from megatron_opd.planner.job import build
from megatron_opd.planner.plan import as_dict, plan
from megatron_opd.planner.table import show

MODELS = Path(__file__).parents[1] / "model_configs"
TP4 = {"tensor": 4, "data": 4, "sequence": True}


def run_of(model="llama-8b", teachers=None, *, lengths=(1024, 2048), **sections):
    """A config of big models, of which only config.json is there."""
    sections = {
        "parallel": TP4,
        "student": {"dtype": "bf16"},
        "train": {"steps": 10, "micro_batch_size": 2},
        **sections,
        "rollout": {
            "engine": "sglang", "prompts_per_step": 64, "samples_per_prompt": 4, "max_new_tokens": lengths[1],
            "servers": c.ServersConfig(count=8), **sections.get("rollout", {}),
        },
    }  # fmt: skip
    teachers = [{"name": "big", "model": "llama-70b", "dtype": "bf16"}] if teachers is None else teachers
    made = tiny.config(
        str(MODELS / model), [{**teacher, "model": str(MODELS / teacher["model"])} for teacher in teachers], **sections
    )
    sources = [c.SourceConfig(name="math", path=""), c.SourceConfig(name="code", path="", weight=3.0)]
    return dataclasses.replace(made, data=c.DataConfig(train=sources, max_prompt_tokens=lengths[0]))


def job_of(*args, gpu="H100", response=None, **sections):
    return build(run_of(*args, **sections), gpu=gpu, response=response)


@pytest.mark.parametrize(
    ("model", "billions"),
    [("llama-8b", 8.03), ("llama-70b", 70.55), ("qwen3-8b", 8.19), ("qwen3-0.6b", 0.596), ("qwen3-30b-a3b", 30.53)],
)
def test_parameters_are_the_published_ones(model, billions):
    assert sizes.numel(sizes.whole(read_architecture(MODELS / model))) / 1e9 == pytest.approx(billions, rel=1e-3)


def test_active_parameters_of_a_mixture():
    arch = read_architecture(MODELS / "qwen3-30b-a3b")
    embedding = arch.vocab_size * arch.hidden_size
    assert (sizes.active_numel(arch) + embedding) / 1e9 == pytest.approx(3.35, rel=0.01)  # "A3B", embeddings included


@pytest.mark.parametrize("model", sorted(path.name for path in MODELS.iterdir()))
@pytest.mark.parametrize(("tensor", "pipeline", "expert"), [(1, 1, 1), (4, 4, 4), (8, 2, 4), (2, 1, 2)])
def test_every_stage_has_the_parameters_of_the_weight_table(model, tensor, pipeline, expert):
    arch = read_architecture(MODELS / model)
    layout = c.ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert if arch.num_experts else 1)
    size, experts = arch.num_layers // pipeline, arch.num_experts // layout.expert
    for stage in range(pipeline):
        table = rules(arch, layers=range(size), first=stage == 0, last=stage == pipeline - 1, experts=range(experts))
        there = 0
        for name, rule in table.items():
            whole = is_expert(name) or "norm" in name or "router" in name
            there += math.prod(rule.shape) // (1 if whole else tensor)
        assert sizes.numel(sizes.stage_parameters(arch, layout, stage)) == there


def test_memory_of_llama_8b_by_hand():
    """TP 4, distributed optimizer over 4 replicas: 2 bytes of weights, 4 of gradients, a quarter of 12 of state."""
    rank = memory.worst(job_of(teachers=[{"name": "t", "model": "llama-8b", "dtype": "bf16"}]))
    split = 8_030_261_248 - 65 * 4096  # all but the norms
    mine = split // 4 + 65 * 4096
    assert rank.always["weights"] == pytest.approx(2 * mine, rel=1e-6)
    assert rank.always["gradients"] == pytest.approx(4 * mine, rel=1e-6)
    assert rank.always["optimizer"] == pytest.approx(3 * mine, rel=1e-6)
    assert rank.always["teacher weights"] == 2 * (mine - 128256 * 4096 // 4)  # without its head,
    assert rank.always["teacher heads"] == 2 * 128256 * 4096 // 4  # which is counted here
    assert rank.moments["the loss"]["hidden states"] == 64 * 2048 * 4096 * 2
    assert rank.moments["scoring"]["hidden states"] == 2 * 64 * 2048 * 4096 * 2


def test_fp16_takes_what_bf16_takes():
    """Master weights included; a loss scale is one number."""
    fp16, bf16 = (memory.worst(job_of(student={"dtype": dtype})) for dtype in ("fp16", "bf16"))
    assert fp16 == bf16


def test_a_plain_optimizer_is_whole_on_every_replica():
    rank = memory.worst(job_of(optim={"distributed": False}, student={"dtype": "fp32"}))
    assert rank.always["optimizer"] == 2 * rank.always["gradients"] == 2 * rank.always["weights"]


def test_an_offloaded_teacher_is_there_while_it_scores():
    teacher = {"name": "big", "model": "llama-70b", "dtype": "bf16"}
    stays = memory.worst(job_of(teachers=[teacher, {**teacher, "name": "two"}]))
    alone = {**teacher, "offload": True, "prefetch": False}
    comes = memory.worst(job_of(teachers=[alone, {**alone, "name": "two"}]))
    assert comes.always["teacher weights"] == 0
    assert comes.moments["scoring"]["teachers fetched"] == stays.always["teacher weights"] / 2
    assert comes.total < stays.total


def test_a_teacher_that_is_fetched_ahead_is_there_with_the_one_before():
    big = {"name": "a", "model": "llama-70b", "dtype": "bf16", "offload": True}
    small = {**big, "name": "b", "model": "llama-8b"}
    stays = {"name": "c", "model": "qwen3-0.6b", "dtype": "fp16"}

    def fetched(*teachers):
        return memory.worst(job_of(teachers=list(teachers))).moments["scoring"]["teachers fetched"]

    one, other = fetched(big), fetched(small)
    assert one > other > 0
    assert fetched(big, small, {**small, "name": "d"}) == one + other
    assert fetched(big, stays, small) == one + other  # whoever stays does not come between them
    assert fetched({**big, "prefetch": False}, {**small, "prefetch": False}) == one
    assert fetched(small, {**big, "prefetch": False}) == one


def test_copies_are_hidden_behind_the_teachers_before():
    big = {"name": "a", "model": "llama-70b", "dtype": "bf16", "offload": True}
    small = {**big, "name": "b", "model": "llama-8b"}

    def seconds(*teachers):
        job = job_of(teachers=list(teachers), rollout={"prompts_per_step": 16})
        return next(s.seconds for s in timing.estimate(job).stages if s.name == "teachers on the ranks")

    copies = {}
    for teacher in (big, small):
        copies[teacher["name"]] = seconds(teacher) - seconds({**teacher, "offload": False})
    assert min(copies.values()) > 0
    scoring = seconds({**big, "offload": False})
    assert scoring > copies["b"]  # so that all of that copy is hidden behind the big one
    none = seconds({**big, "offload": False}, {**small, "offload": False})
    assert seconds(big, small) == pytest.approx(none + copies["a"])
    assert seconds(big, {**small, "prefetch": False}) == pytest.approx(none + copies["a"] + copies["b"])
    left = copies["a"] - seconds({**small, "offload": False})
    assert left > 0
    assert seconds(small, big) == pytest.approx(none + copies["b"] + left)


def test_pipeline_stages_hold_as_many_micro_batches_as_are_under_way():
    job = job_of(parallel={"tensor": 2, "pipeline": 4, "sequence": True})
    kept = [rank.moments["the loss"]["activations"] for rank in memory.trainer(job)]
    ids = 2 * 3072 * 9  # of the first stage: tokens, and which of them are here
    assert kept[0] - 4 * ids == pytest.approx(4 / 3 * kept[1], rel=1e-9)
    assert kept[1] == pytest.approx(3 / 2 * kept[2], rel=1e-9)


def test_loss_buffers_by_hand():
    positions, rows, columns = 2 * 3072, 2 * 2048, 128256 // 4
    output, hidden = positions * 4096 * 2, rows * 4096 * 2
    buffer, chunk = 2 * 1024 * columns, 4 * 1024 * columns  # bf16 in the fused loss, float32 elsewhere
    assert loss_buffers.peak(job_of()) == output + 2 * hidden + 2 * 2 * buffer  # twice: exchanges overlap with products
    assert loss_buffers.peak(job_of(loss={"chunk_tokens": 4096})) == output + 2 * hidden + 2 * 4 * buffer  # but for one
    lists = [{"name": "t", "model": "llama-70b", "backend": "sglang", "carrier": "topk"}]
    logits = 4 * rows * columns
    by_lists = {"teachers": lists, "loss": {"ensemble": "probs"}}
    assert loss_buffers.peak(job_of(**by_lists)) == output + hidden + 2 * logits + 8 * chunk
    with_rewards = {**by_lists, "rl": {"weight": 1.0}}
    assert loss_buffers.peak(job_of(**with_rewards)) == output + hidden + 3 * logits + 8 * chunk
    both = loss_buffers.peak(job_of(rl={"weight": 1.0}, loss={"chunk_tokens": 16}))
    assert both == output + hidden + 3 * logits  # what the fused loss left, and a gradient with its upstream factor
    rewards_alone = loss_buffers.peak(job_of(rl={"weight": 1.0}, loss={"weight": 0.0}))
    assert rewards_alone == output + hidden + 2 * logits + 5 * chunk


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, True),
        ({"rl": {"weight": 1.0}}, False),
        ({"policy": {"kl_coef": 1.0}}, False),
        ({"answers": {"lmbda": 0.5}}, False),
        ({"loss": {"kind": "sampled"}}, False),
        ({"loss": {"ensemble": "probs"}, "teachers": [{"name": "t", "model": "llama-8b", "backend": "sglang",
                                                         "carrier": "topk"}]}, False),
    ],
)  # fmt: skip
def test_logits_are_planned_where_the_objective_wants_them(sections, expected):
    from megatron_opd.core.vocab import VocabShard
    from megatron_opd.trainer.build_objective import build_objective

    job = job_of(**sections)
    heads = [SimpleNamespace(head_LD=None) for _ in job.config.teachers]
    others = job.config.answers.lmbda < 1
    objective = build_objective(job.config, VocabShard.whole(9), heads, has_answers_of_others=others)
    assert loss_buffers.takes_hidden(job) == objective.takes_hidden == expected


def with_fp8(job, **settings):
    """The job with a section precision.fp8."""
    precision = c.PrecisionConfig(fp8=c.Fp8Config(**settings))
    return dataclasses.replace(job, config=dataclasses.replace(job.config, precision=precision))


def test_a_rounded_student_head_makes_logits():
    assert not loss_buffers.takes_hidden(with_fp8(job_of(), heads=["student"], emulate=True))
    assert loss_buffers.takes_hidden(with_fp8(job_of(), heads=["big"], emulate=True))


def test_matrices_of_a_resident_fp8_teacher_are_a_byte_a_weight():
    job = job_of(parallel={"tensor": 4, "pipeline": 2, "data": 2, "sequence": True})
    plain = [rank.always["teacher weights"] for rank in memory.trainer(job)]
    resident = with_fp8(job, teachers=["all"], resident=True, first_layers_bf16=4)
    small = [rank.always["teacher weights"] for rank in memory.trainer(resident)]
    a_layer = (8192 * (8192 + 2048) + 8192 * 8192 + 3 * 8192 * 28672) // 4
    assert [a - b for a, b in zip(plain, small, strict=True)] == [36 * a_layer, 40 * a_layer]
    moving = with_fp8(job, teachers=["all"])
    assert [rank.always["teacher weights"] for rank in memory.trainer(moving)] == plain


def test_a_teacher_s_head_in_fp8_is_a_byte_a_number_and_rounds_hidden_states():
    job = job_of()
    plain, emulated, real = (
        memory.worst(made) for made in (job, with_fp8(job, heads=["big"], emulate=True), with_fp8(job, heads=["big"]))
    )
    assert emulated == plain
    assert real.always["teacher heads"] == plain.always["teacher heads"] / 2 == 8192 * 128256 / 4
    loss = [rank.moments["the loss"]["loss"] for rank in (plain, real)]
    assert loss[1] - loss[0] == 14 * 1024 * 8192


def test_a_teacher_with_its_own_tokenizer_has_its_own_vocabulary():
    teacher = {"name": "t", "model": "qwen3-8b", "dtype": "bf16", "tokenizer": "own"}
    job = job_of(teachers=[teacher])
    assert memory.worst(job).always["teacher heads"] == 2 * 151936 // 4 * 4096
    assert not loss_buffers.takes_hidden(job)
    rows, columns, chunk = 2 * 2048, 128256 // 4, 1024 * 4
    needed = 2 * 4 * rows * columns + 8 * chunk * (128256 + 151936)
    assert loss_buffers.peak(job) == 2 * 3072 * 4096 * 2 + rows * 4096 * 2 + needed


@pytest.mark.parametrize("targets", [[], ["qkv"], ["o_proj", "down_proj"]])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (4, 2)])
def test_adapters_are_those_of_the_layers(tensor, pipeline, targets):
    arch, lora = read_architecture(MODELS / "llama-8b"), c.LoraConfig(rank=16, targets=targets)
    layout = c.ParallelConfig(tensor=tensor, pipeline=pipeline)
    expected = 0
    for place in places(arch, lora, tensor):
        adapted = [part for part in place.parts if part in lora.modules]
        expected += sum(16 * (place.inputs + place.rows(part)) for part in adapted)
    found = sizes.numel(adapters.parameters(arch, lora, layout, pipeline - 1))
    assert found == expected * arch.num_layers // pipeline


def test_adapters_alone_have_gradients_and_optimizer_state():
    job = job_of(lora={"rank": 16})
    whole, rank = memory.worst(job_of()), memory.worst(job)
    mine = sizes.numel(adapters.trained(job.student, job.config.lora, job.config.parallel, 0))
    assert rank.always["gradients"] == 4 * mine
    assert rank.always["optimizer"] == 3 * mine
    assert rank.always["weights"] == whole.always["weights"] + 2 * mine
    assert traffic.gradients(job) == mine * 6 * 3 / 4
    assert flops.training(job_of()) - flops.training(job) == 256 * 2 * sizes.body_numel(job.student) * 3072 + 256 * (
        flops.head(4096, 128256, 2048)
    )


def test_flops_by_hand():
    job = job_of("llama-8b", [{"name": "t", "model": "llama-8b", "dtype": "bf16"}], lengths=(1000, 1000))
    body, length = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336), 2000
    forward = 2 * body * length + 2 * 32 * 32 * 128 * length**2
    head = 2 * 4096 * 128256
    assert flops.body(job.student, length) == forward
    teacher_head = 256 * 1000 * head
    assert flops.training(job) == 256 * 3 * (forward + 1000 * head) + teacher_head
    recomputed = job.with_layout(job.config.parallel, recompute="full", micro_batch_size=2)
    assert flops.training(recomputed) - flops.training(job) == 256 * forward


def test_packed_sequences_are_as_long_as_they_are():
    """Where padding is not computed on, work and traffic follow the mean; a micro-batch may still be the largest."""
    teachers = [{"name": "t", "model": "llama-8b", "dtype": "bf16"}]
    parallel = {"tensor": 2, "pipeline": 2, "data": 2, "sequence": True}
    padded, packed = (
        job_of("llama-8b", teachers, lengths=(1000, 1000), response=500, parallel=parallel,
               train={"steps": 10, "micro_batch_size": 2, "packing": packing})
        for packing in (False, True)
    )  # fmt: skip
    passes = flops.body(packed.student, 2000) - flops.body(packed.student, 1500)
    assert flops.training(padded) - flops.training(packed) == 256 * 3 * passes
    ((teacher, arch),) = packed.inside
    assert flops.scoring(padded, teacher, arch) - flops.scoring(packed, teacher, arch) == 256 * passes
    assert traffic.pipeline(packed) / traffic.pipeline(padded) == 1500 / 2000
    assert memory.worst(packed) == memory.worst(padded)


def test_a_routed_teacher_is_asked_about_its_share():
    teachers = [
        {"name": "math", "model": "llama-8b", "sources": {"code": 0.0}},
        {"name": "code", "model": "llama-8b", "sources": {"math": 0.0}},
    ]
    job = job_of(teachers=teachers)
    assert [flops.asked_share(job, teacher) for teacher in job.config.teachers] == [0.25, 0.75]


def test_bytes_of_the_carriers():
    served = {"model": "llama-70b", "backend": "sglang"}
    teachers = [
        {"name": "hidden", **served},
        {"name": "list", "carrier": "topk", "top_k": 100, **served},
        {"name": "one", "carrier": "sampled", **served},
        {"name": "here", "model": "llama-8b"},
    ]
    job = job_of(teachers=teachers)
    sent = [traffic.carrier_bytes(t, arch) for t, arch in zip(job.config.teachers, job.teachers, strict=True)]
    assert sent == [25 * 8192, 34 + 1080, 34, 0]
    tokens = 256 * 2048
    assert traffic.of_teachers(job) == {"hidden": tokens * sent[0], "list": tokens * sent[1], "one": tokens * sent[2]}
    assert traffic.weight_sync(job) == 2 * 8_030_261_248


def test_traffic_between_ranks_by_hand():
    job = job_of(parallel={"tensor": 2, "pipeline": 2, "data": 2, "sequence": True}, teachers=[])
    activation = 128 * 3072 * 4096 * 2  # of a replica's sequences
    assert traffic.tensor_parallel(job) == 2 * activation / 2 * 16 * 4
    assert traffic.pipeline(job) == 2 * activation / 2
    heaviest = sizes.numel(sizes.stage_parameters(job.student, job.config.parallel, 1))  # the final norm makes it so
    assert traffic.gradients(job) == heaviest * (4 + 2) / 2


def test_the_70b_teacher_needs_a_node_and_is_told_so():
    served = {"name": "big", "model": "llama-70b", "backend": "sglang", "carrier": "topk"}
    little = c.ServersConfig(count=1, tensor=1)
    made = plan(job_of(teachers=[{**served, "servers": little}], loss={"ensemble": "probs"}))
    assert any("teachers.0.servers.tensor" in problem for problem in made.problems)
    assert math.isinf(made.estimate.seconds)
    enough = c.ServersConfig(count=1, tensor=8)
    made = plan(job_of(teachers=[{**served, "servers": enough}], loss={"ensemble": "probs"}))
    assert not made.problems
    role = made.roles[1]
    assert role.weights == 2 * 70_553_706_496 / 8
    a_token = 2 * 1 * 128 * 80 * 2
    assert role.cache_tokens == int((0.85 * 80e9 - role.weights) // a_token)


def test_70b_student_does_not_fit_and_a_layout_that_does_is_found():
    job = job_of("llama-70b", parallel={"tensor": 8, "data": 4, "sequence": True})
    made = plan(job)
    assert any("needs" in problem and "GB at its peak" in problem for problem in made.problems)
    found = made.nearest
    assert found is not None
    assert memory.fits(found.job)
    assert not found.job.problems()
    assert found.job.config.parallel.world_size % 32 == 0
    everything = search.fitting(job, found.job.config.parallel.world_size)
    assert all(layout.changes >= found.changes for layout in everything)


def test_the_fastest_layout_fits_and_is_not_slower():
    made = plan(job_of())
    assert made.fastest is not None
    assert made.fastest.seconds <= made.estimate.seconds * 1.03
    assert made.fastest.job.config.parallel.world_size == 16
    assert memory.fits(made.fastest.job)


def test_an_impossible_layout_is_a_problem_with_its_setting():
    made = plan(job_of(parallel={"tensor": 1, "pipeline": 64}))
    assert any("parallel.pipeline=64 does not divide" in problem for problem in made.problems)
    assert made.nearest is not None


def test_sampling_ahead_hides_the_shorter_part():
    teachers = [{"name": "t", "model": "llama-8b", "dtype": "bf16"}]
    waits = timing.estimate(job_of(teachers=teachers))
    ahead = timing.estimate(job_of(teachers=teachers, rollout={"max_staleness": 1}))
    seconds = {stage.name: stage.seconds for stage in waits.stages}
    own = seconds["training"] + seconds["teachers on the ranks"]
    assert waits.seconds == pytest.approx(seconds["sampling"] + own + seconds["sync"])
    assert ahead.seconds == pytest.approx(max(seconds["sampling"], own) + seconds["sync"])
    assert ahead.tokens_per_s == pytest.approx(256 * 2048 / ahead.seconds)


def test_gpus_to_keep_pace():
    """With as many servers sampling is no longer the bound, and with one less it is."""

    def with_servers(count, response):
        return job_of(teachers=[], rollout={"servers": c.ServersConfig(count=count)}, response=response)

    sampling, training, _ = timing.estimate(with_servers(1, 500)).stages
    enough = sampling.keeping_pace
    assert enough is not None
    assert enough > 1
    assert servers.rollout(with_servers(enough, 500)).seconds <= training.seconds
    assert servers.rollout(with_servers(enough - 1, 500)).seconds > training.seconds


def test_servers_on_the_trainers_gpus_have_what_it_leaves():
    def job(**settings):
        return job_of(teachers=[], rollout={"servers": c.ServersConfig(count=8, **settings)})

    apart, beside = (servers.rollout(job(colocated=c)) for c in (False, True))
    own, kept = 0.85 * 80e9 - apart.weights, memory.resting(job())
    assert kept == sum(memory.worst(job()).always.values())  # of stages that are alike
    a_token = memory.cache_bytes(job().student, 2, 1)
    assert apart.cache_tokens == int(own // a_token)
    assert beside.cache_tokens == int((0.92 * 80e9 - kept - beside.weights) // a_token)
    assert 0 < beside.cache_tokens < apart.cache_tokens
    assert (beside.gpus, apart.gpus) == (8, 8)
    sampling, training, _ = timing.estimate(job(colocated=True)).stages
    assert (sampling.keeping_pace, training.gpus) == (None, 16)
    made = plan(job_of(teachers=[], parallel={"data": 2}, rollout={"servers": c.ServersConfig(colocated=True)}))
    assert any("no room for one sequence" in p and "beside what the trainer keeps" in p for p in made.problems)


@pytest.mark.parametrize("args", [["--mem-fraction-static", "0.5"], ["--page-size=1", "--mem-fraction-static=0.5"]])
def test_servers_have_the_memory_that_they_are_told_to_take(args):
    def role(args):
        made = job_of(teachers=[], rollout={"servers": c.ServersConfig(count=8, args=args)})
        return servers.rollout(made), memory.cache_bytes(made.student, 2, 1)

    (assumed, _), (told, a_token) = role([]), role(args)
    assert told.cache_tokens == int((0.5 * 80e9 - told.weights) // a_token)
    assert told.cache_tokens < assumed.cache_tokens


@pytest.mark.parametrize("args", [["--mem-fraction-static"], ["--mem-fraction-static", "much"]])
def test_a_share_of_memory_that_is_none(args):
    with pytest.raises(ValueError, match="--mem-fraction-static must be followed by a number between 0 and 1"):
        plan(job_of(teachers=[], rollout={"servers": c.ServersConfig(args=args)}))


@pytest.mark.parametrize(("share", "fits"), [(0.2, True), (0.9, False)])
def test_servers_that_are_told_to_take_what_the_trainer_keeps(share, fits):
    told = c.ServersConfig(count=8, colocated=True, args=["--mem-fraction-static", str(share)])
    problems = [
        p for p in plan(job_of(teachers=[], rollout={"servers": told})).problems if "but the trainer keeps" in p
    ]
    assert (not problems) == fits
    if problems:
        show(plan(job_of(teachers=[], rollout={"servers": told})), console := Console(record=True, width=200))
        assert "no layout" not in console.export_text(), "the trainer fits"
        (lower,) = re.findall(r"to (0\.\d\d)$", problems[0])
        assert 0 < float(lower) < 0.9


@pytest.mark.parametrize(
    ("sync", "colocated", "others"),
    [("tensor", False, 8), ("tensor", True, 7), ("disk", True, 0), ("broadcast", False, 0)],
)
def test_every_server_rank_that_reads_rank_0s_memory_has_a_context_there(sync, colocated, others):
    def ranks(count):
        told = c.ServersConfig(count=count, tensor=4, colocated=colocated)
        return memory.trainer(job_of(teachers=[], parallel={"pipeline": 2}, rollout={"servers": told, "sync": sync}))

    first, second = ranks(2)
    assert first.always["servers' contexts"] == others * 0.5e9
    assert second.always["servers' contexts"] == 0


def test_a_student_in_fp8_has_one_byte_a_number_of_its_matrices():
    """Which are all of an 8B model but the embedding, the head and the norms."""
    plain, rounded = (
        job_of("qwen3-8b", [], student={"dtype": "bf16"}, rollout={"quantization": quantization})
        for quantization in ("none", "fp8")
    )
    matrices = 36 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 12288 * 4096)
    for bytes_of in (traffic.weight_sync, lambda job: servers.rollout(job).weights):
        assert bytes_of(plain) - bytes_of(rounded) == matrices
    assert servers.rollout(rounded).cache_tokens > servers.rollout(plain).cache_tokens
    assert servers.rollout(rounded).seconds < servers.rollout(plain).seconds


def test_no_number_of_servers_hastens_one_sequence():
    few = {"prompts_per_step": 4, "samples_per_prompt": 1}
    job = job_of("qwen3-0.6b", [], lengths=(64, 16000), rollout=few, train={"steps": 1, "micro_batch_size": 1})
    assert timing.estimate(job).stages[0].keeping_pace is None


def test_a_family_that_only_servers_know():
    other = {"name": "t", "model": "other", "backend": "sglang", "carrier": "sampled"}
    config = run_of(teachers=[other], loss={"kind": "sampled", "ensemble": "probs"})
    directory = MODELS / "other"
    assert not directory.exists()
    with pytest.raises(ValueError, match=r"teachers\.0\.model: .*other"):
        build(config, gpu="H100")


def test_what_cannot_be_planned_is_said_at_once(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Unheard"], "vocab_size": 9}')
    config = run_of(teachers=[{"name": "t", "model": str(tmp_path)}], lengths=(8, 8))
    with pytest.raises(ValueError, match="cannot be planned") as error:
        build(config, gpu="H1000", response=9)
    for said in ("--gpu H1000", "--response 9", "teachers.0.model", "Unheard"):
        assert said in str(error.value)
    served = dataclasses.replace(config.teachers[0], backend="sglang", carrier="sampled")
    loss = dataclasses.replace(config.loss, kind="sampled")
    made = plan(build(dataclasses.replace(config, teachers=[served], loss=loss), gpu="H100"))
    assert "unknown family" in made.roles[1].name


@pytest.mark.parametrize("name", GPUS)
def test_data_sheets_are_in_base_units(name):
    gpu = GPUS[name]
    assert 2e10 < gpu.memory < 1e12
    assert 1e14 < gpu.bf16 < 1e16
    assert gpu.fp32 < gpu.bf16
    assert gpu.network < gpu.host < gpu.bandwidth
    assert 1e11 < gpu.bandwidth < 1e13


def test_the_plan_as_json():
    told = json.loads(json.dumps(as_dict(plan(job_of()))))
    assert told["ranks"][0]["total"] == pytest.approx(sum(told["ranks"][0]["parts"].values()))
    assert told["wire"]["bytes_a_token"]["big"] == {"sent": 0.0, "payload": 16384}


def test_check_plan_needs_config_json_alone(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"""
run: {{dir: runs/never}}
parallel: {{tensor: 4, data: 2, sequence: true}}
student: {{model: {MODELS / "llama-8b"}, dtype: bf16}}
teachers: [{{name: big, model: {MODELS / "llama-70b"}, backend: sglang, carrier: topk,
            servers: {{tensor: 8, urls: ["http://127.0.0.1:1"]}}}}]
loss: {{ensemble: probs}}
rollout: {{engine: sglang, servers: {{urls: ["http://127.0.0.1:2"]}}}}
data: {{train: [{{name: math, path: nowhere.jsonl}}]}}
train: {{steps: 1}}
""")
    assert cli.main(["check", str(config), "--plan", "--gpu", "H200"]) == 0
    shown = capsys.readouterr().out
    for what in ("8 x H200", "optimizer", "keep pace", "bound by", "assumed"):
        assert what in shown
    assert cli.main(["check", str(config), "parallel.tensor=1", "parallel.data=1", "parallel.sequence=false",
                     "--plan", "--gpu", "A100"]) == 1  # fmt: skip
    assert "nearest layout that fits: parallel.tensor=" in capsys.readouterr().out


def test_no_torch_is_needed():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from megatron_opd.planner import options, plan, table\n"
        "assert 'megatron' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parents[2])


def test_context_parallelism_divides_sequences_and_optimizer_state():
    split = job_of(parallel={"tensor": 4, "context": 4, "sequence": True}, teachers=[])
    whole = job_of(parallel={"tensor": 4, "sequence": True}, teachers=[])
    one, other = memory.worst(whole), memory.worst(split)
    assert (whole.longest, split.longest) == (3072, 3072)  # 2 chunks x 4 ranks x 4 divide it already
    assert other.always["weights"] == one.always["weights"]
    assert other.always["optimizer"] == pytest.approx(one.always["optimizer"] / 4, rel=1e-6)
    assert memory.under_way(split, 0) == pytest.approx(memory.under_way(whole, 0) / 4)
    # 256 sequences of 3072 tokens, of which a rank has a quarter; 2 x 2 KV heads of 128 in bf16 of 32 layers, to three
    # others, forward, backward and their gradients back.
    assert traffic.context_parallel(split) == 256 * 768 * 2 * 2 * 128 * 2 * 32 * 3 * 3
    assert traffic.context_parallel(whole) == 0
    assert {t.name: t.path for t in traffic.table(split)}["context parallel"] == "network"
    assert traffic.gradients(split) == traffic.gradients(job_of(parallel=TP4, teachers=[]))
    assert timing.estimate(split).seconds > 0


def test_layouts_that_are_tried_keep_the_context():
    job = job_of(parallel={"tensor": 4, "context": 2, "data": 2, "sequence": True}, teachers=[])
    tried = list(search.fitting(job, 16))
    assert tried
    assert {layout.job.config.parallel.context for layout in tried} == {2}
    assert {layout.job.config.parallel.world_size for layout in tried} == {16}
    assert "parallel.context=2" in tried[0].overrides
