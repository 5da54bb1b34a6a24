"""Weights in pinned host memory, and their copies to the GPU on a stream of their own."""

from __future__ import annotations

import functools

import torch

from megatron_opd.teachers import host_memory
from megatron_opd.teachers.offload import OffloadedWeights


def offloaded(model: torch.nn.Module, *, ahead: bool) -> OffloadedWeights:
    """Move the parameters of a model on a GPU to host memory, for good; `ahead` as in `OffloadedWeights`."""
    copies = _Copies(model)
    copies.drop()
    return OffloadedWeights(copies.fetch, copies.wait, copies.drop, ahead=ahead)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all models: what is needed first is copied first."""
    return torch.cuda.Stream(device)


class _Copies:
    """The copies of one model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = list(model.parameters())
        self._host = host_memory.copies(self._parameters, pin=True)
        self._device = self._parameters[0].device
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def fetch(self) -> None:
        # The memory is of the computing stream, which may still be at work in it for a model that was dropped: the
        # copies wait for what has been computed so far, and the caching allocator need not know of two streams.
        there = [torch.empty_like(host, device=self._device) for host in self._host]
        stream = _stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for host, tensor in zip(self._host, there, strict=True):
                tensor.copy_(host, non_blocking=True)
            self._arrived.record()
        for parameter, tensor in zip(self._parameters, there, strict=True):
            parameter.data = tensor

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._arrived)

    def drop(self) -> None:
        self.wait()  # nobody may get memory that a copy still writes to
        for parameter in self._parameters:
            parameter.data = parameter.data.new_empty(0)
