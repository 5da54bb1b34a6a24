"""`megatron-opd verify`: whether two models are the same, by their weights and by what they compute."""

from __future__ import annotations

import argparse
import math
import random
from typing import TYPE_CHECKING, Any

from megatron_opd.commands import offline
from megatron_opd.core.arguments import Commands

if TYPE_CHECKING:
    import torch

_EXAMPLES = """\
examples:
  megatron-opd verify models/Qwen3-8B checkpoints/Qwen3-8B             bit for bit
  megatron-opd verify models/Qwen3-8B models/mine --atol 0.01          by how much training has changed it
  megatron-opd verify models/Qwen3-8B checkpoints/Qwen3-8B --logits    and what the two models compute

--logits runs random prompts in fp32, a torch_dist checkpoint through Megatron and a Hugging Face directory through
transformers, one model after the other (each is loaded whole). Exit code 1 when the two differ by more than --atol.
"""


def add(commands: Commands) -> None:
    """The command and its options."""
    parser = commands.add_parser("verify", help="compare two models in any two formats")
    offline.examples(parser, _EXAMPLES)
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--like", metavar="HF_DIR", help="directory with the config.json, if A or B has none")
    parser.add_argument("--atol", type=float, default=0.0, help="largest |Δ| of a weight (default 0: bit for bit)")
    parser.add_argument("--logits", action="store_true", help="also compare logits on random prompts, in fp32")
    parser.add_argument("--logits-atol", type=float, default=1e-4, help="the same for logits (default 1e-4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random prompts")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what differs; 0 where the models are the same, or within the tolerance."""
    with offline.work():
        return _verify(arguments)


def _verify(arguments: argparse.Namespace) -> int:
    import torch

    from megatron_opd.models import compare, convert
    from megatron_opd.tracking.bytes_bar import BytesBar

    a, b = (compare.open_side(path, arguments.like) for path in map(offline.model_dir, (arguments.a, arguments.b)))
    settings = compare.differing_settings(a, b)
    if settings:
        raise ValueError(f"{a.path} and {b.path} are different models: {'; '.join(settings)}")
    num_tensors = sum(len(p.rule.merge([torch.empty(p.rule.shape, device="meta")])) for p in convert.parameters(a.arch))
    with BytesBar("verify", sum(p.numel for p in convert.parameters(a.arch))) as bar:
        different = list(compare.compare(a, b, bar))
    for d in sorted(different, key=lambda d: -d.max_abs)[:10]:
        types = "" if d.dtypes[0] == d.dtypes[1] else f" ({' and '.join(str(t)[6:] for t in d.dtypes)})"
        print(f"  {d.name}: max |Δ| {d.max_abs:.3g}{types}")
    worst = max((d.max_abs for d in different), default=0.0)
    equal = num_tensors - len(different)
    print(f"weights: {equal} of {num_tensors} tensors are equal bit for bit; max |Δ| {worst:.3g}", flush=True)
    fine = worst <= arguments.atol and (not different or arguments.atol > 0)
    if arguments.logits:
        fine &= _same_logits(arguments, a, b)
    print("the models are the same" if fine and not different else "within the tolerance" if fine else "DIFFERENT")
    return 0 if fine else 1


def _same_logits(arguments: argparse.Namespace, a: Any, b: Any) -> bool:
    draw = random.Random(arguments.seed)
    longest = min(128, a.arch.max_positions)
    ids = [[draw.randrange(a.arch.vocab_size) for _ in range(n)] for n in (2, min(17, longest), longest)]
    ours, theirs = _logits(a, ids), _logits(b, ids)
    # NaN is no number that max() would find: it is as far away as can be.
    worst = max((x - y).abs().nan_to_num(nan=math.inf).max().item() for x, y in zip(ours, theirs, strict=True))
    largest = max(x.abs().max().item() for x in ours)
    print(f"logits: {sum(map(len, ids))} tokens, max |Δ| {worst:.3g} (largest logit {largest:.3g})", flush=True)
    return bool(worst <= arguments.logits_atol)


def _logits(side: Any, ids: list[list[int]]) -> list[torch.Tensor]:
    import torch

    from megatron_opd.config import ParallelConfig
    from megatron_opd.models.torch_dist_dir import is_torch_dist
    from megatron_opd.student import token_logps

    if not is_torch_dist(side.path):
        return token_logps.logits_by_transformers(side.path, ids, torch.float32)
    from megatron_opd.student import groups

    parallel = token_logps.start_megatron(ParallelConfig())
    try:
        return token_logps.logits_by_megatron(side.path, ids, parallel, torch.float32, like=side.like)
    finally:
        groups.stop()
