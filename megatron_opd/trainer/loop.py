"""The loop: sample, score, update, sync, evaluate, save. Every rank runs it; only leaders own an engine.

    prompts -> engine.generate -> teachers score -> pack -> student.step -> engine.load -> evaluate, save, log

With `rollout.max_staleness` the first arrow runs ahead (`rollout/ahead.py`). When servers are lost for good, all ranks
learn of it together, save what is trained, and stop.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

from megatron_opd.config import Config, TeacherConfig
from megatron_opd.config.file import to_dict
from megatron_opd.core import process_memory, run_dir
from megatron_opd.core.parallel import Parallel, PeerError
from megatron_opd.core.preemption import Notice, Preempted
from megatron_opd.core.types import MicroBatch, Rollout
from megatron_opd.core.watchdog import Watch
from megatron_opd.models import hub
from megatron_opd.prompts.mix import PromptMix
from megatron_opd.rollout import colocated
from megatron_opd.sglang import nccl, serve
from megatron_opd.student import groups
from megatron_opd.student.student import Student
from megatron_opd.teachers import build_teachers
from megatron_opd.tracking import train_log
from megatron_opd.tracking.phase import Phase
from megatron_opd.tracking.tracker import METRICS_FILE, Tracker, build_tracker, read_metrics
from megatron_opd.trainer import conditions, fp8_fidelity, loss_backend, model_places, shaping_metrics, step_metrics
from megatron_opd.trainer.alarms import Watchman, alarms_of
from megatron_opd.trainer.build_objective import build_objective
from megatron_opd.trainer.completions import Completions
from megatron_opd.trainer.episode_metrics import EpisodeWatch
from megatron_opd.trainer.experience import Experience, build_leader
from megatron_opd.trainer.goals import Goals
from megatron_opd.trainer.held_out import HeldOut
from megatron_opd.trainer.other_data import check_newest
from megatron_opd.trainer.preflight import Inputs, read_inputs
from megatron_opd.trainer.run_record import RunRecord
from megatron_opd.trainer.saving import Saving
from megatron_opd.trainer.shaping import Shaping, is_shaped
from megatron_opd.trainer.stopwatch import Stopwatch
from megatron_opd.trainer.together import ServersLost
from megatron_opd.trainer.updates import split, update

_AS_WRITTEN: Mapping[str, str] = {}
"""Models that are all where the config says."""


def train(config: Config, notice: Notice) -> None:
    """Run the config to its last step on this rank, from the newest checkpoint of run.dir if there is one.

    Raises Preempted on all ranks, with everything saved, after one of them got notice to make room.
    """
    if serve.has_nccl_group(config.rollout):
        nccl.settle()
    parallel = groups.start(config.parallel, config.run, stay_here=not serve.reaches_out(config.rollout, config.run))
    say = partial(train_log.say_early, config.run.dir)
    asks = config.train.eval_teachers or config.train.eval_agreement
    needs = hub.needs(config.student, config.teachers, starts_servers=False, asks_teachers=asks)
    places = model_places.settle(needs, config.model_settings, parallel, say=say)
    if parallel.is_main:
        say("reading the models' configs, tokenizers and prompts")
    inputs = parallel.share_world(
        lambda: read_inputs(config.with_models(places), rows_to_try=0)
    )  # the launcher has tried them
    if config.data.on_change == "error":
        parallel.share_world(lambda: check_newest(config.run.dir, inputs.data))
    with ExitStack() as opened:
        tracker = Tracker()

        def open_run_dir() -> None:
            nonlocal tracker
            opened.enter_context(run_dir.claimed(config.run.dir))
            directory, steps = Path(config.run.dir), config.train.steps
            made = build_tracker(config.log, directory, num_steps=steps, settings=to_dict(config))
            tracker = opened.enter_context(made)

        parallel.share_world(open_run_dir)
        for note in inputs.notes:
            tracker.message(note)
        logs = Path(config.run.dir) / run_dir.LOGS
        watch = opened.enter_context(Watch(logs, parallel.rank, config.run.timeout_s))
        run = Run(config, parallel, inputs, tracker, places)
        opened.callback(run.close)
        run.to_the_end(watch, notice)
    groups.stop()  # a rank that fails does not wait for the others here


class Run:
    """The parts of a run on this rank, and the loop over them."""

    def __init__(
        self,
        config: Config,
        parallel: Parallel,
        inputs: Inputs,
        tracker: Tracker,
        places: Mapping[str, str] = _AS_WRITTEN,
    ) -> None:
        """`places` has the directories of models that the config names as a hub does."""
        self.config, self.parallel, self.inputs, self.tracker = config, parallel, inputs, tracker
        backend = loss_backend.settle(config.loss, config.student, config.teachers, parallel)
        if backend.note:
            tracker.message(f"warning: the loss runs on the backend {backend.name}: {backend.note}")
        loss = dataclasses.replace(config.loss, backend=backend.name or config.loss.backend)
        config = dataclasses.replace(config.with_models(places), loss=loss)  # self.config stays as it was written
        with tracker.phase("looking for the servers", is_told=config.is_served):
            served = parallel.share_world(lambda: serve.with_urls(config))
            colocated.clear_for_ranks(served.rollout, parallel)
        with tracker.phase(f"loading the student {hub.shown(config.student.model)}"):
            self.student = Student(config, parallel)
        vocab = self.student.vocab_shard(inputs.vocab_size)
        teachers = build_teachers(served, parallel, vocab, loading=self._loading)
        self.objective = build_objective(config, vocab, teachers, has_answers_of_others=config.answers.lmbda < 1)
        shaped = is_shaped(config.loss, config.policy, config.rl)
        self.shaping = Shaping(config, parallel, self.objective.distillation) if shaped else None
        with tracker.phase(f"starting who answers: rollout.engine {config.rollout.engine}"):
            leader = build_leader(config, served, parallel, inputs)
        self.experience = Experience(config, parallel, teachers, leader)
        self.held_out = HeldOut(config.train, config.loss, config.teachers, inputs, self.experience, tracker)
        tokenizer, has_turns = leader and leader.tokenizer, config.plays_episodes
        self.completions = Completions(config.log, config.run.dir, parallel, tokenizer, tracker, has_turns=has_turns)
        found = conditions.measure(backend, parallel, config.student, config.teachers)
        record = RunRecord(inputs.data, found, config.data.on_change)
        self.saving = Saving(config.run, parallel, self.student, tracker, record=record, train=config.train)
        self.timed, self.kept = Stopwatch(), process_memory.Kept()
        self.watchman = Watchman(alarms_of(config.rl, config.rollout))
        self.episodes = EpisodeWatch(parallel, tracker, is_on=has_turns, has_rewards=config.rewards_turns)
        tracker.show([*self.objective.headlines(), *step_metrics.headlines(config.rl), *self.episodes.headlines()])
        prompts = PromptMix(inputs.train, seed=config.run.seed)
        with tracker.phase("looking for a checkpoint to continue from"):
            self.trained = self.saving.restore(prompts, self.completions, to_dict(self.config))
        self.cursor = prompts.state()
        """Place in the prompts behind the last batch that the student was trained on."""
        self.began_at = self.trained
        """Steps that were done before this process."""
        self.evaluated = 0
        """The step after which this process evaluated last."""
        self.goals = Goals(config.train)
        if self.goals and self.trained:
            rows = Path(config.run.dir) / METRICS_FILE
            parallel.share_world(lambda: self.goals.read(read_metrics(rows)))
        self.experience.start(prompts)

    def _loading(self, teacher: TeacherConfig) -> AbstractContextManager[Phase]:
        how = "connecting to the servers of" if teacher.is_served else "loading"
        return self.tracker.phase(f"{how} teacher {teacher.name} {hub.shown(teacher.model)}")

    def close(self) -> None:
        """End what runs beside the loop."""
        self.experience.close()

    def to_the_end(self, watch: Watch, notice: Notice) -> None:
        """Every step that is left, then the export."""
        try:
            self._steps(watch, notice)
        except ServersLost as lost:
            self._save()
            how = f"{lost}; {run_dir.how_to_continue(self.config.run.dir)}"
            raise ServersLost(how) if self.parallel.is_main else PeerError(how) from lost
        if self.config.train.export:
            with self.tracker.phase("exporting the student as a Hugging Face directory"):
                self.saving.export()
        self.tracker.message(f"done; for tables and a plot: megatron-opd report {self.config.run.dir}")

    def _steps(self, watch: Watch, notice: Notice) -> None:
        train = self.config.train
        with self.tracker.phase("handing the weights to the engine"):
            self.sync()
        if self.trained == 0:
            if self.config.precision.fp8.is_on:
                fp8_fidelity.judge(self.measure_fp8(), self.config.precision.fp8, self.parallel, self.tracker)
            self._evaluate()
        elif self.trained >= train.steps:
            self.tracker.message(f"nothing to train: train.steps is {train.steps}; a larger one continues")
        self.tracker.begin(self.trained)
        while self.trained < train.steps and not self._is_enough():
            watch.beat()
            if self.parallel.any_world(notice.asked):
                self._save()
                raise Preempted(run_dir.how_to_continue(self.config.run.dir))
            self._tell(self.step())
            self.kept.bound(process_memory.resident())
            if _due(self.trained, train.eval_every, train.steps):
                self._evaluate()
            if _due(self.trained, train.save_every, train.steps) or self.trained == train.steps:
                self._save()
        if self.began_at < self.trained < train.steps:
            if train.eval_every and self.evaluated < self.trained:
                self._evaluate()
            self._save()

    def _is_enough(self) -> bool:
        """Whether a condition of train.stop_when holds, which is then said. Collective."""
        if not self.goals.conditions:
            return False
        if reached := self.parallel.share_world(self.goals.reached):
            done = f"{self.trained} of {self.config.train.steps} steps"
            self.tracker.message(f"the run ends after {done}: train.stop_when: {reached}")
        return bool(reached)

    def _tell(self, row: dict[str, float]) -> None:
        """The metrics of a step, and what they warn of."""
        self.tracker.log(row, self.trained)
        is_first = self.trained == self.began_at + 1
        for line in (*self.watchman.look(row), *self.goals.feed(row, self.trained, is_first=is_first)):
            self.tracker.message(line)

    @contextmanager
    def _stage(self, stage: str, what: str, *, total: int = 0, unit: str = "") -> Iterator[Phase]:
        """A timed part of a step. Only the first step of a process tells of it, unless it takes long."""
        is_first = self.trained == self.began_at
        phase = self.tracker.phase(f"step {self.trained + 1}: {what}", total=total, unit=unit, is_told=is_first)
        with phase as shown, self.timed(stage):
            yield shown

    def _sample(self, step: int) -> list[Rollout]:
        rollout, experience = self.config.rollout, self.experience
        total = rollout.prompts_per_step * rollout.samples_per_prompt // self.parallel.data_size
        with (
            self._stage("generate", "sampling", total=total, unit="answers") as phase,
            experience.together(),
            experience.finished.told_to(phase, step),
        ):
            return experience.sample(step)

    def step(self) -> dict[str, float]:
        """One turn of the loop: from prompts to new weights in the engine."""
        step, started, together = self.trained, time.perf_counter(), self.experience.together
        rollouts = self._sample(step)
        if self.experience.shares_gpus:
            with self.timed("release"):
                self.experience.release()
        what = "scoring by the teachers" if self.experience.teachers else "packing the answers"
        with self._stage("score", what), together():
            batches = self.experience.score(rollouts)
        parts, shaped = split(batches, self.config.train.minibatches), {}
        if self.shaping is not None:
            parts, shaped = self.shaping(rollouts, parts, step)
        term, scored = self.objective.distillation, [batch for part in parts for batch in part]
        self.completions.look(self.student, term, rollouts=rollouts, batches=scored, step=step + 1)
        total = len(batches) * self.config.train.epochs
        with self._stage("step", "updating the student", total=total, unit="micro-batches") as phase:
            metrics = update(self.student, parts, self.objective, self.config.train, told=phase.advance)
        self.trained, self.cursor = step + 1, self.experience.cursor
        if self.student.skipped:
            self.tracker.message(f"step {self.trained} skipped, weights unchanged: {self.student.skipped}")
        self.completions.log(rollouts, self.trained, batches, term)
        self._settle()
        try:
            what = f"step {self.trained}: handing the new weights to the engine"
            with self.tracker.phase(what, is_told=False), self.timed("sync"):
                self.sync()
        except ServersLost:  # the step is trained all the same, and the checkpoint that follows goes on behind it
            self.tracker.log(self._row({**metrics, **shaped}, rollouts, batches, started), self.trained)
            raise
        return self._row({**metrics, **shaped}, rollouts, batches, started)

    def _row(
        self, metrics: dict[str, float], rollouts: list[Rollout], batches: list[MicroBatch], started: float
    ) -> dict[str, float]:
        """All metrics of the step that was trained last, which `started` then. Collective."""
        seconds = time.perf_counter() - started
        measured = self._measured(rollouts, batches, self.trained - 1)
        return {**step_metrics.derived(metrics), **measured, "tokens_per_s": metrics["num_tokens"] / seconds}

    def _measured(self, rollouts: list[Rollout], batches: list[MicroBatch], step: int) -> dict[str, float]:
        """The step's metrics besides the objective's. Collective."""
        is_mixed = self.config.answers.lmbda < 1
        grading = self._grading(step) if self.config.has_rewards else {}
        if self.shaping is None and self.config.has_rewards:
            grading |= shaping_metrics.of_rewards(rollouts, self.config.data.train, self.parallel)
        return {
            **step_metrics.of_rollouts(rollouts, self.parallel, version=step, is_mixed=is_mixed),
            **self.episodes.look(rollouts),
            **grading,
            **step_metrics.of_batches(batches, self.parallel),
            **step_metrics.of_parts(self.experience.parts, self.parallel),
            **step_metrics.of_memory(self.parallel),
            **{f"time/{stage}": seconds for stage, seconds in self.timed.times.items()},
        }

    def _grading(self, step: int) -> dict[str, float]:
        """The seconds of the replica that graded longest; says what went wrong in any of them. Collective."""
        everyone = self.parallel.gather_leaders(self.experience.grading(step))
        for line in dict.fromkeys(line for _, news in everyone for line in news):
            self.tracker.message(line)
        return {"time/grade": max(seconds for seconds, _ in everyone)}

    def _settle(self) -> None:
        """Answers under way are not to change weights in their middle."""
        if self.config.rollout.max_staleness and not self.config.rollout.partial:
            with self.timed("settle"):
                self.experience.settle()

    def sync(self) -> None:
        """New weights into the engines. Collective."""
        self.experience.sync(self.student, self.trained)

    def _evaluate(self) -> None:
        metrics = self.held_out.evaluate(self.student, self.objective, self.trained)
        if metrics:
            self.evaluated = self.trained
            self.tracker.log(metrics, self.trained)
            for line in self.goals.feed(metrics, self.trained, is_first=self.trained == 0):
                self.tracker.message(line)
            self._keep_if_best()
            self._back_to_sampling()

    def _keep_if_best(self) -> None:
        """Export the student where train.save_best asks for it and it is better than ever. Collective."""
        if not (self.goals.best_of and self.parallel.share_world(lambda: self.goals.is_best(self.trained))):
            return
        with self.tracker.phase(f"exporting the best student so far, by {self.goals.best_of}"):
            self.saving.export(run_dir.BEST, run_dir.BEST_ADAPTER)
        self.parallel.share_world(lambda: self.goals.record_best(Path(self.config.run.dir), self.trained))

    def measure_fp8(self) -> fp8_fidelity.Measured:
        """The size of FP8's errors in this run, on answers to held-out prompts."""
        measured = fp8_fidelity.measure_held_out(self.experience, self.student, self.objective, self.inputs)
        self._back_to_sampling()
        return measured

    def _back_to_sampling(self) -> None:
        """An engine that has given its memory back gets it and the weights again."""
        if self.experience.shares_gpus:
            self.sync()

    def _save(self) -> None:
        is_told = self.trained > self.saving.saved  # a run that has to stop may have just saved
        with self.tracker.phase(f"saving after step {self.trained}", is_told=is_told):
            self.saving.save(self.trained, self.cursor)


def _due(step: int, every: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)
