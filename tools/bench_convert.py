#!/usr/bin/env python3
"""Measure conversion: time and peak memory of both directions on generated checkpoints of growing depth.

Each conversion runs in a process of its own. Its peak is VmHWM of /proc/self/status less the peak of a process that
only imports the same modules, so Linux only. Peak memory must not grow with the number of layers; exit code 1 when
it exceeds two of the largest layers plus a constant.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tool
import torch
from rich.console import Console
from rich.table import Table

from megatron_opd.models.architecture import read_architecture
from megatron_opd.models.convert import parameters
from megatron_opd.models.hf_dir import write
from megatron_opd.models.weight_map import all_rules, hf_shapes

_EXAMPLES = """\
examples:
  python tools/bench_convert.py                                     2, 16 and 64 layers of hidden size 1024, bf16
  python tools/bench_convert.py --layers 2 8 --hidden 256 --keep    small; keeps the checkpoints
  python tools/bench_convert.py --layers 24 --hidden 2048 --ffn 8192 --vocab 32768 --json bench.json
"""
_ALLOWED_BYTES = 256 << 20
"""The constant: pages of the files being read, buffers, and what libraries take when they are first used."""
_MEASURED = """\
import sys, time
sys.path.insert(0, sys.argv[1])
from megatron_opd.__main__ import main
from megatron_opd.models import convert, hf_dir
start = time.perf_counter()
code = main(["convert", *sys.argv[2:]]) if sys.argv[2:] else 0
seconds = time.perf_counter() - start
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("measured", code, seconds, peak * 1024)
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Measure time and peak memory of checkpoint conversion.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=tool.positive, nargs="+", default=[2, 16, 64], metavar="N")
    parser.add_argument("--hidden", type=tool.positive, default=1024, metavar="N")
    parser.add_argument("--ffn", type=tool.positive, metavar="N", help="default: 3 x hidden")
    parser.add_argument("--vocab", type=tool.positive, default=8192, metavar="N")
    parser.add_argument("--dtype", choices=tool.DTYPES, default="bf16")
    parser.add_argument("--work", metavar="DIR", help="where the checkpoints go (default: a temporary directory)")
    parser.add_argument("--keep", action="store_true", help="do not remove them")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    arguments = parser.parse_args(argv)
    return tool.run(_bench, arguments)


def _bench(arguments: argparse.Namespace) -> int:
    work = Path(tempfile.mkdtemp(prefix="bench_convert_", dir=arguments.work))
    try:
        rows = [row for layers in arguments.layers for row in _measure(arguments, layers, work / str(layers))]
    finally:
        if not arguments.keep:
            shutil.rmtree(work, ignore_errors=True)
    table = Table("layers", "direction", "size", "largest layer", "time", "rate", "peak memory")
    for row in rows:
        table.add_row(
            str(row["layers"]),
            row["direction"],
            tool.gigabytes(row["bytes"]),
            tool.gigabytes(row["layer_bytes"]),
            f"{row['seconds']:.1f} s",
            f"{row['bytes'] / row['seconds'] / 1e6:.0f} MB/s",
            tool.gigabytes(row["peak_bytes"]),
        )
    Console(width=110).print(table)
    print("peak memory is what the process had beyond one that only imports the same modules")
    if arguments.keep:
        print(f"the checkpoints are in {work}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    too_much = [row for row in rows if row["peak_bytes"] > 2 * row["layer_bytes"] + _ALLOWED_BYTES]
    for row in too_much:
        print(f"TOO MUCH: {row['layers']} layers, {row['direction']}: {tool.gigabytes(row['peak_bytes'])}")
    return int(bool(too_much))


def _measure(arguments: argparse.Namespace, layers: int, work: Path) -> list[dict[str, float]]:
    """Both directions on one generated checkpoint."""
    work.mkdir(parents=True)
    generate(work / "hf", arguments, layers)
    arch = read_architecture(work / "hf")
    size = sum(p.numel for p in parameters(arch)) * tool.DTYPES[arguments.dtype].itemsize
    layer = _largest_layer(work / "hf") * tool.DTYPES[arguments.dtype].itemsize
    rows = []
    for direction, options in (
        ("hf-to-megatron", ["--hf", str(work / "hf"), "--out", str(work / "megatron")]),
        ("megatron-to-hf", ["--checkpoint", str(work / "megatron"), "--out", str(work / "back")]),
    ):
        _, own = _run([])
        seconds, peak = _run([direction, *options])
        found = {"layers": layers, "bytes": size, "layer_bytes": layer, "seconds": seconds, "peak_bytes": peak - own}
        rows.append({"direction": direction, **found})
        print(f"{layers} layers, {direction}: {seconds:.1f} s, {tool.gigabytes(peak - own)}", file=sys.stderr)
    if not arguments.keep:
        shutil.rmtree(work)
    return rows


def _run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(Path(__file__).parent), *command], capture_output=True, text=True
    )
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("measured")]
    if not lines or lines[0][1] != "0":
        raise ValueError(f"the conversion failed: {done.stderr[-500:]}")
    return float(lines[0][2]), int(lines[0][3])


def generate(directory: Path, arguments: argparse.Namespace, layers: int) -> None:
    """A Hugging Face checkpoint of random weights, written a tensor at a time."""
    source = directory.with_name("config")
    source.mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": layers,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.ffn or 3 * arguments.hidden,
        "num_attention_heads": arguments.hidden // 64,
        "num_key_value_heads": max(arguments.hidden // 256, 1),
        "head_dim": 64,
        "vocab_size": arguments.vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    (source / "config.json").write_text(json.dumps(config))
    dtype, random = tool.DTYPES[arguments.dtype], torch.Generator().manual_seed(0)
    shapes = hf_shapes(all_rules(read_architecture(source)))
    started = time.perf_counter()
    weights = ((name, torch.randn(shape, generator=random).to(dtype)) for name, shape in shapes.items())
    write(weights, directory, like=source)
    print(f"{layers} layers: generated in {time.perf_counter() - started:.1f} s", file=sys.stderr)


def _largest_layer(model_dir: Path) -> int:
    """Values in all tensors of the largest layer; embedding and head are layers too."""
    sizes: dict[str, int] = {}
    for p in parameters(read_architecture(model_dir)):
        parts = p.name.split(".")
        layer = ".".join(parts[:3]) if p.name.startswith("decoder.layers.") else p.name
        sizes[layer] = sizes.get(layer, 0) + p.numel
    return max(sizes.values())


if __name__ == "__main__":
    sys.exit(main())
