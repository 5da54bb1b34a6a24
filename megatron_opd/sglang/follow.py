"""Weights that another replica's engine pushes: with data parallelism all replicas sample from the same servers."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_opd.core.named_weights import NamedWeights, drain
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.errors import Down


class Follow:
    """The WeightSync of every leader but the first: it sends nothing, and knows which version servers must have."""

    def __init__(self) -> None:
        self._version = 0

    def push(self, clients: Sequence[Client], weights: NamedWeights, version: int) -> dict[str, Exception]:
        """Note the version. Which servers did not get it shows in what they answer."""
        drain(weights)
        self._version = version
        return {}

    def release(self, clients: Sequence[Client]) -> dict[str, Exception]:
        """Nothing: the replica that pushes the weights has the servers give their memory back."""
        return {}

    async def give(self, client: Client) -> None:
        """Raises Down until the server has the current weights from the replica that pushes them."""
        version = (await client.model_info()).get("weight_version")
        if version != str(self._version):
            raise Down(f"{client.url}: has weights '{version}', not {self._version}")

    def close(self) -> None:
        """Nothing is held."""
