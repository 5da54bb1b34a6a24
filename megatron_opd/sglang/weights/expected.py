"""What a server's checksums must be, from the student's own tensors: the check that servers have the student's weights.

SGLang fuses some tensors (q, k and v; gate and up; the experts of a layer), splits them over its ranks, and hashes what
each rank has; of a matrix in FP8 the values times their scales, in bf16. The same is done here while the weights stream
by; parts of a fused tensor are kept until it is whole.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_opd.sglang.client import Client
from megatron_opd.sglang.errors import BadAnswer, Refused
from megatron_opd.sglang.weights import hashes
from megatron_opd.sglang.weights.fp8_weights import whole

_THREADS = 8
"""Most that hash at a time; the other cores are for the ranks of this machine."""
_NAMED = 5
"""Tensors named in a message."""
_VOCAB_MULTIPLE, _CPU_MLP_MULTIPLE = 64, 32
# Hugging Face's name -> (SGLang's name, place in the fused tensor, how it is split over ranks)
_RULES = [
    (r"(.*)\.q_proj\.(weight|bias)", r"\1.qkv_proj.\2", 0, "rows"),
    (r"(.*)\.k_proj\.(weight|bias)", r"\1.qkv_proj.\2", 1, "kv_rows"),
    (r"(.*)\.v_proj\.(weight|bias)", r"\1.qkv_proj.\2", 2, "kv_rows"),
    (r"(.*)\.o_proj\.weight", r"\1.o_proj.weight", 0, "columns"),
    (r"(.*\.experts)\.\d+\.gate_proj\.weight", r"\1.w13_weight", 0, "mlp_rows"),
    (r"(.*\.experts)\.\d+\.up_proj\.weight", r"\1.w13_weight", 1, "mlp_rows"),
    (r"(.*\.experts)\.\d+\.down_proj\.weight", r"\1.w2_weight", 0, "mlp_columns"),
    (r"(.*)\.gate_proj\.weight", r"\1.gate_up_proj.weight", 0, "mlp_rows"),
    (r"(.*)\.up_proj\.weight", r"\1.gate_up_proj.weight", 1, "mlp_rows"),
    (r"(.*)\.down_proj\.weight", r"\1.down_proj.weight", 0, "mlp_columns"),
    (r"(.*embed_tokens|lm_head)\.weight", r"\1.weight", 0, "vocab_rows"),
    (r"(.*)", r"\1", 0, "whole"),
]
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_PARTS = {"qkv_proj": 3, "gate_up_proj": 2, "w13_weight": 2}


@dataclass(frozen=True, slots=True)
class ServerLayout:
    """All that a server's checksums depend on, beside the weights."""

    ranks: int
    dtype: torch.dtype
    is_cpu: bool


@dataclass(frozen=True, slots=True)
class _Part:
    fused: str
    place: int
    expert: int
    split: str


@dataclass(frozen=True, slots=True)
class _Held:
    """A part until its fused tensor is whole."""

    split: str
    tensor: torch.Tensor
    is_fp8: bool
    """Servers hash it in bf16 then, whatever their type."""

    def as_in(self, dtype: torch.dtype) -> torch.Tensor:
        """The tensor that a server of this type hashes."""
        return self.tensor if self.is_fp8 else self.tensor.to(dtype)


class Expected:
    """For one push: `ask_layout` of every server, then `watch` the weights, then `check` every server."""

    def __init__(self, model: str | Path) -> None:
        config = json.loads((Path(model) / "config.json").read_text())
        self._kv_heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
        self._experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
        self._layouts: dict[Client, ServerLayout] = {}
        self._parts: dict[str, dict[tuple[int, int], _Held]] = {}
        self._sums: dict[tuple[ServerLayout, int], dict[str, set[str]]] = {}

    async def ask_layout(self, client: Client) -> None:
        """Raises Refused for a server whose weights cannot be compared with the student's."""
        info = await client.server_info()
        dtype = getattr(torch, str(info.get("dtype")), None)
        odd = {n: info[n] for n in ("dp_size", "pp_size", "ep_size") if info.get(n, 1) != 1}
        odd |= {} if isinstance(dtype, torch.dtype) else {"dtype": info.get("dtype")}
        if odd:
            raise Refused(
                f"{client.url}: rollout.sync_verify cannot compare the weights of a server with {odd}; start it"
                " without, with an explicit --dtype, or switch the check off"
            )
        assert isinstance(dtype, torch.dtype)
        self._layouts[client] = ServerLayout(int(info.get("tp_size", 1)), dtype, info.get("device") == "cpu")

    def watch(self, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same stream; what passes is remembered as checksums, which threads compute: numpy lets them run at the
        same time."""
        workers = min(len(os.sched_getaffinity(0)), _THREADS)
        with ThreadPoolExecutor(workers, thread_name_prefix="checksums") as pool:
            under_way: deque[Future[None]] = deque()
            for weight in whole(weights):
                part = _part(weight.name)
                held = self._parts.setdefault(part.fused, {})
                copy = weight.tensor().to("cpu", copy=True)
                held[part.expert, part.place] = _Held(part.split, copy, weight.is_fp8)
                if len(held) == self._num_parts(part):
                    under_way.append(pool.submit(self._add, part.fused, self._parts.pop(part.fused)))
                while len(under_way) > workers:  # each holds its tensor
                    under_way.popleft().result()
                yield from weight.sent
            for last in under_way:
                last.result()

    async def check(self, client: Client) -> None:
        """Raises BadAnswer when the server's weights are not, bit for bit, those that were watched."""
        layout = self._layouts[client]
        ranks = _by_rank(await client.checksums())
        wrong: set[str] = set(self._parts)  # never became whole
        for rank in range(layout.ranks):
            theirs, ours = ranks.get(rank, {}), self._sums[layout, rank]
            wrong |= {name for name in ours.keys() | theirs.keys() if theirs.get(name) not in ours.get(name, set())}
        if wrong:
            names = sorted(wrong)
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            raise BadAnswer(f"{client.url}: not the student's weights: {', '.join(names[:_NAMED])}{more}")

    def _num_parts(self, part: _Part) -> int:
        count = next((n for fused, n in _PARTS.items() if f".{fused}" in part.fused), 1)
        return count * (self._experts if part.expert >= 0 else 1)

    def _add(self, fused: str, parts: dict[tuple[int, int], _Held]) -> None:
        for layout in set(self._layouts.values()):
            hashed = hashes.on_cpu if layout.is_cpu else hashes.on_gpu
            for rank in range(layout.ranks):
                by_expert: dict[int, list[torch.Tensor]] = {}
                for (expert, _), held in sorted(parts.items(), key=lambda item: item[0]):
                    piece = self._split(held.as_in(layout.dtype), held.split, layout, rank)
                    by_expert.setdefault(expert, []).append(piece)
                experts = [torch.cat(pieces) for pieces in by_expert.values()]
                whole = torch.stack(experts) if -1 not in by_expert else experts[0]
                sums = {hashed(whole)}
                if fused.endswith("w13_weight") and not layout.is_cpu:  # some GPUs have rows of gate and up in turns
                    sums.add(hashed(whole.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)))
                self._sums.setdefault((layout, rank), {})[fused] = sums

    def _split(self, tensor: torch.Tensor, split: str, layout: ServerLayout, rank: int) -> torch.Tensor:
        """This rank's part of a tensor; SGLang pads with zeros what does not divide."""
        if split == "whole":
            return tensor
        dim = 1 if split.endswith("columns") else 0
        length, ranks = tensor.shape[dim], layout.ranks
        if split == "kv_rows" and ranks > self._kv_heads:  # several ranks have the same head
            rank, ranks = rank * self._kv_heads // ranks, self._kv_heads
        multiple = ranks
        if split == "vocab_rows":
            multiple = max(_VOCAB_MULTIPLE, ranks)
        elif split.startswith("mlp") and layout.is_cpu:
            multiple = _CPU_MLP_MULTIPLE * ranks
        share = -(-length // multiple) * multiple // ranks
        start = min(rank * share, length)
        piece = tensor.narrow(dim, start, min(share, length - start))
        missing = list(piece.shape)
        missing[dim] = share - piece.shape[dim]
        return torch.cat([piece, piece.new_zeros(missing)], dim) if missing[dim] else piece


def _part(name: str) -> _Part:
    expert = _EXPERT.search(name)
    for pattern, fused, place, split in _RULES:
        match = re.fullmatch(pattern, name)
        if match:
            return _Part(match.expand(fused), place, int(expert[1]) if expert else -1, split)
    raise AssertionError(name)


def _by_rank(answer: dict[str, Any]) -> dict[int, dict[str, str]]:
    """Checksums by tensor-parallel rank; none where the answer has another form."""
    try:
        return {r["parallelism_info"][0]["tp_rank"]: dict(r["checksums"]) for r in answer["ranks"]}
    except (LookupError, TypeError, ValueError):
        return {}
