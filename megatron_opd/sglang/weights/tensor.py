"""Weights inside the requests: values without a GPU, CUDA IPC handles with one (then the servers are on this machine).

SGLang takes pickles here, one for each tensor-parallel rank; they go from us to the server, never back. Handles name a
GPU by its number, so the servers must see this process's GPU under the same number.
"""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler

from megatron_opd.sglang.client import Client
from megatron_opd.sglang.weights.buckets import Bucket
from megatron_opd.sglang.weights.session import Failures, at_once


class Inline:
    """A Sender: each server gets its own request, so one that fails concerns nobody else."""

    async def send(self, clients: Sequence[Client], bucket: Bucket, label: str) -> Failures:
        """Give the bucket to all of them, whose weights are of version `label` then; those that did not take it, and
        why."""
        _, failures = await at_once(clients, lambda client: _send(client, bucket, label))
        return failures

    async def drop(self) -> None:
        """There is nothing between updates."""


async def _send(client: Client, bucket: Bucket, label: str) -> None:
    ranks = int((await client.server_info()).get("tp_size", 1))
    body = {
        # A handle is used up by the process that opens it, so every rank gets one of its own.
        "serialized_named_tensors": [_pickled(bucket) for _ in range(ranks if bucket.flat.is_cuda else 1)],
        "flush_cache": False,
        "weight_version": label,
    }
    if not bucket.flat.is_cuda:
        body["serialized_named_tensors"] *= ranks
    await client.order("/update_weights_from_tensor", body, client.timeout_s)


def _pickled(bucket: Bucket) -> str:
    if not bucket.flat.is_cuda:  # views would carry the whole bucket each
        return base64.b64encode(pickle.dumps([(name, tensor.clone()) for name, tensor in bucket.tensors()])).decode()
    import torch.multiprocessing  # noqa: F401  teaches ForkingPickler to write handles

    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(bucket.tensors())
    return base64.b64encode(buffer.getvalue()).decode()
