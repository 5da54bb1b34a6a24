"""Weights in one piece of host memory: where each begins, and that every bit comes back."""

import pytest
import torch

from megatron_opd.teachers import host_memory

DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn, torch.bool]


def bits(shape, dtype, seed):
    """A tensor whose bytes are drawn: NaN of every kind among them."""
    count = torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size()
    drawn = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(seed))  # fmt: skip
    return drawn.view(dtype).view(shape)


def as_bytes(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("sizes", [[], [0], [1], [256, 1, 255, 0, 257, 1 << 20], [7] * 50], ids=str)
def test_parts_are_aligned_and_apart_and_waste_less_than_a_line_each(sizes):
    starts, total = host_memory.layout(sizes)
    ends = [start + size for start, size in zip(starts, sizes, strict=True)]
    assert all(start % 256 == 0 for start in starts)
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    assert max(ends, default=0) <= total <= sum(sizes) + 255 * len(sizes)


def test_every_bit_comes_back_in_its_own_type_and_shape():
    tensors = [bits((3, 5, 2), dtype, seed) for seed, dtype in enumerate(DTYPES)]
    tensors += [bits((), torch.float32, 8), bits((0, 4), torch.bfloat16, 9), bits((6, 4), torch.bfloat16, 10).t()]
    tensors.append(torch.nn.Parameter(bits((2, 2), torch.float32, 11)))
    made = host_memory.copies(tensors, pin=False)
    assert len({tensor.untyped_storage().data_ptr() for tensor in made}) == 1
    for mine, theirs in zip(made, tensors, strict=True):
        assert (mine.dtype, mine.shape, mine.requires_grad) == (theirs.dtype, theirs.shape, False)
        assert as_bytes(mine) == as_bytes(theirs.detach())
    made[0].zero_()  # one part is none of another's
    assert as_bytes(made[1]) == as_bytes(tensors[1])
    assert host_memory.copies([], pin=True) == []


class Cuda:
    """A CUDA runtime that pins, or not."""

    def __init__(self, error=0):
        self.error, self.pinned = error, {}

    def cudaHostRegister(self, address, size, flags):
        self.pinned[address] = size
        return self.error

    def cudaHostUnregister(self, address):
        del self.pinned[address]


def test_memory_is_pinned_as_it_is_and_for_as_long_as_it_is_there(monkeypatch):
    cuda = Cuda()
    monkeypatch.setattr(host_memory.torch.cuda, "cudart", lambda: cuda)
    made = host_memory.copies([torch.ones(1000), torch.ones(3)], pin=True)
    assert list(cuda.pinned.items()) == [(made[0].data_ptr(), 4096 + 256)]
    last = made.pop()
    del made
    assert len(cuda.pinned) == 1
    assert last.tolist() == [1.0] * 3
    del last
    assert cuda.pinned == {}


def test_memory_that_cannot_be_pinned_is_an_error_with_advice(monkeypatch):
    monkeypatch.setattr(host_memory.torch.cuda, "cudart", lambda: Cuda(error=2))
    with pytest.raises(RuntimeError, match=r"could not be pinned \(CUDA's error 2\); .*ulimit -l.*offload=false"):
        host_memory.copies([torch.ones(3)], pin=True)
