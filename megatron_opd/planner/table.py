"""A plan for people: tables of memory, servers, traffic and time, and what to change."""

from __future__ import annotations

import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_opd.core import process_memory
from megatron_opd.planner import traffic
from megatron_opd.planner.plan import Plan
from megatron_opd.planner.search import Candidate

_MOST_STAGES = 6
"""Columns of stages that are shown; of more, the ends are."""


def show(made: Plan, console: Console) -> None:
    """Print it."""
    job = made.job
    layout = job.config.parallel
    context = f" context {layout.context} x" if layout.context > 1 else ""
    console.print(
        f"{layout.world_size} x {job.gpu_name}: tensor {layout.tensor} x pipeline {layout.pipeline} x{context} data"
        f" {layout.data}; {job.sequences} answers a step, prompts of {job.prompt:g} and answers of {job.response:g}"
        f" tokens, at most {job.longest} together\n"
    )
    for table in (_memory(made), _host(made), _servers(made), _teachers(made), _traffic(made), _time(made)):
        if table.row_count:
            console.print(table)
    estimate = made.estimate
    ahead = job.config.rollout.max_staleness
    how = f"sampling {ahead} step(s) ahead" if ahead else "on-policy: one stage after the other"
    console.print(
        f"a step takes {seconds(estimate.seconds)} ({how}), {estimate.tokens_per_s:,.0f} response tokens a second;"
        f" bound by {escape(estimate.bound)}\n"
    )
    _advice(made, console)
    rates = ", ".join(f"{name} {value:g}" for name, value in _assumed(made).items())
    console.print(f"[dim]assumed parts of the data sheet: {rates}[/dim]", highlight=False)


def _assumed(made: Plan) -> dict[str, float]:
    assumed = made.job.assumed
    names = ("training", "scoring", "decoding", "transfer", "usable", "server")
    return {name: getattr(assumed, name) for name in names}


def _advice(made: Plan, console: Console) -> None:
    for problem in made.problems:
        console.print(f"[red]does not fit:[/red] {escape(problem)}", highlight=False)
    if made.nearest is not None:
        console.print(f"nearest layout that fits: {_described(made.nearest)}", highlight=False, soft_wrap=True)
    elif made.needs_layout:
        console.print("no layout of up to 16 times as many GPUs fits")
    fastest = made.fastest
    if fastest is not None and (made.problems or fastest.seconds < 0.95 * made.estimate.seconds):
        console.print(f"fastest on as many GPUs: {_described(fastest)}", highlight=False, soft_wrap=True)


def _described(layout: Candidate) -> str:
    world = layout.job.config.parallel.world_size
    return (
        f"{' '.join(layout.overrides)}  ({world} GPUs, {layout.memory / 1e9:.1f} GB, {seconds(layout.seconds)} a step)"
    )


def _memory(made: Plan) -> Table:
    shown = made.ranks
    if len(shown) > _MOST_STAGES:
        shown = [*shown[:2], *shown[-2:]]
    table = _table("GPU memory of a rank", "part", *(f"stage {rank.stage}" for rank in shown))
    names = list(dict.fromkeys(name for rank in shown for name in rank.parts))
    for name in names:
        table.add_row(name, *(_size(rank.parts.get(name, 0.0)) for rank in shown))
    table.add_section()
    table.add_row("at its peak", *(_size(rank.total) for rank in shown), style="bold")
    table.add_row("which is in", *(rank.peak_at.removeprefix("the ") for rank in shown))
    table.add_row("usable", *(_size(made.usable) for _ in shown))
    return table


def _host(made: Plan) -> Table:
    """Without GPUs all of it is in host memory, so there are two columns."""
    table = _table("Host memory of a machine", "part", "with GPUs", "without GPUs")
    ranks = [machine.rank for machine in made.hosts]
    for name in dict.fromkeys(name for rank in ranks for name in rank.parts):
        table.add_row(name, *(_size(rank.parts.get(name, 0.0)) for rank in ranks))
    table.add_section()
    table.add_row("a rank at its peak", *(_size(rank.total) for rank in ranks))
    table.add_row("which is in", *(rank.peak_at.removeprefix("the ") for rank in ranks))
    table.add_row("ranks on the machine", *(str(machine.ranks_here) for machine in made.hosts))
    for name in ("launcher", "servers"):
        if any(name in machine.others for machine in made.hosts):
            table.add_row(name, *(_size(machine.others.get(name, 0.0)) for machine in made.hosts))
    table.add_row("together", *(_size(machine.total) for machine in made.hosts), style="bold")
    left = process_memory.available()
    if math.isfinite(left):
        table.add_row("this machine has left", *(_size(left) for _ in made.hosts))
    return table


def _servers(made: Plan) -> Table:
    names = ("GPUs", "weights a GPU", "cache, tokens", "sequences together")
    table = _table("Engine and servers", "model", *names)
    for role in made.roles:
        cache = f"{role.cache_tokens:,}" if role.cache_tokens else "no room" if role.concurrent else "?"
        gpus = f"{role.gpus} (trainer's)" if role.is_colocated else str(role.gpus)
        table.add_row(escape(role.name), gpus, _size(role.weights), cache, f"{role.concurrent:,}")
    return table


def _teachers(made: Plan) -> Table:
    job = made.job
    table = _table("What a teacher tells about a token, bytes", "teacher", "carrier", "payload", "on the wire")
    for teacher, arch in zip(job.config.teachers, job.teachers, strict=True):
        sent = traffic.carrier_bytes(teacher, arch)
        carrier = f"{teacher.carrier} {teacher.top_k}" if teacher.carrier == "topk" else teacher.carrier
        on_wire = f"{sent:,.0f}" if sent else "?" if teacher.is_served else "0 (on the ranks)"
        table.add_row(escape(teacher.name), carrier, f"{traffic.payload_bytes(teacher, arch):,.0f}", on_wire)
    return table


def _traffic(made: Plan) -> Table:
    table = _table("Traffic of a step", "what", "over", "all together", "busiest sender")
    for flow in made.traffic:
        table.add_row(escape(flow.name), flow.path, _size(flow.total), _size(flow.a_rank))
    return table


def _time(made: Plan) -> Table:
    table = _table("A step", "stage", "seconds", "PFLOP", "GPUs", "GPUs to keep pace")
    for stage in made.estimate.stages:
        work = f"{stage.flops / 1e15:,.3g}" if stage.flops else "-"
        pace = "-" if stage.keeping_pace is None else str(stage.keeping_pace)
        table.add_row(escape(stage.name), seconds(stage.seconds), work, str(stage.gpus or "-"), pace)
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _size(size: float) -> str:
    if not size:
        return "-"
    for unit, one in (("GB", 1e9), ("MB", 1e6)):
        if size >= one:
            return f"{size / one:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def seconds(value: float) -> str:
    """For people."""
    if math.isinf(value):
        return "never"
    return f"{value:,.1f} s" if value >= 1 else f"{value * 1000:,.3g} ms"
