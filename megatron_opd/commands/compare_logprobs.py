"""`megatron-opd compare-logprobs`: where transformers, Megatron and an SGLang server score the same tokens differently.

How to find a broken conversion, or a mismatch between training and inference. Token ids travel, so tokenizers cannot
differ. Refuses ids that the model does not have: they end an SGLang server.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_opd.commands import offline
from megatron_opd.core import torchrun
from megatron_opd.core.arguments import Commands

if TYPE_CHECKING:
    import torch

    from megatron_opd.config import ParallelConfig
    from megatron_opd.models.architecture import Architecture
    from megatron_opd.tracking.logp_differences import Scored

_COMMAND = "compare-logprobs --hf models/Qwen3-8B"
_EXAMPLES = f"""\
examples:
  megatron-opd {_COMMAND} --text "The capital of France is Paris."
  megatron-opd {_COMMAND} --megatron checkpoints/Qwen3-8B --prompts prompts.jsonl --atol 1e-3
  torchrun --nproc-per-node 4 -m megatron_opd {_COMMAND} --prompts prompts.jsonl --tp 2 --pp 2
  megatron-opd {_COMMAND} --prompts prompts.jsonl --dtype bf16 --sglang http://127.0.0.1:30000 --out compared

--prompts is JSON Lines with `prompt` (and `response`, if it is to be scored too) or `token_ids`, or else text, a
prompt a line. Every token but the first of each is scored. The report is <out>/report.json and <out>/report.png.

what to expect: fp32 about 1e-5; bf16 a mean of about 0.01 to 0.02 between any two engines. One bad tensor of a broken
conversion moves the mean to 0.1 and above; an error that grows with the position points to rope.
"""


def add(commands: Commands) -> None:
    """The command and its options."""
    parser = commands.add_parser("compare-logprobs", help="score the same tokens by transformers, Megatron and SGLang")
    offline.examples(parser, _EXAMPLES)
    parser.add_argument(
        "--hf", required=True, metavar="MODEL", help="tokenizer and reference: Hugging Face directory, or hub name"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompts", metavar="FILE", help="file of prompts")
    what.add_argument("--text", nargs="+", help="the prompts themselves")
    parser.add_argument("--megatron", metavar="DIR", help="torch_dist checkpoint for Megatron (default: --hf)")
    parser.add_argument("--sglang", metavar="URL", help="a running SGLang server with the same model")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds to wait for its answers")
    parser.add_argument("--dtype", choices=offline.DTYPES, default="fp32", help="type for transformers and Megatron")
    parser.add_argument("--max-tokens", type=offline.positive, default=2048, metavar="N", help="cut longer prompts")
    parser.add_argument("--atol", type=float, help="exit with 1 when any |Δ| is larger")
    parser.add_argument("--out", default="compared", metavar="DIR", help="where the report goes (default: compared)")
    offline.add_layout(parser, "Megatron's layout; run under torchrun with that many ranks or a multiple")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Score by each engine, print a line a pair, write the report."""
    with offline.work():
        return _compare(arguments)


def _compare(arguments: argparse.Namespace) -> int:
    from megatron_opd.models.architecture import read_architecture

    arguments.hf = offline.model_dir(arguments.hf)
    arch = read_architecture(arguments.hf, vocab_multiple=arguments.tp)
    ids = _read_ids(arguments, arch)
    layout = _layout(arguments, arch)
    dtype = offline.dtype(arguments.dtype)
    assert dtype is not None
    scored: dict[str, Scored] = {}
    if arguments.sglang and torchrun.is_main():
        from megatron_opd.sglang import prompt_logps

        scored["sglang"] = [prompt_logps.ask(arguments.sglang, sequence, arguments.timeout) for sequence in ids]
    megatron = _by_megatron(arguments.megatron or arguments.hf, ids, layout, dtype)
    if not torchrun.is_main():
        return 0
    from megatron_opd.student import token_logps

    reference = token_logps.logps_by_transformers(arguments.hf, ids, dtype)
    worst = _report(arguments, ids, {"transformers": [x.tolist() for x in reference], "megatron": megatron, **scored})
    if arguments.atol is not None and not worst <= arguments.atol:
        print(f"DIFFERENT: {worst:.3g} is above --atol {arguments.atol:g}")
        return 1
    return 0


def _report(arguments: argparse.Namespace, ids: list[list[int]], scored: dict[str, Scored]) -> float:
    """Print and write how the engines differ; returns the largest |Δ|."""
    from megatron_opd.tracking import logp_differences

    pairs = {f"{a} - {b}": logp_differences.differences(scored[a], scored[b]) for a, b in combinations(scored, 2)}
    text_of = _decoder(arguments.hf)
    summaries: dict[str, Any] = {}
    for name, found in pairs.items():
        summaries[name] = summary = logp_differences.summary(found, ids, scored, name)
        summary["worst"]["text"] = text_of(summary["worst"]["token"])
        print(logp_differences.line(name, summary), flush=True)
    report = {"dtype": arguments.dtype, "prompts": len(ids), "tokens": sum(map(len, ids)) - len(ids)}
    report |= {"pairs": summaries, "token_ids": ids, "logps": scored}
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    logp_differences.plot(pairs, out / "report.png")
    print(f"wrote {out}/report.json and {out}/report.png")
    return max(float(summary["max"]) for summary in summaries.values())


def _read_ids(arguments: argparse.Namespace, arch: Architecture) -> list[list[int]]:
    """The prompts' token ids, cut to --max-tokens; those of one token are left out, for there is nothing to score."""
    from megatron_opd.models.tokenizer import load_tokenizer

    rows = [{"prompt": text} for text in arguments.text] if arguments.text else _rows(Path(arguments.prompts))
    tokenizer = None
    ids: list[list[int]] = []
    for row in rows:
        sequence = row.get("token_ids")
        if sequence is None:
            tokenizer = tokenizer or load_tokenizer(arguments.hf)
            sequence = tokenizer.encode(str(row["prompt"]) + str(row.get("response", "")))
        ids.append(list(sequence)[: min(arguments.max_tokens, arch.max_positions)])
    wrong = [i for sequence in ids for i in sequence if not (isinstance(i, int) and 0 <= i < arch.vocab_size)]
    if wrong:
        raise ValueError(f"token id {wrong[0]} is not in the vocabulary of {arguments.hf} (0 to {arch.vocab_size - 1})")
    ids = [sequence for sequence in ids if len(sequence) > 1]
    if not ids:
        raise ValueError("there is no prompt of at least two tokens")
    return ids


def _rows(path: Path) -> list[dict[str, Any]]:
    """The prompts of a file of JSON Lines or of text."""
    if not path.is_file():
        raise ValueError(f"there is no such file: {path}")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return [{"prompt": line} for line in lines]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON: {error}") from None
        ids = row.get("token_ids") if isinstance(row, dict) else None
        if not isinstance(row, dict) or (ids is None and "prompt" not in row):
            raise ValueError(f"{path}: line {number} has neither prompt nor token_ids")
        if not isinstance(ids, list | None):
            raise ValueError(f"{path}: line {number}: token_ids must be a list of ids, not {ids!r}")
        rows.append(row)
    return rows


def _layout(arguments: argparse.Namespace, arch: Architecture) -> ParallelConfig:
    ranks, needed = torchrun.world_size(), arguments.tp * arguments.pp
    if ranks % needed:
        raise ValueError(f"--tp {arguments.tp} --pp {arguments.pp} needs {needed} ranks or a multiple, not {ranks}")
    if ranks // arguments.pp % arguments.ep:
        raise ValueError(f"--ep {arguments.ep} does not divide the {ranks // arguments.pp} ranks of a pipeline stage")
    return offline.layout(arguments, arch, data=ranks // needed)


def _by_megatron(model_dir: str, ids: list[list[int]], layout: ParallelConfig, dtype: torch.dtype) -> Scored:
    """On every rank; the process groups are gone afterwards."""
    import torch.distributed as dist

    from megatron_opd.student import token_logps

    parallel = token_logps.start_megatron(layout)
    from megatron_opd.student import groups

    try:
        mine = [logps.tolist() for logps in token_logps.logps_by_megatron(model_dir, ids, parallel, dtype)]
        everyone: list[Any] = [None] * parallel.world_size
        dist.all_gather_object(everyone, mine, group=parallel.world_group)
    finally:
        groups.stop()
    return next(answer for answer in everyone if answer)


def _decoder(model_dir: str) -> Any:
    """Token id -> text, or '' where there is no tokenizer."""
    from megatron_opd.models.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(model_dir).hf
    except ValueError:
        return lambda _: ""
    return lambda token: tokenizer.decode([token])
