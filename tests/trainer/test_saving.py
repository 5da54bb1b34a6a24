"""What a run takes from its checkpoint, and what a checkpoint says."""

from types import SimpleNamespace

import pytest

from megatron_opd.config import RunConfig, SourceConfig, TrainConfig
from megatron_opd.core.types import Prompt
from megatron_opd.prompts.fingerprint import DataRecord
from megatron_opd.prompts.mix import PromptMix
from megatron_opd.trainer.run_record import RunRecord
from megatron_opd.trainer.saving import Saving

ALONE = SimpleNamespace(share_world=lambda compute: compute())


def saving(run_dir, loop=None):
    """(of a run whose newest checkpoint has `loop`, the loops that are saved, what the logs were rewound to)."""
    rewound, saved = [], []
    tracker = SimpleNamespace(message=lambda text: None, rewind=rewound.append)
    record = RunRecord(DataRecord(train=[], eval=[]), None, "error")
    run, student = RunConfig(dir=str(run_dir)), SimpleNamespace(skips=0)
    made = Saving(run, ALONE, student, tracker, record=record, train=TrainConfig(steps=9))
    made.checkpoints = SimpleNamespace(
        restore=lambda student, look: loop, save=lambda student, loop: saved.append(loop)
    )
    return made, saved, rewound


def mix():
    prompts = [Prompt(source="a", index=i, text="", token_ids=(i,)) for i in range(5)]
    return PromptMix([(SourceConfig(name="a", path=""), prompts)], seed=1)


@pytest.mark.parametrize("skips", [0, 2])
def test_a_run_goes_on_behind_its_last_prompt_with_what_it_had_counted(tmp_path, skips):
    whole = mix().next(12)
    ours, _, rewound = saving(tmp_path, {"step": 7, "version": 7, "prompts": {"a": 8}, "skips": skips})
    prompts = mix()
    assert ours.restore(prompts, SimpleNamespace(rewind=rewound.append), {}) == 7
    assert [p.index for p in prompts.next(4)] == [p.index for p in whole[8:]]
    assert ours.student.skips == skips
    assert rewound == [7, 7]


def test_a_run_without_a_checkpoint_begins(tmp_path):
    ours, _, rewound = saving(tmp_path)
    prompts = mix()
    assert ours.restore(prompts, SimpleNamespace(rewind=rewound.append), {}) == 0
    assert prompts.state() == {"a": 0}
    assert rewound == [-1, -1]


def test_a_step_is_saved_once_with_its_place_in_the_prompts(tmp_path):
    ours, saved, _ = saving(tmp_path)
    ours.student.skips = 3
    for step in (2, 2, 1, 4):
        ours.save(step, {"a": step})
    assert [(loop["step"], loop["prompts"], loop["skips"]) for loop in saved] == [(2, {"a": 2}, 3), (4, {"a": 4}, 3)]
