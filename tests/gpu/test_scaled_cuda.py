"""The output head's FP8 products on a GPU: the assertions of tests/unit/test_scaled.py."""

import pytest
import scaled_cases
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 50, 1000])
def test_all_three_products_are_the_emulation_s(num_tokens):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device has no FP8")
    scaled_cases.assert_equal_to_the_order_of_sums(num_tokens, "cuda", error=3e-3)
