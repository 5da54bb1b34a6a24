"""FP8 in Megatron models: emulated in Megatron's own linears, or checked to be real in Transformer Engine's. The output
head is not Transformer Engine's: where it is real, it is `precision/scaled.py`.

The emulation rounds the operands of the products and multiplies in the model's dtype, which is what FP8 tensor cores do
but for the accuracy of their sums: y = Q(x) Q(w)ᵀ, and with FP8 gradients dx = Q(dy) Q(w), dw = Q(dy)ᵀ Q(x). Blocks lie
along the columns in all three; Transformer Engine cuts those of the last product along the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_opd.core.parallel import Parallel
from megatron_opd.precision.fp8_plan import HEAD, ModelPlan, Products
from megatron_opd.precision.quantize import Quantized, RoundBackward, RoundForward, Rounding, quantize
from megatron_opd.precision.scaled import Scaled

Linear: TypeAlias = ColumnParallelLinear | RowParallelLinear


@dataclass
class Switch:
    """A model's FP8, which can be left out for a while."""

    model: GPTModel
    emulated: dict[str, _Emulated] = field(default_factory=dict)
    """By module name, counted from this rank's first layer."""
    head: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """The product of hidden states and output head, which the loss does; None where it is not in FP8."""

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model in its dtype. Not for weights that are in FP8 themselves."""
        assert not any(module.resident for module in self.emulated.values())
        # Megatron's block looks at its config in every pass.
        before, self.model.config.fp8 = self.model.config.fp8, None
        head, self.head = self.head, None
        for module in self.emulated.values():
            module.is_on = False
        try:
            yield
        finally:
            self.model.config.fp8, self.head = before, head
            for module in self.emulated.values():
                module.is_on = True

    @property
    def resident_bytes(self) -> int:
        """Memory of the matrices that are kept in FP8."""
        return sum(module.resident.num_bytes for module in self.emulated.values() if module.resident)


def install(model: GPTModel, plan: ModelPlan, parallel: Parallel) -> Switch:
    """Emulate the plan in a model whose weights are loaded, or see that Transformer Engine follows it.

    Raises ValueError where FP8 is asked for of a module that would quietly compute without.
    """
    switch = Switch(model)
    first = parallel.pipeline_rank * (model.config.num_layers // parallel.pipeline_size)
    for name, module in model.named_modules():
        products = plan.of(_global(name, first))
        if products is None:
            continue
        if plan.emulate:
            assert isinstance(module, Linear), name
            made = switch.emulated[name] = _Emulated(module, products, parallel, resident=plan.resident)
            switch.head = made.product if name == HEAD else switch.head
        elif name == HEAD:
            switch.head = Scaled(products)
        elif not _is_transformer_engine(module):
            raise ValueError(
                f"precision.fp8: {name} of {plan.model} is a {type(module).__name__}, which ignores FP8: Transformer"
                " Engine's layers are needed (precision.layers=auto, docs/gpu.md)"
            )
    return switch


def _global(name: str, first_layer: int) -> str:
    """A module's name with its layer counted from the model's first."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"] and len(parts) > 2:
        parts[2] = str(int(parts[2]) + first_layer)
    return ".".join(parts)


def _is_transformer_engine(module: torch.nn.Module) -> bool:
    return any(cls.__module__.split(".")[0] == "transformer_engine" for cls in type(module).__mro__)


class _Emulated:
    """Takes the place of the product in one of Megatron's linears."""

    def __init__(self, module: Linear, products: Products, parallel: Parallel, *, resident: bool) -> None:
        recipe = products.recipe
        # With sequence parallelism the rows of one matrix lie on several ranks: those into a column-parallel layer,
        # and the gradients back into a row-parallel one.
        shared = parallel.tensor_group if module.sequence_parallel and not module.is_expert else None
        is_column = isinstance(module, ColumnParallelLinear)
        self.input = Rounding(recipe.activations, shared if is_column else None)
        self.rows = Rounding(recipe.activations)  # of an input that is whole on this rank, whatever the layout
        self.weight = Rounding(recipe.weights)
        self.gradient = Rounding(recipe.gradients) if products.backward else None
        self.is_on = True
        self.resident: Quantized | None = None
        self._multiply: Callable[..., torch.Tensor] = module._forward_impl
        if resident:
            self._dtype = module.weight.dtype
            self.resident = quantize(module.weight, recipe.weights)
            module.weight.data = module.weight.new_empty(0)
        module._forward_impl = self

    def product(self, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """input · weightᵀ of whole rows, for a layer that is not called."""
        out = F.linear(RoundForward.apply(input, self.rows), RoundForward.apply(weight, self.weight))
        if self.gradient is None:
            return out
        return RoundBackward.apply(out, self.gradient).clone()  # the loss writes its gradient in the logits' place

    def __call__(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.is_on:
            return self._multiply(input, weight, *args, **kwargs)
        if self.resident is not None:
            rounded_weight = self.resident.dequantized(self._dtype)
        else:
            rounded_weight = RoundForward.apply(weight, self.weight)
        out = self._multiply(RoundForward.apply(input, self.input), rounded_weight, *args, **kwargs)
        return out if self.gradient is None else RoundBackward.apply(out, self.gradient)
