"""Weights by a directory that trainer and servers see. The newest one is kept, so a server that lost its weights loads
them at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_opd.core.named_weights import NamedWeights
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.weights.session import Session


class Spool:
    """A Transport through directories in `spool`, one a version."""

    def __init__(self, write: Callable[[NamedWeights, Path], None], spool: Path) -> None:
        """`write` as in TransportInputs."""
        self._write, self._spool = write, spool

    def send(self, session: Session, weights: NamedWeights, version: int, label: str) -> None:
        """Write a directory, have the servers load it, and remove those of older versions."""
        directory = self._directory(version)
        self._write(weights, directory)
        session.each(lambda client: _load(client, directory, label))
        for old in self._spool.glob("v*"):
            if old != directory:
                shutil.rmtree(old, ignore_errors=True)

    async def again(self, client: Client, version: int) -> bool:
        """Have the server load the directory, if it could be written."""
        directory = self._directory(version)
        if not directory.is_dir():
            return False
        await _load(client, directory, str(version))
        await client.resume()
        return True

    def close(self) -> None:
        """Remove the directories."""
        shutil.rmtree(self._spool, ignore_errors=True)

    def _directory(self, version: int) -> Path:
        return self._spool / f"v{version}"


async def _load(client: Client, directory: Path, label: str) -> None:
    """From a directory. SGLang goes back to what it had when that fails."""
    await client.stop_sampling()
    body = {"model_path": str(directory.absolute()), "flush_cache": False, "weight_version": label}
    await client.order("/update_weights_from_disk", body, client.timeout_s)
