"""Linear layers in block-wise FP8 as plain PyTorch: SGLang 0.5.23 multiplies them by kernels of GPUs, or of AMX.

Values are those of the kernels, sums are float32: weights in e4m3 times their scales, activations rounded to e4m3 with
a power of two for each group of columns.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from typing import Any

NAME = "sglang.srt.layers.quantization.fp8"


class PatchFp8:
    """Gives SGLang's linear layers in FP8 the plain product when their module is imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None  # noqa: PT018
        execute = spec.loader.exec_module

        def and_patch(module: Any) -> None:
            execute(module)
            module.Fp8LinearMethod.process_weights_after_loading = lambda self, layer: None
            module.Fp8LinearMethod.apply = product
            module.Fp8Config.get_supported_act_dtypes = classmethod(any_type)

        spec.loader.exec_module = and_patch  # type: ignore[method-assign]
        return spec


def any_type(cls: Any) -> list[Any]:
    """Types of all that is not in FP8; in float32 a test can compare to the last digits."""
    import torch

    return [torch.bfloat16, torch.half, torch.float32]


def product(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
    """x [..., C] times the transposed weight [R, C], in the type of x."""
    import torch

    rows, columns = self.quant_config.weight_block_size
    scales = layer.weight_scale_inv.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    weight = layer.weight.float() * scales[: layer.weight.shape[0], : layer.weight.shape[1]]
    groups = x.float().unflatten(-1, (-1, columns))
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10)
    scale = torch.exp2(torch.ceil(torch.log2(largest / 448.0)))
    rounded = ((groups / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float() * scale).flatten(-2)
    made = torch.nn.functional.linear(rounded, weight).to(x.dtype)
    return made if bias is None else made + bias
