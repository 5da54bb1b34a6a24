#!/usr/bin/env python3
"""Convert checkpoints between Hugging Face and Megatron's torch_dist; look into them; compare them.

One parameter is in memory at a time; under torchrun the processes share the work. Refuses what it cannot convert
exactly, before it writes anything (see docs/checkpoints.md).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from typing import Any

import tool
import torch
from rich.console import Console
from rich.table import Table

from megatron_opd.models import convert, output_dir
from megatron_opd.models.architecture import read_architecture
from megatron_opd.models.convert import ConversionPlan

_CONVERT = "python tools/convert_checkpoint.py"
_EXAMPLES = f"""\
examples:
  {_CONVERT} hf-to-megatron --hf models/Qwen3-8B --out checkpoints/Qwen3-8B
  {_CONVERT} megatron-to-hf --checkpoint runs/mine/checkpoints/step_00000100 --out models/mine
  {_CONVERT} inspect checkpoints/Qwen3-8B
  {_CONVERT} verify models/Qwen3-8B checkpoints/Qwen3-8B --logits
  torchrun --nproc-per-node 8 tools/convert_checkpoint.py hf-to-megatron --hf models/Qwen3-8B --out checkpoints/Qwen3-8B

each command has its own --help; what is exact and what is refused: docs/checkpoints.md
"""
_TO_MEGATRON = f"""\
examples:
  {_CONVERT} hf-to-megatron --hf models/Qwen3-8B --out checkpoints/Qwen3-8B --dry-run
  {_CONVERT} hf-to-megatron --hf models/Qwen3-8B --out checkpoints/Qwen3-8B
  {_CONVERT} hf-to-megatron --hf models/Llama-3.1-8B --out checkpoints/llama --tp 4 --pp 2 --dtype bf16

The result holds config and tokenizer too: name it as student.model, or as teachers.N.model. It is loaded at any
layout; --tp, --pp and --ep only check that the model fits one, and --tp pads the vocabulary to a multiple of it.
"""
_TO_HF = f"""\
examples:
  {_CONVERT} megatron-to-hf --checkpoint checkpoints/Qwen3-8B --out models/Qwen3-8B-back
  {_CONVERT} megatron-to-hf --checkpoint runs/mine/checkpoints/step_00000100 --out models/mine
  {_CONVERT} megatron-to-hf --checkpoint /elsewhere/step_00000100 --out models/mine --like models/Qwen3-8B

Config and tokenizer come from --like; without it from the checkpoint itself when hf-to-megatron made it, or from
student.model of <run.dir>/config.yaml when a run saved it.
"""
_INSPECT = f"""\
examples:
  {_CONVERT} inspect models/Qwen3-8B
  {_CONVERT} inspect runs/mine/checkpoints/step_00000100
  {_CONVERT} inspect checkpoints/Qwen3-8B --json | jq .parameters

Reads headers only. Exit code 1 when something is wrong with the checkpoint.
"""
_VERIFY = f"""\
examples:
  {_CONVERT} verify models/Qwen3-8B checkpoints/Qwen3-8B             bit for bit
  {_CONVERT} verify models/Qwen3-8B models/mine --atol 0.01          by how much training has changed it
  {_CONVERT} verify models/Qwen3-8B checkpoints/Qwen3-8B --logits    and what the two models compute

--logits runs random prompts in fp32, a torch_dist checkpoint through Megatron and a Hugging Face directory through
transformers, one model after the other (each is loaded whole). Exit code 1 when the two differ by more than --atol.
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _parser().parse_args(argv)
    return tool.run(arguments.run, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert checkpoints between Hugging Face and Megatron (torch_dist); look into them; compare them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Any, meaning: str, examples: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=meaning,
            description=meaning.capitalize() + ".",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    command = add(
        "hf-to-megatron", _hf_to_megatron, "write a Hugging Face model as a Megatron checkpoint", _TO_MEGATRON
    )
    command.add_argument("--hf", required=True, metavar="DIR", help="directory with config.json and safetensors")
    _add_output(command)
    command.add_argument(
        "--vocab-multiple", type=tool.positive, default=1, metavar="N", help="pad the vocabulary to a multiple of this"
    )
    tool.add_layout(command, "checked, and the vocabulary padded for it; the checkpoint itself has no layout")

    command = add("megatron-to-hf", _megatron_to_hf, "write a Megatron checkpoint as a Hugging Face model", _TO_HF)
    command.add_argument("--checkpoint", required=True, metavar="DIR", help="torch_dist checkpoint")
    _add_output(command)
    command.add_argument("--like", metavar="HF_DIR", help="where config and tokenizer come from")

    command = add("inspect", _inspect, "show what is in a checkpoint of either format", _INSPECT)
    command.add_argument("dir", metavar="DIR")
    command.add_argument("--like", metavar="HF_DIR", help="directory with the config.json, if DIR has none")
    command.add_argument("--json", action="store_true", help="print JSON")

    command = add("verify", _verify, "compare two models in any two formats", _VERIFY)
    command.add_argument("a", metavar="A")
    command.add_argument("b", metavar="B")
    command.add_argument("--like", metavar="HF_DIR", help="directory with the config.json, if A or B has none")
    command.add_argument("--atol", type=float, default=0.0, help="largest |Δ| of a weight (default 0: bit for bit)")
    command.add_argument("--logits", action="store_true", help="also compare logits on random prompts, in fp32")
    command.add_argument("--logits-atol", type=float, default=1e-4, help="the same for logits (default 1e-4)")
    command.add_argument("--seed", type=int, default=0, help="seed of the random prompts")
    return parser


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, metavar="DIR", help="new directory; must not exist, or be empty")
    command.add_argument("--dtype", choices=tool.DTYPES, help="type of the output (default: as in the input)")
    command.add_argument("--overwrite", action="store_true", help="replace a model in --out")
    command.add_argument("--dry-run", action="store_true", help="check everything and print the plan; write nothing")


def _hf_to_megatron(arguments: argparse.Namespace) -> int:
    tool.join_ranks()
    multiple = math.lcm(arguments.vocab_multiple, arguments.tp)
    tool.layout(arguments, read_architecture(arguments.hf, vocab_multiple=multiple))
    plan = convert.plan_to_megatron(arguments.hf, vocab_multiple=multiple, dtype=tool.DTYPES.get(arguments.dtype))
    if _may_start(arguments, plan, [arguments.hf]):
        with tool.Bar("hf-to-megatron", plan.num_bytes / tool.world_size()) as bar:
            convert.to_megatron(plan, arguments.hf, arguments.out, progress=bar)
    return 0


def _megatron_to_hf(arguments: argparse.Namespace) -> int:
    tool.join_ranks()
    like = convert.find_like(arguments.checkpoint, arguments.like)
    plan = convert.plan_to_hf(arguments.checkpoint, like=like, dtype=tool.DTYPES.get(arguments.dtype))
    if _may_start(arguments, plan, [arguments.checkpoint, like]):
        with tool.Bar("megatron-to-hf", plan.num_bytes / tool.world_size()) as bar:
            convert.to_hf(plan, arguments.checkpoint, arguments.out, like=like, progress=bar)
    return 0


def _may_start(arguments: argparse.Namespace, plan: ConversionPlan, inputs: list[Any]) -> bool:
    """Print the plan and check the output; False for a dry run. The first input is the one with the weights."""
    arch = plan.arch
    padding = arch.padded_vocab_size - arch.vocab_size
    if tool.is_main():
        for name, value in (
            ("from", f"{inputs[0]} ({arch.family}, {arch.num_layers} layers)"),
            ("to", arguments.out),
            ("parameters", f"{len(plan.parameters)} of Megatron's, {str(plan.dtype).removeprefix('torch.')}"),
            ("vocabulary", f"{arch.vocab_size} entries" + (f" and {padding} of padding" if padding else "")),
            ("size", f"{tool.gigabytes(plan.num_bytes)}; {tool.gigabytes(output_dir.free_bytes(arguments.out))} free"),
            ("memory", f"at most {tool.gigabytes(plan.peak_bytes)} a process, beside Python and its libraries"),
        ):
            print(f"{name:<11} {value}", flush=True)
    output_dir.check_output(arguments.out, inputs=inputs, num_bytes=plan.num_bytes, overwrite=arguments.overwrite)
    if arguments.dry_run and tool.is_main():
        print("dry run: everything is in order, nothing was written")
    return not arguments.dry_run


def _inspect(arguments: argparse.Namespace) -> int:
    from megatron_opd.models.describe import describe

    facts = describe(arguments.dir, arguments.like)
    problems = facts["problems"]
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return int(bool(problems))
    table = Table(show_header=False, box=None, title=str(arguments.dir), title_justify="left")
    words = {True: "yes", False: "no"}
    for name, value in facts.items():
        if name != "problems":
            shown = words[value] if isinstance(value, bool) else f"{value:,}" if isinstance(value, int) else str(value)
            table.add_row(name, shown)
    Console(soft_wrap=True).print(table)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return int(bool(problems))


def _verify(arguments: argparse.Namespace) -> int:
    from megatron_opd.models import compare

    a, b = (compare.open_side(path, arguments.like) for path in (arguments.a, arguments.b))
    settings = compare.differing_settings(a, b)
    if settings:
        raise ValueError(f"{a.path} and {b.path} are different models: {'; '.join(settings)}")
    num_tensors = sum(len(p.rule.merge([torch.empty(p.rule.shape, device="meta")])) for p in convert.parameters(a.arch))
    with tool.Bar("verify", sum(p.numel for p in convert.parameters(a.arch))) as bar:
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


if __name__ == "__main__":
    sys.exit(main())
