"""The loop: sample, score, step, sync. Every rank runs this file; only leaders own an engine.

    prompts -> engine.generate -> teachers score -> pack -> student.step -> engine.load -> evaluate, save, log
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import yaml
from safetensors import SafetensorError

from megatron_opd import config_file, run_dir
from megatron_opd.batching import pack
from megatron_opd.config import Config
from megatron_opd.data import PromptMix
from megatron_opd.evaluate import accuracies, count_right, greedy
from megatron_opd.objective import Objective
from megatron_opd.parallel import Parallel
from megatron_opd.preflight import Inputs, read_inputs
from megatron_opd.rollout import build_engine
from megatron_opd.student import groups, hf_dir
from megatron_opd.student.checkpoint import Checkpoints
from megatron_opd.student.student import Student
from megatron_opd.sync import sync
from megatron_opd.teachers import build_teachers
from megatron_opd.tokenizer import load_tokenizer
from megatron_opd.tracker import Tracker, build_tracker
from megatron_opd.types import MicroBatch, Rollout, Sampling, TeacherScore, TeacherScorer

_T = TypeVar("_T")


def train(config: Config) -> None:
    """Run the config to its last step on this rank, from the newest checkpoint of run.dir if there is one."""
    parallel = groups.start(config.parallel, config.run)
    inputs = parallel.share_world(lambda: read_inputs(config))
    with ExitStack() as opened:
        tracker = Tracker()

        def open_run_dir() -> None:
            nonlocal tracker
            opened.enter_context(run_dir.claimed(config.run.dir))
            tracker = opened.enter_context(build_tracker(config, is_main=True))

        parallel.share_world(open_run_dir)
        Run(config, parallel, inputs, tracker).to_the_end()
    groups.stop()  # a rank that fails does not wait for the others here


class Run:
    """The parts of a run on this rank, and the loop over them."""

    def __init__(self, config: Config, parallel: Parallel, inputs: Inputs, tracker: Tracker) -> None:
        self.config, self.parallel, self.inputs, self.tracker = config, parallel, inputs, tracker
        self.student = Student(config, parallel)
        vocab = self.student.vocab_shard(inputs.vocab_size)
        self.teachers = build_teachers(config, parallel, vocab)
        self.objective = Objective(
            config.loss,
            config.rollout.temperature,
            vocab,
            tuple(teacher.name for teacher in self.teachers),
            tuple(teacher.head_LD for teacher in self.teachers if teacher.head_LD is not None),
        )
        self.engine = None
        if parallel.is_leader:
            self.engine = build_engine(config, eos_ids=inputs.eos_ids, vocab_size=inputs.vocab_size)
            self.tokenizer = load_tokenizer(config.student.model)
        self.prompts = PromptMix(inputs.train, seed=config.run.seed)
        self.checkpoints = Checkpoints(config.run.dir, parallel, keep_last=config.train.keep_last)
        self.times: dict[str, float] = {}

    def to_the_end(self) -> None:
        step, num_steps = self._restore(), self.config.train.steps
        self._sync(version=step)
        if step == 0:
            self._evaluate(step)
        elif step >= num_steps:
            self.tracker.message(f"nothing to train: train.steps is {num_steps}; a larger one continues")
        while step < num_steps:
            metrics = self._step(step)
            step += 1
            self.tracker.log(metrics, step)
            if _due(step, self.config.train.eval_every, num_steps):
                self._evaluate(step)
            if _due(step, self.config.train.save_every, num_steps) or step == num_steps:
                loop = {"step": step, "version": step, "prompts": self.prompts.state()}
                path = self.checkpoints.save(self.student, loop)
                self.tracker.message(f"saved {path}")
        if self.config.train.export:
            self._export()
        self.tracker.message(f"done; for tables and a plot: megatron-opd report {self.config.run.dir}")

    def _step(self, step: int) -> dict[str, float]:
        """One turn of the loop: from prompts to new weights in the engine."""
        config, started = self.config, time.perf_counter()
        prompts = self._mine(self.prompts.next(config.rollout.prompts_per_step))
        sampling = Sampling(
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            samples_per_prompt=config.rollout.samples_per_prompt,
            seed=config.run.seed + step,
        )
        rollouts = self._timed("generate", lambda: self._generate(prompts, sampling))
        batches = self._timed("score", lambda: self._pack(rollouts))
        metrics = self._timed("step", lambda: self.student.step(batches, self.objective))
        self._timed("sync", lambda: self._sync(version=step + 1))
        seconds = time.perf_counter() - started
        return {
            **_derived(metrics),
            **self._rollout_metrics(rollouts, version=step),
            **{f"time/{stage}": t for stage, t in self.times.items()},
            "tokens_per_s": metrics["num_tokens"] / seconds,
        }

    def _generate(self, prompts: list[Any], sampling: Sampling) -> list[Rollout]:
        return self.parallel.share(lambda: self.engine.generate(prompts, sampling) if self.engine else [])

    def _pack(self, rollouts: list[Rollout]) -> list[MicroBatch]:
        """Micro-batches of rollouts with the scores of every teacher that has a weight for their source."""
        weights = [self.config.teacher_weights(r.prompt.source) for r in rollouts]
        scores = [_ask(teacher, rollouts, [w[n] > 0 for w in weights]) for n, teacher in enumerate(self.teachers)]
        return pack(
            rollouts,
            micro_batch_size=self.config.train.micro_batch_size,
            length_multiple=self.parallel.tensor_size if self.parallel.sequence else 1,
            device=groups.device(),
            scores=scores,
            weights=weights,
        )

    def _sync(self, *, version: int) -> None:
        sync(self.student.export(), self.engine, version=version)

    def _evaluate(self, step: int) -> None:
        """Greedy accuracy, and the divergence to the teachers on those held-out answers."""
        if not self.config.train.eval_every or not self.inputs.eval:
            return
        prompts = self._mine([p for _, source in self.inputs.eval for p in source])
        rollouts, counts = self.parallel.share(lambda: self._answer(prompts))
        metrics = accuracies(self.parallel.gather_leaders(counts), "eval/accuracy")
        held_out = self.student.evaluate(self._pack(rollouts) if rollouts else [], self.objective)
        metrics |= {f"eval/{name}": value for name, value in held_out.items() if name.startswith("kl/")}
        if step == 0 and self.config.train.eval_teachers:
            metrics |= self.parallel.share_world(self._teacher_accuracies)
        self.tracker.log(metrics, step)

    def _answer(self, prompts: list[Any]) -> tuple[list[Rollout], Any]:
        assert self.engine is not None
        rollouts = greedy(self.engine, prompts, max_new_tokens=self.config.rollout.max_new_tokens)
        return rollouts, count_right(rollouts, self.tokenizer)

    def _teacher_accuracies(self) -> dict[str, float]:
        from megatron_opd.rollout.local import LocalEngine

        prompts = [p for _, source in self.inputs.eval for p in source]
        metrics: dict[str, float] = {}
        for teacher in self.config.teachers:
            engine = LocalEngine(teacher.model, eos_ids=self.inputs.eos_ids, vocab_size=self.inputs.vocab_size)
            rollouts = greedy(engine, prompts, max_new_tokens=self.config.rollout.max_new_tokens)
            metrics |= accuracies([count_right(rollouts, self.tokenizer)], f"eval/teacher/{teacher.name}/accuracy")
        return metrics

    def _restore(self) -> int:
        loop = self.checkpoints.restore(self.student)
        changed = self.parallel.share_world(lambda: _write_config(self.config))
        if loop is None:
            self.tracker.rewind(-1)
            if changed is not None:
                self.tracker.message(f"no complete checkpoint in {self.config.run.dir}: starting from the beginning")
            return 0
        self.prompts.load_state(loop["prompts"])
        self.tracker.rewind(loop["step"])
        self.tracker.message(f"resuming after step {loop['step']}")
        for line in changed or []:
            self.tracker.message(f"changed since the last start: {line}")
        return int(loop["step"])

    def _export(self) -> None:
        out = Path(self.config.run.dir) / run_dir.HF_EXPORT
        weights = self.student.export()
        if self.parallel.is_main:
            try:
                hf_dir.write(weights, out, like=self.config.student.model)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"the export {out} could not be written: {error}; is the disk full?") from error
        else:
            sync(weights, None, version=0)
        self.tracker.message(f"exported {out}")

    def _mine(self, prompts: list[_T]) -> list[_T]:
        """This replica's share; strided, so that every replica sees every source."""
        return prompts[self.parallel.data_rank :: self.parallel.data_size]

    def _timed(self, stage: str, compute: Callable[[], _T]) -> _T:
        started = time.perf_counter()
        result = compute()
        self.times[stage] = time.perf_counter() - started
        return result

    def _rollout_metrics(self, rollouts: list[Rollout], *, version: int) -> dict[str, float]:
        """Means over the rollouts of all replicas, which have equally many."""
        mine = {
            "rollout/length": fmean(len(r.response_ids) for r in rollouts),
            "rollout/truncated_frac": fmean(r.finish == "length" for r in rollouts),
            "rollout/version_lag": fmean(version - v for r in rollouts for v in r.versions),
        }
        replicas = self.parallel.gather_leaders(mine)
        return {name: fmean(replica[name] for replica in replicas) for name in mine}


def _ask(teacher: TeacherScorer, rollouts: list[Rollout], wanted: list[bool]) -> list[TeacherScore | None]:
    """The teacher's scores of the wanted rollouts, None for the others."""
    scores = iter(teacher.score([r for r, want in zip(rollouts, wanted, strict=True) if want]))
    return [next(scores) if want else None for want in wanted]


def _derived(metrics: dict[str, float]) -> dict[str, float]:
    """The step's metrics with what follows from them."""
    student, teacher = metrics["logprob/student"], metrics["logprob/teacher"]
    return {
        **{name: value for name, value in metrics.items() if name != "num_tokens"},
        "logprob/gap": student - teacher,
        "perplexity/student": math.exp(-student),
        "perplexity/teacher": math.exp(min(-teacher, 700.0)),  # a teacher may rule a sampled token out
    }


def _write_config(config: Config) -> list[str] | None:
    """Write the resolved config; returns what is not as the last start of this run had it, None at the first start."""
    path = Path(config.run.dir) / run_dir.CONFIG
    before = yaml.safe_load(path.read_text()) if path.is_file() else None
    temporary = path.with_suffix(".tmp")
    temporary.write_text(config_file.dump(config))
    temporary.replace(path)
    return None if before is None else config_file.changes(before, config_file.to_dict(config))


def _due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)
