"""`megatron-opd prune`: take layers out of a Hugging Face model."""

from __future__ import annotations

import argparse

from megatron_opd.commands import offline
from megatron_opd.core.arguments import Commands

_EXAMPLES = """\
examples:
  megatron-opd prune models/SmolLM2-135M-Instruct models/SmolLM2-pruned --drop 12 15 18 21
  megatron-opd prune models/Qwen3-8B models/Qwen3-8B-28 --drop 20-27 --dry-run

The result is a smaller model of the same family, which training has to repair. The other weights, the tokenizer and
everything else stay as they are. One tensor is in memory at a time.
"""


def add(commands: Commands) -> None:
    """The command and its options."""
    parser = commands.add_parser("prune", help="take layers out of a Hugging Face model: a smaller student to repair")
    offline.examples(parser, _EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face directory, or a name of the hub")
    parser.add_argument("out", metavar="OUT", help="the directory to make")
    parser.add_argument("--drop", nargs="+", required=True, metavar="N", help="layers, from 0; 4-7 is 4, 5, 6 and 7")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is in OUT")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be made")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Say what is made, and make it."""
    from megatron_opd.models import output_dir, prune
    from megatron_opd.models.architecture import read_architecture
    from megatron_opd.tracking.bytes_bar import BytesBar, gigabytes

    with offline.work():
        arguments.model = offline.model_dir(arguments.model)
        num_layers = read_architecture(arguments.model).num_layers
        kept = prune.kept_layers(arguments.drop, num_layers)
        num_bytes = prune.size_of(arguments.model, kept)
        output_dir.check_output(
            arguments.out, inputs=[arguments.model], num_bytes=num_bytes, overwrite=arguments.overwrite
        )
        print(f"{arguments.out}: {len(kept)} of {num_layers} layers, {gigabytes(num_bytes)}", flush=True)
        if not arguments.dry_run:
            with BytesBar("pruning", num_bytes) as bar:
                prune.write(arguments.model, kept, arguments.out, progress=bar)
    return 0
