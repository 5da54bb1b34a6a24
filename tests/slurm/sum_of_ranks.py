"""A program for the benchmark job: rank 0 writes the names of all nodes and the sum of all ranks to a file."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor(dist.get_rank())
dist.all_reduce(total)
nodes = [None] * dist.get_world_size()
dist.all_gather_object(nodes, os.environ["SLURMD_NODENAME"])
if dist.get_rank() == 0:
    Path(sys.argv[1]).write_text(f"{' '.join(nodes)}: {int(total)}")
dist.destroy_process_group()
