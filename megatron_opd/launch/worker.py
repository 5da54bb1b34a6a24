"""Whether this process is a rank. Nothing slow is imported to find out."""

from __future__ import annotations

import os


def is_worker() -> bool:
    """Whether torchrun or srun has started this process as a rank. Maps srun's names to torch's."""
    if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ.setdefault("RANK", os.environ["SLURM_PROCID"])
        os.environ.setdefault("LOCAL_RANK", os.environ["SLURM_LOCALID"])
        os.environ.setdefault("WORLD_SIZE", os.environ["SLURM_STEP_NUM_TASKS"])
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
