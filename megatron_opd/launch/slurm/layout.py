"""Which process of a run goes to which node and GPU of a cluster job. Pure: it reads no models and asks no Slurm.

The trainer takes the first nodes, as many ranks a node as it has GPUs, so that tensor-parallel groups stay within one.
Servers fill what is left, the largest first, each wholly on one node; one job step serves one model on one node.
Colocated servers take the trainer's own GPUs, from the first on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opd.launch.local import Process
from megatron_opd.sglang.serve import ANYWHERE, Served


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One job step."""

    name: str
    """`trainer`, or the served model and the step's number: `teacher-math-0`."""
    nodes: tuple[int, ...]
    """Numbers of the job's nodes that it runs on."""
    gpus: tuple[int, ...]
    """That it takes, on each of them."""
    tasks: int
    """Processes that Slurm starts, evenly over the nodes."""
    ports: tuple[int, ...]
    """That its servers listen on; none of the trainer."""
    command: tuple[str, ...]


@dataclass(slots=True)
class _Node:
    """What of a node is not taken."""

    gpus: list[int]
    ports: set[int] = dataclasses.field(default_factory=set)


def place(
    processes: Sequence[Process], arguments: Sequence[str], *, gpus_per_node: int, nodes: int | None = None
) -> list[Step]:
    """The job steps of a run of these processes: those of the servers and, last, the trainer's.

    `arguments` are the config file and overrides as the user gave them; without GPUs, `gpus_per_node` is the number of
    ranks that a node takes. With `nodes`, raises ValueError when the run does not take exactly so many.
    """
    *servers, trainer = processes
    free: list[_Node] = []
    last = _trainer(trainer, free, gpus_per_node)
    steps: list[Step] = []
    for process in sorted(servers, key=_tensor, reverse=True):  # which is stable: equals keep the config's order
        if process.is_colocated:
            made = _colocated(process, arguments, last, free)
        else:
            made = _servers(process, arguments, free, gpus_per_node)
        _check_reached(process, made)
        steps += made
    if nodes is not None and nodes != len(free):
        hint = "ask for as many" if nodes < len(free) else "ask for fewer, or raise servers.count or parallel.data"
        raise ValueError(f"this run takes {len(free)} node(s) of {gpus_per_node} GPUs, not {nodes}; {hint}")
    return [*steps, last]


def num_nodes(steps: Sequence[Step]) -> int:
    """That the steps take."""
    return 1 + max(node for step in steps for node in step.nodes)


def gpus_taken(steps: Sequence[Step], gpus_per_node: int) -> int:
    """GPUs that the job asks for on each node: those that are used where it takes one node, else all of them."""
    if num_nodes(steps) > 1:
        return gpus_per_node
    return len({gpu for step in steps for gpu in step.gpus})


def idle_gpus(steps: Sequence[Step], gpus_per_node: int) -> dict[int, list[int]]:
    """GPUs that no step takes, by node."""
    taken = {(node, gpu) for step in steps for node in step.nodes for gpu in step.gpus}
    idle = {n: [g for g in range(gpus_per_node) if (n, g) not in taken] for n in range(num_nodes(steps))}
    return {node: gpus for node, gpus in idle.items() if gpus}


def _trainer(trainer: Process, free: list[_Node], gpus_per_node: int) -> Step:
    per_node = min(gpus_per_node, trainer.ranks)
    if trainer.ranks % per_node:
        raise ValueError(
            f"the trainer's {trainer.ranks} ranks (parallel.tensor x parallel.pipeline x parallel.context x"
            f" parallel.data) do not fill nodes of {gpus_per_node} GPUs; change parallel.data, or --gpus-per-node"
        )
    count = trainer.ranks // per_node
    free += [_Node(list(range(per_node, gpus_per_node))) for _ in range(count)]
    return Step(
        name=trainer.name,
        nodes=tuple(range(count)),
        gpus=tuple(range(per_node)),
        tasks=trainer.ranks,
        ports=(),
        command=trainer.command,
    )


def _colocated(process: Process, arguments: Sequence[str], trainer: Step, free: list[_Node]) -> list[Step]:
    """Steps of servers on the trainer's nodes and GPUs, where other servers may have ports."""
    theirs = [_Node(list(trainer.gpus), free[node].ports) for node in trainer.nodes]
    steps = _servers(process, arguments, theirs, len(trainer.gpus))
    if len(theirs) > len(trainer.nodes):
        raise ValueError(
            f"rollout.servers.colocated: {process.ranks} GPUs in servers of {_tensor(process)} do not fit on the"
            f" trainer's {len(trainer.nodes)} node(s) of {len(trainer.gpus)}; lower rollout.servers.count"
        )
    return steps


def _check_reached(process: Process, steps: Sequence[Step]) -> None:
    """Raises ValueError for servers beyond the machine of rank 0 whose weights come no further."""
    assert process.served is not None
    if process.served.is_local and any(step.nodes != (0,) for step in steps):
        raise ValueError(
            "rollout.sync reaches servers on the machine of rank 0 only, but these are on other nodes too; choose"
            " rollout.sync: disk, a smaller rollout.servers.count, or a trainer that leaves them GPUs of its node"
        )


def _servers(process: Process, arguments: Sequence[str], free: list[_Node], gpus_per_node: int) -> list[Step]:
    """Steps of all servers of a model; what they take is no longer in `free`, which grows as needed."""
    assert process.served is not None
    servers, tensor, steps = process.served.servers, _tensor(process), []
    if tensor > gpus_per_node:
        raise ValueError(
            f"{process.served.setting}.tensor ({tensor}) is more than the {gpus_per_node} GPUs of a node; servers"
            " across nodes are not started by us: start yours, and name them in urls"
        )
    left, at = servers.count, 0
    while left:
        if at == len(free):
            free.append(_Node(list(range(gpus_per_node))))
        here = min(left, len(free[at].gpus) // tensor)
        if here:
            gpus, free[at].gpus = free[at].gpus[: here * tensor], free[at].gpus[here * tensor :]
            ports = _ports(free[at], servers.port, here)
            steps.append(
                Step(
                    name=f"{process.served.name}-{len(steps)}",
                    nodes=(at,),
                    gpus=tuple(gpus),
                    tasks=1,
                    ports=ports,
                    command=_serve(process.served, arguments, gpus, ports),
                )
            )
        left, at = left - here, at + 1
    return steps


def _ports(node: _Node, first: int, count: int) -> tuple[int, ...]:
    """The next ones in a row, from `first` on, that no other server of the node has."""
    while node.ports & set(range(first, first + count)):
        first += 1
    node.ports |= set(range(first, first + count))
    return tuple(range(first, first + count))


def _serve(served: Served, arguments: Sequence[str], gpus: Sequence[int], ports: Sequence[int]) -> tuple[str, ...]:
    """The command of a step: the user's config, with this step's share of the servers."""
    here = {"count": len(ports), "gpus": f"[{','.join(map(str, gpus))}]", "port": ports[0], "host": ANYWHERE}
    overrides = [f"{served.setting}.{name}={value}" for name, value in here.items()]
    return ("python", "-m", "megatron_opd", "serve", "--only", served.name, *arguments, *overrides)


def _tensor(process: Process) -> int:
    assert process.served is not None
    return process.served.servers.tensor
