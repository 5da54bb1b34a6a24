"""The Slurm job of a run as text: the header from the layout, and the supervisor `job.sh` that does the rest.

The script holds no layout: it asks for it when it runs (`launch --steps`), so that what it starts is what its config
says then, and a script can be edited.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_opd.config import RunConfig
from megatron_opd.launch.slurm.layout import Step, gpus_taken, idle_gpus, num_nodes

SUPERVISOR = Path(__file__).with_name("job.sh")
WARNING_S = 300
"""Before the job's time is over: for the step under way and a checkpoint."""


def script(
    run: RunConfig,
    arguments: Sequence[str],
    steps: Sequence[Step],
    *,
    gpus_per_node: int,
    sbatch: Sequence[str] = (),
    setup: str = "",
) -> str:
    """The whole batch script. `sbatch` are more options of the header, which win; `setup` replaces OPD_SETUP.

    sbatch reads quotes in its header as a shell does."""
    name = Path(run.dir).resolve().name
    taken = gpus_taken(steps, gpus_per_node)
    whole = ["--exclusive", "--mem=0"] if taken == gpus_per_node else []
    header = [
        f"--job-name={name}",
        f"--nodes={num_nodes(steps)}",
        f"--gpus-per-node={taken}",
        *whole,
        "--time=24:00:00",
        f"--output={name.replace('%', '%%')}-%j.out",
        "--open-mode=append",  # a requeued job goes on in the same file
        f"--signal=B:USR1@{WARNING_S}",
        "--requeue",
        *sbatch,
    ]
    settings = [f"OPD_GPUS_PER_NODE={taken}", *([f"OPD_SETUP={shlex.quote(setup)}"] if setup else [])]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"#SBATCH {shlex.quote(option)}" for option in header),
            "# Written by `megatron-opd launch --slurm`, for these steps (arguments of the script are more overrides):",
            *(f"#   {line}" for line in describe(steps, gpus_per_node)),
            "",
            *settings,
            "",
            SUPERVISOR.read_text(),
            f'opd_run {shlex.join(arguments)} "$@"',
            "",
        ]
    )


def describe(steps: Sequence[Step], gpus_per_node: int) -> list[str]:
    """A line for people a step, and one for GPUs that nobody uses."""
    lines, trainer = [], steps[-1]
    for step in steps:
        shares = step is not trainer and set(step.nodes) <= set(trainer.nodes) and set(step.gpus) & set(trainer.gpus)
        whose = " of the trainer" if shares else ""
        ports = f", ports {_numbers(step.ports)}" if step.ports else ""
        lines.append(
            f"{step.name}: {step.tasks} task{'s' if step.tasks > 1 else ''} on node {_numbers(step.nodes)},"
            f" GPUs {_numbers(step.gpus)}{whose}{ports}"
        )
    taken = gpus_taken(steps, gpus_per_node)
    if taken < gpus_per_node:
        shares = f"the job takes {taken} of the node's {gpus_per_node} GPUs, and the CPUs and memory that the cluster"
        lines.append(f"{shares} gives with them; for more: --sbatch=--mem=64G --sbatch=--cpus-per-task=8")
    idle = idle_gpus(steps, taken)
    return [*lines, *(f"warning: node {node} has idle GPUs: {_numbers(gpus)}" for node, gpus in idle.items())]


def table(run: RunConfig, steps: Sequence[Step]) -> str:
    """What `job.sh` reads: fields by tabs, the run first, then a line a step: name, nodes, tasks, servers, command."""
    lines = [("run", str(Path(run.dir).absolute()), run.max_restarts)]
    lines += [
        ("step", s.name, ",".join(map(str, s.nodes)), s.tasks, len(s.ports), shlex.join(s.command)) for s in steps
    ]
    return "\n".join("\t".join(map(str, line)) for line in lines)


def _numbers(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
