#!/usr/bin/env python3
"""Score the same tokens with transformers, Megatron and (given a URL) an SGLang server, and show where they differ.

How to find a broken conversion, or a mismatch between training and inference. Token ids travel, so tokenizers cannot
differ. Refuses ids that the model does not have: they end an SGLang server.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from itertools import combinations
from pathlib import Path
from typing import Any

import tool
import torch
import torch.distributed as dist

from megatron_opd.config import ParallelConfig
from megatron_opd.models.architecture import Architecture, read_architecture
from megatron_opd.models.tokenizer import load_tokenizer

_COMMAND = "tools/compare_logprobs.py --hf models/Qwen3-8B"
_EXAMPLES = f"""\
examples:
  python {_COMMAND} --text "The capital of France is Paris."
  python {_COMMAND} --megatron checkpoints/Qwen3-8B --prompts prompts.jsonl --atol 1e-3
  torchrun --nproc-per-node 4 {_COMMAND} --prompts prompts.jsonl --tp 2 --pp 2
  python {_COMMAND} --prompts prompts.jsonl --dtype bf16 --sglang http://127.0.0.1:30000 --out compared

--prompts is JSON Lines with `prompt` (and `response`, if it is to be scored too) or `token_ids`, or else text, a
prompt a line. Every token but the first of each is scored. The report is <out>/report.json and <out>/report.png.

what to expect: fp32 about 1e-5; bf16 a mean of about 0.01 to 0.02 between any two engines. One bad tensor of a broken
conversion moves the mean to 0.1 and above; an error that grows with the position points to rope.
"""
Scored = list[list[float]]
"""Log-probability of every token but the first, by prompt."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Compare per-token log-probabilities of transformers, Megatron and SGLang.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face directory: tokenizer and reference")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompts", metavar="FILE", help="file of prompts")
    what.add_argument("--text", nargs="+", help="the prompts themselves")
    parser.add_argument("--megatron", metavar="DIR", help="torch_dist checkpoint for Megatron (default: --hf)")
    parser.add_argument("--sglang", metavar="URL", help="a running SGLang server with the same model")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds to wait for its answers")
    parser.add_argument("--dtype", choices=tool.DTYPES, default="fp32", help="type for transformers and Megatron")
    parser.add_argument("--max-tokens", type=tool.positive, default=2048, metavar="N", help="cut longer prompts")
    parser.add_argument("--atol", type=float, help="exit with 1 when any |Δ| is larger")
    parser.add_argument("--out", default="compared", metavar="DIR", help="where the report goes (default: compared)")
    tool.add_layout(parser, "Megatron's layout; run under torchrun with that many ranks or a multiple")
    arguments = parser.parse_args(argv)
    return tool.run(_compare, arguments)


def _compare(arguments: argparse.Namespace) -> int:
    arch = read_architecture(arguments.hf, vocab_multiple=arguments.tp)
    ids = _read_ids(arguments, arch)
    layout = _layout(arguments, arch)
    dtype = tool.DTYPES[arguments.dtype]
    scored: dict[str, Scored] = {}
    if arguments.sglang and tool.is_main():
        scored["sglang"] = [ask_sglang(arguments.sglang, sequence, arguments.timeout) for sequence in ids]
    megatron = _by_megatron(arguments.megatron or arguments.hf, ids, layout, dtype)
    if not tool.is_main():
        return 0
    from megatron_opd.student import token_logps

    reference = token_logps.logps_by_transformers(arguments.hf, ids, dtype)
    scored = {"transformers": [logps.tolist() for logps in reference], "megatron": megatron, **scored}
    pairs = {f"{a} - {b}": _differences(scored[a], scored[b]) for a, b in combinations(scored, 2)}
    text_of = _decoder(arguments.hf)
    report = {"dtype": arguments.dtype, "prompts": len(ids), "tokens": sum(map(len, ids)) - len(ids), "pairs": {}}
    for name, found in pairs.items():
        report["pairs"][name] = summary = _summary(found, ids, scored, name)
        summary["worst"]["text"] = text_of(summary["worst"]["token"])
        print(_line(name, summary), flush=True)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps({**report, "token_ids": ids, "logps": scored}, indent=1) + "\n")
    _plot(pairs, out / "report.png")
    print(f"wrote {out}/report.json and {out}/report.png")
    worst = max(summary["max"] for summary in report["pairs"].values())
    if arguments.atol is not None and not worst <= arguments.atol:
        print(f"DIFFERENT: {worst:.3g} is above --atol {arguments.atol:g}")
        return 1
    return 0


def _read_ids(arguments: argparse.Namespace, arch: Architecture) -> list[list[int]]:
    """The prompts' token ids, cut to --max-tokens; those of one token are left out, for there is nothing to score."""
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
    ranks, needed = tool.world_size(), arguments.tp * arguments.pp
    if ranks % needed:
        raise ValueError(f"--tp {arguments.tp} --pp {arguments.pp} needs {needed} ranks or a multiple, not {ranks}")
    if ranks // arguments.pp % arguments.ep:
        raise ValueError(f"--ep {arguments.ep} does not divide the {ranks // arguments.pp} ranks of a pipeline stage")
    return tool.layout(arguments, arch, data=ranks // needed)


def _by_megatron(model_dir: str, ids: list[list[int]], layout: ParallelConfig, dtype: torch.dtype) -> Scored:
    """On every rank; the process groups are gone afterwards."""
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


def ask_sglang(url: str, ids: list[int], timeout_s: float) -> list[float]:
    """An SGLang server's log-probability of every token but the first."""
    body = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    request = urllib.request.Request(
        url.rstrip("/") + "/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            triples = json.load(answer)["meta_info"]["input_token_logprobs"]
        logps, echoed = [t[0] for t in triples[1:]], [t[1] for t in triples]
    except urllib.error.HTTPError as error:
        said = error.read(300).decode(errors="replace")
        raise ValueError(f"{url} answered {error.code} ({error.reason}): {said}") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{url} did not answer as an SGLang server: {error}") from None
    if echoed != ids or not all(isinstance(logp, float | int) for logp in logps):
        raise ValueError(f"{url} scored other tokens than were sent: {len(echoed)} of {len(ids)}")
    return [float(logp) for logp in logps]


def _differences(a: Scored, b: Scored) -> Scored:
    return [[x - y for x, y in zip(*pair, strict=True)] for pair in zip(a, b, strict=True)]


def _summary(found: Scored, ids: list[list[int]], scored: dict[str, Scored], name: str) -> dict[str, Any]:
    """Mean and largest |Δ|, and where the largest is."""
    sizes = torch.tensor([abs(d) for prompt in found for d in prompt], dtype=torch.float64).nan_to_num(nan=torch.inf)
    where = [(i, s) for i, prompt in enumerate(found) for s in range(len(prompt))]
    prompt, position = where[int(sizes.argmax())]
    first, second = name.split(" - ")
    return {
        "mean": sizes.mean().item(),
        "max": sizes.max().item(),
        "worst": {
            "prompt": prompt,
            "position": position + 1,
            "token": ids[prompt][position + 1],
            first: scored[first][prompt][position],
            second: scored[second][prompt][position],
        },
    }


def _line(name: str, summary: dict[str, Any]) -> str:
    worst = summary["worst"]
    where = f"prompt {worst['prompt']}, position {worst['position']}, token {worst['token']} {worst['text']!r}"
    return f"{name}: mean |Δ| {summary['mean']:.3g}, max |Δ| {summary['max']:.3g} at {where}"


def _decoder(model_dir: str) -> Any:
    """Token id -> text, or '' where there is no tokenizer."""
    try:
        tokenizer = load_tokenizer(model_dir).hf
    except ValueError:
        return lambda _: ""
    return lambda token: tokenizer.decode([token])


def _plot(pairs: dict[str, Scored], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_position, by_size) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name, found in pairs.items():
        points = [(s + 1, max(abs(d), 1e-9)) for prompt in found for s, d in enumerate(prompt)]
        positions, sizes = zip(*points, strict=True)
        by_position.plot(positions, sizes, ".", markersize=3, alpha=0.6, label=name)
        by_size.plot(sorted(sizes), [(i + 1) / len(sizes) for i in range(len(sizes))], label=name)
    by_position.set(yscale="log", xlabel="position", ylabel="|Δ log-probability|", title="every token")
    by_size.set(xscale="log", xlabel="|Δ log-probability|", ylabel="fraction of tokens below", title="distribution")
    by_position.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
