#!/usr/bin/env python3
"""Measure what a token costs in each form that a served teacher's answer can have: bytes on the wire, and seconds.

Prints a Markdown table. Without --model, a shallow model of random weights is made and served. Responses are random
tokens, new ones for every request, so no prefix cache helps. Seconds are from the first request to the last answer over
all scored tokens, with as many requests at a time as --concurrency says, and include reading the answers. Without a GPU
they say nothing about GPUs; the bytes are the same everywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import tool

from megatron_opd.config import ServersConfig
from megatron_opd.models.architecture import read_limits
from megatron_opd.sglang import process
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.errors import SGLangError
from megatron_opd.sglang.wire import Ask

_EXAMPLES = """\
examples:
  python tools/bench_carriers.py                             a random model of hidden size 1024, vocabulary 32768
  python tools/bench_carriers.py --vocab 151936 --hidden 4096
  python tools/bench_carriers.py --model ./teacher --url http://node7:30000 --response 2048 --concurrency 32
"""


@dataclass(frozen=True, slots=True)
class _Row:
    carrier: str
    bytes_per_token: float
    seconds_per_token: float


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Measure bytes and seconds a token of every teacher carrier on a real SGLang server.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="Hugging Face directory of the teacher (default: a random one)")
    parser.add_argument(
        "--vocab", type=tool.positive, default=32768, metavar="N", help="of a random model (%(default)s)"
    )
    parser.add_argument(
        "--hidden", type=tool.positive, default=1024, metavar="N", help="of a random model (%(default)s)"
    )
    parser.add_argument(
        "--url", help="a running server of the model, with --enable-return-hidden-states (default: start one)"
    )
    parser.add_argument("--python", default=ServersConfig().python, help="Python of SGLang's environment")
    parser.add_argument("--prompt", type=tool.positive, default=64, metavar="N", help="tokens before the scored ones")
    parser.add_argument("--response", type=tool.positive, default=256, metavar="N", help="scored tokens a request")
    parser.add_argument("--requests", type=tool.positive, default=16, metavar="N")
    parser.add_argument("--concurrency", type=tool.positive, default=4, metavar="N", help="requests at a time")
    parser.add_argument("--top-k", type=tool.positive, nargs="+", default=[16, 64, 256], metavar="K")
    return tool.run(_run, parser.parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    if arguments.url and not arguments.model:
        raise ValueError("--url needs --model: the directory of what that server serves")
    with tempfile.TemporaryDirectory() as directory:
        arguments.model = arguments.model or _random_model(directory, arguments)
        return _compare(arguments)


def _random_model(directory: str, arguments: argparse.Namespace) -> str:
    """Two layers: what is measured here is what comes after the last one."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=2 * arguments.hidden,
        num_hidden_layers=2,
        num_attention_heads=max(arguments.hidden // 64, 1),
        num_key_value_heads=max(arguments.hidden // 64, 1),
        head_dim=64,
        max_position_embeddings=arguments.prompt + arguments.response + 8,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


def _compare(arguments: argparse.Namespace) -> int:
    vocab_size, context = read_limits(arguments.model)
    length = arguments.prompt + arguments.response + 1
    if length > context:
        raise ValueError(f"--prompt and --response are {length} tokens, but the model has a context of {context}")
    with _server(arguments, context) as servers:
        client = Client(servers.urls[0], servers, vocab_size=vocab_size, context=context)
        try:
            rows = asyncio.run(_measure(client, arguments))
        except SGLangError as error:
            raise ValueError(f"the server failed: {error}") from error
    print(
        f"{arguments.requests} requests of {arguments.prompt} + {arguments.response} tokens, {arguments.concurrency} at"
        f" a time, vocabulary {vocab_size:,}\n"
    )
    print("| carrier | bytes per token | seconds per token | tokens per second |")
    print("|---|---:|---:|---:|")
    for row in rows:
        rate = f"{1 / row.seconds_per_token:,.0f}"
        print(f"| {row.carrier} | {row.bytes_per_token:,.0f} | {row.seconds_per_token:.2e} | {rate} |")
    return 0


@contextmanager
def _server(arguments: argparse.Namespace, context: int) -> Iterator[ServersConfig]:
    """The settings of a running server: the one that was named, or one of our own."""
    if arguments.url:
        yield ServersConfig(urls=[arguments.url], max_in_flight=arguments.concurrency)
        return
    servers = ServersConfig(python=arguments.python, max_in_flight=arguments.concurrency)
    with tempfile.TemporaryDirectory() as logs:
        extra = ("--enable-return-hidden-states",)
        started = process.start(servers, arguments.model, name="teacher", log_dir=logs, context=context, extra=extra)
        try:
            process.wait(started, servers, say=lambda line: print(line, file=sys.stderr, flush=True))
            yield ServersConfig(urls=[started[0].url], max_in_flight=arguments.concurrency)
        finally:
            process.stop(started)


async def _measure(client: Client, arguments: argparse.Namespace) -> list[_Row]:
    async with client:
        carriers = [("sampled", 0), *(("topk", k) for k in arguments.top_k), ("hidden", 0)]
        for carrier, top_k in carriers:  # what is done once, at the first request, belongs to nobody
            await _score(client, arguments, carrier, top_k, count=1)
        return [await _row(client, arguments, carrier, top_k) for carrier, top_k in carriers]


async def _row(client: Client, arguments: argparse.Namespace, carrier: str, top_k: int) -> _Row:
    before, started = client.usage.bytes_received, time.monotonic()
    await _score(client, arguments, carrier, top_k, count=arguments.requests)
    seconds = time.monotonic() - started
    tokens = arguments.requests * arguments.response
    name = f"topk, K = {top_k}" if top_k else carrier
    return _Row(name, (client.usage.bytes_received - before) / tokens, seconds / tokens)


async def _score(client: Client, arguments: argparse.Namespace, carrier: str, top_k: int, *, count: int) -> None:
    """`count` requests; the client lets --concurrency of them through at a time."""
    asks = [
        Ask(
            rid=f"{carrier}-{top_k}-{i}-{random.random()}",
            ids=_tokens(client, arguments.prompt + arguments.response),
            first=arguments.prompt,
            carrier=carrier,  # type: ignore[arg-type]
            top_k=top_k,
        )
        for i in range(count)
    ]
    await asyncio.gather(*map(client.score, asks))


def _tokens(client: Client, count: int) -> Sequence[int]:
    return tuple(random.choices(range(client.limits.vocab_size), k=count))


if __name__ == "__main__":
    sys.exit(main())
