"""A row that a step draws twice: two prompts, whose answers are not compared with each other.

Otherwise it would matter to rewards on which replica the second draw is.
"""

import pytest

from megatron_opd import config as c
from megatron_opd.core.types import Prompt, Rollout
from megatron_opd.trainer.shaping import Shaping
from megatron_opd.trainer.shaping_metrics import Totals, count_rewards

CONFIG = c.Config(
    run=c.RunConfig(dir="unused"),
    student=c.StudentConfig(model="unused"),
    teachers=[],
    data=c.DataConfig(train=[c.SourceConfig(name="sums", path="unused")]),
    train=c.TrainConfig(steps=1),
    rl=c.RLConfig(weight=1.0, normalise=False),
)


def answered(repeat, *rewards):
    prompt = Prompt(source="sums", index=7, text="", token_ids=(1,), repeat=repeat)
    said = {"token_ids": (2,), "learnt": (True,), "logps": (-1.0,), "finish": "stop", "versions": (0,)}
    return [Rollout(prompt=prompt, sample=i, reward=reward, **said) for i, reward in enumerate(rewards)]


@pytest.mark.parametrize("second", [[1.0, 1.0], [1.0, 0.0]], ids=["solved", "mixed"])
def test_each_draw_has_its_own_mean(second):
    rollouts = [*answered(0, 0.0, 0.0), *answered(1, *second)]
    shaped = Shaping(CONFIG, None, None)._of_rollouts(rollouts, step=0)
    mean = sum(second) / 2
    assert shaped.rewarded_R == [0.0, 0.0, second[0] - mean, second[1] - mean]
    totals = Totals(CONFIG.policy, CONFIG.rl, CONFIG.data.train)
    count_rewards(totals, rollouts)
    assert totals._sums["reward/mixed_groups"] == [float(len(set(second)) > 1), 2]
