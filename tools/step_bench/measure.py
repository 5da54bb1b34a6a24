"""One case on one rank: the run's own loop, with a clock."""

from __future__ import annotations

import platform
import resource
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from step_bench.cases import Case
from step_bench.traffic import Traffic

from megatron_opd.sglang import serve
from megatron_opd.student import cpu, groups
from megatron_opd.trainer.preflight import read_inputs


def measure(case: Case) -> dict[str, Any]:
    """What came out, on every rank: lists have a number a repeat."""
    cpu.enable()
    from megatron_opd.tracking.tracker import Tracker
    from megatron_opd.trainer.loop import Run

    config = case.config()
    parallel = groups.start(config.parallel, config.run, stay_here=not serve.reaches_out(config.rollout, config.run))
    inputs = parallel.share_world(lambda: read_inputs(config))
    parallel.share_world(lambda: Path(config.run.dir).mkdir(parents=True, exist_ok=True))
    run = Run(config, parallel, inputs, Tracker())
    try:
        sampling = _watch(run.experience.leader.engine if run.experience.leader else None)
        run.sync()
        for _ in range(case.warmup):
            run.step()
        with Traffic() as traffic:
            run.step()
        repeats = [_repeat(run, sampling, case.steps) for _ in range(case.repeats)]
        mine = dict(traffic.bytes), _resident()
        everyone = parallel.gather_world(mine)
    finally:
        run.close()
    groups.stop()
    found = {key: [repeat[key] for repeat in repeats] for key in repeats[0]}
    on_gpu = max(found.pop("gpu_bytes"))
    return {
        "name": case.name,
        **{key: getattr(case, key) for key in ("tensor", "pipeline", "data", "context", "teachers", "ranks", "weak")},
        "prompts_per_step": config.rollout.prompts_per_step,
        "about": _about(),
        **found,
        "bytes": dict(sum((Counter(sent) for sent, _ in everyone), Counter())),
        "peak_bytes": on_gpu or max(peak for _, peak in everyone),
        "mfu": _mfu(case, found) if case.gpu else None,
    }


class _Sampling:
    """Seconds that this rank's engine has sampled, whoever waited for it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def _watch(engine: Any) -> _Sampling:
    watched = _Sampling()
    if engine is not None:
        generate = engine.generate

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return generate(*args, **kwargs)
            finally:
                watched.seconds += time.perf_counter() - started

        engine.generate = timed
    return watched


def _repeat(run: Any, sampling: _Sampling, steps: int) -> dict[str, Any]:
    """Means over some steps. `hidden` is the share of the sampling that nobody waited for."""
    sampling.take()
    started, stages, tokens, lengths, on_gpu = time.perf_counter(), Counter[str](), 0.0, 0.0, 0.0
    for _ in range(steps):
        begun = time.perf_counter()
        metrics = run.step()
        tokens += metrics["tokens_per_s"] * (time.perf_counter() - begun)
        lengths += metrics["rollout/length"]
        on_gpu = max(on_gpu, metrics.get("memory/gpu", 0.0))
        stages.update({name[5:]: value for name, value in metrics.items() if name.startswith("time/")})
    seconds = time.perf_counter() - started
    busy = max(run.parallel.gather_leaders(sampling.take()))
    return {
        "step_s": seconds / steps,
        "tokens_per_s": tokens / seconds,
        "response_tokens": lengths / steps,
        "stages": {name: value / steps for name, value in stages.items()},
        "sampling_s": busy / steps,
        "hidden": max(1 - stages["generate"] / busy, 0.0) if busy else None,
        "gpu_bytes": round(1e9 * on_gpu),
    }


def _resident() -> int:
    """Bytes of this process since the start."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _mfu(case: Case, found: dict[str, list[Any]]) -> list[float]:
    """FLOPs that the model needs in forward and backward passes, of those that the GPUs could have done meanwhile."""
    from megatron_opd.planner import flops
    from megatron_opd.planner.job import build

    config = case.config()
    made = []
    for stages, response in zip(found["stages"], found["response_tokens"], strict=True):
        job = build(config, gpu=case.gpu, response=response)
        able = stages["step"] * case.ranks * job.gpu.flops(config.student.dtype)
        made.append(flops.model_training(job) / able)
    return made


def _about() -> dict[str, str]:
    """Where and of what."""
    here = Path(__file__).parent
    asked = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False, timeout=30
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"commit": asked.stdout.strip() or "unknown", "device": device, "torch": torch.__version__}
