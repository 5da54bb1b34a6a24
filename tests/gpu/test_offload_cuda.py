"""Teachers that wait in pinned host memory, on a GPU: what tests/teachers/test_offload.py asserts, of real copies."""

import pytest
import tiny
import torch

from megatron_opd.config import TeacherConfig
from megatron_opd.core.vocab import VocabShard

pytestmark = pytest.mark.gpu
COLUMNS = 96
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
"""Large enough for weights to outweigh activations."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [tiny.save(tiny.build("qwen3", seed=n, **SIZES), root / f"t{n}") for n in range(3)]


def scored(parallel, paths, rollouts, offload, prefetch):
    """([hidden states by teacher], bytes on the GPU before and after, most while they scored, of one model)."""
    from megatron_opd.teachers import ask_all
    from megatron_opd.teachers.megatron_teacher import MegatronTeacher

    made = []
    for n, path in enumerate(paths):
        settings = TeacherConfig(name=f"t{n}", model=path, offload=offload, prefetch=prefetch)
        made.append(MegatronTeacher(settings, parallel, VocabShard(0, COLUMNS, COLUMNS), micro_batch_size=2))
    copies = made[0].offloaded
    parameters = [p.numel() for p in made[0].model.parameters()]
    if copies is not None:
        assert not any(parameters)
        with copies.there():
            parameters = [p.numel() for p in made[0].model.parameters()]
    weights = [[1.0] * len(made)] * len(rollouts)
    hidden = []
    for _ in range(3):  # memory of one round is that of the next
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        scores = ask_all(made, rollouts, weights)
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated() - before
        hidden.append([torch.cat([s.hidden_RD for s in of]).cpu() for of in scores])
        del scores
    assert all(torch.equal(a, b) for again in hidden[1:] for a, b in zip(hidden[0], again, strict=True))
    return hidden[0], before, torch.cuda.memory_allocated(), most, 4 * sum(parameters)


@pytest.mark.parametrize(("prefetch", "models"), [(True, 2), (False, 1)])
def test_offloaded_teachers_say_the_same_and_at_most_two_are_there(ranks, paths, prefetch, models):
    rollouts = tiny.rollouts(count=4, vocab_size=90)
    ((resident, _, _, activations, size),) = ranks.run(1, scored, paths, rollouts, False, True)
    ((hidden, before, after, most, _),) = ranks.run(1, scored, paths, rollouts, True, prefetch)
    for mine, theirs in zip(hidden, resident, strict=True):
        assert torch.equal(mine, theirs)
    assert before == after
    assert models * size <= most <= models * size * 1.1 + activations
