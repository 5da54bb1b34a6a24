"""What GPUs can do, from their makers' data sheets, and which part of that programs like ours are assumed to get."""

from __future__ import annotations

from dataclasses import dataclass

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Of a number, by type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Rates of one GPU, a second."""

    memory: float
    """Bytes."""
    bf16: float
    """FLOPs of dense matrix products, without sparsity."""
    fp32: float
    """FLOPs in float32 proper, which is what PyTorch does by default."""
    bandwidth: float
    """Bytes of its own memory."""
    link: float
    """Bytes to GPUs of its node, in one direction."""
    network: float
    """Bytes to other nodes in one direction, of the usual one network card a GPU."""
    host: float
    """Bytes to the memory of its machine, in one direction."""

    def flops(self, dtype: str) -> float:
        """FLOPs of matrix products in a type of ours."""
        return self.bf16 if BYTES[dtype] == 2 else self.fp32


GPUS = {
    "A100": Gpu(memory=80e9, bf16=312e12, fp32=19.5e12, bandwidth=2.039e12, link=300e9, network=25e9, host=32e9),
    "H100": Gpu(memory=80e9, bf16=989e12, fp32=67e12, bandwidth=3.35e12, link=450e9, network=50e9, host=64e9),
    "H200": Gpu(memory=141e9, bf16=989e12, fp32=67e12, bandwidth=4.8e12, link=450e9, network=50e9, host=64e9),
    "B200": Gpu(memory=180e9, bf16=2250e12, fp32=75e12, bandwidth=8e12, link=900e9, network=50e9, host=64e9),
    "L40S": Gpu(memory=48e9, bf16=362e12, fp32=91.6e12, bandwidth=0.864e12, link=32e9, network=25e9, host=32e9),
}
"""SXM modules of 80, 80, 141 and 180 GB; the L40S is a PCIe card."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumed:
    """Which part of a data sheet is reached. Assumptions, not measurements: put your own in when you have them."""

    training: float = 0.45
    """Of the FLOPs, in forward and backward passes without communication and pipeline bubbles."""
    scoring: float = 0.50
    """Of the FLOPs, in forward passes over whole sequences: teachers, and servers reading prompts."""
    decoding: float = 0.60
    """Of the memory's bandwidth, in sampling token by token."""
    transfer: float = 0.70
    """Of a link or a network card."""
    usable: float = 0.92
    """Of the memory: the rest goes to CUDA, NCCL and fragments."""
    server: float = 0.85
    """Of its memory that a server takes for weights and KV cache."""
    context: float = 0.5e9
    """Bytes that CUDA takes on a GPU for each process that opens it."""
    process: float = 0.5e9
    """Bytes of host memory of a rank, or of the launcher, before there is a model: Python, torch and Megatron."""
    cuda: float = 2.5e9
    """Bytes of host memory that a process has besides when it uses a GPU: CUDA's libraries and contexts."""
    server_process: float = 4e9
    """Bytes of host memory of a server, a GPU."""
    session: float = 16e6
    """Bytes of host memory of a session of the tool python that computes little; it may take 32 times as much."""
    gpus_per_node: int = 8
