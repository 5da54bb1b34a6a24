"""How an in-process teacher is built: as a model that will never see a gradient."""

import tiny
import torch

from megatron_opd.config import TeacherConfig
from megatron_opd.core.vocab import VocabShard


def built(parallel, model_dir):
    """Whether gradients were on while its layers were made, and what its parameters say."""
    from megatron_opd.teachers import megatron_teacher

    seen, build_gpt = [], megatron_teacher.build_gpt

    def watched(*arguments):
        seen.append(torch.is_grad_enabled())
        return build_gpt(*arguments)

    megatron_teacher.build_gpt = watched
    try:
        config = TeacherConfig(name="t", model=model_dir)
        teacher = megatron_teacher.MegatronTeacher(config, parallel, VocabShard(0, 96, 96), micro_batch_size=1)
    finally:
        megatron_teacher.build_gpt = build_gpt
    return seen, any(p.requires_grad for p in teacher.model.parameters()), torch.is_grad_enabled()


def test_without_gradients(ranks, tmp_path):
    """Transformer Engine looks at that: with gradients on, matrices in FP8 are kept twice, and in host memory too."""
    path = tiny.save(tiny.build("qwen3"), tmp_path / "teacher")
    assert ranks.run(1, built, path) == [([False], False, True)]
