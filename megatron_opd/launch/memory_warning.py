"""A warning before a run starts that may need more host memory than this machine has: the kernel would end it later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from megatron_opd.core import process_memory
from megatron_opd.planner import host
from megatron_opd.planner.host import HostMemory
from megatron_opd.planner.job import Job


def lines(job: Job, longest_prompt: int, left: Callable[[], float] = process_memory.available) -> list[str]:
    """The warning, or nothing. `longest_prompt`: tokens, as the data have it. `left`: bytes that the machine has."""
    need, room = _need(job, longest_prompt), left()
    if need.total <= room:
        return []
    part, size = largest(need)
    return [
        f"warning: this run may need {need.total / 1e9:.1f} GB of host memory, and {room / 1e9:.1f} GB are left here;"
        f" most is {part} ({size / 1e9:.1f} GB): {remedy(part, job)}; `check --plan` has the rest"
    ]


def plan(job: Job, longest_prompt: int, left: Callable[[], float] = process_memory.available) -> str:
    """A line with what the run needs here; arguments as of `lines`."""
    need = _need(job, longest_prompt)
    ranks = f"{need.ranks_here} rank{'s' if need.ranks_here > 1 else ''}"
    return (
        f"plan: {ranks} on a machine, about {need.total / 1e9:.1f} GB of host memory together, {left() / 1e9:.1f} GB"
        " are left here; `check --plan` has the parts, GPUs, traffic and times"
    )


def _need(job: Job, longest_prompt: int) -> HostMemory:
    data = job.config.data
    data = replace(data, max_prompt_tokens=min(data.max_prompt_tokens, max(longest_prompt, 1)))
    job = replace(job, config=replace(job.config, data=data))
    return host.machine(job, on_gpu=torch.cuda.is_available())


def largest(need: HostMemory) -> tuple[str, float]:
    """The part that takes most of a machine, with its bytes."""
    parts = {name: size * need.ranks_here for name, size in need.rank.parts.items()} | need.others
    return max(parts.items(), key=lambda part: part[1])


def remedy(part: str, job: Job) -> str:
    """The setting that makes a part of the plan smaller."""
    match part:
        case "activations" | "loss":
            return _of_a_pass(job)
        case "engine cache" | "engine's passes" | "hidden states":
            return f"lower rollout.prompts_per_step or {_longest(job)}"
        case "teacher weights" | "teacher heads" | "teachers fetched" | "teachers that wait":
            whole = [i for i, t in enumerate(job.config.teachers) if not t.is_served and t.dtype == "fp32"]
            return f"set teachers.{whole[0]}.dtype=bf16" if whole else "take a smaller teachers.0.model"
        case "prompts":
            return "shorten the files of data.train"
        case "sessions":
            return "lower rollout.prompts_per_step or rollout.samples_per_prompt: each episode has a session"
        case "servers":
            return "lower rollout.servers.count, or give urls of servers elsewhere"
        case "programs" | "launcher":
            return "lower parallel.data, tensor or pipeline: each rank is a process"
    return "train adapters alone (lora.rank), or take a smaller student.model"


def _of_a_pass(job: Job) -> str:
    size = job.config.train.micro_batch_size
    if size > 1:
        return f"lower train.micro_batch_size (it is {size})"
    if job.config.student.recompute != "full":
        return "set student.recompute=full"
    return f"lower {_longest(job)}{'' if job.config.environments else ' or data.max_prompt_tokens'}"


def _longest(job: Job) -> str:
    """The setting that bounds sequences."""
    return "environment.max_tokens" if job.config.environments else "rollout.max_new_tokens"
