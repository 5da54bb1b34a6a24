"""From settings to a pool of clients. What a client must know about the model is in the model's own config.json."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path

from megatron_opd.config import ServersConfig
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.pool import Pool


def connect(
    servers: ServersConfig,
    model_dir: str | Path,
    *,
    name: str,
    on_return: Callable[[Client], Awaitable[None]] | None = None,
) -> Pool:
    """A pool over `servers.urls`, which serve the model of `model_dir`; nothing is sent yet. Raises ValueError.

    `name` is how the servers are called in messages.
    """
    if not servers.urls:
        raise ValueError(f"{name}: servers.urls is empty: nobody has started servers for it")
    path = Path(model_dir) / "config.json"
    vocab_size, context = (_positive(path, field) for field in ("vocab_size", "max_position_embeddings"))
    clients = [Client(url, servers, vocab_size=vocab_size, context=context) for url in servers.urls]
    return Pool(clients, servers, name=name, on_return=on_return)


def _positive(path: Path, name: str) -> int:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not tell {name}: {error}") from None
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{path}: {name} must be a whole number above 0, not {value!r}")
    return value
