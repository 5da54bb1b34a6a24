"""FP8 products of output heads on a GPU: the assertions of tests/precision/test_scaled.py and test_fp8.py."""

import pytest
import scaled_cases
import test_fp8
import tiny
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_fp8(needs_cuda):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device has no FP8")


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 50, 1000])
def test_all_three_products_are_the_emulation_s(num_tokens):
    scaled_cases.assert_equal_to_the_order_of_sums(num_tokens, "cuda", error=3e-3)


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 50, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_teacher_s_logits_are_the_emulation_s(num_tokens, dtype):
    scaled_cases.assert_a_teacher_s_head_is_the_emulated_one(num_tokens, dtype, "cuda", error=3e-3)


def test_a_teacher_s_head_takes_a_byte_a_number():
    scaled_cases.assert_a_teacher_s_head_takes_a_byte_a_number("cuda")


@pytest.mark.parametrize("heads", [["t"], ["all"]])
def test_a_step_is_the_emulated_one(ranks, tmp_path, heads):
    sizes = test_fp8.SIZES
    models = {"student": tiny.build("qwen3", vocab_size=96, **sizes), "teacher": tiny.build("qwen3", seed=1, **sizes)}
    made = test_fp8.config({name: tiny.save(model, tmp_path / name) for name, model in models.items()}, heads=heads)
    test_fp8.assert_steps_are_the_emulated_ones(ranks, made, "tp1", loss=0.02, gradient=0.05)
