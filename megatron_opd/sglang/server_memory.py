"""GPU memory that servers give back and take again (SGLang's memory saver), while the trainer has their GPUs.

SGLang 0.5.23 ends itself when it is told to give back what it has given back, or to take what it has, and nothing that
it says tells which is the case. So the state is kept where it ends together with the server: in the version of its
weights, which is a number, or SGLang's own word, only while the server has everything. Whoever meets a server, after a
restart of either side, knows from that what may be asked. Memory comes first and the version follows; a trainer that
dies just between the two costs a restart of the server.

A server that lacks memory is paused, so that no request, nor a look at its health, computes with what is not there.
"""

from __future__ import annotations

from typing import Any

from megatron_opd.sglang.client import CONTROL_S, Client

RELEASED = "released"
"""Version of a server that has given everything back."""
WITHOUT_CACHE = "without-cache"
"""Version of a server that has room for weights, with or without right ones in it, and none for keys and values."""
_WEIGHTS = ["weights"]
_CACHE = ["kv_cache", "cuda_graph"]


async def release(client: Client) -> None:
    """Stop it, and have it give everything back; harmless when it has. Raises Refused when it still computes."""
    state = await _state(client)
    if state == RELEASED:
        return
    await client.stop_sampling()  # it ends when it must give back what it computes with
    await _change(client, "release", _WEIGHTS if state == WITHOUT_CACHE else [*_CACHE, *_WEIGHTS], RELEASED)


async def take_for_weights(client: Client) -> None:
    """Have it take room for its weights, whose values are lost, and for nothing else."""
    state = await _state(client)
    if state == RELEASED:
        await _change(client, "resume", _WEIGHTS, WITHOUT_CACHE)
    elif state != WITHOUT_CACHE:  # started again since, or never asked to give anything back
        await client.stop_sampling()
        await _change(client, "release", _CACHE, WITHOUT_CACHE)


async def take_for_cache(client: Client, version: int) -> None:
    """Have a server that lacks only that take room for its cache. Its weights are of `version`."""
    await _change(client, "resume", _CACHE, str(version))


async def has_saver(client: Client) -> bool:
    """Whether it was started with --enable-memory-saver; without, it says that it gives memory back, and keeps it."""
    return bool((await client.server_info()).get("enable_memory_saver"))


async def _state(client: Client) -> Any:
    return (await client.model_info()).get("weight_version")


async def _change(client: Client, how: str, tags: list[str], state: str) -> None:
    await client.post(f"/{how}_memory_occupation", {"tags": tags}, client.timeout_s)
    # By default requests would be aborted, also those that wait for the server to go on.
    body = {"new_version": state, "abort_all_requests": False}
    await client.order("/update_weight_version", body, CONTROL_S)
