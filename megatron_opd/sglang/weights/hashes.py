"""SGLang 0.5.23's checksums of a tensor (its `tensor_hash`), so that they can be computed on this side too."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_TILE = 8192
_AT_ONCE = 8 * _TILE
"""Words that are hashed together: what is in between stays in a core's cache."""
_SEED = 0x243F6A88
_SEEDS = (_SEED, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF)
_POSITIONS, _ROTATIONS = (0x27D4EB2D, 0x165667B1), (15, 13)
_MASK = (1 << 64) - 1


def on_cpu(tensor: torch.Tensor) -> str:
    """What a server without a GPU says of this tensor: the first 8 bytes of a SHA-256 of its bytes."""
    return hashlib.sha256(_bytes(tensor)).digest()[:8].hex()


def on_gpu(tensor: torch.Tensor) -> str:
    """What a server with a GPU says: its Triton kernel `gpu_tensor_hash`, in numpy. Not yet compared with the kernel.

    Two 32-bit hashes of every word and its place, summed over tiles of 8,192 words; mixed, and summed over the tiles.
    """
    data = np.frombuffer(_bytes(tensor), np.uint8)
    words = (data if len(data) % 4 == 0 else np.pad(data, (0, -len(data) % 4))).view(np.uint32)
    total = sum(_of_tiles(words[i : i + _AT_ONCE], i, 4 * len(words)) for i in range(0, len(words), _AT_ONCE)) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        total = ((total ^ (total >> shift)) * factor) & _MASK
    return f"{total ^ (total >> 31):016x}"


def _of_tiles(words: np.ndarray, first: int, num_bytes: int) -> int:
    """Sum of the hashes of some tiles, whose first word has the place `first` in a tensor of so many bytes."""
    places = np.arange(first, first + len(words), dtype=np.uint32)
    starts = np.arange(0, len(words), _TILE)
    halves = []
    for seed, factor, rotation in zip(_SEEDS, _POSITIONS, _ROTATIONS, strict=True):
        rotated = (places << np.uint32(rotation)) | (places >> np.uint32(32 - rotation))
        mixed = _mix(words ^ ((places * np.uint32(factor) + np.uint32(seed)) ^ rotated))
        tiles = np.add.reduceat(mixed, starts, dtype=np.uint32)
        halves.append(_mix(tiles ^ np.uint32(num_bytes & 0xFFFFFFFF)).astype(np.uint64))
    return int(np.sum((halves[0] << np.uint64(32)) | halves[1], dtype=np.uint64))


def _mix(words: np.ndarray) -> np.ndarray:
    """MurmurHash3's last step on 32 bits."""
    words = (words ^ (words >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return words ^ (words >> np.uint32(16))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
