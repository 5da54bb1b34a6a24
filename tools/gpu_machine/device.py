"""One line about this machine: device, torch, whose layers and optimizer a run uses; exit code 1 without CUDA."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> int:
    """Entry point; returns the exit code."""
    import torch

    if not torch.cuda.is_available():
        print(f"there is no CUDA device (torch {torch.__version__})")
        return 1
    from megatron_opd.precision import installed

    p = torch.cuda.get_device_properties(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    facts = [
        f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}",
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}",
        *(f"{package} {installed.version(package) or 'not installed'}" for package in ("megatron-core", "triton")),
        *installed.notes("auto"),
        installed.apex_problem() or f"NVIDIA's Apex: {'there' if installed.has_apex() else 'not installed'}",
    ]
    print("; ".join(facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
