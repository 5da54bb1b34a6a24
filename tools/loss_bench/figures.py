"""The figures that are promised, each measured here and held against its goal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from loss_bench import accuracy, measure, methods
from loss_bench.methods import Shape

_BETAS = {"forward KL": 0.0, "JSD": 0.5, "reverse KL": 1.0}
_MEMORY_TIMEOUT_S = 600


@dataclass
class Figure:
    """One line of the table."""

    name: str
    goal: float
    value: float
    at_least: bool = False
    """Whether the goal is a lower bound; else an upper one."""
    unit: str = ""
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def is_met(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def on_cpu(rounds: int, peers: set[str]) -> Iterator[Figure]:
    """The figures of one thread, V = 32,768."""
    yield from _accuracy("cpu", (1, 2, 4))
    yield from _against_gkd([Shape(tokens, 32768) for tokens in (128, 512)], rounds, peers)
    yield from _memory_of_logits(512)
    yield from _linear(Shape(512, 32768), rounds, peers)
    yield from _memory_of_linear(peers)
    yield from _added_teachers([Shape(tokens, 32768) for tokens in (128, 512)], rounds)


def on_gpu(rounds: int, peers: set[str]) -> Iterator[Figure]:
    """The figures of one GPU, T = 8,192, V = 151,936, bf16; the goals are those for an H100."""
    yield from _accuracy("cuda", (1,))
    shape = Shape(8192, 151936, dtype="bfloat16", device="cuda", d_student=4096, d_teacher=4096)
    for name, goal, changes in (
        ("forward KL", 4.5, {}), ("reverse KL", 4.5, {"beta": 1.0}), ("JSD", 7.8, {"beta": 0.5}),
        ("KL, 4 teachers", 12.0, {"num_teachers": 4}),
    ):  # fmt: skip
        found = measure.times({"ours": methods.logits_call("ours", replace(shape, **changes))}, rounds)
        yield Figure(f"logits, {name}", goal, found.best()["ours"]["cuda_ms"], unit="ms", detail=found.best())
    call = methods.linear_call("ours", shape)
    products = methods.linear_call("bare products", shape)
    found = measure.times({"ours": call, "bare products": products}, rounds).best()
    yield Figure("hidden states, forward KL", 67.0, found["ours"]["cuda_ms"], unit="ms", detail=found)
    extra = measure.peak_extra(call, "cuda") - shape.vocabulary * shape.d_student * (4 + 2)
    yield Figure("hidden states, peak beyond the head's gradient", 1.0, extra / 1e9, unit="GB")
    if "TRL chunked" in peers:
        for name, beta, goal in (("KL", 0.0, 1.4), ("JSD", 0.5, 1.8)):
            pair = {m: methods.linear_call(m, replace(shape, beta=beta)) for m in ("ours", "TRL chunked")}
            found = measure.times(pair, rounds)
            value = found.ratio("TRL chunked", "ours", "cuda_ms")
            yield Figure(f"hidden states, {name}: faster than TRL chunked", goal, value, True, "x", found.best())


def extra_bytes(form: str, method: str, shape: Shape) -> int:
    """Peak memory of a call in a process of its own."""
    request = json.dumps({"form": form, "method": method, "shape": asdict(shape)})
    command = [sys.executable, str(Path(__file__).parents[1] / "bench_loss.py"), "--memory", request]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_MEMORY_TIMEOUT_S)
    if done.returncode:
        raise ValueError(f"measuring the memory of {method} failed: {done.stderr[-500:]}")
    return int(done.stdout.split()[-1])


def answer_memory(request: str) -> int:
    """What `extra_bytes` asks: the second call's peak, so that libraries and kernels are there."""
    asked = json.loads(request)
    make: Callable[[str, Shape], Any] = {"logits": methods.logits_call, "linear": methods.linear_call}[asked["form"]]
    shape = Shape(**asked["shape"])
    prepare, work = make(asked["method"], replace(shape, tokens=16))
    work(prepare())
    return measure.peak_extra(make(asked["method"], shape), shape.device)


def _accuracy(device: str, shards: tuple[int, ...]) -> Iterator[Figure]:
    found = {n: accuracy.worst(device, n) for n in shards}
    where = "TP " + "/".join(map(str, shards))
    for what, goal in (("float32", 2e-6), ("bfloat16", 2.2e-3)):
        value = max(f["errors"][what] for f in found.values())
        yield Figure(f"gradient vs float64, {what}, {where}", goal, value, detail={str(n): f for n, f in found.items()})
    value = max(f["errors"]["over rounding"] for f in found.values())
    yield Figure(f"the same in bfloat16 / rounding of the exact gradient, {where}", 1.01, value, unit="x")
    yield Figure(f"loss vs float64, {where}", 1e-5, max(f["errors"]["loss"] for f in found.values()))
    for n, f in found.items():
        for kind, goal in (("KL", 1), ("JSD or probabilities", 2)) if n > 1 else ():
            yield Figure(f"collectives forward, {kind}, TP {n}", goal, f["collectives"][kind][0])
            yield Figure(f"collectives backward, {kind}, TP {n}", 0, f["collectives"][kind][1])


def _against_gkd(shapes: list[Shape], rounds: int, peers: set[str]) -> Iterator[Figure]:
    names = [m for m in ("ours", "plain", "TRL GKD") if m in peers]
    for shape in shapes:
        for loss, beta in _BETAS.items():
            found = measure.times({m: methods.logits_call(m, replace(shape, beta=beta)) for m in names}, rounds)
            for method in names[1:]:
                goal = (3.0 if loss != "JSD" else 6.0) if method == "TRL GKD" else 1.0
                ratio, name = found.ratio(method, "ours"), f"logits, {loss}, T={shape.tokens}: faster than {method}"
                yield Figure(name, goal, ratio, True, "x", found.best())


def _memory_of_logits(tokens: int) -> Iterator[Figure]:
    """In units of one bf16 [T, V] tensor."""
    for loss, beta in _BETAS.items():
        shape = Shape(tokens, 32768, dtype="bfloat16", beta=beta)
        value = extra_bytes("logits", "ours", shape) / (2 * tokens * 32768)
        yield Figure(f"logits, {loss}: extra peak memory / [T, V] in bf16", 0.10, value)


def _linear(shape: Shape, rounds: int, peers: set[str]) -> Iterator[Figure]:
    names = [m for m in ("ours", "plain", "TRL chunked", "Liger", "Liger compiled", "bare products") if m in peers]
    for loss, beta in _BETAS.items():
        all_of = replace(shape, beta=beta)
        found = measure.times({m: methods.linear_call(m, all_of) for m in names}, rounds)
        value = found.ratio("ours", "bare products")
        yield Figure(f"hidden states, {loss}: time / bare products", 1.25, value, unit="x", detail=found.best())
        if "TRL chunked" in names:
            value = found.ratio("TRL chunked", "ours")
            yield Figure(f"hidden states, {loss}: faster than TRL chunked", 2.0, value, True, "x", found.best())
        half = replace(all_of, masked=True)
        found = measure.times({m: methods.linear_call(m, half) for m in names if m != "bare products"}, rounds)
        for method in [m for m in names if m.startswith("Liger")]:
            name = f"hidden states, {loss}, half masked: faster than {method}"
            yield Figure(name, 1.5, found.ratio(method, "ours"), True, "x", found.best())


def _memory_of_linear(peers: set[str]) -> Iterator[Figure]:
    if "Liger" not in peers:
        return
    for loss, beta in _BETAS.items():
        shape = Shape(2048, 32768, beta=beta)
        found = {m: extra_bytes("linear", m, shape) for m in ("ours", "Liger")}
        value = found["Liger"] / found["ours"]
        yield Figure(f"hidden states, {loss}, T=2048: less peak memory than Liger", 10.0, value, True, "x", found)


def _added_teachers(shapes: list[Shape], rounds: int) -> Iterator[Figure]:
    """Time of each teacher beyond the first, of four, over that of one."""
    for shape in shapes:
        for ensemble, goal in (("logits", 20.0), ("probs", 60.0)):
            for loss, beta in _BETAS.items():
                one = replace(shape, beta=beta, ensemble=ensemble)
                calls = {
                    "one": methods.logits_call("ours", one),
                    "four": methods.logits_call("ours", replace(one, num_teachers=4)),
                }
                found = measure.times(calls, rounds)
                value = 100 * (found.ratio("four", "one") - 1) / 3
                name = f"{ensemble}, {loss}, T={shape.tokens}: each added teacher"
                yield Figure(name, goal, value, unit="%", detail=found.best())
