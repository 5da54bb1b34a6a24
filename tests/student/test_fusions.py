"""What is fused and overlapped on GPUs: what would be set there, and that reductions on their way change nothing."""

import functools
from unittest import mock

import pytest
import steps
import tiny
import torch

VOCAB_SIZE = 90
OPTIM = {"lr": 1e-2, "clip_grad": 0.0}
"""No clipping: the gradient's norm is a sum over ranks' shares, and those follow the buckets."""


@pytest.mark.parametrize(
    ("layers", "on_gpu", "replicas", "fuses", "overlaps"),
    [
        ("transformer_engine", True, 8, True, True),
        ("transformer_engine", True, 1, True, False),  # nothing to reduce
        ("local", True, 8, False, True),
        ("local", False, 8, False, False),
        ("transformer_engine", False, 8, False, False),
    ],
)
def test_what_is_on_where(layers, on_gpu, replicas, fuses, overlaps):
    from megatron_opd.student import fusions

    found = fusions.chosen(layers, on_gpu=on_gpu, replicas=replicas)
    assert (found.swiglu, found.rope, found.weight_gradients, found.reduction) == (fuses, fuses, fuses, overlaps)
    assert found.megatron() == {"bias_activation_fusion": fuses, "apply_rope_fusion": fuses}


def fused_settings(parallel, path):
    """What Megatron's config says on a machine with a GPU and Transformer Engine, and on this one."""
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_opd.models.architecture import read_architecture
    from megatron_opd.student import model

    names = ("transformer_impl", "bias_activation_fusion", "apply_rope_fusion", "gradient_accumulation_fusion")
    arch = read_architecture(path)
    here = model.transformer_config(arch, parallel, dtype=torch.bfloat16)
    with (
        mock.patch.object(model, "default_layers", return_value="transformer_engine"),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb", len),
    ):
        there = model.transformer_config(arch, parallel, dtype=torch.bfloat16)
        local = model.transformer_config(arch, parallel, dtype=torch.bfloat16, precision={"transformer_impl": "local"})
    return [tuple(getattr(made, name) for name in names) for made in (here, there, local)]


def test_megatron_s_config_has_it(ranks, tmp_path):
    (found,) = ranks.run(1, fused_settings, tiny.save(tiny.build("qwen3"), tmp_path / "model"))
    off = ("local", False, False, False)
    assert found == [off, ("transformer_engine", True, True, False), off]


class Linear(torch.nn.Linear):
    """As Transformer Engine's: it says whether it adds weight gradients to `main_grad` itself."""

    fuse_wgrad_accumulation = False


def test_trained_modules_of_the_engine_add_to_the_buffer_themselves():
    from megatron_opd.student import fusions

    model = torch.nn.ModuleList([Linear(2, 2), torch.nn.Linear(2, 2), Linear(2, 2)])
    model[2].weight.requires_grad_(False)  # beside an adapter
    assert fusions.fuse_weight_gradients(model) == 1
    assert [getattr(module, "fuse_wgrad_accumulation", None) for module in model] == [True, None, False]


def trained(parallel, config, rollouts, overlaps):
    """Metrics, exported weights, and how many reductions of the last step had begun before the end of its backward."""
    from megatron.core.distributed import finalize_model_grads

    from megatron_opd.student import fusions, optim

    small = functools.partial(optim.DistributedDataParallelConfig, bucket_size=3000 if overlaps else None)
    began = []

    def finalize(models, *arguments, **settings):
        began.append(sum(group.grad_reduce_handle is not None for model in models for group in model.bucket_groups))
        finalize_model_grads(models, *arguments, **settings)

    chosen = fusions.Fusions(reduction=overlaps)
    with (
        mock.patch.object(fusions, "chosen", return_value=chosen),
        mock.patch.object(optim, "DistributedDataParallelConfig", small),
    ):
        student, objective, pack = steps.build(parallel, config, VOCAB_SIZE)
    student.gpt.config.finalize_model_grads_func = finalize
    mine = pack(rollouts[parallel.data_rank :: parallel.data_size])
    metrics, gradients = [], []
    for _ in range(3):
        metrics.append(student.step(mine, objective))
        gradients.append([gradient.clone() for gradient in student.gradients(mine, objective)])
    return metrics, {name: tensor.clone() for name, tensor in student.export()}, gradients, began


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3", {"data": 2}),
        ("qwen3_tied", {"data": 2}),
        ("qwen3_tied", {"data": 2, "pipeline": 2}),
        ("qwen3_moe", {"data": 2}),  # experts without a token among them
    ],
    ids=str,
)
def test_reductions_on_their_way_change_no_bit(ranks, tmp_path, family, layout):
    model, teacher = (tiny.save(tiny.build(family, seed=seed), tmp_path / str(seed)) for seed in range(2))
    config = tiny.config(
        model, [{"name": "t", "model": teacher}], train={"steps": 10, "micro_batch_size": 1}, optim=OPTIM
    )
    rollouts = [tiny.rollouts(count=6, vocab_size=VOCAB_SIZE)[0]] * 6
    size = 2 * layout.get("pipeline", 1)
    without, within = (ranks.run(size, trained, config, rollouts, on, **layout) for on in (False, True))
    for (metrics, weights, gradients, _), (mine, my_weights, my_gradients, began) in zip(without, within, strict=True):
        for step, expected in zip(mine, metrics, strict=True):
            assert step.pop("grad_norm") == pytest.approx(expected.pop("grad_norm"), rel=1e-6)
            assert step == expected
        assert all(torch.equal(a, b) for a, b in zip(my_weights.values(), weights.values(), strict=True))
        for a, b in zip(my_gradients, gradients, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert began[0] == 0  # Megatron counts in the first step what it waits for in the next ones
        assert began[-1] >= 1
