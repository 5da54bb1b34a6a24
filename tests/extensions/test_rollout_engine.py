"""A rollout engine of one's own: three files, tests and docs apart.

rollout/parrot_engine.py         the engine: `Parrot` below
rollout/engines.py               a line of BUILDERS
config/rollout_engines.py        its name and a line of ENGINES: what it needs and can do
"""

from dataclasses import replace

import tiny
import torch

from megatron_opd import config as c
from megatron_opd.config.checks_serving import check_serving
from megatron_opd.config.rollout_engines import ENGINES, EngineTraits
from megatron_opd.core.types import Prompt, Rollout
from megatron_opd.prompts.mix import PromptMix
from megatron_opd.rollout.engines import BUILDERS
from megatron_opd.trainer import step_metrics
from megatron_opd.trainer.experience import Experience, build_leader
from megatron_opd.trainer.preflight import Inputs

STUDENT = "examples/quickstart/models/student"
PROMPTS = [Prompt(source="a", index=i, text="", token_ids=(3 + i, 4, 5)) for i in range(4)]
TRAITS = EngineTraits(shares_gpus=True, takes=("max_staleness",))


class Parrot:
    """Repeats the prompt, as long as it has its weights."""

    def __init__(self, inputs):
        self.eos, self.version, self.log = inputs.eos_ids[0], None, []

    def generate(self, prompts, sampling, on_finished=None):
        assert self.version is not None, "there are no weights"
        self.log.append("generate")
        made = [self._answer(p, s) for p in prompts for s in range(sampling.samples_per_prompt)]
        for rollout in made:
            on_finished(rollout)
        return made

    def _answer(self, prompt, sample):
        ids = (*prompt.token_ids, self.eos)
        return Rollout(
            prompt=prompt, sample=sample, token_ids=ids, learnt=(True,) * len(ids), logps=(0.0,) * len(ids),
            finish="stop", versions=(self.version,) * len(ids),
        )  # fmt: skip

    def load(self, weights, version):
        self.log.append(f"load {[name for name, _ in weights]}")
        self.version = version

    def release(self):
        self.log.append("release")
        self.version = None

    def metrics(self):
        return {"rollout/calls": float(len(self.log))}

    def close(self):
        self.log.append("close")


class Student:
    """Exports one weight, in a collective that hangs where a rank stays away."""

    def __init__(self, parallel):
        self.parallel = parallel

    def export(self):
        yield "w", torch.tensor(float(self.parallel.any_world(True)))


def settings(**rollout):
    made = tiny.config(STUDENT, [], rollout={"engine": "parrot", "prompts_per_step": 2, **rollout})
    return replace(made, data=c.DataConfig(train=[c.SourceConfig(name="a", path="")]))


def two_steps(parallel):
    """(answers of two steps, metrics, what the leader's engine was asked for) of a rank."""
    ENGINES["parrot"], BUILDERS["parrot"] = TRAITS, Parrot
    try:
        config = settings()
        inputs = Inputs(train=[], eval=[], eos_ids=(2,), vocab_size=32)
        leader = build_leader(config, config, parallel, inputs)
        experience = Experience(config, parallel, [], leader)
        experience.start(PromptMix([(config.data.train[0], PROMPTS)], seed=1))
        answers = []
        for step in range(2):
            experience.sync(Student(parallel), step)
            answers.append(experience.sample(step))
            experience.release()
        metrics = step_metrics.of_parts(experience.parts, parallel)
        experience.close()
        return answers, metrics, leader and leader.engine.log
    finally:
        del ENGINES["parrot"], BUILDERS["parrot"]


def test_it_answers_in_the_loop_and_gives_its_memory_back(ranks):
    leader, peer = ranks.run(2, two_steps)
    answers, metrics, log = leader
    assert peer == (answers, metrics, None)
    for version, rollouts in enumerate(answers):
        assert [r.token_ids for r in rollouts] == [(*r.prompt.token_ids, 2) for r in rollouts]
        assert [set(r.versions) for r in rollouts] == [{version}] * 2
    step = ["load ['w']", "generate", "release"]
    assert log == [*step, *step, "close"]
    assert metrics == {"rollout/calls": 6.0}


def problems_of(made):
    return check_serving(made.rollout, made.teachers, made.loss, made.parallel)


def test_settings_that_it_has_no_use_for_are_refused(monkeypatch):
    monkeypatch.setitem(ENGINES, "parrot", TRAITS)
    assert problems_of(settings(max_staleness=2)) == []
    (problem,) = problems_of(settings(top_p=0.5))
    assert problem == "rollout.top_p needs rollout.engine: sglang, not parrot"
    assert settings().rollout.shares_gpus
    assert not settings().is_served


def test_the_memory_of_every_engine_is_asked_for_by_its_traits():
    rollout = c.RolloutConfig()
    assert {name: replace(rollout, engine=name).shares_gpus for name in BUILDERS} == {"local": False, "sglang": False}
    beside = replace(rollout, servers=c.ServersConfig(colocated=True))
    assert {name: replace(beside, engine=name).shares_gpus for name in BUILDERS} == {"local": False, "sglang": True}
    assert BUILDERS.keys() == ENGINES.keys()
