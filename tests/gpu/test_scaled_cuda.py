"""Output heads' FP8 products on a GPU: the assertions of tests/unit/test_scaled.py."""

import pytest
import scaled_cases
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
