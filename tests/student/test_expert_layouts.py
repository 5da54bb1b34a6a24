"""A mixture's checkpoint goes on with another number of ranks that share its experts, none among them: every tensor bit
for bit, and steps that go on counting."""

import itertools
import math

import pytest
import steps
import tiny
import torch
import torch.distributed.checkpoint as dcp

VOCAB_SIZE = 90


def layout(tensor, expert, **others):
    return {"tensor": tensor, "expert": expert, "sequence": tensor > 1, **others}


def stepped(parallel, config, rollouts, run_dir, go_on):
    """Steps and a checkpoint, from the beginning (two steps) or from the newest checkpoint (none); then one more step,
    after which this rank has these weights. Also the loss scale of the checkpoint, and the steps that Adam counts."""
    from megatron_opd.student import optim
    from megatron_opd.student.checkpoint import Checkpoints

    student, objective, pack = steps.build(parallel, config, VOCAB_SIZE)
    checkpoints = Checkpoints(run_dir, parallel, keep_last=2)
    mine = rollouts[parallel.data_rank :: parallel.data_size]
    if go_on:
        assert checkpoints.restore(student)["step"] == 2
    else:
        for _ in range(2):
            student.step(pack(mine), objective)
    checkpoints.save(student, {"step": 2 + go_on})
    scaler = optim.scaler(student.optimizer)
    scale = scaler and scaler.scale.item()
    student.step(pack(mine), objective)
    counts = {state["step"].item() for adam in optim._adams(student.optimizer) for state in adam.state.values()}
    return {name: tensor.clone() for name, tensor in student.export()}, scale, counts


def tensors(checkpoint):
    """All tensors of a checkpoint by name, as torch itself reads them."""
    reader = dcp.FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    found = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items() if hasattr(e, "size")}
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


PAIRS = [
    (layout(2, 2), layout(1, 1, data=2)),
    (layout(1, 1, pipeline=2), layout(2, 2)),
    (layout(4, 4), layout(2, 2)),
    (layout(2, 2, data=2), layout(4, 4)),
    (layout(4, 2), layout(1, 1)),
]
ALWAYS = {(0, "fp32", True), (1, "bf16", False), (1, "fp16", True), (4, "fp16", False)}
"""Cases of the product beside which the others are slow: (pair, type, whether the optimizer is distributed)."""


def cases():
    for case in itertools.product(range(len(PAIRS)), ("fp32", "bf16", "fp16"), (True, False)):
        pair, dtype, distributed = case
        marks = [] if case in ALWAYS else [pytest.mark.slow]
        name = "-".join([*map(words, PAIRS[pair]), dtype, "distributed" if distributed else "whole"])
        yield pytest.param(*PAIRS[pair], dtype, distributed, id=name, marks=marks)


def words(there):
    return "".join(f"{name[0]}{size}" for name, size in there.items() if name != "sequence")


@pytest.mark.parametrize(("first", "second", "dtype", "distributed"), list(cases()))
def test_experts_are_spread_anew(ranks, tmp_path, first, second, dtype, distributed):
    models = [tiny.save(tiny.build("qwen3_moe", seed=seed), tmp_path / str(seed)) for seed in range(2)]
    teacher = {"name": "t", "model": models[1]}
    rollouts = tiny.rollouts(count=4, vocab_size=VOCAB_SIZE)
    made = []
    for go_on, there in enumerate((first, second)):
        optim = {"distributed": distributed, "initial_loss_scale": (512.0, 64.0)[go_on]}  # the second is not used
        config = tiny.config(models[0], [teacher], student={"dtype": dtype}, optim=optim)
        count = math.prod(there.get(name, 1) for name in ("tensor", "pipeline", "data"))
        made.append(ranks.run(count, stepped, config, rollouts, str(tmp_path), go_on, **there)[0])
    before, after = (tensors(tmp_path / f"checkpoints/step_{step:08d}") for step in (2, 3))
    assert before.keys() == after.keys()
    assert any("exp_avg_sq" in name and "experts" in name for name in before)
    for name, tensor in before.items():
        if tensor.dtype != torch.uint8:
            assert torch.equal(tensor, after[name]), name
    (expected, *facts), (found, *same_facts) = made
    assert same_facts == facts == [512.0 if dtype == "fp16" else None, {3}]
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5 if dtype == "fp32" else 4e-3)
