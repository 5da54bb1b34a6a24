"""LoRA on the ranks: y = W x + (alpha / rank) B A x, with W frozen (Hu et al. 2021, arXiv:2106.09685).

Under tensor parallelism only h = A x, of [S, B, rank], is communicated:

* column-parallel: A is a copy, B is split like W's rows. The gradient of h is summed over the ranks, so that of A is
  whole; with sequence parallelism h is gathered, and A's gradient is of this rank's part of the sequence.
* row-parallel: A is split like W's columns, B is a copy. h is summed over the ranks; with sequence parallelism it is
  scattered besides, and B's gradient is of this rank's part of the sequence.

Copies with a gradient of part of the sequence are marked `sequence_parallel`, as norms are: Megatron sums those, and
counts copies once in the gradient norm. Shape letters: S sequence, B batch, R rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel as tp
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_opd.config import LoraConfig
from megatron_opd.core.parallel import Parallel
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.lora_layout import SUFFIX, Place, merged, places
from megatron_opd.student import groups


class _Pair(torch.nn.Module):
    """A and B of one Hugging Face module, this rank's shards."""

    def __init__(self, a_RI: torch.Tensor, num_rows: int) -> None:
        super().__init__()
        self.lora_A = torch.nn.Parameter(a_RI)
        self.lora_B = torch.nn.Parameter(a_RI.new_zeros(num_rows, a_RI.shape[0]))


class Adapter(torch.nn.Module):
    """What is added to the output of one of Megatron's linear layers."""

    def __init__(self, place: Place, config: LoraConfig, parallel: Parallel, pairs: dict[str, _Pair], hf: str) -> None:
        super().__init__()
        self.place, self.config, self.parallel, self.hf = place, config, parallel, hf
        for part, pair in pairs.items():
            self.add_module(part, pair)
            split, copy = (pair.lora_A, pair.lora_B) if place.row_parallel else (pair.lora_B, pair.lora_A)
            set_tensor_model_parallel_attributes(split, True, 1 if place.row_parallel else 0, 1)
            copy.sequence_parallel = parallel.sequence  # type: ignore[attr-defined]

    def pairs(self) -> dict[str, _Pair]:
        """The adapted modules by Hugging Face's name."""
        return dict(self.named_children())  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The linear layer's input, as it gets it -> what to add to its output, split as that is."""
        pairs = self.pairs()
        h_SBR = F.linear(x, torch.cat([pair.lora_A for pair in pairs.values()])) * self.config.scale
        pieces = self._exchange(h_SBR).split(self.config.rank, dim=-1)
        return self.place.interleave(
            {name: F.linear(piece, pair.lora_B) for (name, pair), piece in zip(pairs.items(), pieces, strict=True)}
        )

    def _exchange(self, h: torch.Tensor) -> torch.Tensor:
        group = self.parallel.tensor_group
        if self.parallel.tensor_size == 1:
            return h
        if self.place.row_parallel and self.parallel.sequence:
            return tp.reduce_scatter_to_sequence_parallel_region(h, group=group)
        if self.place.row_parallel:
            return tp.reduce_from_tensor_model_parallel_region(h, group=group)
        if self.parallel.sequence:
            return tp.gather_from_sequence_parallel_region(h, group=group)
        return tp.copy_to_tensor_model_parallel_region(h, group=group)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """This rank's shard of W + (alpha / rank) B A."""
        pairs = {part: (pair.lora_A, pair.lora_B) for part, pair in self.pairs().items()}
        return merged(weight, self.place, pairs, self.config.scale)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For torch_dist checkpoints: what is split and what is a copy."""
        split, axis = ("lora_A", 1) if self.place.row_parallel else ("lora_B", 0)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {f"{part}.{split}": axis for part in self.pairs()},
            sharded_offsets,
            tp_group=self.parallel.tensor_group,
            dp_cp_group=self.parallel.reduction_group,
        )


def attach(model: GPTModel, arch: Architecture, config: LoraConfig, parallel: Parallel, *, seed: int) -> None:
    """Freeze the model and put adapters beside its linear layers; B is 0, so outputs are what they were.

    A is drawn as peft draws it, by seed and name, and then cut: the same on every layout.
    """
    dtype = next(model.parameters()).dtype
    model.requires_grad_(False)
    first = parallel.pipeline_rank * (arch.num_layers // parallel.pipeline_size)
    for index, layer in enumerate(model.decoder.layers, start=first):
        for place in places(arch, config, parallel.tensor_size):
            hf = f"model.layers.{index}.{place.hf}"
            pairs = {}
            for part in place.parts:
                if part in config.modules:
                    a_RI = _initial_a(f"{hf}{part}", place, config.rank, parallel, seed)
                    pairs[part] = _Pair(a_RI.to(groups.device(), dtype), place.rows(part))
            adapter = Adapter(place, config, parallel, pairs, hf)
            parent, _, name = place.megatron.partition(".")
            getattr(layer, parent).add_module(name + SUFFIX, adapter)
            getattr(getattr(layer, parent), name).register_forward_hook(partial(_add, adapter))
    if model.pre_process:
        model.embedding.register_forward_hook(_let_gradients_through)


def _add(adapter: Adapter, _: Any, inputs: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
    return output[0] + adapter(inputs[0]), output[1]


def _let_gradients_through(_: Any, __: Any, output: torch.Tensor) -> None:
    """Recomputed layers have gradients only where their input has one, and a frozen embedding's output has none."""
    if torch.is_grad_enabled():
        output.requires_grad_()


def _initial_a(name: str, place: Place, rank: int, parallel: Parallel, seed: int) -> torch.Tensor:
    """This rank's columns of A, uniform within 1 / sqrt(inputs); fp32 on the CPU."""
    shards = parallel.tensor_size if place.row_parallel else 1
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    bound = (place.inputs * shards) ** -0.5
    whole_RI = torch.empty(rank, place.inputs * shards).uniform_(-bound, bound, generator=generator)
    return whole_RI.chunk(shards, dim=1)[parallel.tensor_rank if place.row_parallel else 0].contiguous()


def adapters(model: torch.nn.Module) -> dict[str, Adapter]:
    """This rank's adapters by the names of the weights that they change."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
    return {f"{name.removesuffix(SUFFIX)}.weight": adapter for name, adapter in found.items()}


def merged_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's parameters without adapters, which are added to what they change; one at a time."""
    found = adapters(model)
    of_adapters = {id(p) for adapter in found.values() for p in adapter.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in of_adapters:
            weight = parameter.detach()
            yield name, found[name].merged(weight) if name in found else weight


def peft_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, int | None]]:
    """(name in peft's files, this rank's shard, dimension along which it is split or None for a copy)."""
    for adapter in adapters(model).values():
        for part, pair in adapter.pairs().items():
            for letter, shard in (("A", pair.lora_A), ("B", pair.lora_B)):
                dim = shard.partition_dim if getattr(shard, "tensor_model_parallel", False) else None
                yield f"base_model.model.{adapter.hf}{part}.lora_{letter}.weight", shard.detach(), dim
