"""Weights inside the requests: values without a GPU, CUDA IPC handles with one (then the servers are on this machine).

SGLang takes pickles here, one for each tensor-parallel rank; they go from us to the server, never back. Handles name a
GPU by its number, so the servers must see this process's GPU under the same number.
"""

from __future__ import annotations

import base64
import io
import pickle
from collections import OrderedDict
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing  # teaches ForkingPickler to write handles

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
    buffer = io.BytesIO()
    if bucket.flat.is_cuda:
        ForkingPickler(buffer).dump(bucket.tensors())
    else:
        pickler = pickle.Pickler(buffer)
        pickler.dispatch_table = {torch.Tensor: _reduced}
        pickler.dump([(name, tensor.clone()) for name, tensor in bucket.tensors()])  # views would carry all of it each
    return base64.b64encode(buffer.getvalue()).decode()


def _reduced(tensor: torch.Tensor) -> Any:
    """As torch does it, but for FP8, which torch pickles in a form that SGLang's careful unpickler cannot read."""
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
    storage = tensor.contiguous().view(torch.uint8)._typed_storage()
    how = (storage, 0, tuple(tensor.shape), tensor.stride(), False, OrderedDict(), tensor.dtype)
    return torch._utils._rebuild_tensor_v3, how
