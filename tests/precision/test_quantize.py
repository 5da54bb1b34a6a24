"""Rounding to FP8 against torch's own casts, block by block, and what a scale may and may not do."""

import pytest
import torch

from megatron_opd.precision.quantize import RoundBackward, RoundForward, Rounding, quantize, rounded, scale_of
from megatron_opd.precision.recipes import HISTORY, RECIPES, Scaling

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
CASTS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
BLOCKS = {"tensor": None, "1x128": (1, 128), "128x128": (128, 128), "1x32": (1, 32)}


def normal(*shape, seed=0):
    """Rows and columns of very different sizes, so that shared scales hurt."""
    torch.manual_seed(seed)
    sizes = torch.logspace(-3, 3, shape[-1])
    return torch.randn(*shape) * sizes[torch.randperm(shape[-1])]


def by_hand(x, scaling):
    """The same with loops over blocks."""
    rows, columns = scaling.block or x.shape
    out = torch.empty_like(x)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            block = x[i : i + rows, j : j + columns]
            amax = block.abs().max()
            scale = LARGEST[scaling.format] / amax if amax > 0 else torch.tensor(1.0)
            if scaling.power_of_two:
                scale = 2.0 ** torch.floor(torch.log2(scale.double())).float()
            cast = (block * scale).clamp(-LARGEST[scaling.format], LARGEST[scaling.format]).to(CASTS[scaling.format])
            out[i : i + rows, j : j + columns] = cast.float() / scale
    return out


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_is_torchs_cast_under_a_scale_a_block(fmt, block, power_of_two, device):
    scaling = Scaling(fmt, block, power_of_two=power_of_two)
    x = normal(150, 300)  # no multiples of the blocks
    assert torch.equal(rounded(x.to(device), scaling).cpu(), by_hand(x, scaling))


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
def test_leading_dimensions_are_rows(block):
    x = normal(3, 50, 160)
    scaling = Scaling("e4m3", block)
    assert torch.equal(rounded(x, scaling), rounded(x.reshape(150, 160), scaling).view(3, 50, 160))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("operand", ["activations", "weights", "gradients"])
def test_relative_error_is_half_a_step_of_the_mantissa(recipe, operand):
    scaling = getattr(recipe, operand)
    x = torch.rand(64, 256) + 0.5  # no value is small beside its block's largest
    bits = {"e4m3": 3, "e5m2": 2}[scaling.format]
    error = (rounded(x, scaling) - x).abs() / x
    assert 2.0 ** -(bits + 3) < error.max() <= 2.0 ** -(bits + 1) * (1 + 1e-6)


def test_blocks_save_what_a_shared_scale_loses():
    x = torch.cat([torch.full((1, 128), 1e5), torch.full((1, 128), 1e-3)], dim=1)
    assert (rounded(x, Scaling("e4m3"))[0, 128:] == 0).all()  # below the smallest number under one scale
    torch.testing.assert_close(rounded(x, Scaling("e4m3", (1, 128))), x)


def test_powers_of_two_stay_what_they_are():
    x = 2.0 ** torch.arange(-4, 5).float()
    assert torch.equal(rounded(x, Scaling("e4m3", power_of_two=True)), x)


def test_zeros_and_no_rows():
    assert torch.equal(rounded(torch.zeros(4, 8), Scaling("e4m3", (1, 4))), torch.zeros(4, 8))
    assert Rounding(Scaling("e4m3"))(torch.zeros(0, 8)).shape == (0, 8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
def test_what_is_not_finite_stays_seen(bad, block):
    x = torch.ones(4, 256)
    x[1, 2] = bad
    assert not rounded(x, Scaling("e4m3", block))[1, 2].isfinite()


def test_a_scale_brings_the_largest_value_to_the_largest_number_and_never_above():
    amax = torch.tensor([1e-30, 3.0, 448.0, 1e30])
    assert torch.allclose(scale_of(amax, Scaling("e4m3")) * amax, torch.full((4,), 448.0))
    powers = scale_of(amax, Scaling("e4m3", power_of_two=True))
    assert torch.equal(torch.frexp(powers).mantissa, torch.full((4,), 0.5))
    assert ((powers * amax <= 448) & (powers * amax > 224)).all()


def test_bf16_stays_bf16_and_takes_a_byte_a_value():
    x = normal(128, 256).bfloat16()
    packed = quantize(x, Scaling("e4m3", (128, 128)))
    assert packed.dequantized(x.dtype).dtype == torch.bfloat16
    assert packed.num_bytes == 128 * 256 + 2 * 4


def test_a_delayed_scale_is_of_the_passes_before():
    rounding = Rounding(RECIPES["delayed"].activations)
    small, large = torch.tensor([[0.3, 0.11]]), torch.tensor([[30.0, 0.11]])
    assert torch.equal(rounding(small), small.to(torch.float8_e4m3fn).float())  # nothing seen: a scale of 1
    assert torch.equal(rounding(small), rounded(small, Scaling("e4m3")))
    assert rounding(large)[0, 0] == pytest.approx(0.3)  # saturated: it was not expected
    assert torch.equal(rounding(large), rounded(large, Scaling("e4m3")))
    for _ in range(HISTORY):
        rounding(small)
    assert torch.equal(rounding(small), rounded(small, Scaling("e4m3")))  # the large one is forgotten


def test_gradients_pass_or_are_rounded():
    x = normal(4, 8).requires_grad_()
    upstream = normal(4, 8, seed=1)
    RoundForward.apply(x, Rounding(Scaling("e4m3"))).backward(upstream)
    assert torch.equal(x.grad, upstream)
    x.grad = None
    out = RoundBackward.apply(x, Rounding(Scaling("e5m2")))
    assert torch.equal(out, x)
    out.backward(upstream)
    assert torch.equal(x.grad, rounded(upstream, Scaling("e5m2")))
