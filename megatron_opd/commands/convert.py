"""`megatron-opd convert`: checkpoints between Hugging Face and Megatron's torch_dist.

One parameter is in memory at a time; under torchrun the processes share the work. Refuses what it cannot convert
exactly, before it writes anything (see docs/checkpoints.md).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_opd.commands import offline
from megatron_opd.core import torchrun
from megatron_opd.core.arguments import Commands

if TYPE_CHECKING:
    from megatron_opd.models.convert import ConversionPlan

_EXAMPLES = """\
examples:
  megatron-opd convert hf-to-megatron --hf models/Qwen3-8B --out checkpoints/Qwen3-8B
  megatron-opd convert megatron-to-hf --checkpoint runs/mine/checkpoints/step_00000100 --out models/mine
  torchrun --nproc-per-node 8 -m megatron_opd convert hf-to-megatron --hf models/Qwen3-8B --out checkpoints/Qwen3-8B

both have their own --help; what is exact and what is refused: docs/checkpoints.md
"""
_TO_MEGATRON = """\
examples:
  megatron-opd convert hf-to-megatron --hf models/Qwen3-8B --out checkpoints/Qwen3-8B --dry-run
  megatron-opd convert hf-to-megatron --hf models/Qwen3-8B --out checkpoints/Qwen3-8B
  megatron-opd convert hf-to-megatron --hf models/Llama-3.1-8B --out checkpoints/llama --tp 4 --pp 2 --dtype bf16

The result holds config and tokenizer too: name it as student.model, or as teachers.N.model. It is loaded at any
layout; --tp, --pp and --ep only check that the model fits one, and --tp pads the vocabulary to a multiple of it.
"""
_TO_HF = """\
examples:
  megatron-opd convert megatron-to-hf --checkpoint checkpoints/Qwen3-8B --out models/Qwen3-8B-back
  megatron-opd convert megatron-to-hf --checkpoint runs/mine/checkpoints/step_00000100 --out models/mine
  megatron-opd convert megatron-to-hf --checkpoint /elsewhere/step_00000100 --out models/mine --like models/Qwen3-8B

Config and tokenizer come from --like; without it from the checkpoint itself when hf-to-megatron made it, or from
student.model of <run.dir>/config.yaml when a run saved it.
"""


def add(commands: Commands) -> None:
    """The command, with one of its own for each direction."""
    parser = commands.add_parser("convert", help="convert checkpoints between Hugging Face and Megatron")
    offline.examples(parser, _EXAMPLES)
    directions = parser.add_subparsers(required=True, metavar="DIRECTION")

    def direction(name: str, help_text: str, epilog: str, convert: Callable[[argparse.Namespace], int]) -> Any:
        made = directions.add_parser(name, help=help_text, description=f"{help_text.capitalize()}.")
        offline.examples(made, epilog)
        made.set_defaults(run=run, convert=convert)
        return made

    what = "write a Hugging Face model as a Megatron checkpoint"
    there = direction("hf-to-megatron", what, _TO_MEGATRON, _hf_to_megatron)
    there.add_argument("--hf", required=True, metavar="MODEL", help="Hugging Face directory, or a name of the hub")
    _add_output(there)
    there.add_argument(
        "--vocab-multiple", type=offline.positive, default=1, metavar="N", help="pad the vocabulary to a multiple of it"
    )
    offline.add_layout(there, "checked, and the vocabulary padded for it; the checkpoint itself has no layout")

    what = "write a Megatron checkpoint as a Hugging Face model"
    back = direction("megatron-to-hf", what, _TO_HF, _megatron_to_hf)
    back.add_argument("--checkpoint", required=True, metavar="DIR", help="torch_dist checkpoint")
    _add_output(back)
    back.add_argument("--like", metavar="HF_DIR", help="where config and tokenizer come from")


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", required=True, metavar="DIR", help="new directory; must not exist, or be empty")
    command.add_argument("--dtype", choices=offline.DTYPES, help="type of the output (default: as in the input)")
    command.add_argument("--overwrite", action="store_true", help="replace a model in --out")
    command.add_argument("--dry-run", action="store_true", help="check everything and print the plan; write nothing")


def run(arguments: argparse.Namespace) -> int:
    """Convert in the direction that is asked for."""
    with offline.work():
        offline.join_ranks()
        arguments.convert(arguments)
    return 0


def _hf_to_megatron(arguments: argparse.Namespace) -> None:
    from megatron_opd.models import convert
    from megatron_opd.models.architecture import read_architecture
    from megatron_opd.tracking.bytes_bar import BytesBar

    arguments.hf = offline.model_dir(arguments.hf)
    multiple = math.lcm(arguments.vocab_multiple, arguments.tp)
    offline.layout(arguments, read_architecture(arguments.hf, vocab_multiple=multiple))
    plan = convert.plan_to_megatron(arguments.hf, vocab_multiple=multiple, dtype=offline.dtype(arguments.dtype))
    if _may_start(arguments, plan, [arguments.hf]):
        with BytesBar("hf-to-megatron", plan.num_bytes / torchrun.world_size()) as bar:
            convert.to_megatron(plan, arguments.hf, arguments.out, progress=bar)


def _megatron_to_hf(arguments: argparse.Namespace) -> None:
    from megatron_opd.models import convert
    from megatron_opd.tracking.bytes_bar import BytesBar

    arguments.like = arguments.like and offline.model_dir(arguments.like, "texts")
    like = convert.find_like(arguments.checkpoint, arguments.like)
    plan = convert.plan_to_hf(arguments.checkpoint, like=like, dtype=offline.dtype(arguments.dtype))
    if _may_start(arguments, plan, [arguments.checkpoint, like]):
        with BytesBar("megatron-to-hf", plan.num_bytes / torchrun.world_size()) as bar:
            convert.to_hf(plan, arguments.checkpoint, arguments.out, like=like, progress=bar)


def _may_start(arguments: argparse.Namespace, plan: ConversionPlan, inputs: list[Any]) -> bool:
    """Print the plan and check the output; False for a dry run. The first input is the one with the weights."""
    from megatron_opd.models import output_dir
    from megatron_opd.tracking.bytes_bar import gigabytes

    arch = plan.arch
    padding = arch.padded_vocab_size - arch.vocab_size
    if torchrun.is_main():
        for name, value in (
            ("from", f"{inputs[0]} ({arch.family}, {arch.num_layers} layers)"),
            ("to", arguments.out),
            ("parameters", f"{len(plan.parameters)} of Megatron's, {str(plan.dtype).removeprefix('torch.')}"),
            ("vocabulary", f"{arch.vocab_size} entries" + (f" and {padding} of padding" if padding else "")),
            ("size", f"{gigabytes(plan.num_bytes)}; {gigabytes(output_dir.free_bytes(arguments.out))} free"),
            ("memory", f"at most {gigabytes(plan.peak_bytes)} a process, beside Python and its libraries"),
        ):
            print(f"{name:<11} {value}", flush=True)
    output_dir.check_output(arguments.out, inputs=inputs, num_bytes=plan.num_bytes, overwrite=arguments.overwrite)
    if arguments.dry_run and torchrun.is_main():
        print("dry run: everything is in order, nothing was written")
    return not arguments.dry_run
