"""The student's weights in FP8 for its servers (`rollout.quantization: fp8`): rounded when they are sent.

What a server multiplies is the matrix [R, C] of a linear layer in e4m3, with a scale for each 128 x 128 of it. It is
rounded as the recipe blockwise does it (`precision/quantize.py`), so the fidelity gate measures these numbers. SGLang
0.5.23 takes new weights in that form alone: a server that rounds by itself (--quantization fp8) has thrown away what
loads them. It multiplies by `weight_scale_inv`, float32 [R / 128, C / 128], rounded up, where ours divides.

Everything else (embedding, head, norms, biases) keeps its type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_opd.config import RolloutConfig, StudentConfig
from megatron_opd.core.named_weights import NamedWeights
from megatron_opd.models.architecture import Architecture, read_architecture
from megatron_opd.precision.quantize import quantize
from megatron_opd.precision.recipes import RECIPES
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.errors import Unfit

SCALING = RECIPES["blockwise"].weights
BLOCK = 128
SCALE = "_scale_inv"
"""Behind the name of a matrix: that of its scales."""
_MATRICES = re.compile(r".*\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight")
_OVERRIDE = "--json-model-override-args"
_CONFIG = {
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "scale_fmt": "ue8m0",  # scales of activations are powers of two, as the recipe has them
    }
}
_FAMILIES = ("qwen2", "qwen3")
_WAYS = ("broadcast", "tensor")


def is_matrix(name: str) -> bool:
    """Whether servers multiply the tensor of this Hugging Face name in FP8."""
    return _MATRICES.fullmatch(name) is not None


@torch.no_grad()
def quantized(weights: NamedWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """The same stream for servers in FP8: a matrix as its values in e4m3, and its scales behind it."""
    for name, tensor in weights:
        if not is_matrix(name):
            yield name, tensor
            continue
        made = quantize(tensor, SCALING)
        yield name, made.values
        yield name + SCALE, made.scales.reciprocal()  # of powers of two: exact


@dataclass(frozen=True, slots=True)
class Sent:
    """A weight of the stream: one tensor, or a matrix in FP8 and its scales."""

    sent: tuple[tuple[str, torch.Tensor], ...]

    @property
    def name(self) -> str:
        """The student's."""
        return self.sent[0][0]

    @property
    def is_fp8(self) -> bool:
        """Whether it is a matrix in FP8."""
        return len(self.sent) > 1

    def tensor(self) -> torch.Tensor:
        """The weight; of a matrix in FP8 what its values stand for, in bf16, which loses nothing."""
        (_, values), *scales = self.sent
        return values.detach() if not scales else _dequantized(values, scales[0][1])


def whole(weights: NamedWeights) -> Iterator[Sent]:
    """The same stream, a weight at a time."""
    for name, tensor in weights:
        pair = (name, tensor)
        yield Sent((pair, next(weights)) if tensor.dtype == torch.float8_e4m3fn else (pair,))


def _dequantized(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    rows, columns = values.shape
    wide = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return (values.float() * wide).bfloat16()


def arguments() -> tuple[str, ...]:
    """Arguments for sglang.launch_server. The model's own weights are in another form: the first sync brings some."""
    made = [_OVERRIDE, json.dumps(_CONFIG), "--load-format", "dummy"]
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0):
        # DeepGEMM packs the scales on Blackwell, and new ones do not fit in place of packed ones.
        made += ["--fp8-gemm-backend", "triton"]
    return tuple(made)


async def check_server(client: Client, *, in_fp8: bool) -> None:
    """Raises Unfit for a server that would take the weights for something else: it says nothing of that itself."""
    info = await client.server_info()
    has = _override(info).get("quantization_config") == _CONFIG["quantization_config"]
    if in_fp8 and not has:
        raise Unfit(
            f"{client.url}: rollout.quantization: fp8 needs a server that was started with"
            f" {_OVERRIDE} '{json.dumps(_CONFIG)}' --load-format dummy"
        )
    if not in_fp8 and (has or info.get("quantization")):
        raise Unfit(
            f"{client.url}: this server is quantised, and the student's weights are sent as they are; start it without,"
            " or, for FP8, set rollout.quantization: fp8"
        )


def _override(info: dict[str, Any]) -> dict[str, Any]:
    try:
        found = json.loads(info.get("json_model_override_args") or "{}")
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def problems(rollout: RolloutConfig, student: StudentConfig) -> list[str]:
    """Faults of `rollout.quantization` for this student and these servers. A student whose config.json cannot
    be read is left out: that is a problem already."""
    servers, what = rollout.servers, "rollout.quantization: fp8"
    options = {word.partition("=")[0] for word in servers.args}
    if rollout.quantization == "none":
        if rollout.is_served and "--quantization" in options:
            return [
                "rollout.servers.args: new weights do not reach a server with --quantization; set rollout.quantization:"
                " fp8 instead"
            ]
        return []
    found = [
        f"rollout.servers.args: {option} is set by {what}"
        for option in ("--quantization", "--load-format", _OVERRIDE)
        if option in options
    ]
    if rollout.sync not in _WAYS:
        found.append(f"{what} needs rollout.sync: {' or '.join(_WAYS)}, not {rollout.sync}")
    if (student.dtype if servers.dtype == "auto" else servers.dtype) != "bf16":
        found.append(f"{what} needs bf16 for all else: set student.dtype or rollout.servers.dtype to bf16")
    try:
        arch = read_architecture(student.model)
    except ValueError:
        return found
    if arch.family not in _FAMILIES:
        found.append(
            f"{what}: SGLang 0.5.23 takes new FP8 weights of {' and '.join(_FAMILIES)} models only, not of"
            f" {arch.family} (it looks for Llama's scales under another name, and lays experts out anew)"
        )
        return found
    return found + [
        f"{what} needs multiples of {BLOCK}, but {side} of student.model is {size} with rollout.servers.tensor"
        f" {servers.tensor}"
        for side, size in _sides(arch, servers.tensor).items()
        if size % BLOCK
    ]


def _sides(arch: Architecture, tensor: int) -> dict[str, int]:
    """Sides of the matrices on one rank of a server, by name. Ranks beyond the key-value heads have copies of those."""
    return {
        "the hidden size": arch.hidden_size,
        "the height of q_proj": arch.num_heads * arch.head_dim // tensor,
        "the height of k_proj": max(arch.num_kv_heads // tensor, 1) * arch.head_dim,
        "the intermediate size": arch.ffn_size // tensor,
    }
