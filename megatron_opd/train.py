"""The loop: sample, score, step, sync. Every rank runs this file; only leaders own an engine.

    prompts -> engine.generate -> teachers score -> pack -> student.step -> engine.load -> evaluate, save, log

With `rollout.max_staleness` the first arrow runs ahead (`rollout/ahead.py`). When servers are lost for good, all ranks
learn of it together, save what is trained, and stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from safetensors import SafetensorError

from megatron_opd import colocated, fidelity, references, run_dir, serve, step_metrics
from megatron_opd.answers import Answers, build_answers
from megatron_opd.answers.emphasis import teacher_weights, weighted
from megatron_opd.batching import NoTeacherLeft, of_student, pack, renormalised
from megatron_opd.completions import Completions
from megatron_opd.config import Config
from megatron_opd.config import file as config_file
from megatron_opd.data import PromptMix
from megatron_opd.evaluate import Evaluator, means, teacher_accuracies
from megatron_opd.grading import Grader
from megatron_opd.objective import build_objective
from megatron_opd.parallel import Parallel, PeerError
from megatron_opd.precision.gate import Measured
from megatron_opd.preemption import Notice, Preempted
from megatron_opd.preflight import Inputs, read_inputs
from megatron_opd.rollout import build_engine
from megatron_opd.rollout.ahead import Ahead
from megatron_opd.sglang.errors import SGLangError
from megatron_opd.shaping import Shaping
from megatron_opd.student import adapter_dir, groups, hf_dir
from megatron_opd.student.checkpoint import Checkpoints
from megatron_opd.student.student import Student
from megatron_opd.sync import sync
from megatron_opd.teachers import ask_all, build_teachers
from megatron_opd.tokenizer import load_tokenizer
from megatron_opd.tracker import Tracker, build_tracker
from megatron_opd.types import MicroBatch, Prompt, Rollout, RolloutEngine, Sampling, TeacherScorer
from megatron_opd.updates import update
from megatron_opd.watchdog import Watch

_T = TypeVar("_T")


class ServersLost(ValueError):
    """No server is left that could do what the run needs; every rank raises it at the same place."""


def train(config: Config, notice: Notice) -> None:
    """Run the config to its last step on this rank, from the newest checkpoint of run.dir if there is one.

    Raises Preempted on all ranks, with everything saved, after one of them got notice to make room.
    """
    parallel = groups.start(config.parallel, config.run, stay_here=not serve.reaches_out(config))
    inputs = parallel.share_world(lambda: read_inputs(config))
    with ExitStack() as opened:
        tracker = Tracker()

        def open_run_dir() -> None:
            nonlocal tracker
            opened.enter_context(run_dir.claimed(config.run.dir))
            tracker = opened.enter_context(build_tracker(config, is_main=True))

        parallel.share_world(open_run_dir)
        for note in inputs.notes:
            tracker.message(note)
        logs = Path(config.run.dir) / run_dir.LOGS
        watch = opened.enter_context(Watch(logs, parallel.rank, config.run.timeout_s))
        run = Run(config, parallel, inputs, tracker)
        opened.callback(run.close)
        run.to_the_end(watch, notice)
    groups.stop()  # a rank that fails does not wait for the others here


class Run:
    """The parts of a run on this rank, and the loop over them."""

    def __init__(self, config: Config, parallel: Parallel, inputs: Inputs, tracker: Tracker) -> None:
        self.config, self.parallel, self.inputs, self.tracker = config, parallel, inputs, tracker
        served = parallel.share_world(lambda: serve.with_urls(config))
        colocated.clear_for_ranks(served, parallel)
        self.student = Student(config, parallel)
        vocab = self.student.vocab_shard(inputs.vocab_size)
        self.teachers = build_teachers(served, parallel, vocab)
        self.objective = build_objective(config, vocab, self.teachers, has_answers_of_others=config.answers.lmbda < 1)
        self.shaping = Shaping(config, parallel, self.objective.distillation)
        self.engine: RolloutEngine | None = None
        self.answers: Answers | None = None
        tokenizer = load_tokenizer(config.student.model) if parallel.is_leader else None
        if tokenizer is not None:
            ids = {"eos_ids": inputs.eos_ids, "vocab_size": inputs.vocab_size}
            self.engine = build_engine(served, parallel, **ids)
            self.answers = build_answers(served, self.engine, **ids)
            self.evaluator = Evaluator(config, tokenizer)
            self.grader = Grader(config.data.train if config.is_graded else [], config.rewards, tokenizer)
        self.completions = Completions(config.log, config.run.dir, parallel, tokenizer, tracker)
        self.prompts = PromptMix(inputs.train, seed=config.run.seed)
        self.checkpoints = Checkpoints(config.run.dir, parallel, keep_last=config.train.keep_last)
        self.times: dict[str, float] = {}
        self.trained = self.saved = self._restore()
        self.cursor = self.prompts.state()
        """Of the last batch that the student was trained on."""
        self.ahead = Ahead(
            self.prompts,
            self._sample if parallel.is_leader else None,
            num_prompts=config.rollout.prompts_per_step,
            max_staleness=config.rollout.max_staleness,
            num_steps=config.train.steps,
        )

    def close(self) -> None:
        """Ends what runs beside the loop."""
        self.ahead.close()
        for part in (self.engine, self.answers, *self.teachers):
            if part is not None:
                part.close()

    def to_the_end(self, watch: Watch, notice: Notice) -> None:
        """Every step that is left, then the export."""
        try:
            self._steps(watch, notice)
        except ServersLost as lost:
            self._save_the_rest()
            how = f"{lost}; {run_dir.how_to_continue(self.config.run.dir)}"
            raise ServersLost(how) if self.parallel.is_main else PeerError(how) from lost
        if self.config.train.export:
            self._export()
        self.tracker.message(f"done; for tables and a plot: megatron-opd report {self.config.run.dir}")

    def _steps(self, watch: Watch, notice: Notice) -> None:
        num_steps = self.config.train.steps
        self._sync()
        if self.trained == 0:
            if self.config.precision.fp8.is_on:
                fidelity.judge(self.measure_fp8(), self.config, self.parallel, self.tracker)
            self._evaluate()
        elif self.trained >= num_steps:
            self.tracker.message(f"nothing to train: train.steps is {num_steps}; a larger one continues")
        while self.trained < num_steps:
            watch.beat()
            if self.parallel.any_world(notice.asked):
                self._save_the_rest()
                raise Preempted(run_dir.how_to_continue(self.config.run.dir))
            self.tracker.log(self._step(), self.trained)
            if _due(self.trained, self.config.train.eval_every, num_steps):
                self._evaluate()
            if _due(self.trained, self.config.train.save_every, num_steps) or self.trained == num_steps:
                self._save()

    def _step(self) -> dict[str, float]:
        """One turn of the loop: from prompts to new weights in the engine."""
        config, step, started = self.config, self.trained, time.perf_counter()
        rollouts = self._timed("generate", lambda: self._on_servers(lambda: self._rollouts(step)))
        self._release()
        batches = self._timed("score", lambda: self._on_servers(lambda: self._pack(rollouts)))
        parts, shaped = self.shaping(rollouts, batches, step)
        metrics = self._timed("step", lambda: update(self.student, parts, self.objective, config.train))
        self.trained, self.cursor = step + 1, self.ahead.cursor
        if self.student.skipped:
            self.tracker.message(f"step {self.trained} skipped, weights unchanged: {self.student.skipped}")
        self.completions.log(rollouts, self.trained, batches, self.objective.distillation)
        if config.rollout.max_staleness and not config.rollout.partial:
            # Answers under way are not to change weights in their middle.
            self._timed("settle", lambda: self._on_servers(self.ahead.settle))
        self._timed("sync", self._sync)
        seconds = time.perf_counter() - started
        return {
            **step_metrics.derived(metrics),
            **shaped,
            **step_metrics.of_rollouts(rollouts, self.parallel, version=step, is_mixed=config.answers.lmbda < 1),
            **step_metrics.of_batches(batches, self.parallel),
            **step_metrics.of_parts([self.engine, self.answers, *self.teachers], self.parallel),
            **{f"time/{stage}": t for stage, t in self.times.items()},
            "tokens_per_s": metrics["num_tokens"] / seconds,
        }

    def _rollouts(self, step: int) -> list[Rollout]:
        return self.parallel.share(self.ahead.take(step))

    def _sample(self, step: int, prompts: list[Prompt]) -> list[Rollout]:
        """This replica's answers; each goes to the served teachers as soon as it is finished."""
        assert self.answers is not None
        rollout = self.config.rollout
        sampling = Sampling(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            samples_per_prompt=rollout.samples_per_prompt,
            seed=self.config.run.seed + step,
        )
        rollouts = self.answers.to(self._mine(prompts), sampling, step, on_finished=self._submit)
        if not self.config.is_graded:
            return rollouts
        return [replace(r, reward=x) for r, x in zip(rollouts, self.grader.grade(rollouts), strict=True)]

    def _submit(self, rollout: Rollout) -> None:
        weights = teacher_weights(self.config, rollout)
        for teacher, weight in zip(self.teachers, weights, strict=True):
            if weight > 0:
                teacher.submit(rollout)

    def _pack(self, rollouts: list[Rollout], teachers: Sequence[TeacherScorer] | None = None) -> list[MicroBatch]:
        """Micro-batches of rollouts with the scores of every teacher that has a weight for their source."""
        weights = [teacher_weights(self.config, r) for r in rollouts]
        scores = ask_all(self.teachers if teachers is None else teachers, rollouts, weights)
        batches = pack(
            rollouts,
            **of_student(self.config, self.parallel),
            device=groups.device(),
            scores=scores,
            weights=renormalised(rollouts, weights, scores),
        )
        return weighted(self.config, batches, rollouts)

    def _release(self) -> None:
        """Servers on our GPUs give their memory back until the next `_sync`; nobody samples any more."""
        if self.config.rollout.servers.colocated:
            self._timed("release", lambda: self._on_servers(lambda: colocated.release(self.engine)))

    def _sync(self) -> None:
        """The student's weights into the engine, which can sample then."""
        colocated.make_room(self.config, self.parallel)
        self._on_servers(lambda: sync(self.student.export(), self.engine, version=self.trained))

    def _on_servers(self, compute: Callable[[], _T]) -> _T:
        """`compute`, for which some ranks talk to servers. When those are lost on one rank, every rank raises
        ServersLost; so this is a barrier, and no rank waits for one that has stopped."""
        if not self.config.is_served:
            return compute()
        result, error = None, None
        try:
            result = compute()
        except Exception as caught:
            error = caught
        said = None if error is None else (isinstance(error, SGLangError | NoTeacherLeft), str(error))
        failures = [failure for failure in self.parallel.gather_world(said) if failure]
        if not failures:
            return cast(_T, result)
        is_lost, message = max(failures)
        if is_lost:
            raise ServersLost(message) from error
        raise error or PeerError(message)

    def _save(self) -> None:
        loop = {"step": self.trained, "version": self.trained, "prompts": self.cursor, "skips": self.student.skips}
        path = self.checkpoints.save(self.student, loop)
        self.saved = self.trained
        self.tracker.message(f"saved {path}")

    def _save_the_rest(self) -> None:
        if self.trained > self.saved:
            self._save()

    def _evaluate(self) -> None:
        """How good held-out answers are, and the divergence to the teachers on the greedy ones."""
        if not self.config.train.eval_every or not self.inputs.eval:
            return
        prompts = self._mine([p for _, source in self.inputs.eval for p in source])
        rollouts, totals = self._on_servers(lambda: self.parallel.share(lambda: self._answer(prompts)))
        metrics = means(self.parallel.gather_leaders(totals), "eval")
        self._release()
        batches = self._on_servers(lambda: self._pack(rollouts) if rollouts else [])
        held_out = self.student.evaluate(batches, self.objective)
        metrics |= {f"eval/{name}": value for name, value in held_out.items() if name.startswith("kl/")}
        metrics |= references.nll(
            self.student, self.objective.distillation.vocab, self.inputs.eval, self.config, self.parallel
        )
        if self.trained == 0 and self.config.train.eval_teachers:
            metrics |= self.parallel.share_world(lambda: teacher_accuracies(self.evaluator, self.inputs))
        self.tracker.log(metrics, self.trained)
        if self.config.rollout.servers.colocated:
            self._sync()

    def measure_fp8(self) -> Measured:
        """What FP8 does to this run, on answers to held-out prompts."""
        prompts = fidelity.held_out(self.inputs, self.config.precision.fp8.check_prompts)
        rollouts = self._on_servers(lambda: self.parallel.share(lambda: self._sample(0, prompts)))
        self._release()
        parts = self.config, self.student, self.teachers, self.objective
        measured = self._on_servers(lambda: fidelity.measure(*parts, rollouts, self._pack))
        if self.config.rollout.servers.colocated:
            self._sync()
        return measured

    def _answer(self, prompts: list[Any]) -> tuple[list[Rollout], Any]:
        assert self.engine is not None
        return self.evaluator.answer(self.engine, prompts, samples=self.config.train.eval_samples)

    def _restore(self) -> int:
        loop = self.checkpoints.restore(self.student)
        changed = self.parallel.share_world(
            lambda: config_file.record(self.config, Path(self.config.run.dir) / run_dir.CONFIG)
        )
        if loop is None:
            self.tracker.rewind(-1)
            self.completions.rewind(-1)
            if changed is not None:
                self.tracker.message(f"no complete checkpoint in {self.config.run.dir}: starting from the beginning")
            return 0
        self.prompts.load_state(loop["prompts"])
        self.student.skips = loop.get("skips", 0)  # checkpoints did not always have it
        self.tracker.rewind(loop["step"])
        self.completions.rewind(loop["step"])
        self.tracker.message(f"resuming after step {loop['step']}")
        for line in changed or []:
            self.tracker.message(f"changed since the last start: {line}")
        return int(loop["step"])

    def _export(self) -> None:
        out = Path(self.config.run.dir) / run_dir.HF_EXPORT
        weights, adapters = self.student.export(), self.student.export_adapters()
        if self.parallel.is_main:
            try:
                hf_dir.write(weights, out, like=self.config.student.model)
                if self.config.lora.rank:
                    base = self.config.student.model
                    adapter_dir.write(adapters, out.with_name(run_dir.ADAPTER), self.config.lora, base=base)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"the export {out} could not be written: {error}; is the disk full?") from error
        else:
            sync(weights, None, version=0)
            sync(adapters, None, version=0)
        self.tracker.message(f"exported {out}")

    def _mine(self, prompts: list[_T]) -> list[_T]:
        """This replica's share; strided, so that every replica sees every source."""
        return prompts[self.parallel.data_rank :: self.parallel.data_size]

    def _timed(self, stage: str, compute: Callable[[], _T]) -> _T:
        started = time.perf_counter()
        result = compute()
        self.times[stage] = time.perf_counter() - started
        return result


def _due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)
